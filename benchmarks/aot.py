"""The table of docs/results/aot.md: every stage of seven models, compiled for slices of four kinds of TPU.

    python -m benchmarks.aot compile [--only WORD ...] [--stages STAGE ...] [--minutes N]   a JSON file per new cell
    python -m benchmarks.aot estimate [...]                           the same by `laif compile --estimate`, in seconds
    python -m benchmarks.aot page       writes docs/results/aot.md from the files

A cell is a model, a slice and a stage. Those of one model and slice are compiled by one `laif compile ... --json`.
Needs the TPU compiler: pip install 'laif_jax[aot]'.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CELLS = ROOT / "benchmarks" / "results" / "aot"
PAGE = ROOT / "docs" / "results" / "aot.md"
YARDSTICKS = ("memory", "overlap")
YARDSTICK = ROOT / "configs" / "yardstick" / "llama2_7b_sft.yaml"

# Model -> (its name in the table of models, devices of the tensor axis in training; what draws tokens has `DRAWING`
# of them at least: else every chip brings all weights together for its decode loop).
MODELS = {
    "Llama-2-7B": ("meta-llama/Llama-2-7b-hf", 1),
    "Mistral-7B": ("mistralai/Mistral-7B-v0.1", 1),
    "Yi-6B": ("01-ai/Yi-6B", 1),
    "DeepSeek-7B": ("deepseek-ai/deepseek-llm-7b-base", 1),
    "Llama-2-13B": ("meta-llama/Llama-2-13b-hf", 1),
    "Mixtral-8x7B": ("mistralai/Mixtral-8x7B-v0.1", 1),
    "Llama-2-70B": ("meta-llama/Llama-2-70b-hf", 4),
}
_SMALL = {"v5e": "v5e-32", "v6e": "v6e-16", "v4": "v4-32", "v5p": "v5p-16"}
_MIDDLE = {"v5e": "v5e-64", "v6e": "v6e-32", "v4": "v4-64", "v5p": "v5p-32"}
_LARGE = {"v5e": "v5e-256", "v6e": "v6e-128", "v4": "v4-256", "v5p": "v5p-128"}
SLICES = dict.fromkeys(("Llama-2-7B", "Mistral-7B", "Yi-6B", "DeepSeek-7B"), _SMALL) | {
    "Llama-2-13B": _MIDDLE,
    "Mixtral-8x7B": _LARGE,
    "Llama-2-70B": _LARGE,
}
DRAWING = 4
STAGES = ("sft", "dpo", "reward", "ppo", "sample")
ROW, HALF = 2048, 1024


@dataclass(frozen=True)
class Cell:
    """One compile. `yardstick`: what is compared with MaxText, "memory" as in the file, "overlap" without the argument
    of the compiler that it has."""

    model: str
    topology: str
    stage: str
    yardstick: str = ""

    @property
    def name(self) -> str:
        return f"{f'yardstick-{self.yardstick}-' if self.yardstick else ''}{self.model}-{self.topology}-{self.stage}"

    @property
    def path(self) -> Path:
        return CELLS / f"{self.name}.json"

    @property
    def estimate(self) -> Path:
        """What stands in for the file until there is one."""
        return CELLS / f"{self.name}.estimate.json"


def cells() -> Iterator[Cell]:
    """All, those that matter most first."""
    for kind in YARDSTICKS:
        yield Cell("Llama-2-7B", "v5e-16", "sft", kind)
    for model in ("Mistral-7B", *[name for name in MODELS if name != "Mistral-7B"]):
        for kind in ("v5e", "v6e", "v5p", "v4"):
            for stage in STAGES:
                yield Cell(model, SLICES[model][kind], stage)


def config(cell: Cell) -> dict[str, Any]:
    """The settings of a cell: one or two sequences per chip, all weights trained, AdamW, whole blocks recomputed."""
    from laif_jax.aot.topologies import parse_slice

    source, tensor = MODELS[cell.model]
    chips = parse_slice(cell.topology).chips
    if cell.stage in ("ppo", "sample"):
        tensor = max(tensor, DRAWING)
    rows = chips // tensor
    steps = {"steps": 100, "max_prompt_length": 512, "optimizer": {"name": "adamw", "learning_rate": 1.0e-5}}
    return {
        "name": cell.name,
        "model": {"source": source, "remat": "full"},
        "mesh": {"fsdp": -1, "tensor": tensor},
        "sft": steps | {"batch_size": 2 * rows, "max_length": ROW},
        "dpo": steps | {"batch_size": rows, "max_length": HALF},
        "reward": steps | {"batch_size": rows, "max_length": HALF},
        "ppo": {
            "batch_size": 4 * chips,
            "minibatches": 2,
            "micro_batch": chips,
            "max_prompt_length": 512,
            "sampling": {"max_new_tokens": 512, "batch_size": 4 * chips},
        },
        "sampling": {"max_new_tokens": 512, "batch_size": 8 * chips},
    }


def _alike(cell: Cell) -> tuple[Any, ...]:
    """Of cells that one configuration serves."""
    return cell.model, cell.topology, cell.yardstick, cell.stage in ("ppo", "sample")


def compile_cells(group: list[Cell], *options: str) -> dict[str, dict[str, Any]]:
    """Runs `laif compile` for cells of one model and slice: a report, or what went wrong as `error`, by stage."""
    cell = group[0]
    with tempfile.TemporaryDirectory() as folder:
        path = YARDSTICK
        if not cell.yardstick:
            path = Path(folder) / "cell.yaml"
            path.write_text(yaml.safe_dump(config(cell)))
        overrides = ["mesh.libtpu_args={}"] if cell.yardstick == "overlap" else []
        command = [sys.executable, "-m", "laif_jax.cli", "compile", str(path), *overrides]
        command += ["--topology", cell.topology, "--json", *options]
        done = subprocess.run(
            [*command, *(word for each in group for word in ("--stage", each.stage))],
            cwd=ROOT,
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
            check=False,
        )
    lines = done.stdout.strip().splitlines()
    if done.returncode not in (0, 1) or not lines:
        error = (done.stderr.strip().splitlines() or ["no output"])[-1][:500]
        return {each.stage: {"error": error} for each in group}
    found = json.loads(lines[-1])
    return {each.stage: found | {"stages": {each.stage: found["stages"][each.stage]}} for each in group}


def estimate_all(only: list[str], stages: list[str]) -> None:
    """Estimates the cells that have no file."""
    for cell in cells():
        if cell.path.exists():
            cell.estimate.unlink(missing_ok=True)
        elif cell.stage in stages and all(word in cell.name for word in only):
            found = compile_cells([cell], "--estimate")[cell.stage]
            cell.estimate.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{cell.name}: {found.get('error', 'estimated')}", flush=True)


def compile_all(only: list[str], stages: list[str], minutes: float) -> None:
    """Compiles the cells that have no file yet, until the time is over; stages of a model and slice in one process,
    and one by one if that fails."""
    end = time.monotonic() + 60 * minutes
    CELLS.mkdir(parents=True, exist_ok=True)
    wanted = [cell for cell in cells() if cell.stage in stages and all(word in cell.name for word in only)]
    todo = [cell for cell in wanted if not cell.path.exists()]
    for _, same in itertools.groupby(todo, key=_alike):
        group = list(same)
        if time.monotonic() > end:
            break
        start = time.monotonic()
        found = compile_cells(group)
        if len(group) > 1 and any("error" in report for report in found.values()):
            found = {cell.stage: compile_cells([cell])[cell.stage] for cell in group}
        for cell in group:
            cell.path.write_text(json.dumps(found[cell.stage], indent=1) + "\n")
            print(f"{cell.name}: {found[cell.stage].get('error', 'done')}", flush=True)
        print(f"  {time.monotonic() - start:.0f} s", flush=True)


# ---- the page ----------------------------------------------------------------------------------------------------


def page() -> str:
    """docs/results/aot.md."""
    every = list(cells())
    text = _STAGES_TEXT
    if guessed := sum(not cell.path.exists() for cell in every):
        text += (
            f"\n\n{guessed} of {len(every)} rows are estimates of memory, marked with ≈ (`laif compile --estimate`: "
            "arguments are exact,\ntemporaries a rule of thumb, far too low for sampling, as the compiled rows show; "
            "traffic and so time are not\nknown). "
            "`python -m benchmarks.aot compile` goes on with them."
        )
    lines = [_HEAD, *_yardstick(), "", "## Stages", "", text, ""]
    for model in MODELS:
        rows = [row for cell in cells() if cell.model == model and not cell.yardstick for row in _rows(cell)]
        if rows:
            lines += [f"### {model}", "", *_table(rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def _read(cell: Cell) -> dict[str, Any] | None:
    path = cell.path if cell.path.exists() else cell.estimate
    return json.loads(path.read_text()) if path.exists() else None


def _rows(cell: Cell) -> list[tuple[str, ...]]:
    found = _read(cell)
    if found is None:
        return []
    if "error" in found:
        return [(cell.topology, cell.stage, f"not compiled: {found['error'][:80]}", *[""] * 7)]
    stage = found["stages"][cell.stage]
    gb = lambda value: f"{value / 1e9:.2f}"  # noqa: E731
    price, sent = stage["examples_per_dollar_bound"], stage["collectives"].values()
    timed = stage["fits"] and not stage["estimate"]  # an estimate knows no traffic, and so no time
    return [
        (
            cell.topology,
            cell.stage,
            "≈ " * stage["estimate"] + ("yes" if stage["fits"] else "no"),
            gb(stage["argument_bytes"]),
            gb(stage["temp_bytes"]),
            f"{gb(stage['peak_bytes'])} of {gb(stage['hbm_bytes'])}",
            f"{stage['step_seconds_bound']:.3f}" if timed else "",
            f"{stage['mfu_bound']:.0%}" if timed else "",
            gb(sum(row["bytes"] for row in sent)) if timed else "",
            f"{price:.0f}" if price and timed else "",
        )
    ]


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    head = ("slice", "stage", "fits", "arguments GB", "temporaries GB", "peak GB", "bound s", "MFU bound",
            "network GB", "examples per $")  # fmt: skip
    return ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows)]


def _yardstick() -> list[str]:
    found = [_read(cell) for cell in itertools.islice(cells(), len(YARDSTICKS))]
    if any(each is None or "error" in each for each in found):
        return ["The yardstick has not been compiled."]
    stages = [each["stages"]["sft"] for each in found if each]
    gb = lambda name: [f"{stage[name] / 1e9:.2f} GB" for stage in stages]  # noqa: E731
    times = [f"{stage['step_seconds_bound']:.2f} s, {stage['mfu_bound']:.0%}" for stage in stages]
    rows = [
        ("", "MaxText 0.2.5", "laif_jax, the file as it is", "laif_jax, without `libtpu_args`"),
        ("---",) * 4,
        ("arguments per chip", "5.05 GB", *gb("argument_bytes")),
        ("temporaries per chip", "4.93 GB", *gb("temp_bytes")),
        ("FLOPs, a loop's body once", "5.93e12", *[f"{stage['flops']:.2e}" for stage in stages]),
        (
            "bytes accessed, a loop's body once",
            "4.29e10",
            *[f"{stage['bytes_accessed']:.2e}" for stage in stages],
        ),
        ("peak memory, arguments included", "", *gb("peak_bytes")),
        ("FLOPs of a whole step", "", *[f"{stage['step_flops']:.3e}" for stage in stages]),
        (
            "FLOPs that the model needs (6 N D and attention)",
            "",
            *[f"{stage['programs'][0]['model_flops']:.3e}" for stage in stages],
        ),
        ("bound on a step's time, and on MFU", "", *times),
    ]
    beside = [(stage["peak_bytes"] - stage["argument_bytes"]) / 1e9 for stage in stages]
    text = (
        "The file asks the compiler to start fewer transfers at a time (`mesh.libtpu_args`, see "
        "[compile](../reference/compile.md)). Left alone, it overlaps more of them with computation and needs "
        f"{stages[1]['temp_bytes'] / 1e9:.2f} GB of temporaries, "
        f"{stages[1]['temp_bytes'] / 4.93e9 - 1:.0%} more than MaxText's figure. `temp_size_in_bytes` is more than "
        "what is ever in memory beside the arguments: by `peak_memory_in_bytes` that is "
        f"{beside[0]:.2f} and {beside[1]:.2f} GB here. MaxText's peak is not known."
    )
    return ["| " + " | ".join(row) + " |" for row in rows] + ["", *textwrap.wrap(text, 118)]


_HEAD = """# Memory, work and cost of every stage, compiled before any chip is rented

