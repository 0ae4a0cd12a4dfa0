"""A notice to stop: SIGTERM, or a maintenance event that a Google Cloud machine announces.

A run that hears of one ends with exit code 75, which says "saved; start me again": a training loop first saves at the
end of its step; anything else ends at once, since finished stages are kept and the rest is done again. Several
processes agree on the step (`pulse`), whichever of them was told.
"""

import logging
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: a failure that passes; ask again
GRACE = 10.0  # seconds until a process that is held up outside of Python is ended all the same
POLL = 5.0  # seconds between two looks at the machine's metadata
GO_ON = "Start the same command again to go on"


class Preempted(SystemExit):
    """The run was asked to stop, and stops. No Exception: what handles failures must not take it for one."""

    def __init__(self, what: str = "What was finished is kept"):
        super().__init__(EXIT_CODE)
        self.message = f"asked to stop ({state.why}). {what}. {GO_ON}"

    def __str__(self) -> str:
        return self.message


class State:
    """What this process knows. `pulse` shares it with the other processes.

    Attributes:
      why: the notice, or "". calls: of `reached`, the same in every process at the same place of the run. loops: above
        0 inside of a training loop. several: the processes decide together; then
      stop_at: the call of `reached` that stops, and now: do not wait for one. told: the notice is in the log.
      raised: the main thread is on its way out.
      lock: of `calls`, `loops` and the decision. The signal handler, which may interrupt its holder, never takes it.
    """

    def __init__(self, several: bool = False) -> None:
        self.lock = threading.Lock()
        self.why = ""
        self.calls = 0
        self.loops = 0
        self.several = several
        self.stop_at: int | None = None
        self.now = False
        self.told = False
        self.raised = False


state = State()


def reached() -> bool:
    """Whether to save and stop here. A training loop asks after every step, in every process alike."""
    with state.lock:
        state.calls += 1
        if state.several:
            return state.stop_at is not None and state.calls >= state.stop_at
        return bool(state.why)


@contextmanager
def loop() -> Generator[None, None, None]:
    """Inside, a notice waits for `reached`; one that came after the last call of it stops the run at the end."""
    with state.lock:
        state.loops += 1
    try:
        yield
    finally:
        with state.lock:
            state.loops -= 1
    if state.stop_at is not None if state.several else state.why:
        raise Preempted("Training had just ended, and its last step was saved")


def decide(calls: list[int], in_loop: list[bool]) -> None:
    """Called with what all processes said, by the holder of `state.lock`: where they stop."""
    if all(in_loop):
        state.stop_at = max(calls) + 1
    else:
        state.now = True


def stop_now() -> None:
    """Ends the main thread by `Preempted`; the whole process after `GRACE` seconds, if that is held up in a
    collective, which another process has left."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    time.sleep(GRACE)
    log.warning("asked to stop (%s); ended while it waited. %s", state.why, GO_ON)
    os._exit(EXIT_CODE)


# ---- listening ---------------------------------------------------------------------------------------------------


def _handle(signum: int, frame: Any) -> None:
    del frame
    state.why = state.why or signal.Signals(signum).name
    if not state.raised and (state.now or not (state.several or state.loops)):
        state.raised = True  # a launcher may repeat itself, and must not cut short what ends in order
        raise Preempted()


@contextmanager
def listening() -> Generator[None, None, None]:
    """Inside, SIGTERM and maintenance events are notices. For the main thread of a command."""
    global state
    state = State(state.several)
    previous = signal.signal(signal.SIGTERM, _handle)
    # The system's handler writes here even while the main thread is in a call that does not come back to Python.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_hear, args=(reader, state), name="notices", daemon=True).start()
    ended = threading.Event()
    host = _metadata_host()
    if host is not None:
        threading.Thread(target=_ask_machine, args=(host, ended), name="maintenance", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, previous if previous is not None else signal.SIG_DFL)
        os.close(writer)  # ends the thread that reads
        state = State(state.several)


def take_back_signal() -> None:
    """After `jax.distributed.initialize`, which sets a handler of its own."""
    if signal.getsignal(signal.SIGTERM) is _handle:
        signal.signal(signal.SIGTERM, _handle)


def _hear(reader: int, mine: State) -> None:
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while byte := pipe.read(1):
            if byte[0] != signal.SIGTERM:
                continue
            mine.why = mine.why or signal.Signals.SIGTERM.name
            if not mine.told:
                log.warning("asked to stop (%s)%s", mine.why, ": saving first" if mine.loops else "")
                mine.told = True
            if not mine.several and not mine.loops:
                threading.Thread(target=_end_at_last, args=(mine,), daemon=True).start()


def _end_at_last(mine: State) -> None:
    time.sleep(2 * GRACE)  # it may have services to end
    if state is mine and not mine.loops:
        log.warning("asked to stop (%s); ended while it was busy. %s", mine.why, GO_ON)
        os._exit(EXIT_CODE)


# ---- maintenance of a Google Cloud machine -------------------------------------------------------------------------

_PRODUCT = Path("/sys/class/dmi/id/product_name")
_EVENTS = {
    "maintenance-event": ("TERMINATE_ON_HOST_MAINTENANCE", "the machine is about to be maintained"),
    "preempted": ("TRUE", "the machine is about to be taken back"),
}


def _metadata_host() -> str | None:
    """Where this machine's metadata are; None elsewhere than on Google Cloud."""
    given = os.environ.get("GCE_METADATA_HOST")
    if given:
        return given
    try:
        google = _PRODUCT.read_text().startswith("Google")
    except OSError:
        google = False
    return "metadata.google.internal" if google else None


def _ask_machine(host: str, ended: threading.Event) -> None:
    """A notice of maintenance may come minutes before SIGTERM does, and where SIGTERM goes to the container alone."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        for name, (value, why) in _EVENTS.items():
            url = f"http://{host}/computeMetadata/v1/instance/{name}"
            request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
            try:
                found = opener.open(request, timeout=POLL).read().decode().strip()
            except OSError as error:
                log.debug("%s: %s", url, error)
                continue
            if found == value and not ended.is_set():
                state.why = state.why or why
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
                return
        if ended.wait(POLL):
            return
