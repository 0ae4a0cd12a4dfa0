"""launch/again.sh: what runs again, what does not, and the signal that reaches it."""

import json
import os
import signal
import subprocess
import time

from tests.launch.pod import ROOT


def start(tmp_path, text, **environment):
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / "again.sh"), "bash", "-c", text],
        env={**os.environ, "TRIES": str(tmp_path / "tries"), "LAIF_AGAIN_SECONDS": "0"} | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def run(tmp_path, text, **environment):
    """(exit code, output, how often it ran)"""
    process = start(tmp_path, "echo x >> $TRIES; " + text, **environment)
    out, _ = process.communicate(timeout=30)
    return process.returncode, out, len((tmp_path / "tries").read_text().split())


def test_what_saved_runs_again_until_it_is_done(tmp_path):
    code, out, tries = run(tmp_path, "[ $(wc -l < $TRIES) -ge 3 ] || exit 75")
    assert (code, tries) == (0, 3)
    assert out.count("saved; starting again") == 2


def test_an_error_ends_it(tmp_path):
    assert run(tmp_path, "exit 2")[::2] == (2, 1)


def test_a_signal_reaches_the_command_which_is_not_started_again(tmp_path):
    text = 'trap "echo saved; exit 75" TERM; echo x >> $TRIES; while :; do sleep 0.05; done'
    process = start(tmp_path, text)
    deadline = time.monotonic() + 20
    while not (tmp_path / "tries").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (75, "saved\n")
    assert (tmp_path / "tries").read_text() == "x\n"


PLACES = 'echo "${JAX_COORDINATOR_ADDRESS:-}|${JAX_NUM_PROCESSES:-}|${JAX_PROCESS_ID:-}"'


def test_the_nodes_of_a_job_learn_their_places(tmp_path):
    pools = {"workerpool0": ["main:2222"], "workerpool1": ["a:2222", "b:2222"]}
    found = set()
    for kind, index in (("workerpool0", 0), ("workerpool1", 0), ("workerpool1", 1)):
        spec = {"cluster": pools, "task": {"type": kind, "index": index}, "environment": "cloud"}
        found.add(run(tmp_path, PLACES, CLUSTER_SPEC=json.dumps(spec))[1])
    assert found == {"main:2222|3|0\n", "main:2222|3|1\n", "main:2222|3|2\n"}


def test_a_job_of_one_node_is_told_of_no_others(tmp_path):
    spec = {"cluster": {"workerpool0": ["main:2222"]}, "task": {"type": "workerpool0", "index": 0}}
    assert run(tmp_path, PLACES, CLUSTER_SPEC=json.dumps(spec))[1] == "||\n"
