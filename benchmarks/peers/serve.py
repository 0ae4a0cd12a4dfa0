"""What every contender of a side-by-side run speaks: it builds, runs one step, and then blocks when told to.

Standard library only: it is imported in each contender's own environment. The harness starts `python CONTENDER
JOB.json` and reads JSON lines; it writes how many passes over the work the next block has, -1 for one step,
or 0 for the end.
"""

import contextlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

# So many passes over the work (0: one step), all done when it returns; it may tell the seconds of its parts.
Block = Callable[[int], dict[str, float] | None]


def serve(build: Callable[[dict[str, Any]], Block], peak_bytes: Callable[[], int] | None = None) -> None:
    """Runs the protocol. `build` makes a contender of a job; `peak_bytes` tells an accelerator's peak memory."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error

    def say(**line: Any) -> None:
        print(json.dumps(line), file=answers, flush=True)

    with open(sys.argv[1]) as file:
        job = json.load(file)
    begin = time.perf_counter()
    block = build(job)
    built, cpu = time.perf_counter(), time.process_time()
    block(0)
    first, cpu = time.perf_counter(), time.process_time() - cpu
    say(setup_seconds=built - begin, first_step_seconds=first - built, first_step_cpu_seconds=cpu)
    for line in sys.stdin:
        passes = int(line)
        if passes == 0:
            break
        start, cpu = time.perf_counter(), time.process_time()
        parts = block(max(0, passes)) or {}
        say(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu, **parts)
    say(peak_bytes=peak_bytes() if peak_bytes else _resident_peak())
    answers.flush()
    os._exit(0)  # a trainer that waits for its next block never returns


def _resident_peak() -> int:
    """The most memory that this program held, in bytes; `getrusage` would count what its parent held, too."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class Inverted:
    """Steps on demand of a trainer that wants to run the loop itself: `train` runs in a thread, and waits in `gate`.

    Args:
      train: called once, in the thread; it calls `gate` before each step, when all steps before are done.
    """

    def __init__(self, train: Callable[[Callable[[], None]], None]):
        self._orders: queue.Queue[int] = queue.Queue()
        self._done: queue.Queue[BaseException | None] = queue.Queue()
        self._left = 0
        self._train = train
        threading.Thread(target=self._run, daemon=True).start()
        self._wait()  # the trainer is at its first step

    def __call__(self, steps: int) -> None:
        self._orders.put(steps)
        self._wait()

    def gate(self) -> None:
        if self._left == 0:
            self._done.put(None)
            self._left = self._orders.get()
        self._left -= 1

    def _run(self) -> None:
        with contextlib.suppress(SystemExit):
            try:
                self._train(self.gate)
                self._done.put(RuntimeError("the trainer ended before the harness did: give it more steps"))
            except BaseException as error:  # noqa: BLE001 (raised in the thread that waits)
                self._done.put(error)

    def _wait(self) -> None:
        error = self._done.get()
        if error is not None:
            raise error
