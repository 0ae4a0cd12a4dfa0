"""The pulse of several processes, over a store in this one: who is lost, who has left, and what an error waits for."""

import threading
import time

import pytest

from laif_jax.parallel import preemption, pulse
from laif_jax.parallel.pulse import Pulse


class Store:
    """What of JAX's coordination service the pulse uses; shared by all."""

    def __init__(self):
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            if key in self.values and not allow_overwrite:
                raise RuntimeError(f"ALREADY_EXISTS: {key}")
            self.values[key] = value
            self.changed.notify_all()

    def key_value_dir_get(self, prefix):
        with self.changed:
            return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise RuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self.values[key]


@pytest.fixture
def run(monkeypatch):
    """Makes the pulses of a run of three processes; `ended` on each: what its process would have said at its end."""
    monkeypatch.setattr(pulse, "EVERY", 0.05)
    monkeypatch.setattr(pulse.atexit, "register", lambda call: None)
    monkeypatch.setattr(Pulse, "_name_the_lost_when_jax_aborts", lambda self: None)
    monkeypatch.setattr(preemption, "state", preemption.State())
    made = []

    def end(self, lost):
        self.ended = lost
        self.leaving.set()

    monkeypatch.setattr(Pulse, "_end", end)
    store = Store()
    for index in range(3):
        one = Pulse(store, index, 3, silence=2.0, address="")
        one.ended = None
        made.append(one)
        one.start()
    yield made
    for one in made:
        one.leaving.set()
        one.thread.join()


def stop_dead(one: Pulse) -> None:
    """As SIGKILL would: no more beats, and no word of leaving."""
    one._say = lambda beat: None


def wait_for(told, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not told() and time.monotonic() < deadline:
        time.sleep(0.01)
    return told()


def test_the_others_end_with_the_name_of_the_lost_one(run):
    stop_dead(run[2])
    assert wait_for(lambda: run[0].ended is not None and run[1].ended is not None)
    assert run[0].ended.startswith("process 2 on ")
    assert run[1].ended == run[0].ended


def test_the_others_miss_process_0_themselves(run):
    stop_dead(run[0])
    assert wait_for(lambda: run[1].ended is not None and run[2].ended is not None)
    assert run[1].ended.startswith("process 0 on ")


def test_one_that_has_left_is_not_missed(run):
    run[2].leaving.set()
    run[2].thread.join()
    assert wait_for(lambda: 2 not in run[0].said)
    assert not wait_for(lambda: run[0].ended is not None, 3.0)
    run[0].leaving.set()
    assert wait_for(lambda: 0 not in run[1].said)
    assert run[1].ended is None


def test_an_error_waits_until_all_were_seen_alive(run):
    start = time.monotonic()
    run[1].confirm()
    assert run[1].all_well >= start
    assert run[1].ended is None


def test_an_error_that_a_lost_process_caused_waits_for_its_name(run):
    stop_dead(run[2])
    run[1].confirm()
    assert run[1].ended is not None
    assert run[1].ended.startswith("process 2 on ")
