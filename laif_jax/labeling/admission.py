"""When the next call to a model may start. Pure: the time is an argument, nothing here sleeps or sends.

Three things hold calls back, apart from the transport: a number of calls in flight that grows by one per round of
successes and shrinks by a quarter when the endpoint says that it is too much (AIMD); buckets of requests and tokens per
minute, as the endpoint's headers tell them; and a time before which it asked not to be called.
"""

import math
from dataclasses import dataclass, field
from typing import Any

SHRINK = 0.75
RETRY_AFTER_MOST = 600.0


@dataclass(slots=True)
class Bucket:
    """Something that is used up by calls and flows back at `rate` per second. Unknown until a header tells it."""

    capacity: float = math.inf
    level: float = math.inf
    rate: float = 0.0
    at: float = 0.0

    def _flow(self, time: float) -> None:
        if self.rate:
            self.level = min(self.capacity, self.level + self.rate * max(0.0, time - self.at))
        self.at = time

    def told(self, time: float, limit: float | None, remaining: float | None, reset: float | None) -> None:
        """What a header says. `reset`: seconds until it is full again, which gives the rate where no limit is told."""
        self._flow(time)
        if limit is not None and limit > 0:
            self.capacity, self.rate = float(limit), limit / 60.0
        if remaining is None:
            return
        if math.isinf(self.capacity):  # only the rest is told: it flows back as the reset says
            missing = 1.0 if reset is None else max(remaining, 1.0) / max(reset, 1e-3)
            self.capacity, self.rate = max(remaining, 1.0), missing
        self.level = min(self.level, float(remaining))
        # An empty bucket is full again at its reset, if that is sooner than the flow would have it.
        if reset is not None and reset > 0 and remaining <= 0:
            self.rate = max(self.rate, self.capacity / max(reset, 1.0) if reset < 60.0 else self.rate)

    def delay(self, time: float, amount: float) -> float:
        """Seconds until `amount` can be taken. More than the capacity is let through from a full bucket."""
        if math.isinf(self.level):
            return 0.0
        self._flow(time)
        missing = min(amount, self.capacity) - self.level
        if missing <= 1e-9:
            return 0.0
        return missing / self.rate if self.rate else 1.0

    def take(self, amount: float) -> None:
        self.level -= amount


@dataclass(slots=True)
class Admission:
    """The state of one (provider, model, place).

    Attributes:
      most: calls in flight at most, by the configuration. limit: at present.
      step: by how much a full round of successes raises the limit, and what it never falls below: 1, but for batches,
        of which a round takes hours.
    """

    most: int
    step: int = 1
    limit: float = 0.0
    requests: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)
    resume_at: float = 0.0
    _shrunk_at: float = -math.inf

    def __post_init__(self) -> None:
        self.limit = self.limit or float(self.most)

    def widen(self, most: int) -> None:
        """Another job wants more calls in flight."""
        if most > self.most:
            if self.limit >= self.most:  # never held back so far
                self.limit = float(most)
            self.most = most

    def delay(self, time: float, tokens: int = 0) -> float:
        """Seconds until a call of so many tokens may start, as far as time decides it; 0: now."""
        return max(
            self.resume_at - time, self.requests.delay(time, 1.0), self.tokens.delay(time, tokens), 0.0
        )

    def started(self, tokens: int = 0) -> None:
        self.requests.take(1.0)
        self.tokens.take(tokens)

    def succeeded(self) -> None:
        """One more call in flight (`step`) for each full round of successes."""
        if self.limit < self.most:
            self.limit = min(float(self.most), self.limit + self.step / self.limit)

    def throttled(self, time: float, started: float, retry_after: float | None) -> None:
        """The endpoint refused a call, sent at `started`, as one too many. Refusals of calls that were sent before the
        last one shrank the limit say nothing new."""
        if started > self._shrunk_at:
            self.limit = max(float(min(self.step, self.most)), self.limit * SHRINK)
            self._shrunk_at = time
        if retry_after is not None:
            # The endpoint speaks to all of us: nobody calls it before the time it named.
            self.resume_at = max(self.resume_at, time + min(retry_after, RETRY_AFTER_MOST))

    def told(self, time: float, limits: Any) -> None:
        """What the headers of a reply say (`wires.RateLimits`)."""
        for bucket, names in ((self.requests, ("requests",)), (self.tokens, ("tokens", "input_tokens"))):
            for name in names:
                window = getattr(limits, name, None)
                if window is not None:
                    bucket.told(time, window.limit, window.remaining, window.reset)


@dataclass(slots=True)
class Circuit:
    """Stops calls to an endpoint that cannot answer, so that 20,000 items do not each wait for it.

    It opens at once on a fatal error (refused key, unknown model), and after `limit` failed calls in a row. After
    `pause` seconds one call is let through: if it succeeds, the circuit closes; if not, it stays open as long again.
    """

    limit: int
    pause: float = 30.0
    reason: str = ""
    passing: bool = True
    _row: int = 0
    _probe_at: float = math.inf

    def success(self) -> None:
        self._row, self.reason, self.passing, self._probe_at = 0, "", True, math.inf

    def failure(self, time: float, kind: str, reason: str, *, fatal: bool) -> bool:
        """Counts a failed call; whether the circuit opened by it. A request that is refused for what it is (HTTP 400,
        at once and unpaid) says nothing about the next one."""
        self._row += kind != "bad_request"
        if not fatal and self._row < self.limit:
            return False
        opened = not self.reason
        why = "" if fatal else f"{self._row} calls in a row failed, the last: "
        self.reason, self.passing = f"not asked: {why}{reason}", not fatal
        self._probe_at = time + self.pause
        return opened

    def closed_to(self, time: float) -> str:
        """Why a call must not be made now; "" if it may (it is then the probe, if the circuit is open)."""
        if not self.reason:
            return ""
        if time >= self._probe_at:
            self._probe_at = time + self.pause
            return ""
        return self.reason
