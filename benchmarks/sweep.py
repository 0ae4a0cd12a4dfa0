"""Times a sweep of seeds of the synthetic world: together, one by one in one process, and as one command per seed.

    python -m benchmarks.sweep [--seeds 16] [--json]

The study is that of `configs/quickstart.yaml` with a smaller model and fewer examples: per seed a base model is
pretrained, then SFT, samples, labels, DPO, and an evaluation of both. All three ways make the same artifacts: their
keys are compared, and so are the losses of every training run. They are timed in turns, `--repeats` times, from the
start of the command to its end; all share one compilation cache, which the first turn fills and which therefore does
not count.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
ARMS = (
    "arms=[{name: SFT, teacher: weak, share: 0.3},"
    " {name: LAIF, teacher: weak, share: 0.3, optimize: dpo, critic: strong, pairs: policy_vs_policy}]"
)


def world(hidden: int, layers: int, prompts: int) -> list[str]:
    """The overrides of the study."""
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_layers": layers,
        "num_heads": 4,
        "max_position": 64,
    }
    return [
        f"model.scratch={json.dumps(sizes)}",
        "seeds=1",
        f"data.train.limit={prompts}",
        f"data.eval.limit={prompts // 4}",
        f"pretrain.examples={4 * prompts}",
        "pretrain.epochs=1",
        "pretrain.batch_size=16",
        "dpo.batch_size=8",
        ARMS,
        "questions=[]",
        "labeling.poll=0.1",
    ]


def laif(*arguments: str, cache: Path) -> tuple[float, float]:
    """Seconds of one command, and seconds of CPU: of it and of the processes that it ended."""
    started, cpu = time.perf_counter(), cpu_of_children()
    done = subprocess.run(
        [sys.executable, "-m", "laif_jax.cli", *arguments],
        env=os.environ | {"LAIF_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(
            f"laif {' '.join(arguments[:2])} ended with {done.returncode}:\n{done.stderr[-3000:]}"
        )
    return time.perf_counter() - started, cpu_of_children() - cpu


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def losses(out: Path) -> dict[str, list[float]]:
    """The losses of every training run by its stage's folder."""
    return {
        file.parent.parent.name: [json.loads(line)["loss"] for line in file.open()]
        for file in sorted(out.glob("**/train/metrics.jsonl"))
    }


def difference(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    """The largest relative difference of two sets of losses, which must be of the same stages and steps."""
    if a.keys() != b.keys() or any(len(a[name]) != len(b[name]) for name in a):
        raise SystemExit(f"the two ways did not make the same stages: {sorted(set(a) ^ set(b))[:5]}")
    return max(
        (abs(x - y) / max(abs(x), 1e-6) for name in a for x, y in zip(a[name], b[name], strict=True)),
        default=0.0,
    )


def measure(
    seeds: int, overrides: list[str], repeats: int, commands: bool, together: int | None
) -> dict[str, Any]:
    """Seconds of each way per turn, ratios of medians, and how far the losses are apart.

    Seconds of CPU are told beside: on a machine that does other work too they say more.
    """
    axis = f"seed={list(range(seeds))}"
    times: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    apart = 0.0
    with tempfile.TemporaryDirectory(prefix="laif-sweep-") as folder:
        cache = Path(folder) / "cache"
        how = ["--together", str(together)] if together else []

        def sweep(out: Path, *options: str) -> tuple[float, float]:
            return laif("sweep", str(CONFIG), f"out={out}", *overrides, axis, *options, cache=cache)

        def one_command_each(out: Path) -> tuple[float, float]:
            runs = [
                laif("run", str(CONFIG), f"out={out / str(seed)}", *overrides, f"seed={seed}", cache=cache)
                for seed in range(seeds)
            ]
            return sum(wall for wall, _ in runs), sum(used for _, used in runs)

        ways: dict[str, Callable[[Path], tuple[float, float]]] = {
            "together": lambda out: sweep(out, *how),
            "one_by_one": lambda out: sweep(out, "--one-by-one"),
        }
        if commands:
            ways["one_command_each"] = one_command_each
        for repeat in range(repeats):
            found = {}
            for name, way in ways.items():
                out = Path(folder) / f"{name}-{repeat}"
                wall, used = way(out)
                times.setdefault(name, []).append(wall)
                cpu.setdefault(name, []).append(used)
                found[name] = losses(out)
                print(
                    f"turn {repeat + 1}: {name}: {wall:.1f} s, {used:.1f} s of CPU",
                    file=sys.stderr,
                    flush=True,
                )
                shutil.rmtree(out)
            apart = max(apart, *(difference(found["together"], other) for other in found.values()))
    others = [name for name in ways if name != "together"]
    return {
        "seeds": seeds,
        "seconds": times,
        "cpu_seconds": cpu,
        **{f"ratio_to_{name}": ratio(times, name) for name in others},
        **{f"cpu_ratio_to_{name}": ratio(cpu, name) for name in others},
        "largest_relative_difference_of_losses": apart,
    }


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    """How many times as long a way takes as training together, by the medians over turns; the first turn, in which
    `together` compiles for all, counts only if it is the only one."""
    return statistics.median(seconds[name][1:] or seconds[name]) / statistics.median(
        seconds["together"][1:] or seconds["together"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2, help="turns; the first one compiles")
    parser.add_argument("--hidden", type=int, default=32, help="the model's width (the quickstart's: 128)")
    parser.add_argument("--layers", type=int, default=2, help="its layers (the quickstart's: 3)")
    parser.add_argument("--prompts", type=int, default=400, help="training prompts (the quickstart's: 3000)")
    parser.add_argument("--together", type=int, help="models at once (default: the sweep's own rule)")
    parser.add_argument("--no-commands", action="store_true", help="leave out one command per seed")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    overrides = world(options.hidden, options.layers, options.prompts)
    found = measure(options.seeds, overrides, options.repeats, not options.no_commands, options.together)
    found |= {name: getattr(options, name) for name in ("hidden", "layers", "prompts")}
    for name, seconds in found["seconds"].items():
        used = ", ".join(f"{value:.1f}" for value in found["cpu_seconds"][name])
        print(f"{name:18} {', '.join(f'{value:.1f}' for value in seconds)} s; CPU {used} s")
    for name in ("one_by_one", "one_command_each"):
        if f"ratio_to_{name}" in found:
            by_cpu = found[f"cpu_ratio_to_{name}"]
            words = name.replace("_", " ")
            print(
                f"together is {found[f'ratio_to_{name}']:.2f} times as fast as {words} (by CPU {by_cpu:.2f})"
            )
    print(f"losses differ by at most {found['largest_relative_difference_of_losses']:.1e} (relative)")
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
