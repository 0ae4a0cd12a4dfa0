"""Throughput, memory and opening time of the labelling engine: python -m benchmarks.labeling [--json].

An endpoint that answers after 50 ms is asked through the whole path: claims, the lane, the parser, and a store on disk
with synchronous commits. `bound` is calls in flight / latency, which no client can pass; `throughput` counts from the
job's submission to its last commit. The endpoint is the provider `simulated`, or, with `--client plain` or `sdk`, a
server in a process of its own (`benchmarks.fixed_endpoint`). `one_core` is a run with 1,000 calls in flight on one
core.

`--rows N` then runs one job of N judgements that are made as they are asked for, and reports by how much memory grew
from its first tenth to its end; it opens the store again and times how long finding what is left to do takes. `--fill`
writes those N rows directly, which is faster, where only the opening is to be measured.

`--against distilabel` puts the same prompts to a simulated endpoint over HTTP, by our service and by distilabel, and
gives the ratios; see `benchmarks.labeling_peers`.

With --json the last line is one JSON object; all other lines are for people.
"""

import argparse
import asyncio
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from laif_jax.config.schema import SimulatedSpec
from laif_jax.labeling import schema
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.critic import load_critic
from laif_jax.labeling.judge import JudgeWork
from laif_jax.labeling.runner import Runner
from laif_jax.labeling.store import Store, now
from laif_jax.records import Comparison, Completion, Prompt


class Planted(Sequence[Comparison]):
    """Comparisons that exist only while they are under way."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._made = lru_cache(maxsize=4096)(self._make)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._made(index)

    @staticmethod
    def _make(index: int) -> Comparison:
        prompt = Prompt.from_text(f"Question {index}: what is {index} + {index}, and why does it matter?")
        sides = [
            Completion(
                prompt_id=prompt.id,
                generator=name,
                text=f"Answer {name} of {index}. " + "It has a few more words. " * 4,
                meta={"quality": quality},
            )
            for name, quality in (("a", 0.2 + 0.6 * (index % 2)), ("b", 0.5))
        ]
        return Comparison(prompt=prompt, a=sides[0], b=sides[1])


class BenchWork(JudgeWork):
    """A job whose id does not need all its items at once."""

    @cached_property
    def id(self) -> str:
        return f"bench-{len(self)}"[:16]


def simulated(in_flight: int, latency: float, *, paid: bool = False) -> Endpoint:
    """The provider `simulated`, in this process. `paid`: it has a price, so that money is reserved and settled."""
    spec = SimulatedSpec(world="planted", latency=latency)
    endpoint = Endpoint(provider="simulated", simulated=spec, concurrency=in_flight)
    return endpoint.model_copy(update={"prompt_price": 1.0, "completion_price": 2.0}) if paid else endpoint


def remote(url: str, in_flight: int, client: Literal["plain", "sdk"]) -> Endpoint:
    """An endpoint over HTTP."""
    return Endpoint(provider="openai", model="fixed", base_url=url, concurrency=in_flight, client=client)


@contextlib.contextmanager
def server(latency: float) -> Generator[str]:
    """The address of an endpoint over HTTP, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.fixed_endpoint", "--latency", str(latency)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def rss_mb() -> float:
    """Resident memory of this process now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


async def run(folder: str, items: Sequence[Comparison], endpoint: Endpoint, latency: float) -> dict[str, Any]:
    """One job; judgements per second of wall time, from its submission to its last commit."""
    count, in_flight = len(items), endpoint.concurrency
    store = Store(folder)
    runner = Runner(store)
    work = BenchWork(endpoint, load_critic("laif_basic"), items, "seeded", 0)
    began, cpu, loop_cpu = time.perf_counter(), time.process_time(), time.thread_time()
    status = runner.submit(work)
    early = 0.0
    while status.state == "running":
        await asyncio.sleep(0.01)
        found = await runner.status(status.id)
        assert found is not None
        status = found
        if not early and status.done >= count // 10:
            early = rss_mb()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    loop_cpu = time.thread_time() - loop_cpu
    late = rss_mb()
    await runner.close()
    store.close()
    assert status.state == "done", status.reason
    assert status.done == count
    rate, bound = count / seconds, in_flight / latency
    return {
        "in_flight": in_flight,
        "judgements": count,
        "throughput": round(rate, 1),
        "bound": round(bound, 1),
        "ratio_to_bound": round(rate / bound, 4),
        "cpu_us_per_judgement": round(cpu / count * 1e6, 1),
        "loop_cpu_us_per_judgement": round(loop_cpu / count * 1e6, 1),
        "rss_mb": round(late, 1),
        "rss_growth_mb": round(late - early, 1),
    }


def fill(folder: str, rows: int) -> None:
    """Writes the rows of a job of `rows` judgements, of which the last hundred are not answered."""
    store, date = Store(folder), now()
    text = json.dumps({"messages": [{"role": "user", "content": "x" * 600}]})
    for start in range(0, rows, 5000):
        batch: dict[str, list[dict[str, Any]]] = {
            name: [] for name in ("requests", "request_texts", "responses", "results", "job_items")
        }
        for number in range(start, min(start + 5000, rows)):
            key = f"{(number * 0x9E3779B97F4A7C15) % 2**64:016x}".ljust(64, "0")
            done = number < rows - 100
            batch["requests"].append(
                {
                    "key": key,
                    "endpoint_key": "e",
                    "model": "m",
                    "state": "ok" if done else "pending",
                    "attempts": 1,
                }
                | {"reason": "", "owner": "", "job": "", "reserved": 0, "created": date, "updated": date}
            )
            batch["request_texts"].append({"key": key, "request": text})
            if done:
                batch["responses"].append(
                    {"key": key, "body": "y" * 300, "model": "m", "system_fingerprint": "", "latency": 0.05}
                    | {"attempt": 0, "date": date}
                )
                batch["results"].append(
                    {
                        "key": key[:16],
                        "kind": "judgement",
                        "item": key[:16],
                        "status": "ok",
                        "endpoint_key": "e",
                    }
                    | {"critic_hash": "c" * 64, "record": "z" * 600, "updated": date}
                )
                batch["job_items"].append(
                    {
                        "job": "filled",
                        "position": number,
                        "part": 0,
                        "result": key[:16],
                        "status": "ok",
                        "run": 1,
                    }
                )
        store.write(None, **batch).result()
    store.close()


def measure_open(folder: str, job: str) -> dict[str, Any]:
    """Opens a store and finds what is left to do: requests by state, and results of the job by status."""
    began = time.perf_counter()
    store = Store(folder)
    left = store.left()
    opened = time.perf_counter() - began
    with store.engine.connect() as connection:
        run_number = connection.exec_driver_sql("SELECT max(run) FROM job_items").scalar() or 0
    counts = store.job_counts(job, run_number)
    seconds = time.perf_counter() - began
    store.close()
    size = sum(file.stat().st_size for file in Path(folder).glob("labels.sqlite*"))
    return {
        "open_seconds": round(seconds, 3),
        "open_and_left_seconds": round(opened, 3),
        "left": left,
        "stored": sum(counts.values()),
        "store_mb": round(size / 1e6, 1),
    }


@contextlib.contextmanager
def one_core() -> Generator[None]:
    """Everything that starts inside runs on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def measure_level(options: argparse.Namespace, in_flight: int, seconds: float) -> dict[str, Any]:
    """Throughput with so many calls in flight, over about so many seconds if the bound is reached."""
    rounds = max(1, round(seconds * min(1 / options.latency, 5000 / in_flight)))
    items = list(Planted(rounds * in_flight))  # made before: no part of what is measured
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder))
        if options.client == "simulated":
            endpoint = simulated(in_flight, options.latency, paid=options.paid)
        else:
            endpoint = remote(stack.enter_context(server(options.latency)), in_flight, options.client)
        level = asyncio.run(run(folder, items, endpoint, options.latency))
    print(
        f"{in_flight:5} in flight: {level['throughput']:8.1f} judgements/s, bound {level['bound']:8.1f}, "
        f"ratio {level['ratio_to_bound']:.3f}, CPU each {level['cpu_us_per_judgement']:.0f} us, "
        f"{level['loop_cpu_us_per_judgement']:.0f} us of it in the event loop's thread",
        file=sys.stderr,
    )
    return level


