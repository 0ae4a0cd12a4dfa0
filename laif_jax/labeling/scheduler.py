"""Makes calls: a place in the endpoint's lane, a few attempts with back-off, every answer and cost into the store."""

import asyncio
import json
import logging
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from laif_jax.labeling.answers import Answer
from laif_jax.labeling.budget import most_completion, most_tokens
from laif_jax.labeling.calls import Call, Endpoint
from laif_jax.labeling.errors import CallError
from laif_jax.labeling.lanes import Lane
from laif_jax.labeling.metrics import Meters
from laif_jax.labeling.prices import Price, cost, most, price_of
from laif_jax.labeling.providers import Provider, SqlLedger, make_provider, read_reply
from laif_jax.labeling.store import Row, Settle, Store, now
from laif_jax.records import Usage
from laif_jax.records.hashing import json_writer

log = logging.getLogger(__name__)

BACKOFF_FIRST = 0.5  # seconds before the second attempt; doubles with each further one
BACKOFF_MOST = 30.0
RETRY_AFTER_MOST = 600.0
BATCH_STEP = 500  # rows: see `Admission`
_body_json = json_writer()
_THROTTLED = {"rate_limited", "overloaded"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended.

    Attributes:
      answer: None exactly when it failed; `reason` then says why.
      passing: of a failure: one that may be over when the request is made again (nobody reached, too many calls, a
        stopped job), not one that the same request meets every time (a refused key, a request that is not accepted).
      asked: False: a job that was stopped did not ask at all.
      denied: the budget had no room for a further attempt; the request is pending again.
    """

    key: str
    answer: Answer | None
    reason: str = ""
    latency: float = 0.0
    date: str = ""
    cached: bool = False
    passing: bool = False
    asked: bool = True
    denied: bool = False


class Breaker:
    """Whether one job still asks its endpoint: not after the endpoint's circuit opened under it, nor once stopped."""

    def __init__(self) -> None:
        self.reason = ""
        self.passing = True

    def open(self, reason: str, passing: bool) -> None:
        if not self.reason:
            self.reason, self.passing = reason, passing
            log.error("calls stopped: %s", reason)

    def stop(self, reason: str) -> None:
        """Opens it at the client's word."""
        self.reason = self.reason or f"not asked: {reason}"


@dataclass(slots=True, eq=False)
class Party:
    """One run of one job, as the scheduler sees it.

    Attributes:
      price: of its model; None: not known, then nothing is reserved and costs stay unknown.
    """

    job: str
    endpoint: Endpoint
    provider: Provider
    lane: Lane
    price: Price | None
    breaker: Breaker

    def tokens(self, call: Call) -> int:
        """Upper bound of a call's tokens, for the buckets of tokens per minute and for reservations."""
        return most_tokens(call.messages)

    def most(self, call: Call) -> int:
        """Upper bound of a call's cost in nano-dollars; 0: free, or not known."""
        if self.price is None or self.price.free:
            return 0
        return most(
            self.price, self.tokens(call), most_completion(call), batch=getattr(self.endpoint, "batch", False)
        )

    def cost(self, used: Usage | None, reserved: int) -> int | None:
        """What a call cost, by what it says that it used; if it does not say, the most that it can have been."""
        if self.price is None:
            return None
        return (
            reserved if used is None else cost(self.price, used, batch=getattr(self.endpoint, "batch", False))
        )


class Scheduler:
    """Answers calls from their endpoint. Lives in one event loop."""

    def __init__(self, store: Store, meters: Meters | None = None) -> None:
        self.store = store
        self.meters = meters or Meters()
        self.closing = False
        # A batch's rows wait for one another: what holds live calls to the same model back must not cut it up.
        self._lanes: dict[tuple[str, bool], Lane] = {}
        self._providers: dict[Endpoint, Provider] = {}
        self._jitter = random.Random()  # never reaches a result

    def party(self, job: str, endpoint: Endpoint) -> Party:
        """A job's way to its endpoint. Raises `EndpointError` if the endpoint cannot be used."""
        provider = self._providers.get(endpoint)
        if provider is None:
            ledger = SqlLedger(self.store.engine) if endpoint.batch else None
            provider = self._providers[endpoint] = make_provider(endpoint, ledger)
        place = (endpoint.key, endpoint.batch)
        lane = self._lanes.get(place)
        if lane is None:
            lane = self._lanes[place] = Lane(provider.width, BATCH_STEP if endpoint.batch else 1)
        lane.widen(provider.width)
        return Party(job, endpoint, provider, lane, price_of(endpoint, datetime.now(UTC).date()), Breaker())

    def lanes(self) -> dict[str, Lane]:
        """The lanes of all endpoints that were used, by the endpoint's name."""
        return {
            f"{e.name} (batches)" if e.batch else e.name: self._lanes[e.key, e.batch]
            for e in self._providers
            if (e.key, e.batch) in self._lanes
        }

    async def ask(self, party: Party, call: Call, attempts_before: int, bound: int) -> Outcome:
        """The outcome of a call that was claimed. Never raises for what an endpoint does.

        Args:
          bound: what was reserved for it: upper bound of its cost in nano-dollars.
        """
        tokens = party.tokens(call)
        reason, passing, reserved = "", True, bound
        for number in range(call.endpoint.max_attempts):
            attempt = attempts_before + number
            if not reserved and bound:
                if not await asyncio.wrap_future(self.store.reserve(party.job, call.key, bound)):
                    self.store.give_back(party.job, [call.key])
                    return Outcome(call.key, None, "the budget has no room", asked=False, denied=True)
                reserved = bound
            await party.lane.enter(party.job, tokens)
            try:
                if why := self._why_not(party):
                    self.store.give_back(party.job, [call.key])
                    return Outcome(call.key, None, why, passing=party.breaker.passing, asked=False)
                started, began = time.perf_counter(), time.monotonic()
                try:
                    reply = await party.provider.call(call, attempt)
                except CallError as error:
                    failure, latency = error, time.perf_counter() - started
                else:
                    if reply.limits is not None:
                        party.lane.admission.told(time.monotonic(), reply.limits)
                    latency = time.perf_counter() - started
                    return self._take(party, call, attempt, reply.raw, reply.answer, latency, reserved)
            finally:
                party.lane.leave()
            reason, passing = failure.reason, failure.retryable
            last = number + 1 == call.endpoint.max_attempts or not failure.retryable
            self._throttle(party, failure, began, last)
            reserved = await self._store_failure(party, call, attempt, failure, latency, reserved, last)
            if last:
                break
            await self._back_off(party, failure, number)
        return Outcome(call.key, None, reason, date=now(), passing=passing)

    def _why_not(self, party: Party) -> str:
        if self.closing:
            return party.breaker.reason or "not asked: the service is stopping"
        if not party.breaker.reason and not party.provider.free:
            circuit = party.lane.circuit
            if why := circuit.closed_to(time.monotonic()):
                party.breaker.open(why, circuit.passing)
        return party.breaker.reason

    def _throttle(self, party: Party, error: CallError, began: float, last: bool) -> None:
        if party.provider.free:
            return
        at = time.monotonic()
        if error.limits is not None:
            party.lane.admission.told(at, error.limits)
        if error.kind in _THROTTLED or error.retry_after is not None:
            party.lane.admission.throttled(at, began, error.retry_after)
        if last and party.lane.circuit.failure(at, error.kind, error.reason, fatal=error.fatal):
            party.breaker.open(party.lane.circuit.reason, party.lane.circuit.passing)

    async def _back_off(self, party: Party, error: CallError, number: int) -> None:
        if party.provider.free:
            return
        delay = min(BACKOFF_FIRST * 2**number, BACKOFF_MOST) * self._jitter.uniform(0.5, 1.0)
        if error.retry_after is not None:
            asked = min(error.retry_after, RETRY_AFTER_MOST)
            delay = max(delay if asked == 0 else 0.0, asked)
        await asyncio.sleep(delay)

    def _take(
        self, party: Party, call: Call, attempt: int, body: Any, answer: Answer, latency: float, reserved: int
    ) -> Outcome:
        """Stores an answer and what it cost. It counts for a place in the lane until it is committed."""
        date, used = now(), answer.usage
        self.meters.call(party.endpoint, "answered", latency)
        party.lane.circuit.success()
        party.lane.admission.succeeded()
        nanos = party.cost(used, reserved)
        tokens = (
            (used.prompt_tokens, used.cached_tokens, used.completion_tokens) if used else (None, None, None)
        )
        row: Row = {
            "key": call.key,
            "body": utf8(_body_json(body)),
            "model": answer.model,
            "system_fingerprint": answer.fingerprint,
            "latency": latency,
            "attempt": attempt,
            "date": date,
        }
        settle = Settle(call.key, party.job, attempt, "answered", nanos, date, reserved, tokens)
        state = {"k": call.key, "state": "ok", "attempts": attempt + 1, "reason": "", "updated": date}
        self.store.post({"responses": [row], "states": [state]}, [settle], party.lane.storing())
        return Outcome(call.key, answer, latency=latency, date=date)

    async def _store_failure(
        self,
        party: Party,
        call: Call,
        attempt: int,
        error: CallError,
        latency: float,
        reserved: int,
        last: bool,
    ) -> int:
        """Stores a failed attempt, and what it may have cost; what is still reserved for the next one."""
        date = now()
        self.meters.call(party.endpoint, error.kind, latency)
        row: Row = {
            "key": call.key,
            "attempt": attempt,
            "kind": error.kind,
            "reason": _plain(error.reason),
            "body": _plain(error.body),
            "latency": latency,
            "date": date,
        }
        log.debug("attempt %d failed (%s): %s", attempt + 1, error.kind, error.reason)
        settles, states = [], []
        billed, used = error.billed, error.usage
        if reserved and (billed != "no" or last):
            kind, nanos = "free", 0
            if billed == "yes" and used is not None:
                kind, nanos = "answered", party.cost(used, reserved)
            elif billed != "no":
                kind, nanos = "presumed", reserved
            settles = [Settle(call.key, party.job, attempt, kind, nanos, date, reserved)]
            reserved = 0
        if last:
            reason = _plain(error.reason)
            states = [
                {"k": call.key, "state": "failed", "attempts": attempt + 1, "reason": reason, "updated": date}
            ]
        await asyncio.wrap_future(self.store.write(settles, failures=[row], failed_states=states))
        return reserved

    async def close(self) -> None:
        for lane in self._lanes.values():
            lane.close()
        for provider in self._providers.values():
            await provider.close()
        self._lanes.clear()
        self._providers.clear()

    def stop(self) -> None:
        """No call starts any more; who waits for a place is told so."""
        self.closing = True
        for lane in self._lanes.values():
            lane.nudge()


def utf8(text: str) -> str:
    """Text without lone surrogates."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _plain(text: str) -> str:
    """Text that every database takes: PostgreSQL has no NUL character, and neither has lone surrogates."""
    return text.encode("utf-8", "replace").decode().replace("\x00", "\ufffd")


def stored_outcome(call: Call, row: Row) -> Outcome | None:
    """The outcome in a stored response; None if it cannot be read as this call needs it."""
    try:
        answer = read_reply(call, json.loads(row["body"])).answer
    except (CallError, ValueError):
        return None
    return Outcome(call.key, answer, latency=row["latency"], date=row["date"], cached=True)
