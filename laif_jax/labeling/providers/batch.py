"""The patient path: calls are collected, sent as a batch at half the price, and answered within a day.

To the scheduler this is a provider like any other whose calls take long. Underneath:

* Calls that arrive within `LINGER` seconds go out together. A call that an earlier batch already holds, sent before a
  crash or by another worker, waits for that one instead: it is never sent twice.
* A batch is noted in the ledger before it is sent and its id after. If a crash, or a connection that broke, came in
  between, the provider's own list decides whether it has the batch, `SETTLE` seconds later at the earliest.
* Each row ends for itself: an answer; an error of its own; or nothing, because the batch expired or was cancelled, and
  then the row may be sent again.
"""

import asyncio
import contextlib
import datetime
import json
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from laif_jax.labeling.calls import Call, Endpoint
from laif_jax.labeling.errors import CallError, EndpointError, Malformed, Overloaded
from laif_jax.labeling.providers.base import Reply
from laif_jax.labeling.providers.ledger import Batch, Ledger
from laif_jax.labeling.providers.remote import Exchange, RemoteProvider

log = logging.getLogger(__name__)

LINGER = 2.0  # seconds after the last call before a batch goes out
POLL = 30.0  # seconds between two questions after a batch
SETTLE = 300.0  # seconds until a batch that was perhaps sent must be on the provider's list
WIDTH = 10_000  # calls that wait at once, and so the rows of a batch at most


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a batch stands. `state` is the provider's word. `known`: False: it has no such batch (any more)."""

    ended: bool
    state: str
    known: bool = True


class BatchTransport(Protocol):
    """A provider's batch API. All methods raise `CallError` if the provider cannot be asked.

    Attributes:
      max_rows, max_bytes: of one batch.
    """

    max_rows: int
    max_bytes: int

    def name(self, key: str) -> str:
        """What the row of a request is called: its key, or as much of it as a name may hold."""
        ...

    async def submit(self, tag: str, calls: Sequence[Call]) -> str:
        """The provider's id of a new batch, which is called `tag` where it can have a name. An error whose `billed` is
        "unknown" leaves open whether there is one."""
        ...

    async def find(self, batch: Batch, known: set[str]) -> list[str]:
        """Ids that a batch of unknown fate may have: those on the provider's list that carry its tag; or, without
        tags, that were made at its time with as many rows, and are not among the `known` ones."""
        ...

    async def poll(self, remote_id: str) -> Progress: ...

    async def fetch(self, remote_id: str) -> dict[str, Exchange | None]:
        """The rows of a batch that has ended, by name; None: it was not answered (expired, cancelled)."""
        ...

    async def cancel(self, remote_id: str) -> None: ...

    async def close(self) -> None: ...


