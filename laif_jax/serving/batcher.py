"""Concurrent requests, decoded together: one worker thread in front of the engine.

The worker takes the oldest waiting row, waits a short window for others, and decodes those of the same group (output
capacity, log-probs wanted or not) as one batch. Groups keep a one-token verdict from waiting inside a batch of long
answers. The queue is bounded; a full one is an error at once, so that a client can slow down.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from laif_jax.rollout.buckets import batch_bucket
from laif_jax.rollout.engine import Engine, Row, RowOutput

log = logging.getLogger(__name__)

CHUNK = 16  # decode steps between two looks at the stop strings


class QueueFullError(Exception):
    """No room for the request's rows."""


class ClosedError(Exception):
    """The worker is shutting down."""


class DecodingError(Exception):
    """A batch failed; the message has the cause."""


@dataclass(frozen=True)
class Ticket:
    """A row that waits. `halt` looks at what was drawn so far and says whether to stop (for stop strings)."""

    row: Row
    top: int | None = None
    halt: Callable[[RowOutput], bool] | None = None
    future: "Future[RowOutput]" = field(default_factory=Future)

    @property
    def capacity(self) -> int:
        """The limit, rounded up so that few capacities are compiled."""
        return 1 if self.row.limit == 1 else max(16, 1 << (self.row.limit - 1).bit_length())

    @property
    def group(self) -> tuple[int, int | None]:
        """Rows with the same group may share a batch."""
        return self.capacity, self.top


class Batcher:
    """A bounded queue of rows and the thread that decodes them."""

    def __init__(
        self, engine: Engine, *, max_batch: int = 16, max_queue: int = 512, window: float = 0.01
    ) -> None:
        """`window`: seconds that the first row of a batch waits for company."""
        self.engine = engine
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.window = window
        self.batches = 0  # decoded so far
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="laif-batcher", daemon=True)

    def start(self) -> None:
        """Starts the worker."""
        self._thread.start()

    @property
    def queued(self) -> int:
        """Rows that wait."""
        return len(self._waiting)

    def submit(self, tickets: Sequence[Ticket]) -> "list[Future[RowOutput]]":
        """Queues all rows of a request, or none of them.

        Raises:
          QueueFullError: there is no room. ClosedError: the worker is shutting down.
        """
        with self._changed:
            if self._closed:
                raise ClosedError("the server is shutting down; ask again when it is back")
            if len(self._waiting) + len(tickets) > self.max_queue:
                raise QueueFullError(
                    f"{len(self._waiting)} completions wait already and {len(tickets)} more would pass the limit of "
                    f"{self.max_queue}; ask again later, or ask less at once"
                )
            self._waiting.extend(tickets)
            self._changed.notify_all()
        return [ticket.future for ticket in tickets]

    def close(self, timeout: float = 60.0) -> None:
        """Takes nothing more, finishes what waits, and stops the worker."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout)
        with self._changed:
            left = list(self._waiting)
            self._waiting.clear()
        for ticket in left:
            ticket.future.set_exception(ClosedError("the server shut down before it got to this request"))

    def _work(self) -> None:
        while True:
            tickets = self._next_batch()
            if tickets is None:
                return
            tickets = [ticket for ticket in tickets if ticket.future.set_running_or_notify_cancel()]
            if tickets:
                self._decode(tickets)

    def _next_batch(self) -> list[Ticket] | None:
        """Up to `max_batch` rows of the oldest row's group; None: closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            group = self._waiting[0].group
            deadline = time.monotonic() + self.window
            while not self._closed and self._count(group) < self.max_batch:
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            mine = [ticket for ticket in self._waiting if ticket.group == group][: self.max_batch]
            chosen = {id(ticket) for ticket in mine}
            self._waiting = deque(ticket for ticket in self._waiting if id(ticket) not in chosen)
            return mine

    def _count(self, group: tuple[int, int | None]) -> int:
        return sum(ticket.group == group for ticket in self._waiting)

    def _decode(self, tickets: list[Ticket]) -> None:
        """Decodes a batch; an error reaches every request in it and the worker lives on."""

        def halt(outputs: list[RowOutput]) -> list[bool]:
            return [
                ticket.halt is not None and ticket.halt(output)
                for ticket, output in zip(tickets, outputs, strict=True)
            ]

        stoppable = any(ticket.halt for ticket in tickets)
        capacity, top = tickets[0].group
        try:
            outputs = self.engine.run(
                [ticket.row for ticket in tickets],
                capacity=capacity,
                batch_size=batch_bucket(len(tickets), self.max_batch),
                top=top,
                chunk=CHUNK if stoppable else None,
                halt=halt if stoppable else None,
            )
        except Exception as error:
            log.exception("a batch of %d rows failed", len(tickets))
            for ticket in tickets:
                failure = DecodingError(f"decoding failed: {type(error).__name__}: {error}")
                failure.__cause__ = error
                ticket.future.set_exception(failure)
            return
        self.batches += 1
        for ticket, output in zip(tickets, outputs, strict=True):
            ticket.future.set_result(output)
