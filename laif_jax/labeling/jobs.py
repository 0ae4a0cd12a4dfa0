"""Jobs: a list of items put to one endpoint. The runner looks answers up, asks for the rest, and stores the results."""

import asyncio
import json
import logging
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from laif_jax.labeling.calls import Call, Endpoint
from laif_jax.labeling.complete import CompleteWork
from laif_jax.labeling.critic import Critic, load_critic, shipped_critics
from laif_jax.labeling.errors import CriticError, LabelError
from laif_jax.labeling.judge import JudgeWork
from laif_jax.labeling.rate import RateWork
from laif_jax.labeling.scheduler import Breaker, Outcome, Scheduler, request_row, stored_outcome
from laif_jax.labeling.store import Row, Store, now
from laif_jax.labeling.work import Work
from laif_jax.records import Comparison, Completion, Prompt

log = logging.getLogger(__name__)
WINDOW = 512  # items that are looked up in the store together
STOPPED = "its client stopped the job"


class _JobModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CompleteJob(_JobModel):
    """Completions of prompts. `generator`: the name that the completions carry."""

    kind: Literal["complete"] = "complete"
    endpoint: Endpoint
    prompts: tuple[Prompt, ...]
    generator: str
    system: str | None = None
    temperature: float = Field(default=1.0, ge=0)
    max_tokens: int = Field(default=512, gt=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int = Field(default=1, gt=0)
    seed: int | None = None

    def work(self) -> Work:
        params: dict[str, Any] = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        if self.top_p is not None:
            params["top_p"] = self.top_p
        return CompleteWork(
            self.endpoint,
            self.prompts,
            generator=self.generator,
            system=self.system,
            params=params,
            n=self.n,
            seed=self.seed,
        )


class JudgeJob(_JobModel):
    """Judgements of comparisons. `critic`: the name of a shipped critic, or a critic in full."""

    kind: Literal["judge"] = "judge"
    endpoint: Endpoint
    critic: str | Critic
    comparisons: tuple[Comparison, ...]
    order: Literal["both", "seeded"] = "both"
    seed: int = 0

    def work(self) -> Work:
        critic = _critic(self.critic)
        critic.require("comparison")
        return JudgeWork(self.endpoint, critic, self.comparisons, self.order, self.seed)


class RateItem(_JobModel):
    """A completion and the prompt that it answers."""

    prompt: Prompt
    completion: Completion

    @model_validator(mode="after")
    def _check(self) -> "RateItem":
        if self.completion.prompt_id != self.prompt.id:
            raise ValueError(
                f"the completion answers prompt {self.completion.prompt_id}, not {self.prompt.id}"
            )
        return self


class RateJob(_JobModel):
    """Ratings of single completions. `critic`: the name of a shipped critic that rates, or one in full."""

    kind: Literal["rate"] = "rate"
    endpoint: Endpoint
    critic: str | Critic
    items: tuple[RateItem, ...]

    def work(self) -> Work:
        critic = _critic(self.critic)
        critic.require("rating")
        return RateWork(self.endpoint, critic, [(item.prompt, item.completion) for item in self.items])


def _critic(critic: str | Critic) -> Critic:
    if isinstance(critic, Critic):
        return critic
    if critic not in shipped_critics():  # a path would be one of the service's machine
        raise CriticError(
            f"critic {critic!r} is none of {', '.join(shipped_critics())}; send another one in full"
        )
    return load_critic(critic)


Job = CompleteJob | JudgeJob | RateJob
JobRequest = Annotated[Job, Field(discriminator="kind")]
job_request: TypeAdapter[Job] = TypeAdapter(JobRequest)


class JobStatus(BaseModel):
    """Where a job stands.

    Attributes:
      state: "running", "done", "failed" (see `reason`) or "interrupted" (the service ended, or the client stopped it:
        `reason` says which; submit it again for the rest).
      done: items whose result is stored. counts: results by status. calls: calls answered or failed in this run.
      cached: calls whose answer was in the store.
      stalled: why nothing can be stored at present (a full disk), "" if all is well.
    """

    id: str
    kind: str
    endpoint: str
    critic: str = ""
    state: Literal["running", "done", "failed", "interrupted"]
    reason: str = ""
    total: int
    done: int = 0
    counts: dict[str, int] = Field(default_factory=dict)
    calls: int = 0
    cached: int = 0
    stalled: str = ""
    created: str = ""
    updated: str = ""

    @classmethod
    def from_row(cls, row: Row) -> "JobStatus":
        counts = dict(row["counts"])
        progress = {name: counts.pop(name, 0) for name in ("done", "calls", "cached")}
        fields = {name: row[name] for name in row if name in cls.model_fields and name != "counts"}
        return cls(**fields, counts=counts, **progress)


@dataclass
class _Item:
    position: int
    calls: list[Call]
    outcomes: list[Outcome | None]
    missing: int


class _Job:
    """One run of one job."""

    def __init__(self, work: Work, store: Store, scheduler: Scheduler) -> None:
        self.work, self.store, self.scheduler = work, store, scheduler
        self.status = JobStatus(
            id=work.id,
            kind=work.kind,
            endpoint=work.endpoint.name,
            critic=work.critic,
            state="running",
            total=len(work),
            created=now(),
        )
        self._counts: Counter[str] = Counter()
        self._failed: dict[str, Outcome] = {}  # not asked twice in one run
        self._error: BaseException | None = None
        self._breaker = Breaker(work.endpoint)
        self._stopped = False

    def stop(self) -> None:
        """Starts no more calls; the answers that are under way are stored."""
        self._breaker.stop(STOPPED)
        self._stopped = True

    # ---- the run -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        state, reason = "done", ""
        try:
            await self._save("running", "")
            await self._work_off()
            await asyncio.wrap_future(self.store.write())  # everything queued before is committed
            if self._error is not None:
                raise self._error
        except LabelError as error:
            state, reason = "failed", str(error)
        except ExceptionGroup as group:
            known = group.subgroup(LabelError)
            if known is None:
                log.exception("job %s", self.status.id)
            first = (known or group).exceptions[0]
            state, reason = "failed", str(first) if known else f"internal error: {first!r}"
        except asyncio.CancelledError:
            state, reason = "interrupted", "the service ended before the job did; submit it again"
        if state == "done" and self.scheduler.closing:
            state, reason = "interrupted", "the service ended before the job did; submit it again"
        elif state == "done" and self._stopped:
            state, reason = "interrupted", f"{STOPPED}; submit it again for the rest"
        await self._save(state, reason)
        final = self.status
        log.info(
            "job %s (%s, %s) %s%s: %d of %d items, %d calls, %d answers from the store, %s",
            *(final.id, final.kind, final.endpoint, final.state, f" ({reason})" if reason else ""),
            *(final.done, final.total, final.calls, final.cached, final.counts),
        )

    async def _save(self, state: Any, reason: str) -> None:
        status = self.status.model_copy(update={"state": state, "reason": reason, "updated": now()})
        counts = {**status.counts, "done": status.done, "calls": status.calls, "cached": status.cached}
        row: Row = {
            **status.model_dump(include={"id", "kind", "endpoint", "critic", "state", "reason", "total"}),
            "endpoint_key": self.work.endpoint.key,
            "counts": json.dumps(counts),
            "created": status.created,
            "updated": status.updated,
        }
        try:
            await asyncio.wrap_future(self.store.write(jobs=[row]))
        except LabelError as error:
            status = status.model_copy(update={"state": "failed", "reason": str(error)})
        self.status = status

    async def _work_off(self) -> None:
        width = self.scheduler.lane(self.work.endpoint).provider.width
        queue: asyncio.Queue[tuple[_Item, int, int] | None] = asyncio.Queue(maxsize=2 * width)
        async with asyncio.TaskGroup() as group:
            workers = min(width, max(1, 2 * len(self.work)))
            for _ in range(workers):
                group.create_task(self._worker(queue))
            for start in range(0, len(self.work), WINDOW):
                await self._window(range(start, min(start + WINDOW, len(self.work))), queue)
            for _ in range(workers):
                await queue.put(None)

    async def _window(self, positions: range, queue: asyncio.Queue[tuple[_Item, int, int] | None]) -> None:
        items = []
        for position in positions:
            calls = self.work.calls(position)
            items.append(_Item(position, calls, [None] * len(calls), len(calls)))
            if position % 64 == 0:
                await asyncio.sleep(0)  # the service answers others meanwhile
        calls_by_key = {call.key: call for item in items for call in item.calls}
        answered = await asyncio.to_thread(self.store.answered, list(calls_by_key))
        stored = {key: stored_outcome(calls_by_key[key], row) for key, row in answered.items()}
        open_keys = [key for key in calls_by_key if stored.get(key) is None]
        attempts = await asyncio.to_thread(self.store.attempts, open_keys)
        self.store.write(
            requests=[request_row(calls_by_key[key]) for key in open_keys if key not in attempts]
        )
        for item in items:
            for slot, call in enumerate(item.calls):
                outcome = stored.get(call.key)
                if outcome is None:
                    await queue.put((item, slot, attempts.get(call.key, 0)))
                else:
                    self.status.cached += 1
                    self._take(item, slot, outcome)
            if not item.calls:
                self._finish(item)

    async def _worker(self, queue: asyncio.Queue[tuple[_Item, int, int] | None]) -> None:
        while (entry := await queue.get()) is not None:
            item, slot, attempts = entry
            call = item.calls[slot]
            outcome = self._failed.get(call.key)
            if outcome is None:
                outcome = await self.scheduler.ask(call, attempts, self._breaker)
                self.status.calls += outcome.asked
                if outcome.answer is None:
                    self._failed[call.key] = outcome
            self._take(item, slot, outcome)

    def _take(self, item: _Item, slot: int, outcome: Outcome) -> None:
        item.outcomes[slot] = outcome
        item.missing -= 1
        if item.missing == 0:
            self._finish(item)

    def _finish(self, item: _Item) -> None:
        results = self.work.results(item.position, [o for o in item.outcomes if o is not None])
        date, status = now(), results[0].status
        rows = [
            {
                "key": result.key,
                "kind": result.kind,
                "item": result.item,
                "status": result.status,
                "endpoint_key": self.work.endpoint.key,
                "critic_hash": result.critic_hash,
                "record": result.record.encode("utf-8", "replace").decode(),
                "updated": date,
            }
            for result in results
        ]
        places = [
            {"job": self.status.id, "position": item.position, "part": result.part, "result": result.key}
            for result in results
        ]
        future = self.store.write(results=rows, job_items=places)
        future.add_done_callback(lambda done: self._committed(done, status))

    def _committed(self, future: Future[None], status: str) -> None:
        # Called by the store's one writer thread: what is counted is on disk.
        error = future.exception()
        if error is not None:
            self._error = error
            return
        self._counts[status] += 1
        self.status.counts = dict(self._counts)
        self.status.done += 1


class Runner:
    """All jobs of one service."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.scheduler = Scheduler(store)
        self._jobs: dict[str, tuple[_Job, asyncio.Task[None]]] = {}
        self._ended: dict[str, JobStatus] = {}  # without the items, which are large

    def submit(self, work: Work) -> JobStatus:
        """Starts a job, or finds it running. Raises `EndpointError` if the endpoint cannot be used."""
        job = _Job(work, self.store, self.scheduler)
        job_id = job.status.id
        if job_id in self._jobs:
            return self._jobs[job_id][0].status
        self.scheduler.lane(work.endpoint)
        task = asyncio.create_task(job.run(), name=f"job-{job_id}")
        self._jobs[job_id] = (job, task)
        self._ended.pop(job_id, None)
        task.add_done_callback(lambda _: self._end(job))
        return job.status

    def stop(self, job_id: str) -> None:
        """Stops a job that runs: it starts no more calls, and ends when those under way are answered and stored."""
        if job_id in self._jobs:
            self._jobs[job_id][0].stop()

    def _end(self, job: _Job) -> None:
        del self._jobs[job.status.id]
        self._ended[job.status.id] = job.status

    async def status(self, job_id: str) -> JobStatus | None:
        if job_id in self._jobs:
            return self._jobs[job_id][0].status.model_copy(update={"stalled": self.store.stalled})
        if job_id in self._ended:
            return self._ended[job_id]
        row = await asyncio.to_thread(self.store.job, job_id)
        return None if row is None else JobStatus.from_row(row)

    @property
    def running(self) -> int:
        """How many jobs run."""
        return len(self._jobs)

    async def close(self, grace: float = 10.0) -> None:
        """Starts no more calls, waits for those in flight so that their answers are stored, then stops."""
        self.scheduler.closing = True
        tasks = [task for _, task in self._jobs.values()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self.scheduler.close()
