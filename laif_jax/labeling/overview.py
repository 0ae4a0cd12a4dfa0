"""The state of the service in one object: what its dashboard shows, and the gauges of its metrics."""

import asyncio
import json
import logging
import math
import time
from collections import deque
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel, Field

from laif_jax.labeling import schema
from laif_jax.labeling.budget import NANOS
from laif_jax.labeling.jobs import JobStatus
from laif_jax.labeling.metrics import Cached, Gauge, Meters
from laif_jax.labeling.runner import UNDER_WAY, Runner
from laif_jax.labeling.store import Row, Store

log = logging.getLogger(__name__)
TICK = 1.0  # seconds between two looks at what moves
SPAN = 60.0  # seconds over which rates are taken
JOBS, LATEST, ERRORS = 30, 10, 10
TEXT_MOST = 4000  # characters of a text that are shown


class JobView(JobStatus):
    """A job as the dashboard shows it.

    Attributes:
      rate: items per second, over the last minute; None if nothing is known of it.
      eta: seconds until it is done at this rate; None if it does not move.
      cost: what it cost so far, in US dollars; budget: its own cap, in US dollars.
    """

    rate: float | None = None
    eta: float | None = None
    cost: float = 0.0
    budget: float | None = None


class EndpointView(BaseModel):
    """An endpoint as this process uses it: calls in flight, calls that wait for a place, how many may be in flight at
    present, and why it is not asked ("" if it is)."""

    name: str
    in_flight: int
    waiting: int
    limit: int
    stopped: str


class JudgementView(BaseModel):
    """A judgement beside the two texts. `p_b`: the probability that b is better; None where there is no label. `a`, `b`
    are None for a judgement from before the service started: then `question` is what the critic was shown last."""

    job: str
    critic: str
    status: str
    p_b: float | None
    order: str
    question: str
    a: str | None
    b: str | None
    answer: str
    reason: str
    date: str


class Money(BaseModel):
    """US dollars. `presumed`: of calls whose answer was lost, but that may be on the bill. `reserved`: put aside for
    calls under way. `cap`: the hard budget, None if there is none."""

    spent: float = 0.0
    presumed: float = 0.0
    reserved: float = 0.0
    cap: float | None = None


class Overview(BaseModel):
    """Everything that the dashboard shows. Counts of requests, results and errors are over the whole store; `answered`,
    `failed` and `throughput` (calls that ended, by second, oldest first) are this process's since it started."""

    store: str
    stalled: str
    uptime: float
    answered: int
    failed: int
    per_second: float
    throughput: list[int]
    requests: dict[str, int]
    results: dict[str, int]
    errors: dict[str, int]
    latest_errors: list[dict[str, str]]
    money: Money
    endpoints: list[EndpointView]
    jobs: list[JobView]
    judgements: list[JudgementView] = Field(max_length=LATEST)


