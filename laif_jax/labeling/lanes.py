"""Lanes: what all jobs share about one endpoint. Places in it are given out fairly, job by job."""

import asyncio
import time
from collections import OrderedDict, deque
from typing import Any

from laif_jax.labeling.admission import Admission, Circuit


class Acks:
    """Counts commits in the event loop, with one wake-up for all that come before it looks."""

    def __init__(self, done: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self._done, self._count, self._woken = done, deque[int](), False

    def __call__(self, _: Any, count: int) -> None:
        """Called in the writer's thread."""
        self._count.append(count)
        if not self._woken:
            self._woken = True
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._woken = False
        count = 0
        while self._count:
            count += self._count.popleft()
        if count:
            self._done(count)


class Lane:
    """Admission to one endpoint.

    An answer that is not committed yet counts as well: at most as many of them as calls in flight are waited for, so
    that a full disk stops the calls and a kill loses little.
    """

    def __init__(self, most: int, step: int = 1) -> None:
        self.admission = Admission(most, step)
        self.circuit = Circuit(limit=max(8, 2 * most))
        self.in_flight = 0
        self.unstored = 0
        self._waiting: OrderedDict[str, deque[tuple[asyncio.Future[None], int]]] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None
        self._acks = Acks(self._stored)

    def widen(self, most: int) -> None:
        """Another job wants more calls in flight."""
        self.admission.widen(most)
        self.circuit.limit = max(self.circuit.limit, 2 * most)

    @property
    def waiting(self) -> int:
        """Calls that wait for a place."""
        return sum(len(queue) for queue in self._waiting.values())

    async def enter(self, job: str, tokens: int) -> None:
        """Waits for a place; jobs that wait get one each in turn."""
        if not self._waiting and self._free() and self.admission.delay(time.monotonic(), tokens) <= 0:
            return self._start(tokens)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(job, deque()).append((future, tokens))
        self._pump()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():  # got the place in the moment of the cancellation
                self.leave()
            raise
        return None

    def leave(self) -> None:
        """Gives the place to the next."""
        self.in_flight -= 1
        self._pump()

    def storing(self) -> Acks:
        """An answer is on its way to the store; what this returns is to be called once it is there."""
        self.unstored += 1
        return self._acks

    def _stored(self, count: int) -> None:
        self.unstored -= count
        self._pump()

    def _free(self) -> bool:
        limit = int(self.admission.limit)
        return self.in_flight < limit and self.unstored <= limit

    def _start(self, tokens: int) -> None:
        self.in_flight += 1
        self.admission.started(tokens)

    def _pump(self) -> None:
        while self._waiting and self._free():
            job, queue = next(iter(self._waiting.items()))
            future, tokens = queue[0]
            if not future.done():
                delay = self.admission.delay(time.monotonic(), tokens)
                if delay > 0:
                    return self._later(delay)
                self._start(tokens)
                future.set_result(None)
            queue.popleft()
            del self._waiting[job]
            if queue:
                self._waiting[job] = queue  # to the end of the line
        return None

    def _later(self, delay: float) -> None:
        if self._timer is None or self._timer.cancelled():
            self._timer = asyncio.get_running_loop().call_later(min(delay, 60.0), self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._pump()

    def nudge(self) -> None:
        """Lets everybody who waits look again (the service is stopping)."""
        for queue in self._waiting.values():
            for future, _ in queue:
                if not future.done():
                    self.in_flight += 1
                    future.set_result(None)
        self._waiting.clear()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
