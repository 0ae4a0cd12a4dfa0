"""Makes calls: bounded concurrency per endpoint, back-off with jitter, Retry-After, and one call per request key."""

import asyncio
import json
import logging
import random
import time
from dataclasses import dataclass
from typing import Any

from laif_jax.labeling.answers import Answer
from laif_jax.labeling.calls import Call, Endpoint
from laif_jax.labeling.errors import CallError
from laif_jax.labeling.providers import Provider, make_provider, read_reply
from laif_jax.labeling.store import Row, Store, now

log = logging.getLogger(__name__)

BACKOFF_FIRST = 0.5  # seconds before the second attempt; doubles with each further one
BACKOFF_MOST = 30.0
RETRY_AFTER_MOST = 600.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended.

    Attributes:
      answer: None exactly when it failed; `reason` then says why.
      passing: of a failure: one that may be over when the request is made again (nobody reached, too many calls, a
        stopped job), not one that the same request meets every time (a refused key, a request that is not accepted).
      asked: False: a job that was stopped did not ask at all.
    """

    key: str
    answer: Answer | None
    reason: str = ""
    latency: float = 0.0
    date: str = ""
    cached: bool = False
    passing: bool = False
    asked: bool = True


class Breaker:
    """Stops one job's calls to an endpoint that cannot answer, so that 20,000 items do not each wait for it.

    It opens at once on a fatal error (refused key, unknown model), and after `limit` failed calls in a row. Free
    endpoints have none, and a request that is refused for what it is (HTTP 400, at once and unpaid) says nothing about
    the next one.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._limit = max(8, 2 * endpoint.concurrency)
        self._row = 0
        self._applies = endpoint.provider != "simulated"
        self.reason = ""
        self.passing = True

    def success(self) -> None:
        self._row = 0

    def failure(self, error: CallError) -> None:
        self._row += error.kind != "bad_request"
        if self._applies and not self.reason and (error.fatal or self._row >= self._limit):
            why = "" if error.fatal else f"{self._row} calls in a row failed, the last: "
            self.reason = f"not asked: {why}{error.reason}"
            self.passing = not error.fatal
            log.error("calls stopped: %s%s", why, error.reason)

    def stop(self, reason: str) -> None:
        """Opens it at the client's word."""
        self.reason = self.reason or f"not asked: {reason}"


