"""One run of one job in one process."""

import asyncio
import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from laif_jax.labeling.ahead import Ahead
from laif_jax.labeling.calls import Call
from laif_jax.labeling.errors import LabelError
from laif_jax.labeling.jobs import JobStatus
from laif_jax.labeling.leases import Claimed, Want
from laif_jax.labeling.rows import job_row, request_row, result_rows
from laif_jax.labeling.scheduler import Outcome, Party, Scheduler, stored_outcome
from laif_jax.labeling.store import Done, Row, Store, now
from laif_jax.labeling.work import Work

log = logging.getLogger(__name__)
WINDOW = 512  # items that are looked up in the store together
TURN = 8  # items between two looks of the event loop at what else is due
STOPPED = "its client stopped the job"
ENDED = "the service ended before the job did; submit it again"
POLL = (0.01, 0.5)  # seconds between two looks at what others have in flight: first, most


@dataclass(slots=True, eq=False)
class _Item:
    position: int
    calls: list[Call]
    outcomes: list[Outcome | None]
    missing: int
    before: list[Outcome] = field(default_factory=list)  # of earlier stages
    dropped: bool = False  # looked at again later, from the store


@dataclass(slots=True, eq=False)
class _Asked:
    """A request and everything in a window that waits for its answer."""

    call: Call
    slots: list[tuple[_Item, int]] = field(default_factory=list)
    again: bool = False
    attempts: int = 0
    most: int = 0  # of its cost, in nano-dollars