Made by `python -m benchmarks.aot` from figures of `laif compile` (jax 0.10.2, libtpu 0.0.42, on a machine with 2 CPU
cores and no TPU). Each is of the executable that XLA's TPU compiler made of the step that the stage runs; no step was
run. Figures are per chip, GB = 1e9 bytes. What the columns mean: [compile](../reference/compile.md).

## Yardstick

Llama-2-7B, supervised fine-tuning on v5e-16: weights split over 16 chips, 2 rows of 2048 tokens per chip, whole
blocks recomputed, AdamW, float32 weights (`laif compile configs/yardstick/llama2_7b_sft.yaml --topology v5e-16`).
MaxText's figures are of the same compiler's `memory_analysis()` and `cost_analysis()`; the latter counts the body of
a loop once, and most of the work is in a loop.
"""
_STAGES_TEXT = """\
All weights trained, AdamW, bfloat16 compute, whole blocks recomputed. SFT: 2 rows of 2048 tokens per chip. DPO and
reward model: 1 pair of 2 x 1024 tokens. PPO: 4 prompts of 512 tokens and 512 new ones per chip and iteration, 4
epochs of 2 minibatches, with a value model, a reference and a reward model of the policy's size. Sampling: 8
prompts per chip, the same lengths. For PPO and sampling 4 chips share the weights' columns and a row (`mesh.tensor:
4`). `bound`: the least time of one update, one iteration of PPO or one batch of samples, from FLOPs, memory traffic
and traffic between chips at the chip's full speed; a real step takes longer. Prices: `laif_jax/aot/chips.yaml`.

Decoding for the models without grouped queries (Llama-2-7B and 13B, DeepSeek-7B) has temporaries of 1.7 to 3.6
times their cache (4.3, 6.7 and 4.0 GB), for the others of no more than their cache except on v5e: what the compiler
keeps there has not been looked into. It is why Llama-2-13B's batch of samples does not fit v5e-64; `--search`
finds the largest that does."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("compile", "estimate", "page"))
    parser.add_argument("--only", nargs="*", default=[], help="words that a cell's name must have")
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=STAGES)
    parser.add_argument("--minutes", type=float, default=1e9)
    options = parser.parse_args()
    if options.what == "compile":
        compile_all(options.only, options.stages, options.minutes)
    elif options.what == "estimate":
        estimate_all(options.only, options.stages)
    else:
        PAGE.write_text(page())
        print(PAGE)


if __name__ == "__main__":
    main()
