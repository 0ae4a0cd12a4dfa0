"""docs/results/performance.md, written from the files of benchmarks/results."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.growth_page import section
from benchmarks.performance import TASKS, Task, read
from benchmarks.run import SAVED

BY_NAME = {task.name: task for task in TASKS}
NOTES = SAVED / "notes.md"


@dataclass(frozen=True)
class Target:
    """A line of the table: `value` reads the figure of a task's result, which is to be at least or at most `bound`."""

    what: str
    task: str
    value: Callable[[dict[str, Any]], float | None]
    bound: float
    least: bool = True
    form: str = "{:.2f}x"
    interval: bool = False


def _get(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda result: result.get(name)


def _ratio(what: str, task: str, bound: float) -> Target:
    return Target(what, task, _get("ratio_to_better_peer"), bound, interval=True)


def _memory(what: str, task: str) -> Target:
    return Target(f"peak memory, {what}", task, _get("peak_memory_ratio"), 0.7, least=False)


TARGETS = (
    _ratio("SFT, full rows", "sft", 1.2),
    _ratio("SFT, real lengths, packed", "sft-real", 2.0),
    _ratio("DPO, real lengths", "dpo-real", 2.5),
    _ratio("reward model, real lengths", "reward-real", 2.5),
    _ratio("generation, one length", "generate", 1.15),
    Target("generation, one length, of the roofline", "generate", _get("roofline_fraction"), 0.8, form="{:.0%}"),
    _ratio("generation, 128 prompts, 8 to 256 new tokens", "generate-mixed", 2.0),
    _ratio("an iteration of PPO", "ppo", 2.0),
    _memory("SFT, full rows", "sft"),
    _memory("SFT, real lengths", "sft-real"),
    _memory("DPO, real lengths", "dpo-real"),
    _memory("reward model, real lengths", "reward-real"),
    _memory("an iteration of PPO", "ppo"),
    Target("compiling 32 layers, beside Tunix", "compile", _get("compile_ratio"), 0.5, least=False),
    Target(
        "compiling 32 layers, full cache", "compile", _get("compile_seconds_warm"), 2.0, least=False, form="{:.2f} s"
    ),
    Target("a sweep of 16 seeds, beside a command for each", "sweep", _get("ratio_to_one_command_each"), 4.0),
    Target("the same, beside one by one in one process", "sweep", _get("ratio_to_one_by_one"), 4.0),
)  # fmt: skip


def page() -> str:
    """The page's text; growth's figures are written beside it."""
    lines = [_HEAD, *_machine(), "", "## Targets", "", *_targets(), "", _RATIOS, "", *_notes()]
    lines += ["## Figures", "", _FIGURES, ""]
    for task in TASKS:
        lines += _task(task)
    return "\n".join([*lines, *section(), "## An accelerator", "", _ACCELERATOR, ""]).rstrip() + "\n"


def result_of(name: str) -> dict[str, Any] | None:
    """A task's figures within its result."""
    task = BY_NAME[name]
    found = read(task)
    return found and (found[task.key] if task.key else found)


def _machine() -> list[str]:
    found = [result for task in TASKS if (result := read(task))]
    if not found:
        return ["Nothing has been measured yet: `python -m benchmarks.performance run` does."]
    machine = found[0]["machine"]
    loads = [load for one in found for load in (one["machine"]["load"], one["machine"]["load_after"])]
    limits = [
        limit for task in TASKS if task.key and (one := result_of(task.name)) and (limit := one.get("limits"))
    ]
    lines = [
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB of memory; "
        f"Python {machine['python']}, jax {machine['jax']}; {machine['date']}.",
        "TRL 1.16 (PPO: TRL 1.12) with torch 2.13, google-tunix 0.1.7.",
    ]
    if limits:
        flops, moved = (
            sorted(limit[name] / 1e9 for limit in limits) for name in ("flops", "bytes_per_second")
        )
        lines += [
            f"It multiplies float32 matrices at {flops[0]:.0f} to {flops[-1]:.0f} GFLOP/s and moves memory at "
            f"{moved[0]:.1f} to {moved[-1]:.1f} GB/s, measured before and after each task.",
            f"Load (1 minute) before and after the tasks, of which the benchmark itself is up to {machine['cores']}: "
            f"{min(loads):.1f} to {max(loads):.1f}.",
        ]
    return lines


def _targets() -> list[str]:
    rows = [("", "target", "measured", "95% interval", "reached"), ("---",) * 5]
    for target in TARGETS:
        result = result_of(target.task)
        value = target.value(result) if result else None
        sign = ">=" if target.least else "<="
        goal = f"{sign} {target.form.format(target.bound)}"
        if result is None or value is None:
            rows.append((target.what, goal, "", "", "not measured"))
            continue
        reached = value >= target.bound if target.least else value <= target.bound
        ends = result.get("ratio_ci95") if target.interval else None
        interval = f"{ends[0]:.2f} to {ends[1]:.2f}" if ends else ""
        rows.append((target.what, goal, target.form.format(value), interval, "yes" if reached else "**no**"))
    return _table(rows)


def _notes() -> list[str]:
    return [*NOTES.read_text().strip().splitlines(), ""] if NOTES.exists() else []


def _task(task: Task) -> list[str]:
    """A task's command and the figures of everybody."""
    found = read(task)
    lines = [f"### {task.name}", ""]
    if found is None:
        return [*lines, f"Not measured yet: `python -m {task.command}`.", ""]
    if not task.key:
        shown = [
            (name, _plain(value)) for name, value in found.items() if isinstance(value, (int, float, str))
        ]
        rows = [("figure", ""), ("---", "---"), *[row for row in shown if row[0] != "command"]]
        return [*lines, *_table(rows), "", f"    {found['command']}", ""]
    result = found[task.key]
    names = ["laif_jax", *result["peers"]]
    everybody = [result["ours"], *result["peers"].values()]
    rows = [("", *(label for label, _ in _COLUMNS)), ("---",) * (len(_COLUMNS) + 1)]
    rows += [(name, *(cell(one) for _, cell in _COLUMNS)) for name, one in zip(names, everybody)]
    empty = [i for i in range(1, len(_COLUMNS) + 1) if not any(row[i] for row in rows[2:])]
    rows = [tuple(cell for i, cell in enumerate(row) if i not in empty) for row in rows]
    bound = f"The machine's own limit for this work is {result['bound_seconds']:.2f} s a pass, of which this package "
    bound += f"reaches {result['roofline_fraction']:.0%}."
    return [*lines, *_table(rows), "", bound, "", f"    {found['command']}", ""]


def _figure(name: str, form: str, divisor: float = 1.0) -> Callable[[dict[str, Any]], str]:
    return lambda one: form.format(one[name] / divisor) if one.get(name) is not None else ""


_COLUMNS = (
    ("seconds", _figure("seconds", "{:.2f}")),
    ("of that, CPU", _figure("cpu_seconds", "{:.2f}")),
    ("rollout", _figure("rollout_seconds", "{:.2f}")),
    ("update", _figure("update_seconds", "{:.2f}")),
    ("tokens/s", _figure("tokens_per_second", "{:.0f}")),
    ("MFU", _figure("mfu", "{:.1%}")),
    ("peak GB", _figure("peak_bytes", "{:.2f}", 1e9)),
    ("ready after", _figure("ready_seconds", "{:.1f} s")),
    ("compiling", _figure("compile_seconds", "{:.1f} s")),
    ("compiling, full cache", _figure("compile_seconds_warm", "{:.1f} s")),
    ("turns", lambda one: str(len(one["turns"]))),
)


def _plain(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _table(rows: list[Any]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in rows]


_HEAD = """# Speed and memory beside TRL and Tunix

Made by `python -m benchmarks.performance page` from the files of `python -m benchmarks.performance run`, of
`python -m benchmarks.growth run` and, where it was run, of `python -m benchmarks.sweep`. What the figures mean:
[benchmarks](../reference/benchmarks.md).
"""
_RATIOS = """\
Ratios of time are those of the fastest peer's median seconds to this package's, in turns on the same tokens, shape
(SmolLM2-135M's, random weights), dtype (float32) and optimiser; ratios of memory are this package's peak to the least
peak of a peer."""
_FIGURES = """\
One pass over the work: medians over the turns. Tokens of PPO and generation are the drawn ones. `ready after`: from the
start of the process to the end of its first step, with an empty compilation cache. `compiling`: what the steps before
those that are measured took beyond the usual time; Tunix's trainer compiles its step once more at the second one."""
_ACCELERATOR = """\
No accelerator was at hand. The harness is ready for one H100; peers are left out where their packages cannot be had:

    python -m benchmarks.run --model llama-1b --dtype bfloat16 --task sft,dpo,reward --sequence 2048 --remat dots
    python -m benchmarks.run --model llama-1b --dtype bfloat16 --task generate --sequence 320 --new 256 --batch 64

It measures the product and the copy of that device, reads the peak of its memory, and waits for it at the end of
every pass."""