class JobRun:
    """See the module's text.

    Args:
      body: the job as JSON, kept for other workers while it runs. cap: its budget, in nano-dollars.
      joined: the row of a job that another process began.
    """

    def __init__(
        self,
        work: Work,
        store: Store,
        scheduler: Scheduler,
        party: Party,
        *,
        body: bytes | None = None,
        cap: int | None = None,
        joined: Row | None = None,
    ) -> None:
        self.work, self.store, self.scheduler, self.party = work, store, scheduler, party
        self.id = work.id
        self.joined = joined is not None
        self.shared = self.joined  # other processes may have a part in it
        self.run_number = joined["run"] if joined else 0
        self._body, self._cap = body, cap
        self._created = joined["created"] if joined else now()
        self._state, self._reason, self._updated = "running", "", self._created
        self._calls = self._cached = self._asking = 0
        self._counts: Counter[str] = Counter()
        self._counted: dict[str, int] | None = None  # by the store, over all processes
        self._counted_at = 0.0
        self._ends: dict[str, Done] = {}  # what counts results, by their status
        self._failed: dict[str, Outcome] = {}  # not asked twice in one run
        self._error: BaseException | None = None
        self._stopped = self._left = False
        self._later: list[int] = []
        # Of work whose calls depend on earlier answers: items whose next stage can be asked, and what they know so far.
        self._staged = getattr(work, "stages", 1) > 1
        self._ready: list[int] = []
        self._known: dict[int, list[Outcome]] = {}
        self._queue: asyncio.Queue[_Asked | None] = asyncio.Queue()
        self._moved = asyncio.Event()  # the queue runs low, or something that is waited for is answered
        self._ahead = Ahead(party.provider.width)
        self._workers = self._ended = 0
        self._hungry = False  # waiting for answers of calls under way

    def stop(self) -> None:
        """Starts no more calls; the answers that are under way are stored."""
        self.party.breaker.stop(STOPPED)
        self._stopped = True
        self._moved.set()

    def leave(self) -> None:
        """The job ended elsewhere."""
        self._left = True
        self.party.breaker.stop("the job has ended")
        self._moved.set()

    @property
    def status(self) -> JobStatus:
        """Where the run stands."""
        counts = dict(self._counts) if self._counted is None else self._counted
        return JobStatus(
            id=self.id,
            kind=self.work.kind,
            endpoint=self.work.endpoint.name,
            critic=self.work.critic,
            state=self._state,  # ty: ignore[invalid-argument-type]
            reason=self._reason,
            total=len(self.work),
            done=sum(counts.values()),
            counts=counts,
            calls=self._calls,
            cached=self._cached,
            created=self._created,
            updated=self._updated,
        )

    async def count(self, *, fresh: bool = False) -> None:
        """Counts results over all processes, at most twice a second."""
        if self.run_number and (fresh or time.monotonic() > self._counted_at + 0.5):
            self._counted_at = time.monotonic()
            self._counted = await asyncio.to_thread(self.store.job_counts, self.id, self.run_number)

    # ---- the run -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        state, reason = "done", ""
        try:
            if not self.joined:
                await self._begin()
            await self._work_off()
            await asyncio.wrap_future(self.store.write())  # everything queued before is committed
            if self._error is not None:
                raise self._error
        except LabelError as error:
            state, reason = "failed", str(error)
        except ExceptionGroup as group:
            known = group.subgroup(LabelError)
            if known is None:
                log.exception("job %s", self.id)
            first = (known or group).exceptions[0]
            state, reason = "failed", str(first) if known else f"internal error: {first!r}"
        except asyncio.CancelledError:
            state, reason = "interrupted", ENDED
        if state == "done" and self.scheduler.closing:
            state, reason = "interrupted", ENDED
        elif state == "done" and self._stopped:
            state, reason = "interrupted", f"{STOPPED}; submit it again for the rest"
        await self._finish_run(state, reason)

    async def _begin(self) -> None:
        row = job_row(self.id, self.work, self._created)
        self.run_number = await asyncio.wrap_future(self.store.begin_job(row, self._body, self._cap))
        self._body = None

    async def _finish_run(self, state: str, reason: str) -> None:
        if self._left:
            return log.info("job %s: ended or was run again elsewhere", self.id)
        try:
            if self.shared:
                await self.count(fresh=True)
            others = self.shared and await asyncio.to_thread(self.store.others)
            if not (state == "interrupted" and others and not self._stopped):
                counts = self.status.counts
                progress = {"done": sum(counts.values()), "calls": self._calls, "cached": self._cached}
                await asyncio.wrap_future(
                    self.store.end_job(
                        self.id, self.run_number, state, reason, json.dumps({**counts, **progress})
                    )
                )
        except LabelError as error:
            state, reason = "failed", str(error)
        self._state, self._reason, self._updated = state, reason, now()
        final = self.status
        log.info(
            "job %s (%s, %s) %s%s: %d of %d items, %d calls, %d answers from the store, %s",
            *(final.id, final.kind, final.endpoint, final.state, f" ({reason})" if reason else ""),
            *(final.done, final.total, final.calls, final.cached, final.counts),
        )
        return None

    async def _work_off(self) -> None:
        width = self.party.provider.width
        async with asyncio.TaskGroup() as group:
            self._workers = min(width, max(1, getattr(self.work, "most_calls", 2) * len(self.work)))
            for _ in range(self._workers):
                group.create_task(self._worker())
            await self._all_windows()
            for _ in range(self._workers):
                self._queue.put_nowait(None)

    async def _all_windows(self) -> None:
        await self._windows(range(len(self.work)))
        delay = POLL[0]
        while not self._over:
            await self._next_stages()
            if self._later:
                later, self._later = sorted(set(self._later)), []
                await self._windows(later)
                if self._later:
                    delay = POLL[0] if len(self._later) < len(later) else min(2 * delay, POLL[1])
                    await self._wait_hungry(delay)
            elif self._asking:  # it may lead to another stage, or be put off (no room for its next attempt)
                await self._wait_hungry(1.0)
            elif not self._ready:
                return

    async def _next_stages(self) -> None:
        """Asks what follows from the answers that are here, so that no item waits for all others' first stage."""
        while self._ready and not self._over:
            ready, self._ready = sorted(set(self._ready)), []
            for start in range(0, len(ready), WINDOW):
                await self._ask(await self._look_up(ready[start : start + WINDOW]))

    async def _wait_hungry(self, seconds: float) -> None:
        self._hungry = True
        await self._wait(seconds)
        self._hungry = False

    @property
    def _over(self) -> bool:
        """Nothing more is looked at: the job ended elsewhere, failed, or the service is stopping (then what was not
        asked has no result: who takes the job up again asks it)."""
        return self._left or self._error is not None or self.scheduler.closing

    async def _wait(self, seconds: float) -> None:
        self._moved.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._moved.wait(), seconds)

    # ---- windows -----------------------------------------------------------------------------------------------

    async def _windows(self, positions: Sequence[int]) -> None:
        """Looks items up, window by window, and asks what is not answered. The next window is looked up while the calls
        of one are claimed."""
        ahead: asyncio.Task[list[_Asked]] | None = None
        try:
            for start in range(0, len(positions), WINDOW):
                left = None if ahead is None else await ahead
                ahead = asyncio.create_task(self._look_up(positions[start : start + WINDOW]))
                await self._ask(left or [])
                await self._next_stages()
                if self._over:
                    return
            if ahead is not None:
                await self._ask(await ahead)
                await self._next_stages()
        finally:
            if ahead is not None and not ahead.done():
                ahead.cancel()
                await asyncio.gather(ahead, return_exceptions=True)

    async def _look_up(self, positions: Sequence[int]) -> list[_Asked]:
        """The requests of these items that have no answer in the store; items that need none are finished."""
        if self.shared:
            span = range(positions[0], positions[-1] + 1)
            done = await asyncio.to_thread(self.store.finished, self.id, self.run_number, span)
            for position in done:
                self._known.pop(position, None)
            positions = [position for position in positions if position not in done]
        asked: dict[str, _Asked] = {}
        for number, position in enumerate(positions):
            before = self._known.get(position, [])
            calls = self._further(position, before) if before else self.work.calls(position)
            item = _Item(position, calls, [None] * len(calls), len(calls), before)
            for slot, call in enumerate(calls):
                asked.setdefault(call.key, _Asked(call)).slots.append((item, slot))
            if not calls:
                self._finish(item)
            if number % TURN == TURN - 1:
                await asyncio.sleep(0)
        answered = await asyncio.to_thread(self.store.answered, list(asked))
        left = []
        for number, entry in enumerate(asked.values()):
            row = answered.get(entry.call.key)
            outcome = stored_outcome(entry.call, row) if row is not None else self._failed.get(entry.call.key)
            if outcome is None:
                entry.again = row is not None
                left.append(entry)
            else:
                self._cached += len(entry.slots) * outcome.cached
                self._take(entry, outcome)
            if number % TURN == TURN - 1:
                await asyncio.sleep(0)
        if len(left) < len(asked):  # what is read from the store must not run ahead of what is written
            await asyncio.wrap_future(self.store.write())
        return left

    async def _ask(self, left: Sequence[_Asked]) -> None:
        start = 0
        while start < len(left) and not self._over:
            await self._runs_low()
            queued = self._queue.qsize()
            count = self._ahead.next(self._workers - (self._asking - queued), queued)
            await self._chunk(list(left[start : start + count]))
            start += count

    async def _runs_low(self) -> None:
        while self._queue.qsize() > self._ahead.low and not self._over:
            await self._wait(1.0)

    async def _chunk(self, entries: list[_Asked]) -> None:
        """Claims requests and queues those that we got; waits for money where the budget has no room."""
        while entries:
            await self._runs_low()
            if self._over:
                return
            if why := self.party.breaker.reason:
                for entry in entries:
                    self._take(
                        entry,
                        Outcome(entry.call.key, None, why, passing=self.party.breaker.passing, asked=False),
                    )
                return
            idle = self._asking == 0  # then nothing that is reserved for this job can come back
            ended = self._ended
            claimed = await self._claim(entries)
            self._ahead.ended(self._ended - ended)
            by_key = {entry.call.key: entry for entry in entries}
            for key, attempts in claimed.granted.items():
                by_key[key].attempts = attempts
                self._asking += 1
                self._queue.put_nowait(by_key[key])
            for key, reason in claimed.failed.items():  # in another process, during this run
                self._failed[key] = Outcome(key, None, reason, date=now(), passing=True)
                self._take(by_key[key], self._failed[key])
            for key in (*claimed.answered, *claimed.busy):
                self._put_off(by_key[key])
            entries = [by_key[key] for key in claimed.denied]
            if claimed.granted and self._state != "running":
                await self._change("running")
            if entries:
                await self._wait_for_money(idle and not claimed.granted)

    async def _claim(self, entries: list[_Asked]) -> Claimed:
        calls = [entry.call for entry in entries]
        self.store.write(request_texts=[{"key": call.key, "request": call.request} for call in calls])
        wants = []
        for entry in entries:
            entry.most = self.party.most(entry.call)
            wants.append(Want(entry.call.key, request_row(entry.call), entry.most, entry.again))
        return await asyncio.wrap_future(self.store.claim(self.id, wants, self._created))

    def _put_off(self, entry: _Asked) -> None:
        for item, _ in entry.slots:
            if not item.dropped:
                item.dropped = True
                self._later.append(item.position)

    async def _wait_for_money(self, idle: bool) -> None:
        """Calls under way may cost less than what is reserved for them; after them only a raise of the budget helps."""
        if idle and self._state != "out_of_budget":
            log.warning("job %s is out of budget; it goes on when the budget is raised", self.id)
            await self._change("out_of_budget")
        await self._wait_hungry(0.25)

    async def _change(self, state: str) -> None:
        await asyncio.wrap_future(self.store.set_job_state(self.id, self.run_number, state))
        self._state = state

    # ---- calls and results -------------------------------------------------------------------------------------

    async def _worker(self) -> None:
        while (entry := await self._queue.get()) is not None:
            if self._queue.qsize() <= self._ahead.low:
                self._moved.set()
            outcome = await self.scheduler.ask(self.party, entry.call, entry.attempts, entry.most)
            self._asking -= 1
            self._ended += 1
            if self._hungry:
                self._moved.set()
            if outcome.denied:
                self._put_off(entry)
                continue
            if not outcome.asked and self.scheduler.closing:
                continue
            self._calls += outcome.asked
            if outcome.answer is None:
                self._failed[entry.call.key] = outcome
            self._take(entry, outcome)

    def _take(self, entry: _Asked, outcome: Outcome) -> None:
        for item, slot in entry.slots:
            item.outcomes[slot] = outcome
            item.missing -= 1
            if item.missing == 0 and not item.dropped:
                self._finish(item)

    def _further(self, position: int, outcomes: Sequence[Outcome]) -> list[Call]:
        return self.work.further(position, outcomes) if self._staged else []  # ty: ignore[missing-attribute]

    def _finish(self, item: _Item) -> None:
        outcomes = item.before + [outcome for outcome in item.outcomes if outcome is not None]
        if self._further(item.position, outcomes):
            self._known[item.position] = outcomes
            self._ready.append(item.position)
            return
        self._known.pop(item.position, None)
        results = self.work.results(item.position, outcomes)
        self.scheduler.meters.result(self.work, item.position, results[0].record)
        status, endpoint = results[0].status, self.work.endpoint.key
        self.store.post(
            result_rows(self.id, self.run_number, item.position, endpoint, results),
            [],
            self._ends.get(status) or self._ends.setdefault(status, partial(self._committed, status)),
        )

    def _committed(self, status: str, error: LabelError | None, count: int) -> None:
        # Called by the store's one writer thread: what is counted is on disk.
        if error is not None:
            self._error = error
            return
        self._counts[status] += count