class BatchProvider:
    """See the module's text. Needs a ledger that outlives the process."""

    free = False

    def __init__(
        self, endpoint: Endpoint, reader: RemoteProvider, transport: BatchTransport, ledger: Ledger
    ) -> None:
        self.endpoint, self.width = endpoint, WIDTH
        self._reader, self._transport, self._ledger = reader, transport, ledger
        self._new: dict[str, Call] = {}
        self._waiting: dict[str, tuple[Call, asyncio.Future[Reply]]] = {}
        self._open: dict[str, Batch] = {}
        self._arrived = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._foreign: set[str] = set()  # batches that looked like ours and are not
        self._error: EndpointError | None = None

    async def call(self, call: Call, attempt: int) -> Reply:
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._watch())]
            for task in self._tasks:
                task.add_done_callback(self._stopped)
        if self._error is not None:
            raise self._error
        if call.key not in self._waiting:
            self._waiting[call.key] = (call, asyncio.get_running_loop().create_future())
            self._new[call.key] = call
            self._arrived.set()
        return await asyncio.shield(self._waiting[call.key][1])

    async def cancel(self) -> None:
        """Cancels all open batches; rows that were answered before are still read."""
        for batch in list(self._open.values()):
            if batch.remote_id:
                await self._transport.cancel(batch.remote_id)

    async def close(self) -> None:
        """Lets go. Batches go on at the provider, and are asked after when this endpoint is used again."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for _, future in self._waiting.values():
            future.cancel()
        await self._transport.close()
        await self._reader.close()

    def _stopped(self, task: asyncio.Task[None]) -> None:
        """A task that ended by an error of ours or of the ledger: nobody must wait for it."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.error("batches of %s stopped", self.endpoint.name, exc_info=error)
        self._error = EndpointError(
            f"batches of {self.endpoint.name} stopped: {error!r}. What was sent is noted: start the service again"
        )
        for _, future in self._waiting.values():
            if not future.done():
                future.set_exception(self._error)

    # ---- sending -----------------------------------------------------------------------------------------------

    async def _send(self) -> None:
        while True:
            await self._arrived.wait()
            while True:  # until nothing more comes
                seen = len(self._new)
                await asyncio.sleep(LINGER)
                if len(self._new) == seen or len(self._new) >= WIDTH:
                    break
            self._arrived.clear()
            calls, self._new = self._new, {}
            found = await asyncio.to_thread(self._ledger.find, self.endpoint.key, list(calls))
            for batch in found.values():
                self._open.setdefault(batch.tag, batch)
            for chunk in self._chunks([call for key, call in calls.items() if key not in found]):
                await self._submit(chunk)

    def _chunks(self, calls: Sequence[Call]) -> list[list[Call]]:
        chunks: list[list[Call]] = []
        size = 0
        for call in calls:
            length = len(json.dumps(call.body())) + 300
            full = not chunks or len(chunks[-1]) >= self._transport.max_rows
            if full or size + length > self._transport.max_bytes:
                chunks.append([])
                size = 0
            chunks[-1].append(call)
            size += length
        return chunks

    async def _submit(self, calls: list[Call]) -> None:
        tag, keys = f"laif-{uuid.uuid4().hex[:24]}", [call.key for call in calls]
        batch = await asyncio.to_thread(self._ledger.begin, tag, self.endpoint.key, keys)
        try:
            remote_id = await self._transport.submit(tag, calls)
        except CallError as error:
            if error.billed == "unknown":
                log.warning(
                    "batch %s was perhaps sent (%s): the provider's list will tell", tag, error.reason
                )
                self._open[tag] = batch
                return
            await asyncio.to_thread(self._ledger.lost, tag)
            self._fail(keys, error)
            return
        await asyncio.to_thread(self._ledger.sent, tag, remote_id)
        log.info("batch %s of %d calls to %s sent as %s", tag, len(keys), self.endpoint.name, remote_id)
        self._open[tag] = Batch(tag, remote_id, len(keys), batch.created)

    # ---- asking after ------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL)
            for batch in list(self._open.values()):
                try:
                    await self._ask_after(batch)
                except CallError as error:
                    log.warning("batch %s: %s", batch.tag, error.reason)
                    if error.fatal:  # the batch stays noted: whoever asks again with a good key finds it
                        del self._open[batch.tag]
                        found = await self._rows_of(batch)
                        self._fail(found, error)

    async def _rows_of(self, batch: Batch) -> list[str]:
        """The waiting calls that a batch holds."""
        found = await asyncio.to_thread(self._ledger.find, self.endpoint.key, list(self._waiting))
        return [key for key, other in found.items() if other.tag == batch.tag]

    async def _ask_after(self, batch: Batch) -> None:
        if not batch.remote_id:
            remote_id = await self._identify(batch)
            if remote_id is None:
                return
            batch = Batch(batch.tag, remote_id, batch.rows, batch.created)
            self._open[batch.tag] = batch
        progress = await self._transport.poll(batch.remote_id)
        if not progress.known:
            await self._lose(batch, "the provider does not know it any more")
        elif progress.ended:
            log.info("batch %s (%s) ended: %s", batch.tag, batch.remote_id, progress.state)
            await self._collect(batch, progress)

    async def _identify(self, batch: Batch) -> str | None:
        """The id of a batch that was perhaps sent; None if that is still open, or it was not sent."""
        known = await asyncio.to_thread(self._ledger.known, self.endpoint.key)
        candidates = await self._transport.find(batch, known | self._foreign)
        age = (datetime.datetime.now(datetime.UTC) - batch.created).total_seconds()
        if candidates:
            await asyncio.to_thread(self._ledger.sent, batch.tag, candidates[0])
            return candidates[0]
        if age >= SETTLE:
            await self._lose(batch, "it had not been sent")
        return None

    async def _lose(self, batch: Batch, why: str) -> None:
        keys = await self._rows_of(batch)
        del self._open[batch.tag]
        await asyncio.to_thread(self._ledger.lost, batch.tag)
        self._fail(keys, Overloaded("batch_lost", f"batch {batch.remote_id or batch.tag}: {why}"))

    async def _collect(self, batch: Batch, progress: Progress) -> None:
        rows = await self._transport.fetch(batch.remote_id)
        keys = await self._rows_of(batch)
        if rows and keys and not any(self._transport.name(key) in rows for key in keys):
            log.warning("batch %s is not %s: looking for it again", batch.tag, batch.remote_id)
            self._foreign.add(batch.remote_id)
            await asyncio.to_thread(self._ledger.sent, batch.tag, "")
            self._open[batch.tag] = Batch(batch.tag, "", batch.rows, batch.created)
            return
        errors: dict[str, CallError] = {}
        for key in keys:
            call, future = self._waiting[key]
            exchange = rows.get(self._transport.name(key))
            try:
                if exchange is None:
                    raise Overloaded(
                        "batch_unanswered",
                        f"batch {batch.remote_id} ended ({progress.state}) without an answer to this call",
                    )
                reply = self._reader.read(call, exchange)
            except CallError as error:
                errors[key] = error
            except RecursionError as error:
                errors[key] = Malformed(reason=f"batch {batch.remote_id}: {error}")
            else:
                # The row stays noted: until its answer is stored, a crash must find it here and not send it again.
                del self._waiting[key]
                if not future.done():
                    future.set_result(reply)
        # First noted, then told: who tries again must not meet the same error in the same batch.
        await asyncio.to_thread(self._ledger.release, batch.tag, list(errors))
        for key, error in errors.items():
            self._fail([key], error)
        self._open.pop(batch.tag, None)

    def _fail(self, keys: Sequence[str], error: CallError) -> None:
        for key in keys:
            _, future = self._waiting.pop(key, (None, None))
            if future is not None and not future.done():
                future.set_exception(error)
                with contextlib.suppress(asyncio.CancelledError):
                    future.exception()  # seen: its caller may be gone