class _Lane:
    """What all jobs share about one endpoint: its provider, its places, and until when it asked us to wait."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.provider: Provider = make_provider(endpoint)
        self.places = asyncio.Semaphore(self.provider.width)
        self.resume_at = 0.0

    async def wait(self) -> None:
        while (delay := self.resume_at - time.monotonic()) > 0:
            await asyncio.sleep(delay)


class Scheduler:
    """Answers calls from the store or from their endpoint. Lives in one event loop."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.closing = False
        self._lanes: dict[Endpoint, _Lane] = {}
        self._running: dict[str, asyncio.Future[Outcome]] = {}
        self._answered: set[str] = set()  # keys answered since the start, whatever an earlier look-up said
        self._jitter = random.Random()  # never reaches a result

    def lane(self, endpoint: Endpoint) -> _Lane:
        """Raises `EndpointError` if the endpoint cannot be used."""
        if endpoint not in self._lanes:
            self._lanes[endpoint] = _Lane(endpoint)
        return self._lanes[endpoint]

    async def ask(self, call: Call, attempts_before: int, breaker: Breaker) -> Outcome:
        """The outcome of a call that has no stored answer; two callers of one request share one call.

        Never raises for what an endpoint does; raises `StoreError` if an answer cannot be stored.
        """
        while (running := self._running.get(call.key)) is not None:
            outcome = await asyncio.shield(running)
            if outcome.asked or breaker.reason or self.closing:
                return outcome  # else: another job was stopped before it asked; this one goes on
        if call.key in self._answered:
            rows = await asyncio.to_thread(self.store.answered, [call.key])
            outcome = stored_outcome(call, rows[call.key])
            if outcome is not None:
                return outcome
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._running[call.key] = future
        try:
            outcome = await self._ask(call, attempts_before, breaker)
            future.set_result(outcome)
            return outcome
        except BaseException as error:
            future.set_exception(error if isinstance(error, Exception) else asyncio.CancelledError())
            future.exception()  # seen: nobody else may be waiting
            raise
        finally:
            del self._running[call.key]

    async def _ask(self, call: Call, attempts_before: int, breaker: Breaker) -> Outcome:
        lane = self.lane(call.endpoint)
        reason, passing = "", True
        for attempt in range(attempts_before, attempts_before + call.endpoint.max_attempts):
            async with lane.places:
                await lane.wait()
                if breaker.reason or self.closing:
                    why = breaker.reason or "not asked: the service is stopping"
                    return Outcome(call.key, None, why, passing=breaker.passing, asked=False)
                self.store.write(states=[_state(call, "in_flight", attempt)])
                started = time.perf_counter()
                try:
                    reply = await lane.provider.call(call, attempt)
                except CallError as error:
                    reason, passing, failure = error.reason, error.retryable, error
                    latency = time.perf_counter() - started
                    await self._store_failure(call, attempt, error, latency)
                else:
                    breaker.success()
                    return await self._store_answer(
                        call, attempt, reply.raw, reply.answer, time.perf_counter() - started
                    )
            last = attempt + 1 == attempts_before + call.endpoint.max_attempts
            if not failure.retryable or last:
                breaker.failure(failure)
                break
            await self._back_off(lane, failure, attempt - attempts_before)
        return Outcome(call.key, None, reason, date=now(), passing=passing)

    async def _back_off(self, lane: _Lane, error: CallError, attempt: int) -> None:
        if lane.provider.free:
            return
        delay = min(BACKOFF_FIRST * 2**attempt, BACKOFF_MOST) * self._jitter.uniform(0.5, 1.0)
        if error.retry_after is not None:
            asked = min(error.retry_after, RETRY_AFTER_MOST)
            # The endpoint speaks to all of us: nobody calls it before the time it named.
            lane.resume_at = max(lane.resume_at, time.monotonic() + asked)
            delay = max(delay if asked == 0 else 0.0, asked)
        await asyncio.sleep(delay)

    async def _store_answer(
        self, call: Call, attempt: int, body: dict[str, Any], answer: Answer, latency: float
    ) -> Outcome:
        date = now()
        row: Row = {
            "key": call.key,
            "body": json.dumps(body, ensure_ascii=False).encode("utf-8", "replace").decode(),
            "model": answer.model,
            "system_fingerprint": answer.fingerprint,
            "prompt_tokens": answer.usage.prompt_tokens if answer.usage else None,
            "completion_tokens": answer.usage.completion_tokens if answer.usage else None,
            "cost": None,
            "latency": latency,
            "attempt": attempt,
            "date": date,
        }
        # Inside the lane's place: at most `concurrency` answers are ever waiting to be stored.
        await asyncio.wrap_future(
            self.store.write(responses=[row], states=[_state(call, "ok", attempt + 1, date=date)])
        )
        self._answered.add(call.key)
        return Outcome(call.key, answer, latency=latency, date=date)

    async def _store_failure(self, call: Call, attempt: int, error: CallError, latency: float) -> None:
        row: Row = {
            "key": call.key,
            "attempt": attempt,
            "kind": error.kind,
            "reason": error.reason,
            "body": error.body.encode("utf-8", "replace").decode(),
            "latency": latency,
            "date": now(),
        }
        log.debug("attempt %d failed (%s): %s", attempt + 1, error.kind, error.reason)
        state = _state(call, "failed", attempt + 1, error.reason)
        await asyncio.wrap_future(self.store.write(failures=[row], states=[state]))

    async def close(self) -> None:
        for lane in self._lanes.values():
            await lane.provider.close()
        self._lanes.clear()


def _state(call: Call, state: str, attempts: int, reason: str = "", date: str | None = None) -> Row:
    return {"k": call.key, "state": state, "attempts": attempts, "reason": reason, "updated": date or now()}


def request_row(call: Call) -> Row:
    """The `requests` row of a call that has not been made."""
    date = now()
    return {
        "key": call.key,
        "endpoint_key": call.endpoint.key,
        "model": call.endpoint.model,
        "request": call.request,
        "state": "pending",
        "attempts": 0,
        "reason": "",
        "created": date,
        "updated": date,
    }


def stored_outcome(call: Call, row: Row) -> Outcome | None:
    """The outcome in a stored response; None if it cannot be read as this call needs it."""
    try:
        answer = read_reply(call, json.loads(row["body"])).answer
    except (CallError, ValueError):
        return None
    return Outcome(call.key, answer, latency=row["latency"], date=row["date"], cached=True)
