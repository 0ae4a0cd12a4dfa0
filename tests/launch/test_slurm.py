"""launch/slurm.sbatch in a job of several processes on this machine: what is put back into the queue."""

import os
import shutil
import signal
import subprocess
import time

import pytest

from tests.launch.pod import FAKES, ROOT


class Job:
    """A job of `tasks` processes, in a checkout of its own."""

    def __init__(self, folder, tasks=3):
        self.folder, self.checkout = folder, folder / "checkout"
        (self.checkout / "launch").mkdir(parents=True)
        shutil.copy(ROOT / "launch" / "slurm.sbatch", self.checkout / "launch")
        # As slurmd does it: a copy elsewhere.
        self.script = shutil.copy(ROOT / "launch" / "slurm.sbatch", folder / "slurm_script")
        self.environment = {
            "PATH": f"{FAKES}:{os.environ['PATH']}",
            "FAKE_CLUSTER": str(folder),
            "FAKE_TASKS": str(tasks),
            "SLURM_JOB_ID": "42",
            "SLURM_SUBMIT_DIR": str(self.checkout),
            "JAX_COORDINATOR_ADDRESS": "left-over:1",
        }

    def start(self, *command, **more):
        return subprocess.Popen(
            ["bash", str(self.script), *command],
            env=self.environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, text, **more):
        """(exit code, output) of a job whose processes run `text` in a shell."""
        process = self.start("bash", "-c", text, **more)
        out, _ = process.communicate(timeout=60)
        return process.returncode, out

    @property
    def requeued(self):
        calls = (self.folder / "calls").read_text().splitlines()
        return [call for call in calls if call.startswith("scontrol")] == ["scontrol requeue 42"]


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def test_every_process_runs_the_command_and_a_finished_job_is_not_put_back(job):
    code, out = job.run('echo "I am $SLURM_PROCID of $SLURM_NTASKS, at ${JAX_COORDINATOR_ADDRESS:-nowhere}"')
    assert code == 0
    for index in range(3):
        assert f"I am {index} of 3, at nowhere\n" in out
    assert not job.requeued
    assert not list((job.checkout / "launch" / ".slurm").iterdir())


def test_a_run_that_saved_is_put_back(job):
    code, out = job.run("exit 75", SLURM_RESTART_COUNT="4")
    assert (code, job.requeued) == (0, True)
    assert "start 5" in out


def test_the_signal_before_the_time_limit_reaches_every_process(job):
    text = (
        'trap "echo saved > $FAKE_CLUSTER/$SLURM_PROCID; exit 75" TERM; echo up; while :; do sleep 0.05; done'
    )
    process = job.start("bash", "-c", text)
    deadline = time.monotonic() + 30
    up = 0
    while up < 3:
        assert time.monotonic() < deadline
        up += process.stdout.readline() == "up\n"
    os.kill(process.pid, signal.SIGTERM)  # to the batch shell alone, as --signal=B: says
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert sorted(path.name for path in job.folder.iterdir() if path.name.isdigit()) == ["0", "1", "2"]
    assert job.requeued


def test_an_error_of_one_process_ends_the_job_though_the_others_say_that_they_saved(job):
    code, _ = job.run("if [ $SLURM_PROCID = 1 ]; then exit 2; fi; exit 75")
    assert (code, job.requeued) == (2, False)


@pytest.mark.parametrize(
    "text", ["if [ $SLURM_PROCID = 1 ]; then kill -KILL $$; fi; exit 75", "kill -KILL $PPID; kill -KILL $$"]
)
def test_a_process_that_was_killed_is_no_error_of_the_run(job, text):
    code, _ = job.run(text)
    assert (code, job.requeued) == (0, True)


def test_it_is_not_put_back_for_ever(job):
    code, out = job.run("exit 75", LAIF_REQUEUES="3", SLURM_RESTART_COUNT="3")
    assert (code, job.requeued) == (75, False)
    assert "3 times (LAIF_REQUEUES)" in out


def test_a_cancelled_job_ends(job):
    code, _ = job.run("exit 75", FAKE_SCONTROL="1")
    assert code == 75


def test_mistakes_are_told(job, tmp_path):
    def told(*command, **more):
        process = job.start(*command, **more)
        out, _ = process.communicate()
        assert process.returncode == 2
        return out

    assert "usage: sbatch" in told()
    assert "submit it with sbatch" in told("true", SLURM_JOB_ID="")
    assert "is no checkout" in told("true", SLURM_SUBMIT_DIR=str(tmp_path))
    assert not (job.folder / "calls").exists()


def test_its_options_are_where_sbatch_reads_them():
    lines = (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line for line in lines if line.startswith("#SBATCH ")]
    assert all(line in lines[:first] for line in options), "sbatch stops reading at the first command"
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:TERM@120", "#SBATCH --open-mode=append"} <= set(options)
