"""What the turns of a side-by-side run come to: medians, ratios with intervals, fractions of the machine's limits."""

import argparse
import math
import statistics
from typing import Any

from benchmarks.contenders import OURS
from benchmarks.workload import Shape, real_tokens, work_flops


def contender_figures(
    task: str, rows: Any, options: argparse.Namespace, machine: dict[str, Any], ran: dict[str, Any]
) -> dict[str, Any]:
    """One contender's figures.

    Args:
      machine: `flops` per second of the machine. ran: {cold, turns, peak_bytes} and, after two starts, `warm`.

    `compile_seconds` is what the steps and passes before the measured ones took beyond the usual time.
    """
    turns = ran["turns"]
    median = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    seconds, kind = median["seconds"], _kind(task)
    steps = len(rows) / options.batch
    flops = work_flops(kind, rows, options.shape, options.epochs)
    figures: dict[str, Any] = {name: round(value, 4) for name, value in median.items()}
    figures |= {
        "tokens_per_second": round(real_tokens(kind, rows) / seconds, 1),
        "mfu": round(flops / seconds / machine["flops"], 4),
        "peak_bytes": ran["peak_bytes"],
        "turns": [round(turn["seconds"], 4) for turn in turns],
    }
    for start, suffix in (("cold", ""), ("warm", "_warm")):
        if start in ran:
            ready = ran[start]
            figures |= {f"{name}{suffix}": round(value, 3) for name, value in ready.items()}
            spent = ready["first_step_seconds"] + ready["warmup_seconds"]
            counted = 1 + options.settling + steps * options.warmups
            figures[f"compile_seconds{suffix}"] = round(max(0.0, spent - counted * seconds / steps), 3)
    return figures


def summary(
    task: str, rows: Any, options: argparse.Namespace, machine: dict[str, Any], figures: dict[str, Any]
) -> dict[str, Any]:
    """The figures of a task: of this package, of its peers, and the ratios of one to the other."""
    ours = figures[OURS]
    peers = {name: value for name, value in figures.items() if name != OURS}
    bound = bound_seconds(task, rows, options, machine)
    names = ("lengths", "batch", "sequence", "steps")
    result: dict[str, Any] = {name: getattr(options, name) for name in names}
    result |= {
        "limits": {name: machine[name] for name in ("flops", "bytes_per_second")},
        "ours": ours,
        "peers": peers,
        "compile_seconds": ours["compile_seconds"],
        "compile_seconds_warm": ours.get("compile_seconds_warm"),
        "bound_seconds": round(bound, 4),
        "roofline_fraction": round(bound / ours["seconds"], 4),
    }
    if peers:
        better = min(peers, key=lambda name: peers[name]["seconds"])
        least = min(peer["peak_bytes"] for peer in peers.values())
        logs = [math.log(b / a) for a, b in zip(ours["turns"], peers[better]["turns"])]
        result |= {
            "better_peer": better,
            "ratio_to_better_peer": round(peers[better]["seconds"] / ours["seconds"], 3),
            "ratio_ci95": interval(logs),
            "peak_memory_ratio": round(ours["peak_bytes"] / least, 3),
        }
    if peers and task == "compile":
        quickest = min(peer["compile_seconds"] for peer in peers.values())
        result["compile_ratio"] = round(ours["compile_seconds"] / quickest, 3)
    return result


def interval(logs: list[float]) -> list[float] | None:
    """The 95% interval of a ratio from its logarithm in each turn (Student's t); None of fewer than two."""
    if len(logs) < 2:
        return None
    from scipy import stats

    spread = float(stats.t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    mean = statistics.mean(logs)
    return [round(math.exp(mean - spread), 3), round(math.exp(mean + spread), 3)]


def bound_seconds(task: str, rows: Any, options: argparse.Namespace, machine: dict[str, Any]) -> float:
    """The least time that the machine needs for the work. Training: its operations at the rate of the matrix product.
    Generation: the prompts' operations, words apart, at that rate, and for every drawn token of a full batch one
    reading of the weights and of the batch's cache at the rate of memory, if that takes longer than the operations.
    PPO: both, the policy's log-probs being those of generation."""
    shape: Shape = options.shape
    if task not in ("generate", "ppo"):
        return work_flops(_kind(task), rows, shape) / machine["flops"]
    width = 2 if options.dtype == "bfloat16" else 4
    generation = work_flops("generate", rows, shape)
    drawn = generation - sum(shape.forward_flops(len(row["prompt"])) for row in rows)
    prompts = sum(shape.forward_flops(len(row["prompt"]), words=False) for row in rows)
    steps = sum(row["new"] for row in rows) / options.batch
    weights = shape.matrix_parameters * width
    lengths = [(len(row["prompt"]) + row["new"] / 2) * row["new"] for row in rows]
    cache = 2 * shape.kv_heads * shape.head_dim * shape.layers * width * sum(lengths)
    reading = (steps * weights + cache) / machine["bytes_per_second"]
    bound = prompts / machine["flops"] + max(drawn / machine["flops"], reading)
    if task == "ppo":
        bound += (work_flops("ppo", rows, shape, options.epochs) - generation) / machine["flops"]
    return bound


def _kind(task: str) -> str:
    return "sft" if task == "compile" else task