class Observer:
    """Looks at the runner once a second, and at the store when it is asked."""

    def __init__(self, store: Store, runner: Runner, meters: Meters) -> None:
        self.store, self.runner, self.meters = store, runner, meters
        self._started = time.monotonic()
        self._ended: deque[int] = deque(maxlen=120)  # calls that ended, by second
        self._progress: dict[str, deque[tuple[float, int]]] = {}
        self._counts = Cached(lambda: asyncio.to_thread(store.stats))
        self._errors = Cached(lambda: asyncio.to_thread(latest_failures, store))
        self._old = Cached(lambda: asyncio.to_thread(stored_judgements, store), least=5.0)
        self._task = asyncio.create_task(self._watch(), name="label-observer")

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        before = 0
        while True:
            await asyncio.sleep(TICK)
            total = self.meters.answered + self.meters.failed
            self._ended.append(total - before)
            before = total
            try:
                for job in self.runner.running_ids:
                    if (status := await self.runner.status(job)) is not None:
                        self._note(status)
            except Exception:  # a look that fails is no reason to stop looking
                log.exception("the observer could not look at the jobs")

    def _note(self, status: JobStatus) -> None:
        now = time.monotonic()
        track = self._progress.setdefault(status.id, deque())
        if track and (status.done < track[-1][1]):
            track.clear()  # it was submitted again
        if not track or now - track[-1][0] >= TICK / 2:
            track.append((now, status.done))
        while len(track) > 2 and now - track[0][0] > SPAN:
            track.popleft()

    def _rate(self, status: JobStatus) -> float | None:
        track = self._progress.get(status.id, ())
        if len(track) < 2:
            return None
        (first, done_then), (last, done_now) = track[0], track[-1]
        return (done_now - done_then) / max(last - first, 1e-9)

    # ---- what is asked for -----------------------------------------------------------------------------------------

    async def overview(self) -> Overview:
        """The present state."""
        stats, recent = await self._counts.get(), list(self._ended)
        rows = await asyncio.to_thread(self.store.job_list, JOBS)
        accounts = await asyncio.to_thread(_accounts, self.store, [row["id"] for row in rows])
        last = recent[-10:]
        return Overview(
            store=self.store.where,
            stalled=self.store.stalled,
            uptime=time.monotonic() - self._started,
            answered=self.meters.answered,
            failed=self.meters.failed,
            per_second=sum(last) / (len(last) * TICK) if last else 0.0,
            throughput=recent,
            requests=stats["requests"],
            results=stats["results"],
            errors=stats["failures"],
            latest_errors=await self._errors.get(),
            money=await self.money(),
            endpoints=self._endpoints(),
            jobs=[await self._job(row, accounts.get(row["id"])) for row in rows],
            judgements=await self._judgements(),
        )

    async def money(self) -> Money:
        account = await asyncio.to_thread(self.store.account)
        return Money(
            spent=account.spent / NANOS,
            presumed=account.presumed / NANOS,
            reserved=account.reserved / NANOS,
            cap=None if account.cap is None else account.cap / NANOS,
        )

    def _endpoints(self) -> list[EndpointView]:
        return [
            EndpointView(
                name=name,
                in_flight=lane.in_flight,
                waiting=lane.waiting,
                limit=int(min(lane.admission.limit, 10**9)),
                stopped=lane.circuit.reason,
            )
            for name, lane in self.runner.scheduler.lanes().items()
        ]

    async def _job(self, row: Row, account: Any) -> JobView:
        status = await self.runner.status(row["id"]) or JobStatus.from_row(row)
        view = JobView(**status.model_dump())
        if status.state in UNDER_WAY:
            self._note(status)
            view.rate = self._rate(status)
            if view.rate:
                view.eta = (status.total - status.done) / view.rate
        else:
            self._progress.pop(status.id, None)
        if account is not None:
            view.cost = (account.spent + account.presumed) / NANOS
            view.budget = None if account.cap is None else account.cap / NANOS
        return view

    async def _judgements(self) -> list[JudgementView]:
        latest = list(self.meters.latest)[-LATEST:][::-1]
        if not latest:
            return await self._old.get()
        views = []
        for shown in latest:
            item = shown.comparison
            question = "\n\n".join(message.content for message in item.prompt.messages)
            views.append(_view(json.loads(shown.record), shown.job, question, item.a.text, item.b.text))
        return views

    async def gauges(self) -> list[Gauge]:
        """What Prometheus gets beside the counters."""
        stats, money, lanes = await self._counts.get(), await self.money(), self._endpoints()

        def by(name: str, text: str, label: str, counts: dict[str, int]) -> Gauge:
            return Gauge(name, text, (label,), {(key,): float(value) for key, value in counts.items()})

        def lane(name: str, text: str, field: str) -> Gauge:
            return Gauge(name, text, ("endpoint",), {(e.name,): float(getattr(e, field)) for e in lanes})

        cap = math.inf if money.cap is None else money.cap
        return [
            lane("laif_calls_in_flight", "Calls under way in this process.", "in_flight"),
            lane("laif_calls_waiting", "Calls of this process that wait for a place.", "waiting"),
            lane("laif_calls_limit", "How many calls may be under way at present.", "limit"),
            Gauge(
                "laif_endpoint_stopped",
                "1 while an endpoint is not asked because it cannot answer.",
                ("endpoint",),
                {(e.name,): float(bool(e.stopped)) for e in lanes},
            ),
            by("laif_requests", "Requests in the store.", "state", stats["requests"]),
            by("laif_results", "Results in the store.", "status", stats["results"]),
            by("laif_failed_attempts", "Failed attempts in the store.", "kind", stats["failures"]),
            by("laif_jobs", "Jobs in the store.", "state", stats["jobs"]),
            Gauge("laif_spent_dollars", "Cost of answered calls.", (), {(): money.spent}),
            Gauge("laif_presumed_dollars", "Cost of calls whose answer was lost.", (), {(): money.presumed}),
            Gauge("laif_reserved_dollars", "Put aside for calls under way.", (), {(): money.reserved}),
            Gauge("laif_budget_dollars", "The hard budget; +Inf: none.", (), {(): cap}),
            Gauge(
                "laif_store_stalled",
                "1 while the store cannot be written.",
                (),
                {(): float(bool(self.store.stalled))},
            ),
        ]


def latest_failures(store: Store) -> list[dict[str, str]]:
    """The newest failed attempts: kind, reason, date."""
    c = schema.failures.c
    query = sa.select(c.kind, c.reason, c.date).order_by(c.id.desc()).limit(ERRORS)
    with store.engine.connect() as connection:
        return [{"kind": k, "reason": r[:500], "date": d} for k, r, d in connection.execute(query)]


def stored_judgements(store: Store) -> list[JudgementView]:
    """The newest judgements of single orders, with the last message that the critic was shown."""
    c, texts = schema.results.c, schema.request_texts.c
    query = sa.select(c.record).where(c.kind == "judgement").order_by(c.id.desc()).limit(4 * LATEST)
    views: list[JudgementView] = []
    with store.engine.connect() as connection:
        records = [json.loads(record) for record in connection.execute(query).scalars()]
        single = [r for r in records if r["order"] != "both" and "request" in r.get("meta", {})][:LATEST]
        keys = [record["meta"]["request"] for record in single]
        asked = sa.select(texts.key, texts.request).where(texts.key.in_(keys))
        shown = {key: json.loads(text)["messages"][-1]["content"] for key, text in connection.execute(asked)}
    for record in single:
        views.append(_view(record, "", shown.get(record["meta"]["request"], ""), None, None))
    return views


def _accounts(store: Store, jobs: list[str]) -> dict[str, Any]:
    from laif_jax.labeling import budget

    with store.engine.connect() as connection:
        return budget.accounts(connection, jobs)


def _view(record: dict[str, Any], job: str, question: str, a: str | None, b: str | None) -> JudgementView:
    return JudgementView(
        job=job,
        critic=record["critic"],
        status=record["status"],
        p_b=record.get("p_b"),
        order=record["order"],
        question=_short(question),
        a=None if a is None else _short(a),
        b=None if b is None else _short(b),
        answer=_short(record.get("raw", "")),
        reason=_short(record.get("reason", "")),
        date=record.get("date", ""),
    )


def _short(text: str) -> str:
    # A lone surrogate cannot be sent.
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= TEXT_MOST else text[:TEXT_MOST] + " […]"
