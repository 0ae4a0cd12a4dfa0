"""A notice to stop: what it does in a training loop, outside of one, and where it comes from."""

import contextlib
import http.server
import json
import os
import signal
import threading
import time

import pytest

from laif_jax.parallel import preemption
from laif_jax.parallel.preemption import EXIT_CODE, Preempted, listening, loop, reached
from laif_jax.stages.artifact import run_stage
from tests.training import toys
from tests.training.test_loop import assert_bits, run, spec, without_perf


def ask() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_outside_of_a_loop_it_ends_the_run_at_once_and_the_stage_says_why(tmp_path):
    def work(folder):
        ask()
        time.sleep(60)
        return {}

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as caught, listening():
        run_stage("label", {}, {}, tmp_path, work)
    assert caught.value.code == EXIT_CODE
    assert "asked to stop (SIGTERM). What was finished is kept. Start the same command again" in str(
        caught.value
    )
    (manifest,) = tmp_path.glob("label-*/manifest.json")
    assert json.loads(manifest.read_text())["status"] == "stopped"
    assert signal.getsignal(signal.SIGTERM) is before
    assert run_stage("label", {}, {}, tmp_path, lambda folder: {}).manifest["status"] == "done"


def test_a_second_notice_does_not_disturb_the_first():
    ended = []

    def work():
        try:
            ask()
            time.sleep(60)
        finally:
            ask()
            time.sleep(0.05)
            ended.append("in order")

    with pytest.raises(Preempted), listening():
        work()
    assert ended == ["in order"]


def test_a_failure_of_what_was_told_to_end_as_well_is_no_failure_of_the_stage(tmp_path):
    """A launcher may signal a whole group: the labelling service ends, and the stage that needs it with an error."""

    def work(folder):
        with loop():
            ask()
            raise ConnectionError("the labelling service is gone")

    with (
        pytest.raises(Preempted, match="ended by ConnectionError: the labelling service is gone"),
        listening(),
    ):
        run_stage("ppo", {}, {}, tmp_path, work)
    (manifest,) = tmp_path.glob("ppo-*/manifest.json")
    assert json.loads(manifest.read_text())["status"] == "stopped"


def test_in_a_loop_it_waits_for_the_end_of_the_step():
    with listening(), contextlib.suppress(Preempted), loop():
        seen = [reached()]
        ask()
        ask()  # some launchers repeat it
        seen.append(reached())
    assert seen == [False, True]


def test_a_notice_after_the_last_step_ends_the_run_when_the_loop_does():
    with listening():
        training = loop()
        training.__enter__()
        ask()
        with pytest.raises(Preempted, match="its last step was saved"):
            training.__exit__(None, None, None)


def test_nothing_is_heard_without_listening():
    with loop():
        assert not reached()


@pytest.mark.parametrize("at", [1, 6, 11])
def test_training_that_is_asked_to_stop_ends_in_the_same_bits_when_it_is_started_again(tmp_path, at):
    """Saving is off but for the end: what is resumed from is what the notice saved."""

    class Asked(toys.Batches):
        def __next__(self):
            batch = super().__next__()
            if self.next_step == at:
                ask()
            return batch

    total = spec().steps
    with pytest.raises(Preempted, match=rf"train: step {at} was saved"), listening():
        run(tmp_path / "asked", Asked(total), save_every=0)
    again = run(tmp_path / "asked", save_every=0)
    assert again.resumed_from == at
    whole = run(tmp_path / "calm", save_every=0)
    assert_bits(again.state, whole.state)
    assert without_perf(again.history) == without_perf(whole.history)


class Metadata(http.server.BaseHTTPRequestHandler):
    """A machine's metadata server; `values` by name."""

    values: dict[str, str]

    def do_GET(self):
        assert self.headers["Metadata-Flavor"] == "Google"
        body = self.values[self.path.removeprefix("/computeMetadata/v1/instance/")].encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", "about to be maintained"),
        ("preempted", "TRUE", "about to be taken back"),
    ],
)
def test_a_maintenance_event_of_a_cloud_machine_is_a_notice(monkeypatch, name, value, why):
    monkeypatch.setattr(preemption, "POLL", 0.05)
    values = {"maintenance-event": "NONE", "preempted": "FALSE"}
    handler = type("Handler", (Metadata,), {"values": values})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_address[1]}")
        threading.Timer(0.3, values.__setitem__, (name, value)).start()
        with pytest.raises(Preempted, match=why), listening():
            time.sleep(60)
        server.shutdown()


@pytest.mark.parametrize(
    ("calls", "in_loop", "stop_at", "now"),
    [
        ([7, 9, 8], [True, True, True], 10, False),
        ([7, 7, 7], [True, False, True], None, True),
        ([0, 0], [False, False], None, True),
    ],
)
def test_processes_stop_at_one_place_that_none_has_passed(monkeypatch, calls, in_loop, stop_at, now):
    monkeypatch.setattr(preemption, "state", preemption.State(several=True))
    preemption.decide(calls, in_loop)
    assert (preemption.state.stop_at, preemption.state.now) == (stop_at, now)
    preemption.state.calls = min(calls)
    seen = [reached() for _ in range(4)]
    assert seen == [stop_at is not None and min(calls) + 1 + i >= stop_at for i in range(4)]
