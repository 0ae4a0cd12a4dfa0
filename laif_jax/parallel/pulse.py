"""The pulse of a run of several processes: a lost one ends the others with its name, a notice to stop reaches all.

Every process tells JAX's coordination service every `EVERY` seconds that it lives. Process 0 looks at all of them, the
others at process 0. One that is silent for longer than it may ends all others with exit code 75: started again, the
run resumes from its last checkpoint. (JAX itself would end them too, by abort, and without saying who was lost.)
"""

import atexit
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from laif_jax.parallel import preemption
from laif_jax.parallel.preemption import EXIT_CODE

log = logging.getLogger(__name__)

EVERY = 1.0  # seconds
CONTROL, BEATS, PLACES = "laif/control/", "laif/beats/", "laif/places/"
ANSWER = 30_000  # milliseconds that a process has to say where it is, once asked


class Pulse:
    """The thread of one process.

    Args:
      client: of JAX's coordination service. index, count: of processes. silence: seconds. address: of process 0.
    """

    def __init__(self, client: Any, index: int, count: int, silence: float, address: str):
        self.client, self.index, self.count, self.silence = client, index, count, silence
        self.address = address
        self.me = f"process {index} on {socket.gethostname()} (pid {os.getpid()})"
        self.number = 0
        now = time.monotonic()
        # Of each process watched: what it said last, and when that was new.
        watched = range(1, count) if index == 0 else (0,)
        self.said: dict[int, tuple[str, float]] = dict.fromkeys(watched, ("", now))
        self.all_well = now
        self.decided = False
        self.leaving = threading.Event()
        self.thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        preemption.state.several = True
        self.thread.start()
        self._name_the_lost_when_jax_aborts()
        # A thread that is in C++ when Python ends would take the process down. JAX's own end, which waits for the other
        # processes, comes after this.
        atexit.register(self.stop)

    def stop(self) -> None:
        """At the end of the process: nobody need miss it."""
        self._libc.signal(int(signal.SIGABRT), None)
        self.leaving.set()
        self.thread.join(timeout=10 * EVERY)

    # ---- the thread ----

    def _run(self) -> None:
        while not self.leaving.is_set():
            try:
                self._beat()
            except Exception as error:  # noqa: BLE001 (the service is gone, or the run is over: see below)
                log.debug("pulse: %s", error)
            self._look()
            self.leaving.wait(EVERY)
        try:
            self._say(self._beats() | {"left": True})
        except Exception as error:  # noqa: BLE001 (the others have left already)
            log.debug("pulse: %s", error)

    def _beats(self) -> dict[str, Any]:
        self.number += 1
        ages = [time.monotonic() - when for _, when in self.said.values()]
        return {"n": self.number, "who": self.me, "well": all(age < 4 * EVERY for age in ages)}

    def _say(self, beat: dict[str, Any]) -> None:
        self.client.key_value_set(f"{BEATS}{self.index}", json.dumps(beat), allow_overwrite=True)
        if self.index == 0:
            self.client.key_value_set(f"{CONTROL}beat", json.dumps(beat), allow_overwrite=True)

    def _beat(self) -> None:
        self._say(self._beats())
        if self.index == 0:
            self._hear({int(k.rsplit("/", 1)[-1]): v for k, v in self.client.key_value_dir_get(BEATS)})
        if preemption.state.why:
            self.client.key_value_set(f"{CONTROL}notice", preemption.state.why, allow_overwrite=True)
        control = {k.rsplit("/", 1)[-1]: v for k, v in self.client.key_value_dir_get(CONTROL)}
        if self.index > 0 and "beat" in control:
            self._hear({0: control["beat"]})
        if "lost" in control:
            self._end(control["lost"])
        if "notice" in control and not self.decided:
            self.decided = True
            self._agree(control["notice"])

    def _hear(self, beats: dict[int, str]) -> None:
        now = time.monotonic()
        for index, (before, _) in list(self.said.items()):
            if beats.get(index, before) != before:
                self.said[index] = (beats[index], now)
                if json.loads(beats[index]).get("left"):
                    del self.said[index]  # it has done its part; JAX waits for all at the end
        wells = [json.loads(said or "{}").get("well", False) for said, _ in self.said.values()]
        if all(now - when < 4 * EVERY for _, when in self.said.values()) and (self.index == 0 or all(wells)):
            self.all_well = now

    def _look(self) -> None:
        silent = [i for i, (_, when) in self.said.items() if time.monotonic() - when > self.silence]
        if not silent:
            return
        lost = ", ".join(self._name(i) for i in silent)
        if self.index == 0:
            try:
                self.client.key_value_set(f"{CONTROL}lost", lost, allow_overwrite=True)
            except Exception as error:  # noqa: BLE001 (the others then miss this process instead)
                log.debug("pulse: %s", error)
            time.sleep(3 * EVERY)  # the others read it before the service ends with this process
        self._end(lost)

    def _name(self, index: int) -> str:
        said, when = self.said[index]
        who = json.loads(said)["who"] if said else f"process {index}"
        return f"{who}, last heard of {time.monotonic() - when:.0f} s ago"

    def _end(self, lost: str) -> None:
        if preemption.state.why:
            text = f"laif: asked to stop ({preemption.state.why}), and the other processes have. {preemption.GO_ON}\n"
        else:
            text = (
                f"laif: another process of this run was lost: {lost}. This one ({self.me}) ends, since it cannot go on "
                "alone. Start the same command again on all hosts: it resumes from the last checkpoint\n"
            )
        sys.stderr.write(text)
        sys.stderr.flush()
        os._exit(EXIT_CODE)

    # ---- a notice to stop ----

    def _agree(self, why: str) -> None:
        """All processes say where they are, while none goes on, and draw the same conclusion."""
        state = preemption.state
        if not state.why:
            log.warning("another process was asked to stop (%s)", why)
            state.why = why
        with state.lock:
            place = json.dumps([state.calls, state.loops > 0])
            self.client.key_value_set(f"{PLACES}{self.index}", place)
            places = [
                json.loads(self.client.blocking_key_value_get(f"{PLACES}{i}", ANSWER))
                for i in range(self.count)
            ]
            preemption.decide([calls for calls, _ in places], [loop for _, loop in places])
        if state.now:
            threading.Thread(target=preemption.stop_now, name="stop", daemon=True).start()

    # ---- failures ----

    def confirm(self) -> None:
        """After an error: returns once all processes were seen alive since; if one is lost, that is the cause, and the
        thread ends this process with its name."""
        asked = time.monotonic() + 8 * EVERY  # what is heard from here on was said after the error
        while self.all_well < asked and time.monotonic() < asked + 2 * self.silence:
            time.sleep(EVERY / 4)

    def _name_the_lost_when_jax_aborts(self) -> None:
        """JAX aborts a process whose coordinator is gone, at once and from a thread of its own. It takes no callback
        (as of 0.12 it cannot convert what it would pass), so the signal of the abort is what can be caught."""
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
        self._libc = libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p

        def aborted(signum: int) -> None:
            if 0 in self.said and not _answers(self.address):
                self._end(self._name(0))
            if preemption.state.why:
                self._end("")
            # Also an accelerator's runtime aborts when another host is gone, perhaps before that was missed here.
            self.confirm()
            libc.signal(signum, None)  # nobody is lost: abort by the default action

        self._kept = kind(aborted)  # ctypes does not keep it alive
        libc.signal(int(signal.SIGABRT), self._kept)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            return True
    except OSError:
        return False
