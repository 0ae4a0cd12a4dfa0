"""What the service counts while it runs: for Prometheus at `/metrics`, and for the dashboard.

Counters are this process's since it started. Gauges over the store are read when they are asked for, and not more often
than the store's size allows.
"""

import asyncio
import threading
import time
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from laif_jax.labeling.calls import Endpoint
from laif_jax.records import Comparison

# From a simulated call to a model that thinks for minutes.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
LATEST = 20  # results that are remembered for the dashboard
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Shown:
    """A judgement, in JSON, and the comparison that it is about."""

    job: str
    comparison: Comparison
    record: str


class _Ended:
    """Calls of one endpoint with one outcome: how many took how long. (The library's own counters take a lock each.)"""

    def __init__(self, endpoint: str, outcome: str) -> None:
        self.endpoint, self.outcome = endpoint, outcome
        self.seconds = 0.0
        self.counts = [0] * (len(BUCKETS) + 1)  # by the first bucket that holds them

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.seconds += seconds


class Meters:
    """Counts calls as they end. Its methods are called in the event loop, and are cheap."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.answered = self.failed = 0
        self.latest: deque[Shown] = deque(maxlen=LATEST)
        self._ended: dict[tuple[str, str], _Ended] = {}
        self.registry.register(self)

    def call(self, endpoint: Endpoint, outcome: str, seconds: float) -> None:
        """A call ended. `outcome`: "answered", or the kind of its error."""
        ended = self._ended.get((endpoint.key, outcome))
        if ended is None:
            ended = self._ended[endpoint.key, outcome] = _Ended(endpoint.name, outcome)
        ended.add(seconds)
        if outcome == "answered":
            self.answered += 1
        else:
            self.failed += 1

    def result(self, work: Any, position: int, record: str) -> None:
        """An item of a `Work` has its result, `record` in JSON. Those of comparisons are remembered for a while."""
        at = getattr(work, "comparison", None)
        if at is not None:
            self.latest.append(Shown(work.id, at(position), record))

    def collect(self) -> Iterator[Metric]:
        """What ended, for Prometheus. Several endpoints may have one name (and differ in their options)."""
        calls: Counter[tuple[str, str]] = Counter()
        seconds: defaultdict[str, float] = defaultdict(float)
        counts: dict[str, list[int]] = {}
        for ended in list(self._ended.values()):
            calls[ended.endpoint, ended.outcome] += sum(ended.counts)
            seconds[ended.endpoint] += ended.seconds
            before = counts.get(ended.endpoint, [0] * len(ended.counts))
            counts[ended.endpoint] = [a + b for a, b in zip(before, ended.counts, strict=True)]
        family = CounterMetricFamily(
            "laif_calls", "Calls that ended, by endpoint and outcome.", labels=("endpoint", "outcome")
        )
        for labels, count in calls.items():
            family.add_metric(labels, count)
        yield family
        times = HistogramMetricFamily(
            "laif_call_seconds", "Time of calls that ended, answered or not.", labels=("endpoint",)
        )
        names = [floatToGoString(bound) for bound in (*BUCKETS, float("inf"))]
        for endpoint, found in counts.items():
            upto = list(accumulate(found))
            times.add_metric([endpoint], list(zip(names, upto, strict=True)), seconds[endpoint])
        yield times


Value = TypeVar("Value")


class Cached(Generic[Value]):
    """A value that is costly to read: read again at most every `least` seconds, and so that reading takes at most a
    twentieth of the time."""

    def __init__(self, read: Callable[[], Awaitable[Value]], least: float = 1.0) -> None:
        self._read, self._least = read, least
        self._value: Value | None = None
        self._until = 0.0
        self._lock = asyncio.Lock()

    async def get(self) -> Value:
        async with self._lock:
            if self._value is None or time.monotonic() > self._until:
                began = time.monotonic()
                self._value = await self._read()
                cost = time.monotonic() - began
                self._until = time.monotonic() + max(self._least, 20 * cost)
            return self._value


@dataclass(frozen=True)
class Gauge:
    """One gauge: its values by the values of its labels."""

    name: str
    text: str
    labels: tuple[str, ...]
    values: dict[tuple[str, ...], float]


class _Snapshot:
    """A collector that gives gauges which were read before."""

    def __init__(self, gauges: list[Gauge]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        for gauge in self._gauges:
            family = GaugeMetricFamily(gauge.name, gauge.text, labels=gauge.labels)
            for labels, value in gauge.values.items():
                family.add_metric(list(labels), value)
            yield family


_scraping = threading.Lock()


def exposition(meters: Meters, gauges: list[Gauge]) -> bytes:
    """The text that Prometheus reads."""
    registry = CollectorRegistry()
    registry.register(_Snapshot(gauges))
    with _scraping:
        return generate_latest(meters.registry) + generate_latest(registry)
