"""One run on 8 devices, on 4, on two processes of 4, asked to stop and killed in between: as if nothing happened."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from laif_jax.parallel import preemption
from laif_jax.training.metrics import read_metrics
from tests.parallel import moving

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    """How one process ended."""

    code: int
    said: str

    @property
    def resumed(self) -> int:
        """The step that it resumed from; 0: none."""
        return int((re.findall(r"resumed from the checkpoint of step (\d+)", self.said) or [0])[-1])

    @property
    def saved(self) -> int:
        """The step that it saved when it was asked to stop."""
        (step,) = re.findall(r"step (\d+) was saved\. Start the same command again to go on", self.said)
        return int(step)


def two_processes(out: Path, mesh: str, *options: str) -> list[Ended]:
    """One life of the run in two processes of 4 devices."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    command = [sys.executable, "-m", "tests.parallel.moving", str(out), mesh, *options]
    running, ended = [], []
    try:
        for index in range(2):
            own = env | {"JAX_PROCESS_ID": str(index)}
            running.append(subprocess.Popen(command, cwd=ROOT, env=own, text=True, stderr=subprocess.PIPE))
        for process in running:
            _, said = process.communicate(timeout=300)
            ended.append(Ended(process.returncode, said))
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    return ended


def stopped(out: Path, mesh: str, step: int) -> Ended:
    """One life in this process, asked to stop after a step."""
    with pytest.raises(preemption.Preempted) as notice, preemption.listening():
        moving.run(out, mesh, stop=step)
    return Ended(notice.value.code, str(notice.value))


@contextlib.contextmanager
def quickly_compiled() -> Iterator[None]:
    """Numbers are compared to a tolerance here: the machine code need not be fast."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def losses(out: Path) -> list[float]:
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, moving.STEPS + 1))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """The losses of an undisturbed run on 8 devices, those of one that was moved, how each of its lives but the last
    ended, and the step that the last one resumed from."""
    root = tmp_path_factory.mktemp("moving")
    with quickly_compiled():
        return moved_about(root)


def moved_about(root: Path) -> tuple[list[float], list[float], list[list[Ended]], int]:
    moving.run(root / "calm", "1,8,1")
    moved = root / "moved"
    ends = [
        [stopped(moved, "2,2,2", 1)],
        [stopped(moved, "1,2,2", 3)],
        two_processes(moved, "2,2,2", "--stop", "5"),
        two_processes(moved, "2,2,2", "--die", "12", "1"),
        two_processes(moved, "2,4,1", "--die", "14", "0"),
    ]
    resumed = moving.run(moved, "1,4,2").resumed_from
    return losses(root / "calm"), losses(moved), ends, resumed


def test_the_moved_run_has_the_losses_of_the_undisturbed_one(lives):
    calm, moved, _, _ = lives
    assert moved == pytest.approx(calm, rel=2e-5)


def test_a_run_that_is_asked_to_stop_saves_the_step_it_is_in_and_says_start_me_again(lives):
    _, _, ends, _ = lives
    assert {end.code for life in ends[:3] for end in life} == {preemption.EXIT_CODE}, ends[2]
    assert ends[0][0].saved == 2
    assert ends[1][0].saved == 4
    # Two processes agree on one step, which the notice reaches a little later.
    assert ends[2][0].resumed == 4
    assert ends[2][0].saved == ends[2][1].saved > 4


@pytest.mark.parametrize("lost", [1, 0])
def test_a_process_that_is_lost_ends_the_other_with_its_name(lives, lost):
    _, _, ends, _ = lives
    gone, left = ends[3 if lost else 4][lost], ends[3 if lost else 4][1 - lost]
    assert gone.code == -9, gone.said[-3000:]
    assert left.code == preemption.EXIT_CODE, left.said[-3000:]
    assert f"another process of this run was lost: process {lost} on" in left.said
    assert "Start the same command again on all hosts: it resumes from the last checkpoint" in left.said


def test_a_run_started_again_after_a_loss_resumes_from_its_last_checkpoint(lives):
    _, _, ends, resumed = lives
    assert ends[3][0].resumed == ends[2][0].saved
    assert ends[2][0].saved <= ends[4][0].resumed <= resumed < moving.STEPS
