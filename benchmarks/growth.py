"""How cost grows: time, work and memory of one step against one size at a time.

    python -m benchmarks.growth run [--only CURVE ...] [--minutes N] [--again]    one JSON file per curve
    python -m benchmarks.growth page                                              the section, with its figures

Each point has two sources. The compiler counts a train step's operations, its memory traffic and its peak memory, which
are exact whatever else the machine does; and a process of its own, the contender of the side-by-side runs, takes steps
of that size against the clock. Points are written as soon as they are there; those that are there are kept. Labelled
rows go through the labelling engine, and into a store that is opened again.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contenders import Contender, scripts
from benchmarks.roofline import describe_machine
from benchmarks.workload import Shape, generation_work, real_tokens, training_work, work_flops

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "growth"
BASE = Shape(vocab=8192, hidden=128, mlp=384, layers=4, heads=4, kv_heads=2, head_dim=32, tied=True)
TURNS, LEAST = 3, 1.0  # passes that are timed, and the seconds that they should take together


@dataclass(frozen=True)
class Job:
    """One step: `rows` sequences (pairs of DPO, prompts of generation) of `length` tokens, on `devices`."""

    task: str = "sft"
    shape: Shape = BASE
    rows: int = 4
    length: int = 256
    new: int = 0
    devices: int = 1
    timed: bool = True


@dataclass(frozen=True)
class Curve:
    """What grows. `job` gives the step of a size; None: labelled rows."""

    name: str
    axis: str
    sizes: tuple[int, ...]
    job: Callable[[int], Job] | None
    fixed: str


def _shaped(**changes: int) -> Job:
    return Job(shape=dataclasses.replace(BASE, **changes))


_POWERS = (1, 2, 4, 8, 16, 32)
CURVES = {
    curve.name: curve
    for curve in (
        Curve(
            "sequence",
            "tokens of a row",
            (256, 512, 1024, 2048, 4096, 8192),
            lambda n: Job(rows=1, length=n),
            "SFT, 1 row",
        ),
        Curve("batch", "rows of a batch", _POWERS, lambda n: Job(rows=n), "SFT, rows of 256 tokens"),
        Curve("layers", "layers", _POWERS, lambda n: _shaped(layers=n), "SFT, 4 rows of 256 tokens"),
        Curve(
            "vocabulary",
            "words of the vocabulary",
            (32768, 65536, 131072, 262144),
            lambda n: _shaped(vocab=n),
            "SFT, 4 rows of 256 tokens",
        ),
        Curve(
            "pairs", "pairs of a batch", _POWERS, lambda n: Job(task="dpo", rows=n), "DPO, pairs of 2 x 256 tokens"
        ),
        Curve(
            "devices",
            "simulated devices",
            (1, 2, 4, 8),
            lambda n: Job(rows=4 * n, devices=n, timed=False),
            "SFT, 4 rows of 256 tokens per device, weights split over all of them (fsdp); per device",
        ),
        Curve(
            "prompts",
            "prompts of a batch",
            _POWERS,
            lambda n: Job(task="generate", rows=n, length=192, new=64),
            "generation, 128 + 64 tokens",
        ),
        Curve(
            "drawn",
            "drawn tokens of a row",
            (64, 128, 256, 512, 1024),
            lambda n: Job(task="generate", rows=4, length=64 + n, new=n),
            "generation, 4 prompts of 64 tokens",
        ),
        Curve(
            "labels",
            "labelled rows",
            (1_000, 10_000, 100_000, 1_000_000),
            None,
            "judgements of a simulated endpoint, 1,000 in flight, into a store on disk",
        ),
    )
}  # fmt: skip


# ---- one point -------------------------------------------------------------------------------------------------


def measure(curve: Curve, size: int) -> dict[str, Any]:
    """A point: what the compiler counts, and what the clock says."""
    if curve.job is None:
        return {"size": size} | label(size)
    job = curve.job(size)
    point: dict[str, Any] = {"size": size}
    if job.task != "generate":
        point |= _count_apart(curve.name, size, job.devices)
    return point | (run(job) if job.timed else {})


def count(job: Job) -> dict[str, Any]:
    """What the compiler tells of the train step, per device, and what the model needs (`needed_flops`)."""
    from laif_jax.aot.compiling import compile_stage, target
    from laif_jax.config.schema import CompileConfig

    shape = job.shape
    sizes = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": max(2048, job.length),
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(sizes))
        stage = {"steps": 10, "batch_size": job.rows, "max_length": job.length, "max_prompt_length": 64}
        model = {"source": folder, "dtype": "float32", "remat": "none"}
        config = CompileConfig.model_validate(
            {"name": "growth", "model": model, "mesh": {"fsdp": -1}, job.task: stage}
        )
        report = compile_stage(config, target(config, None), job.task).to_json()
    counted = {name: report[name] for name in ("step_flops", "step_bytes", "argument_bytes", "temp_bytes")}
    rows = training_work(job.task, "full", 1, job.length, shape, None)
    return counted | {
        "needed_flops": work_flops(job.task, rows, shape) * job.rows / job.devices,
        "sent_bytes": sum(row["bytes"] for row in report["collectives"].values()),
        "compile_seconds": round(sum(program["compile_seconds"] for program in report["programs"]), 2),
    }


def _count_apart(name: str, size: int, devices: int) -> dict[str, Any]:
    """`count` in a process of its own, which has so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.growth", "count", "--only", name, "--size", str(size)],
        cwd=ROOT,
        env=dict(os.environ) | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"counting {name} {size} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(job: Job) -> dict[str, Any]:
    """Seconds of a step, and the peak memory of its process."""
    if job.task == "generate":
        rows = generation_work("full", job.rows, job.length - job.new, job.new, job.shape)
    else:
        rows = training_work(job.task, "full", job.rows, job.length, job.shape, None)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "work.json").write_text(json.dumps(rows))
        told: dict[str, Any] = {
            "task": job.task,
            "work": str(folder / "work.json"),
            "cache": str(folder / "cache"),
        }
        told |= {"shape": dataclasses.asdict(job.shape), "lengths": "full", "dtype": "float32"}
        told |= {"batch": job.rows, "sequence": job.length, "new": job.new, "remat": "none"}
        (folder / "job.json").write_text(json.dumps(told))
        python, script = next(iter(scripts(job.task, [], folder).values()))
        contender = Contender("laif_jax", python, script, folder / "job.json", folder)
        try:
            passes = max(1, round(LEAST / TURNS / contender.passes(1)["seconds"]))
            turns = [contender.passes(passes)["seconds"] / passes for _ in range(TURNS)]
            peak = contender.end()
        finally:
            contender.kill()
    seconds = statistics.median(turns)
    return {
        "seconds": seconds,
        "tokens_per_second": real_tokens(job.task, rows) / seconds,
        "process_peak_bytes": peak,
    }


