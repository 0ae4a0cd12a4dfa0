"""launch/tpu_pod.sh against a Cloud TPU service in a folder, whose workers really run what they are given."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.launch.pod import Cloud, no_account, real_gcloud

POLL = ("--poll", "0.1")


@pytest.fixture
def cloud(tmp_path):
    made = Cloud(tmp_path)
    yield made
    made.end()


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def script(cloud: Cloud, text: str) -> list[str]:
    """A command that every worker has: it stands for a training that saves in a bucket ($BUCKET)."""
    path = cloud.cloud / "command.sh"
    path.write_text(f"BUCKET={cloud.cloud}/bucket\nmkdir -p $BUCKET\n{text}\n")
    return ["bash", str(path)]


# ---- create, setup, delete -------------------------------------------------------------------------------------


def flags_of_create(cloud: Cloud) -> list[str]:
    (call,) = cloud.calls_of("queued-resources", "create")
    return call[4:]


def test_create_asks_and_waits_until_the_slice_is_ready(cloud):
    err = cloud.run("create", *POLL).stderr
    assert flags_of_create(cloud) == [
        "pod",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=pod",
        "--async",
        "--quiet",
        "--project=project",
        "--zone=us-west4-a",
    ]
    assert "pod: waiting" in err
    assert cloud.state["request"] == "ACTIVE"
    assert "exists already" in cloud.run("create", *POLL).stderr
    assert cloud.state["created"] == 1


def test_create_of_several_spot_slices_with_everything_given(cloud):
    settings = {
        "SLICES": "3",
        "CAPACITY": "spot",
        "VALID_FOR": "24h",
        "SERVICE_ACCOUNT": "a@b",
        "NETWORK": "n",
    }
    settings |= {"SUBNETWORK": "s", "INTERNAL_IPS": "yes", "LABELS": "team=x", "TYPE": "v6e-32"}
    cloud.run("create", *POLL, **{f"LAIF_POD_{key}": value for key, value in settings.items()})
    assert set(flags_of_create(cloud)) >= {
        "--accelerator-type=v6e-32",
        "--runtime-version=v2-alpha-tpuv6e",
        "--node-count=3",
        "--node-prefix=pod",
        "--spot",
        "--internal-ips",
        "--valid-until-duration=24h",
        "--service-account=a@b",
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        "--network=n",
        "--subnetwork=s",
        "--labels=team=x",
    }
    assert sorted(cloud.state["nodes"]) == ["pod-0", "pod-1", "pod-2"]


def test_create_says_when_the_request_failed(cloud):
    cloud.set(request="FAILED")
    err = cloud.run("create", *POLL, code=69).stderr
    assert "another zone, type or capacity" in err


def test_flags_win_over_the_environment_and_that_over_the_file(cloud):
    (cloud.checkout / "launch" / "pod.env").write_text(
        "# mine\nZONE=from-file1-a\nTYPE=v5p-8\nRUNTIME=file\n\n"
    )
    out = cloud.run("create", "--dry-run", "--type", "v4-8", LAIF_POD_RUNTIME="environment").stdout
    assert "--accelerator-type=v4-8" in out
    assert "--runtime-version=environment" in out
    assert "--zone=us-west4-a" in out
    assert cloud.calls == []


def test_setup_brings_the_commit_and_the_secrets_to_every_worker(cloud, tmp_path):
    secrets = tmp_path / "secrets"
    secrets.write_text("# keys\nHF_TOKEN=very-secret\n")
    secrets.chmod(0o600)
    settings = {"LAIF_POD_SLICES": "2", "LAIF_POD_SECRETS": str(secrets)}
    cloud.run("create", *POLL, **settings)
    (cloud.checkout / "launch" / "tpu_worker.sh").write_text("not committed")
    said = cloud.run("setup", **settings)
    assert "not committed stay here" in said.stderr
    assert len(cloud.workers()) == 4
    pinned = re.search(r"^jax==(\S+)", (cloud.checkout / "requirements" / "py312.txt").read_text(), re.M)[1]
    for home in cloud.workers():
        assert "usage" in (home / "laif/launch/tpu_worker.sh").read_text()
        assert (home / ".laif-secrets").stat().st_mode & 0o777 == 0o600
        installs = (home / "uv.log").read_text()
        assert "-r requirements/py312.txt" in installs
        assert f"jax[tpu]=={pinned}" in installs
    before = [(home / "uv.log").read_text() for home in cloud.workers()]
    cloud.run("setup", **settings)
    assert [(home / "uv.log").read_text() for home in cloud.workers()] == before, "the same code twice"
    everything = said.stdout + said.stderr + (cloud.cloud / "calls.jsonl").read_text()
    assert "very-secret" not in everything


def test_setup_replaces_the_code_and_keeps_what_runs_wrote(cloud):
    cloud.run("create", *POLL)
    cloud.run("setup")
    home = cloud.workers()[0]
    (home / "laif" / "old_module.py").write_text("")
    (home / "laif" / "runs").mkdir()
    (home / "laif" / "runs" / "results.json").write_text("{}")
    (cloud.checkout / "new_module.py").write_text("")
    cloud.run("setup", "--worktree")
    assert not (home / "laif" / "old_module.py").exists()
    assert (home / "laif" / "new_module.py").exists()
    assert (home / "laif" / "runs" / "results.json").exists()


def test_setup_does_not_touch_the_code_of_a_running_run(cloud):
    cloud.run("create", *POLL)
    cloud.run("setup")
    cloud.run("run", "--", "sleep", "60")
    said = cloud.run("setup", code=69)
    assert "run `study` is running as process" in said.stdout + said.stderr


def test_delete_asks_first(cloud):
    cloud.run("create", *POLL)
    assert "nothing was deleted" in cloud.run("delete", code=2).stderr
    cloud.run("delete", "--yes")
    (call,) = cloud.calls_of("queued-resources", "delete")
    assert "--force" in call


# ---- run, status, logs, stop -----------------------------------------------------------------------------------


def test_the_same_command_starts_on_all_workers_and_each_knows_its_place(cloud):
    cloud.run("create", *POLL, LAIF_POD_SLICES="2")
    cloud.run("setup", LAIF_POD_SLICES="2")
    command = ["bash", "-c", 'echo "$0|$1|$JAX_COORDINATOR_ADDRESS|$JAX_NUM_PROCESSES|$JAX_PROCESS_ID"']
    cloud.run("run", "--", *command, "it's", 'a "b"  $HOME', LAIF_POD_SLICES="2")
    for index, home in enumerate(cloud.workers()):
        log = home / "laif-runs" / "study" / "log"
        wait_for(lambda path=log: "ended with exit code 0" in path.read_text())
        assert f'it\'s|a "b"  $HOME|10.0.0.0:8482|4|{index}\n' in log.read_text()
    out = cloud.run("status", LAIF_POD_SLICES="2").stdout
    assert "request pod: ACTIVE\nslice pod-0: READY\nslice pod-1: READY\n" in out
    assert len(re.findall(r"^state=finished worker=\S+ exit=0$", out, re.M)) == 4


JOIN = """
from laif_jax.parallel import distributed
assert distributed.initialize(timeout=60)
import jax
from jax.experimental import multihost_utils
total = multihost_utils.process_allgather(jax.numpy.ones(())).sum()
print("I am", jax.process_index(), "of", jax.process_count(), "and we are", int(total), flush=True)
"""


def test_processes_of_jax_that_were_started_so_find_each_other(cloud):
    cloud.set(address="127.0.0.1")
    cloud.run("create", *POLL)
    cloud.run("setup")
    own = [f"PYTHONPATH={Path(__file__).parents[2]}", "JAX_PLATFORMS=cpu", "XLA_FLAGS="]
    cloud.run("run", "--", "env", *own, sys.executable, "-c", JOIN)
    for index, home in enumerate(cloud.workers()):
        log = home / "laif-runs" / "study" / "log"
        wait_for(lambda path=log: "ended with exit code" in path.read_text(), seconds=120)
        assert f"I am {index} of 2 and we are 2\n" in log.read_text()


def test_one_worker_alone_is_told_of_no_others(tmp_path):
    cloud = Cloud(tmp_path, workers=1)
    cloud.run("create", *POLL)
    cloud.run("setup")
    cloud.run("run", "--", "bash", "-c", "echo processes=${JAX_NUM_PROCESSES:-none}")
    log = cloud.workers()[0] / "laif-runs" / "study" / "log"
    wait_for(lambda: "ended" in log.read_text())
    assert "processes=none" in log.read_text()


def test_secrets_reach_the_command_only(cloud, tmp_path):
    secrets = tmp_path / "secrets"
    secrets.write_text("KEY=very-secret\n")
    secrets.chmod(0o600)
    cloud.run("create", *POLL)
    cloud.run("setup", "--secrets", str(secrets))
    cloud.run("run", "--", "bash", "-c", 'echo "length ${#KEY}"')
    log = cloud.workers()[0] / "laif-runs" / "study" / "log"
    wait_for(lambda: "ended" in log.read_text())
    assert "length 11" in log.read_text()


@pytest.mark.parametrize("state", ["PREEMPTED", "STOPPED", "REPAIRING"])
def test_status_shows_a_slice_that_is_lost_and_does_not_wait_for_its_workers(cloud, state):
    cloud.run("create", *POLL)
    cloud.preempt(state, "ACTIVE")
    assert cloud.run("status").stdout == f"request pod: ACTIVE\nslice pod: {state}\n"
    assert not cloud.calls_of("tpu-vm", "ssh")


def test_status_of_nothing_says_so(cloud):
    assert cloud.run("status").stdout == "request pod: absent\n"


def test_a_refusal_of_google_cloud_says_what_to_look_at(cloud):
    (cloud.fakes / "gcloud").write_text("#!/bin/sh\necho 'ERROR: PERMISSION_DENIED: no' >&2\nexit 1\n")
    for verb in (["create"], ["run", "--watch", "--", "true"]):
        err = cloud.run(*verb, *([] if len(verb) > 1 else POLL), code=69).stderr
        assert "PERMISSION_DENIED: no" in err
        assert "roles/tpu.admin" in err


def test_logs_are_of_the_worker_that_was_named(cloud):
    cloud.run("create", *POLL, LAIF_POD_SLICES="2")
    cloud.run("setup", LAIF_POD_SLICES="2")
    cloud.run("run", "--", "bash", "-c", "echo I am $JAX_PROCESS_ID", LAIF_POD_SLICES="2")
    wait_for(lambda: all("ended" in (home / "laif-runs/study/log").read_text() for home in cloud.workers()))
    out = cloud.run("logs", "--slice", "1", "--worker", "1", "--lines", "2", LAIF_POD_SLICES="2").stdout
    assert out.startswith("I am 3\n---- ")
    assert "there are 2, from 0" in cloud.run("logs", "--slice", "2", code=2, LAIF_POD_SLICES="2").stderr


def test_stop_ends_the_recorded_process_and_no_other(cloud):
    cloud.run("create", *POLL)
    cloud.run("setup")
    command = script(
        cloud, 'trap "touch $BUCKET/saved.$JAX_PROCESS_ID; exit 75" TERM; while :; do sleep 0.05; done'
    )
    neighbour = subprocess.Popen(command, env={**os.environ, "JAX_PROCESS_ID": "neighbour"})
    try:
        cloud.run("run", "--", *command)
        again = cloud.run("run", "--", *command, code=69)
        assert "is running already" in again.stdout + again.stderr
        out = cloud.run("stop").stdout
        assert out.count("exit code 75") == 2
        assert sorted(path.name for path in (cloud.cloud / "bucket").iterdir()) == ["saved.0", "saved.1"]
        assert neighbour.poll() is None, "a process of the same name and command"
        assert cloud.run("stop").stdout.count("is not running") == 2
    finally:
        neighbour.kill()
        neighbour.wait()


def test_stop_kills_what_does_not_listen_with_its_children(cloud):
    cloud.run("create", *POLL)
    cloud.run("setup")
    cloud.run(
        "run", "--", *script(cloud, 'trap "" TERM; sleep 100 & echo $! >> $BUCKET/children; wait; sleep 100')
    )
    children = cloud.cloud / "bucket" / "children"
    wait_for(lambda: children.exists() and len(children.read_text().split()) == 2)
    assert cloud.run("stop", "--grace", "1").stdout.count("exit code 137") == 2
    wait_for(lambda: not any(Path(f"/proc/{pid}/cwd").exists() for pid in children.read_text().split()))


def test_a_process_number_that_was_given_away_is_not_taken_for_the_run(cloud):
    cloud.run("create", *POLL)
    cloud.run("setup")
    cloud.run("run", "--", "true")
    other = subprocess.Popen(["sleep", "60"])
    try:
        for home in cloud.workers():
            wait_for(lambda path=home / "laif-runs/study/exit": path.exists())
            record = home / "laif-runs/study/pid"
            supervisor = (home / "laif-runs/study/supervisor").read_text()
            _, start, boot = (record.read_text() if record.exists() else supervisor).split()
            record.write_text(f"{other.pid} {start} {boot}\n")
        assert cloud.run("stop").stdout.count("is not running") == 2
        assert other.poll() is None
        assert cloud.run("status").stdout.count("state=finished") == 2
    finally:
        other.kill()
        other.wait()


# ---- run --watch -----------------------------------------------------------------------------------------------

# Counts to 20 in a bucket, a step at a time: it goes on where the bucket says, wherever it is started.
COUNT = """
file=$BUCKET/step.$JAX_PROCESS_ID
step=$(cat $file 2>/dev/null || echo 0)
echo "from $step" >> $BUCKET/starts
while [ $step -lt ${STEPS:-20} ]; do step=$((step + 1)); echo $step > $file.part; mv $file.part $file; sleep 0.05; done
"""


def test_watch_does_everything_from_nothing_to_the_end(cloud):
    err = cloud.run("run", "--watch", *POLL, "--", *script(cloud, COUNT)).stderr
    assert "`study` is done" in err
    assert (cloud.cloud / "bucket" / "step.1").read_text() == "20\n"
    assert cloud.state["created"] == 1
    assert (cloud.cloud / "bucket" / "starts").read_text() == "from 0\nfrom 0\n"


@pytest.mark.parametrize(("node", "request_state"), [("PREEMPTED", "SUSPENDED"), ("STOPPED", "ACTIVE")])
def test_watch_asks_again_after_a_preemption_and_the_command_goes_on(cloud, node, request_state):
    watch = cloud.start(
        "run", "--watch", *POLL, "--capacity", "spot", "--", *script(cloud, "STEPS=40" + COUNT)
    )
    steps = [cloud.cloud / "bucket" / f"step.{i}" for i in range(2)]
    wait_for(lambda: all(path.exists() and int(path.read_text() or 0) > 3 for path in steps))
    cloud.preempt(node, request_state)
    out, err = watch.communicate(timeout=60)
    assert watch.returncode == 0, out + err
    assert cloud.state["created"] == 2
    assert [path.read_text() for path in steps] == ["40\n", "40\n"]
    starts = (cloud.cloud / "bucket" / "starts").read_text().splitlines()
    assert len(starts) == 4
    assert "from 0" not in starts[2:], "it did not go on"
    assert "giving the lost request pod back" in err
    first, second = cloud.calls_of("queued-resources", "create")
    assert first == second
    assert "--spot" in first


def test_watch_starts_again_what_saved_and_ended_with_75(cloud):
    text = "n=$(ls $BUCKET | wc -l); touch $BUCKET/$JAX_PROCESS_ID.$$; [ $n -ge 4 ] || exit 75"
    err = cloud.run("run", "--watch", *POLL, "--", *script(cloud, text)).stderr
    assert "starting `study` again; it goes on from its last checkpoint" in err
    assert cloud.state["created"] == 1


def test_watch_ends_with_the_code_of_a_command_that_failed(cloud):
    said = cloud.run("run", "--watch", *POLL, "--", *script(cloud, "echo no such key; exit 2"), code=2)
    assert "ended with exit code 2" in said.stderr
    assert "no such key" in said.stdout


def test_watch_tries_a_failure_again_as_often_as_allowed(cloud):
    text = "echo x >> $BUCKET/tries.$JAX_PROCESS_ID; [ $(wc -l < $BUCKET/tries.$JAX_PROCESS_ID) -ge 3 ] || exit 1"
    cloud.run("run", "--watch", *POLL, "--retries", "2", "--", *script(cloud, text))
    assert (cloud.cloud / "bucket" / "tries.0").read_text() == "x\nx\nx\n"


def test_watch_starts_again_after_a_worker_was_killed(cloud):
    text = """
    if [ -f $BUCKET/again.$JAX_PROCESS_ID ]; then exit 0; fi
    touch $BUCKET/again.$JAX_PROCESS_ID
    if [ $JAX_PROCESS_ID = 0 ]; then kill -KILL $$; fi
    exit 75  # the others have lost it
    """
    err = cloud.run("run", "--watch", *POLL, "--", *script(cloud, text)).stderr
    assert "a worker was killed (exit code 137)" in err


def test_watch_takes_the_error_of_one_worker_for_the_runs(cloud):
    text = "if [ $JAX_PROCESS_ID = 1 ]; then exit 2; fi; exit 75"
    cloud.run("run", "--watch", *POLL, "--", *script(cloud, text), code=2)


def test_watch_stops_the_rest_when_one_worker_has_ended(cloud):
    text = 'if [ $JAX_PROCESS_ID = 0 ]; then exit 5; fi; trap "exit 75" TERM; while :; do sleep 0.05; done'
    said = cloud.run("run", "--watch", *POLL, "--", *script(cloud, text), code=5)
    assert "part of the workers ended and the rest did not" in said.stderr


def test_watch_bears_a_service_that_is_slow_and_fails_now_and_then(cloud):
    cloud.set(
        slow=0.1,
        fail={"queued-resources describe": 2, "tpu-vm scp": 1, "tpu-vm ssh": 2, "tpu-vm describe": 1},
    )
    cloud.run("run", "--watch", *POLL, "--", *script(cloud, COUNT))


def test_watch_ends_when_the_run_is_stopped_by_hand(cloud):
    text = 'trap "exit 75" TERM; touch $BUCKET/up.$JAX_PROCESS_ID; while :; do sleep 0.05; done'
    watch = cloud.start("run", "--watch", *POLL, "--", *script(cloud, text))
    wait_for(lambda: all((cloud.cloud / "bucket" / f"up.{i}").exists() for i in range(2)))
    cloud.run("stop")
    _, err = watch.communicate(timeout=60)
    assert watch.returncode == 75
    assert "was stopped; the same command goes on with it" in err
    assert cloud.run("status").stdout.count("state=stopped") == 2


def test_watch_gives_up_after_the_recreations_that_were_allowed(cloud):
    watch = cloud.start("run", "--watch", *POLL, "--recreations", "0", "--", "sleep", "100")
    wait_for(
        lambda: cloud.state["nodes"] and all((h / "laif-runs/study/pid").exists() for h in cloud.workers())
    )
    cloud.preempt()
    _, err = watch.communicate(timeout=60)
    assert watch.returncode == 69
    assert "--recreations 0 allows no more" in err


def test_a_second_watcher_is_refused_and_one_that_died_is_taken_over_from(cloud):
    command = script(cloud, "STEPS=60" + COUNT)
    watch = cloud.start("run", "--watch", *POLL, "--", *command)
    wait_for(lambda: (cloud.cloud / "bucket" / "step.1").exists())
    assert (
        f"process {watch.pid} watches pod already"
        in cloud.run("run", "--watch", "--", *command, code=2).stderr
    )
    watch.kill()
    watch.communicate()
    assert "is running another command" in cloud.run("run", "--watch", "--", "sleep", "1", code=2).stderr
    err = cloud.run("run", "--watch", *POLL, "--", *command).stderr
    assert "is running already; watching it" in err
    assert (cloud.cloud / "bucket" / "starts").read_text() == "from 0\nfrom 0\n"


# ---- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["status"], {"LAIF_POD_PROJECT": ""}, "no project: give --project"),
        (["status"], {"LAIF_POD_ZONE": ""}, "no zone: give --zone"),
        (["status"], {"LAIF_POD_NAME": ""}, "no name: give --name"),
        (["create"], {"LAIF_POD_TYPE": ""}, "no type: give --type"),
        (["status"], {"LAIF_POD_ZONE": "us-west4"}, "a region is not enough"),
        (["status"], {"LAIF_POD_NAME": "My Pod"}, "lower-case letters"),
        (["status"], {"LAIF_POD_SLICES": "two"}, "a number from 1"),
        (["create"], {"LAIF_POD_CAPACITY": "cheap"}, "one of on-demand, reserved, spot"),
        (["create"], {"LAIF_POD_TYPE": "h100"}, "it looks like v5litepod-16"),
        (["create"], {"LAIF_POD_TYPE": "v9-16"}, "else give --runtime"),
        (["run"], {}, "no command"),
        (["run", "laif"], {}, "behind a lone --"),
        (["status", "--", "ls"], {}, "status takes no command"),
        (["status", "--colour", "red"], {}, "unknown option --colour"),
        (["status", "--zone"], {}, "--zone needs a value"),
        (["fly"], {}, "the verbs are"),
        (["stop", "--grace", "soon"], {}, "a number"),
        (["status", "--run", "a/b"], {}, "letters, digits"),
        (["status", "--settings", "missing.env"], {}, "no settings file missing.env"),
        (["setup", "--secrets", "missing"], {}, "no secrets file missing"),
    ],
)
def test_a_mistake_is_told_before_anything_is_asked(cloud, arguments, environment, message):
    assert message in cloud.run(*arguments, code=2, **environment).stderr
    assert cloud.calls == []


def test_secrets_that_others_can_read_are_refused(cloud, tmp_path):
    secrets = tmp_path / "secrets"
    secrets.write_text("HF_TOKEN=x\n")
    secrets.chmod(0o644)
    assert "chmod 600" in cloud.run("setup", "--secrets", str(secrets), code=2).stderr
    secrets.write_text("HF_TOKEN=x\nrm -rf /\n")
    secrets.chmod(0o600)
    assert "only lines of KEY=VALUE" in cloud.run("setup", "--secrets", str(secrets), code=2).stderr


def test_an_unknown_key_of_the_settings_is_named(cloud):
    (cloud.checkout / "launch" / "pod.env").write_text("REGION=us\n")
    assert (
        "`REGION=us`: lines are KEY=VALUE, with a KEY of: PROJECT ZONE" in cloud.run("status", code=2).stderr
    )


def test_the_shipped_example_of_settings_is_read(cloud):
    shutil.copy(cloud.checkout / "launch" / "pod.env.example", cloud.checkout / "launch" / "pod.env")
    names = ("PROJECT", "ZONE", "NAME", "TYPE")
    out = cloud.run("create", "--dry-run", **dict.fromkeys((f"LAIF_POD_{name}" for name in names), "")).stdout
    assert "--project=my-project" in out
    assert "--spot" in out


def test_help_lists_the_verbs(cloud):
    out = cloud.run("--help").stdout
    for verb in ("create", "setup", "run --watch", "logs", "status", "stop", "delete", "--dry-run"):
        assert verb in out


# ---- dry run ---------------------------------------------------------------------------------------------------


def dry(cloud: Cloud, *arguments: str, **environment: str) -> list[list[str]]:
    out = cloud.run(*arguments[:1], "--dry-run", *arguments[1:], **environment).stdout
    return [shlex.split(line) for line in out.splitlines()]


ALL = {
    "LAIF_POD_SLICES": "2",
    "LAIF_POD_CAPACITY": "spot",
    "LAIF_POD_SERVICE_ACCOUNT": "a@b.iam.gserviceaccount.com",
}
ALL |= {
    "LAIF_POD_NETWORK": "n",
    "LAIF_POD_SUBNETWORK": "s",
    "LAIF_POD_LABELS": "a=b",
    "LAIF_POD_INTERNAL_IPS": "yes",
}
ALL |= {"LAIF_POD_VALID_FOR": "24h"}
VERBS = [
    ("create",),
    ("setup",),
    ("run", "--", "laif", "run", "configs/quickstart.yaml", "out=gs://bucket/runs"),
    ("run", "--watch", "--", "laif", "run", "configs/quickstart.yaml"),
    ("logs", "--follow"),
    ("status",),
    ("stop",),
    ("delete",),
]


@pytest.mark.parametrize("arguments", VERBS, ids=lambda arguments: " ".join(arguments[:2]))
def test_a_dry_run_prints_what_would_be_run_and_runs_nothing(cloud, arguments):
    commands = dry(cloud, *arguments, **ALL)
    assert cloud.calls == []
    assert commands
    assert all(command[:3] == ["gcloud", "compute", "tpus"] for command in commands)
    assert not (cloud.home / ".local").exists(), "it left something behind"


def test_a_dry_run_shows_a_command_as_it_reaches_the_worker(cloud):
    command = ["laif", "run", "it's.yaml", "name=a b"]
    (shown,) = dry(cloud, "run", "--", *command)
    remote = next(word for word in shown if word.startswith("--command=")).partition("=")[2]
    assert shlex.split(remote) == ["bash", "laif/launch/tpu_worker.sh", "start", "study", "--", *command]


@pytest.mark.skipif(real_gcloud() is None, reason="no Google Cloud SDK here")
def test_the_real_gcloud_knows_every_flag(cloud, tmp_path):
    commands = {
        tuple(command[1:])
        for settings in ({}, ALL)
        for verb in VERBS
        for command in dry(cloud, *verb, **settings)
    }
    commands |= {tuple(command[1:]) for command in dry(cloud, "create", LAIF_POD_CAPACITY="reserved")}
    # One of each kind: the same verb with the same flags.
    kinds = {
        (c[2], c[3], *(word.partition("=")[0] for word in c if word.startswith("--"))): c for c in commands
    }
    assert no_account(("compute", "tpus", "tpu-vm", "ssh", "a", "--wroker=all"), tmp_path)[0] == 2
    with ThreadPoolExecutor(2) as pool:
        told = pool.map(lambda command: no_account(command, tmp_path), kinds.values())
        for command, (code, err) in zip(kinds.values(), told):
            assert code == 1, (command, err)
            assert "active account" in err, (command, err)
