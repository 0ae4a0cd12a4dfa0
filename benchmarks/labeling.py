"""Throughput, memory and opening time of the labelling engine: python -m benchmarks.labeling [--json].

A simulated endpoint that answers after 50 ms is asked through the whole path: claims, the lane, the parser, and a store
on disk with synchronous commits. `bound` is calls in flight / latency, which no client can pass. `--rows N` then runs
one job of N judgements that are made as they are asked for, and reports by how much memory grew from its first tenth to
its end; it opens the store again and times how long finding what is left to do takes. `--fill` writes those N rows
directly, which is faster, where only the opening is to be measured.

`--against distilabel` puts the same prompts to a simulated endpoint over HTTP, by our service and by distilabel, and
gives the ratios; see `benchmarks.labeling_peers`.

With --json the last line is one JSON object; all other lines are for people.
"""

import argparse
import asyncio
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from laif_jax.config.schema import SimulatedSpec
from laif_jax.labeling import schema
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.critic import load_critic
from laif_jax.labeling.judge import JudgeWork
from laif_jax.labeling.runner import Runner
from laif_jax.labeling.store import Store, now
from laif_jax.records import Comparison, Completion, Prompt


class Planted(Sequence[Comparison]):
    """Comparisons that exist only while they are looked at."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
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


def make_work(items: Sequence[Comparison], in_flight: int, latency: float) -> BenchWork:
    simulated = SimulatedSpec(world="planted", latency=latency)
    endpoint = Endpoint(provider="simulated", simulated=simulated, concurrency=in_flight)
    return BenchWork(endpoint, load_critic("laif_basic"), items, "seeded", 0)


def rss_mb() -> float:
    """Resident memory of this process now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


async def run(folder: str, items: Sequence[Comparison], in_flight: int, latency: float) -> dict[str, Any]:
    """One job; judgements per second of wall time, from the first call to the last commit."""
    count = len(items)
    store = Store(folder)
    runner = Runner(store)
    began, cpu = time.perf_counter(), time.process_time()
    status = runner.submit(make_work(items, in_flight, latency))
    early = 0.0
    while status.state == "running":
        await asyncio.sleep(0.01)
        found = await runner.status(status.id)
        assert found is not None
        status = found
        if not early and status.done >= count // 10:
            early = rss_mb()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    late = rss_mb()
    await runner.close()
    store.close()
    assert status.state == "done", status.reason
    assert status.done == count
    # The last calls of a job still take one latency when nothing follows them.
    rate, bound = count / (seconds - latency), in_flight / latency
    return {
        "in_flight": in_flight,
        "judgements": count,
        "throughput": round(rate, 1),
        "bound": round(bound, 1),
        "ratio_to_bound": round(rate / bound, 4),
        "cpu_us_per_judgement": round(cpu / count * 1e6, 1),
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


def measure(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    levels = []
    for in_flight in options.in_flight:
        count = max(1000, int(options.seconds * min(in_flight / options.latency, 5000)))
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            levels.append(asyncio.run(run(folder, list(Planted(count)), in_flight, options.latency)))
        level = levels[-1]
        print(
            f"{in_flight:5} in flight: {level['throughput']:8.1f} judgements/s, bound {level['bound']:8.1f}, "
            f"ratio {level['ratio_to_bound']:.3f}, {level['cpu_us_per_judgement']:.0f} us CPU each",
            file=sys.stderr,
        )
    result |= levels[-1]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.fill:
            fill(folder, options.rows)
            result |= measure_open(folder, "filled")
        else:
            large = asyncio.run(run(folder, Planted(options.rows), 1000, options.latency))
            print(f"{options.rows:,} rows: {large}", file=sys.stderr)
            result |= {name: large[name] for name in ("rss_mb", "rss_growth_mb")}
            result |= measure_open(folder, f"bench-{options.rows}"[:16])
    return result | {"rows": options.rows, "levels": levels, "tables": len(schema.metadata.tables)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--in-flight", type=int, nargs="+", default=[8, 64, 1000, 256])
    parser.add_argument("--latency", type=float, default=0.05, help="seconds per simulated call")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="of each throughput run, if the bound is reached"
    )
    parser.add_argument("--rows", type=int, default=20_000, help="of the store that is opened")
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