def measure_rows(options: argparse.Namespace) -> dict[str, Any]:
    """Memory over a job of many rows, and the opening of its store."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.fill:
            fill(folder, options.rows)
            return measure_open(folder, "filled") | {"rows": options.rows}
        endpoint = simulated(1000, options.latency)
        large = asyncio.run(run(folder, Planted(options.rows), endpoint, options.latency))
        print(f"{options.rows:,} rows: {large}", file=sys.stderr)
        kept = {name: large[name] for name in ("rss_mb", "rss_growth_mb")}
        kept["rows_seconds"] = round(options.rows / large["throughput"], 3)
        return kept | measure_open(folder, f"bench-{options.rows}"[:16]) | {"rows": options.rows}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    levels = [measure_level(options, in_flight, options.seconds) for in_flight in options.in_flight]
    result = dict(levels[-1])
    if options.one_core:
        with one_core():
            result["one_core"] = measure_level(options, options.one_core, min(options.seconds, 4.0))
    if options.rows:
        result |= measure_rows(options)
    return result | {"client": options.client, "levels": levels, "tables": len(schema.metadata.tables)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument(
        "--one-core", type=int, default=1000, help="calls in flight of a run on one core (0: none)"
    )
    parser.add_argument("--latency", type=float, default=0.05, help="seconds per call")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each run, if the bound is reached")
    parser.add_argument(
        "--client",
        choices=("simulated", "plain", "sdk"),
        default="simulated",
        help="the endpoint is in this process, or behind HTTP: asked without or with the official package",
    )
    parser.add_argument("--paid", action="store_true", help="the simulated endpoint has a price")
    parser.add_argument("--rows", type=int, default=20_000, help="of the store that is opened (0: none)")
    parser.add_argument("--fill", action="store_true", help="write these rows directly, without calls")
    parser.add_argument("--folder", help="where stores are made (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--against", choices=("distilabel",), help="also run this peer, and give the ratio")
    parser.add_argument(
        "--peer-python", type=Path, help="its interpreter (default: one is made below build/)"
    )
    options = parser.parse_args()
    result = measure(options)
    if options.against:
        from benchmarks.labeling_peers import compare, peer_python  # not in the memory that was measured

        python = options.peer_python or peer_python()
        peer = compare(python, judgements=4000, in_flight=options.in_flight[-1], latency=options.latency)
        result |= {"against": peer, "ratio": peer["ratio"]}
    print(json.dumps(result) if options.json else "\n".join(f"{k:24} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
