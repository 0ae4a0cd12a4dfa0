"""The section "How cost grows" of docs/results/performance.md: tables, figures, and a sentence on each curve."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    NullFormatter,
    NullLocator,
)

from benchmarks.growth import CURVES, ROOT, Curve, read
from laif_jax.studies.svg import PALETTE, STYLE, VARIABLES

FIGURES = ROOT / "docs" / "results" / "performance"
TOP = 3  # the largest points, through which exponents are fitted
# How much an exponent may be above the least possible one: of counts, and of what the clock says.
COUNTED, TIMED = 0.1, 0.25
# A page's theme does not reach an image; these are seen on white and on near-black.
COLORS = dict(zip(VARIABLES, ("#808080", "#808080", "#80808040", PALETTE[0], PALETTE[1], "#ffffff")))

# name -> (label, of the table's column, divisor, the curve's exponents that it may not exceed)
QUANTITIES = {
    "seconds": ("time", "seconds", 1.0),
    "step_flops": ("operations", "GFLOP", 1e9),
    "needed_flops": ("operations needed", "GFLOP needed", 1e9),
    "step_bytes": ("memory traffic", "traffic, MB", 1e6),
    "memory_bytes": ("memory", "memory, MB", 1e6),
    "process_peak_bytes": ("memory of the process", "process, MB", 1e6),
    "sent_bytes": ("traffic between devices", "between devices, MB", 1e6),
    "compile_seconds": ("compilation", "compilation, s", 1.0),
    "tokens_per_second": ("speed", "tokens/s", 1.0),
    "rows_per_second": ("speed", "rows/s", 1.0),
    "open_seconds": ("opening the store", "opening, s", 1.0),
    "store_bytes": ("the store", "store, MB", 1e6),
}
JUDGED = ("step_flops", "step_bytes", "memory_bytes", "seconds", "open_seconds", "store_bytes")


def points_of(curve: Curve) -> list[dict[str, Any]]:
    """The measured points; `memory_bytes`: arguments and temporaries of the step, by the compiler."""
    points = read(curve.name)
    for point in points:
        if "temp_bytes" in point:
            point["memory_bytes"] = point["argument_bytes"] + point["temp_bytes"]
    return points


def exponent(points: Sequence[dict[str, Any]], name: str) -> float | None:
    """The slope of log(value) on log(size) through the largest points; None of fewer than two values above 0."""
    pairs = [(point["size"], point[name]) for point in points if point.get(name, 0) > 0][-TOP:]
    if len(pairs) < 2:
        return None
    sizes, values = np.log(np.array(pairs, dtype=float)).T
    return float(np.polyfit(sizes, values, 1)[0])


def judge(curve: Curve, points: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """(each quantity with its exponent, those that grow faster than they have to).

    The least possible exponent is that of the operations that the model needs (attention over a row of n tokens needs
    n^2), of memory 1, and of anything per device 0.
    """
    told, worse = [], []
    needed = exponent(points, "needed_flops")
    for name in JUDGED:
        found = exponent(points, name)
        if found is None:
            continue
        label = QUANTITIES[name][0]
        linear = name in ("memory_bytes", "store_bytes", "open_seconds")
        least = 0.0 if curve.name == "devices" else 1.0 if linear or needed is None else max(1.0, needed)
        told.append(f"{label} n^{found:.2f}")
        if found > least + (TIMED if "seconds" in name else COUNTED):
            worse.append(f"{label} (n^{found:.2f}, {least:.2f} would do)")
    return told, worse


def sentence(curve: Curve, points: Sequence[dict[str, Any]]) -> str:
    """What the exponents say."""
    told, worse = judge(curve, points)
    if not told:
        return "Too few points for exponents."
    needed = exponent(points, "needed_flops")
    need = f"; the model needs operations n^{needed:.2f}" if needed is not None else ""
    verdict = (
        "faster than they have to grow " + ", ".join(worse)
        if worse
        else "nothing grows faster than it has to"
    )
    largest = ", ".join(f"{point['size']:,}" for point in points[-TOP:])
    return f"Exponents through {largest}: {', '.join(told)}{need}: **{verdict}**."


def table(points: Sequence[dict[str, Any]], axis: str) -> list[str]:
    """The points, a row each; quantities that none of them has are left out."""
    names = [name for name in QUANTITIES if any(point.get(name) for point in points)]
    lines = [[axis, *(QUANTITIES[name][1] for name in names)], ["---"] * (len(names) + 1)]
    for point in points:
        cells = [_number(point[name] / QUANTITIES[name][2]) if name in point else "" for name in names]
        lines.append([f"{point['size']:,}", *cells])
    return ["| " + " | ".join(line) + " |" for line in lines]


def _number(value: float) -> str:
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 4)}f}"


def draw(curve: Curve, points: Sequence[dict[str, Any]], path: Path) -> None:
    """The curve on logarithmic axes: speed on the left, memory on the right, with a line of the first power."""
    speed = [n for n in ("tokens_per_second", "rows_per_second") if any(n in point for point in points)]
    sides = (
        (speed or ["step_flops", "step_bytes"], "per second" if speed else "per device and step"),
        (["memory_bytes", "process_peak_bytes", "store_bytes"], "MB"),
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.7), layout="constrained")
        for axes, (names, unit) in zip(figure.subplots(1, 2), sides):
            for name, color in zip(names, PALETTE):
                pairs = [(p["size"], p[name] / QUANTITIES[name][2]) for p in points if p.get(name)]
                if pairs:
                    axes.plot(*zip(*pairs), "o-", color=color, markersize=4, label=QUANTITIES[name][1])
            axes.set(xscale="log", yscale="log", xlabel=curve.axis, ylabel=unit)
            if unit == "MB":
                _first_power(axes, points)
            _ticks(axes, [point["size"] for point in points])
            axes.legend(fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})
    text = path.read_text()
    for color, seen in COLORS.items():
        text = text.replace(color, seen)
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")


def _ticks(axes: Any, sizes: Sequence[int]) -> None:
    """Sizes below; 1, 2 and 5 times the powers of ten at the side, over at least a factor of four."""
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    low, high = axes.get_ylim()
    middle = math.sqrt(low * high)
    axes.set_ylim(min(low, middle / 2), max(high, middle * 2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
        axis.set_minor_locator(NullLocator())


def _first_power(axes: Any, points: Sequence[dict[str, Any]]) -> None:
    names = [n for n in ("memory_bytes", "process_peak_bytes") if points[-1].get(n)]
    if names and points[0]["size"] < points[-1]["size"]:
        ends = [points[0]["size"], points[-1]["size"]]
        top = points[-1][names[0]] / 1e6
        axes.plot(ends, [top * ends[0] / ends[1], top], ":", color=PALETTE[-1], label="n^1")


def section() -> list[str]:
    """The lines of the section; figures are written beside the page."""
    lines = ["## How cost grows", "", *_TEXT.splitlines(), ""]
    for curve in CURVES.values():
        points = points_of(curve)
        lines += [f"### {curve.axis.capitalize()}", "", f"{curve.fixed}.", ""]
        if not points:
            lines += ["Not measured yet.", ""]
            continue
        draw(curve, points, FIGURES / f"{curve.name}.svg")
        lines += [*table(points, curve.axis), "", sentence(curve, points), ""]
        lines += [f"![Speed and memory against {curve.axis}](performance/{curve.name}.svg)", ""]
        loads = [point["load"] for point in points]
        lines += [f"Load of the machine meanwhile: {min(loads):.1f} to {max(loads):.1f}.", ""]
    return lines


_TEXT = """\
`python -m benchmarks.growth run` measures one size at a time, all others held: a Llama of 4 layers, 128 wide, 8,192
words, where nothing else is said, float32, all weights trained, nothing recomputed. Operations are the matrix products
of the traced step, loops by their trips; memory is the step's arguments and temporaries and traffic what it reads and
writes, by XLA's own analysis of the executable: neither depends on what else the machine does. `seconds` is the
median of 3 measurements of the same step run by the clock, `process` the most memory that its whole process held
(Python, libraries and the compiler too). Exponents are the slopes of log(value) on log(size) through the 3 largest
sizes; operations and time may grow as what the model needs does (attention over n tokens needs n^2), memory by n^1,
and what one device of many does not at all. What exceeds that by 0.1 (0.25 by the clock) is named."""