def label(rows: int) -> dict[str, Any]:
    """Judgements through the labelling engine: rows per second, memory, and opening the store again."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.labeling",
        "--json",
        "--in-flight",
        "1000",
        "--one-core",
        "0",
    ]
    command += ["--seconds", "0.001", "--rows", str(rows)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"labelling {rows} rows failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    seconds = found["rows_seconds"]
    return {
        "seconds": seconds,
        "rows_per_second": rows / seconds,
        "process_peak_bytes": found["rss_mb"] * 1e6,
        "grown_bytes": max(0.0, found["rss_growth_mb"]) * 1e6,
        "open_seconds": found["open_seconds"],
        "store_bytes": found["store_mb"] * 1e6,
    }


# ---- all of them -----------------------------------------------------------------------------------------------


def read(name: str) -> list[dict[str, Any]]:
    """The points of a curve that have been measured, by size."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["points"] if path.exists() else []


def measure_all(only: list[str], minutes: float, again: bool) -> None:
    """Measures the points that are not there, small ones first, until the time is over."""
    end = time.monotonic() + 60 * minutes
    RESULTS.mkdir(parents=True, exist_ok=True)
    curves = [curve for name, curve in CURVES.items() if not only or name in only]
    if again:
        for curve in curves:
            (RESULTS / f"{curve.name}.json").unlink(missing_ok=True)
    machine = describe_machine()
    for place in range(max(len(curve.sizes) for curve in curves)):
        for curve in curves:
            sizes = curve.sizes[place : place + 1]
            for size in sizes:
                points = read(curve.name)
                if time.monotonic() < end and size not in [point["size"] for point in points]:
                    _add(curve, size, points, machine)


def _add(curve: Curve, size: int, points: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    start = time.monotonic()
    try:
        point = measure(curve, size)
    except RuntimeError as error:  # told, and the other points go on; the next run tries again
        print(f"{curve.name} {size}: {error}", file=sys.stderr, flush=True)
        return
    point["load"] = round(os.getloadavg()[0], 1)
    told = {"axis": curve.axis, "fixed": curve.fixed, "machine": machine}
    text = json.dumps(told | {"points": sorted([*points, point], key=lambda p: p["size"])}, indent=1)
    (RESULTS / f"{curve.name}.json").write_text(text + "\n")
    print(f"{curve.name} {size}: {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "page", "count"))
    parser.add_argument("--only", nargs="*", default=[], choices=tuple(CURVES), help="these curves")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--again", action="store_true", help="measure points that are there, too")
    parser.add_argument(
        "--size", type=int, help="of `count`, which prints what the compiler tells of one step"
    )
    options = parser.parse_args()
    if options.what == "run":
        measure_all(options.only, options.minutes, options.again)
    elif options.what == "page":
        from benchmarks.growth_page import section

        print("\n".join(section()))
    else:
        (name,) = options.only
        job = CURVES[name].job
        assert job is not None
        print(json.dumps(count(job(options.size))))


if __name__ == "__main__":
    main()
