"""Figures of a reward model's report: accuracy over steps per learning rate (Figure 8 of Sharma et al. 2024), accuracy
beside the longer text's, by length, calibration, distributions of scores."""

import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from laif_jax.studies.svg import FG, LAIF, MUTED, PAGE, PALETTE, SFT, STYLE, short, svg, thin

Reports = Mapping[str, Mapping[str, Any]]  # per set of pairs what `reward_report` gives
_DASHED = (0, (4, 3))


def accuracy_figure(rates: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy on held-out pairs over steps, a line per learning rate, and the longer text's. '' without a curve.

    Args:
      rates: rows of `learning_rate` and `curve`, rows of `step`, `accuracy`, `longest_wins`.
    """
    drawn = [row for row in rates if any(point.get("accuracy") is not None for point in row["curve"])]
    if not drawn:
        return ""
    colors = dict(zip(sorted(row["learning_rate"] for row in drawn), itertools.cycle(PALETTE)))
    with _figure(7.0, 3.6) as figure:
        axes = figure.subplots()
        for row in sorted(drawn, key=lambda row: row["learning_rate"]):
            x, y = thin([p["step"] for p in row["curve"]], [p["accuracy"] for p in row["curve"]])
            ended = "" if not row.get("failed") else " (not finite)"
            label = f"{row['learning_rate']:g}{ended}"
            axes.plot(
                x,
                100 * y,
                color=colors[row["learning_rate"]],
                lw=1.8,
                marker="o",
                markersize=3.5,
                label=label,
            )
        length = next(
            (p["longest_wins"] for row in drawn for p in row["curve"] if p.get("longest_wins")), None
        )
        if length is not None:
            axes.axhline(100 * length, color=FG, linestyle=_DASHED, linewidth=1.2, label="longest wins")
        axes.axhline(50, color=MUTED, linestyle=(0, (1, 2)), linewidth=1)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("accuracy on held-out pairs, %")
        figure.legend(loc="outside upper left", ncols=4)
        return svg(figure, "steps", "Accuracy on held-out pairs over steps per learning rate")


def sets_figure(sets: Reports) -> str:
    """Accuracy with its interval per set of pairs, beside the longer text's. '' without any."""
    rows = {name: report for name, report in sets.items() if report.get("accuracy") is not None}
    if not rows:
        return ""
    with _figure(8.0, 1.1 + 0.55 * len(rows)) as figure:
        axes = figure.subplots()
        marks = (("accuracy", "ci95", LAIF, "o", 0.13), ("longest_wins", "longest_ci95", SFT, "s", -0.13))
        for y, report in enumerate(rows.values()):
            for value, interval, color, marker, shift in marks:
                place, (low, high) = y - shift, report[interval]
                axes.plot([100 * low, 100 * high], [place, place], color=color, lw=2, solid_capstyle="butt")
                axes.plot(100 * report[value], place, marker, color=color, markeredgecolor=PAGE, markersize=7)
        axes.axvline(50, color=MUTED, linestyle=(0, (1, 2)), linewidth=1)
        axes.set_yticks(range(len(rows)), [short(name) for name in rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("pairs decided rightly, % (95% interval over prompts)")
        _legend(figure, {"reward model": (LAIF, "o"), "longest wins": (SFT, "s")})
        return svg(figure, "sets", "Accuracy per set of pairs beside the longest-wins baseline")


def length_figure(sets: Reports) -> str:
    """Accuracy by how much longer the preferred response is: a panel per set. '' without any."""
    rows = {name: report["by_length"] for name, report in sets.items() if report.get("by_length")}
    if not rows:
        return ""
    with _figure(9.0, 2.9 * -(-len(rows) // 2) + 0.4) as figure:
        for axes, (name, bins) in _panels(figure, rows):
            x = np.arange(len(bins))
            heights = [100 * row["accuracy"] for row in bins]
            axes.bar(x, heights, 0.7, color=LAIF)
            for place, row in zip(x, bins):
                longest = 100 * row["longest_wins"]
                axes.plot([place - 0.4, place + 0.4], [longest, longest], color=FG, lw=1.6)
                axes.annotate(f"n {row['n']}", (place, 2), ha="center", va="bottom", color=PAGE, fontsize=8)
            axes.axhline(50, color=MUTED, linestyle=(0, (1, 2)), linewidth=1)
            names = [length_range(row["low"], row["high"]).replace(" to ", "\nto ") for row in bins]
            axes.set_xticks(x, names, fontsize=8)
            axes.tick_params(axis="x", length=0)
            axes.grid(visible=False, axis="x")
            axes.set_ylim(0, 105)
            axes.set_title(short(name), loc="left")
            axes.set_xlabel("preferred longer by, characters")
            axes.set_ylabel("accuracy, %")
        return svg(figure, "length", "Accuracy by length difference")


def calibration_figure(sets: Reports) -> str:
    """Predicted chance that the higher-scored response is preferred against how often it was. '' without any."""
    rows = {name: report["calibration"] for name, report in sets.items() if report["calibration"]["bins"]}
    if not rows:
        return ""
    with _figure(9.0, 3.0 * -(-len(rows) // 2) + 0.4) as figure:
        for axes, (name, found) in _panels(figure, rows):
            axes.plot([50, 100], [50, 100], color=MUTED, linestyle=_DASHED, lw=1)
            total = sum(row["n"] for row in found["bins"])
            x, y = ([100 * row[key] for row in found["bins"]] for key in ("predicted", "observed"))
            axes.plot(x, y, color=LAIF, lw=1.2)
            sizes = [12 + 240 * row["n"] / total for row in found["bins"]]
            axes.scatter(x, y, s=sizes, color=LAIF, edgecolors=PAGE, zorder=3)
            axes.set_xlim(48, 102)
            axes.set_ylim(min(45, *(value - 4 for value in y)), 104)
            axes.set_title(f"{short(name, 24)}: ECE {found['ece']:.3f}", loc="left")
            axes.set_xlabel("predicted, %")
            axes.set_ylabel("preferred, %")
        return svg(figure, "calibration", "Calibration")


def distribution_figure(sets: Reports) -> str:
    """Histograms of the scores of preferred and other responses. '' without any."""
    rows = {name: report["distribution"] for name, report in sets.items() if report.get("distribution")}
    if not rows:
        return ""
    with _figure(9.0, 2.6 * -(-len(rows) // 2) + 0.6) as figure:
        for axes, (name, found) in _panels(figure, rows):
            for key, color in (("chosen", LAIF), ("rejected", SFT)):
                axes.stairs(found[key], found["edges"], color=color, lw=1.6)
                axes.stairs(found[key], found["edges"], color=color, fill=True, alpha=0.22)
                axes.axvline(found[f"{key}_mean"], color=color, linestyle=_DASHED, lw=1.2)
            axes.set_title(short(name), loc="left")
            axes.set_xlabel("score")
            axes.set_ylabel("responses")
        _legend(figure, {"preferred": (LAIF, "s"), "other": (SFT, "s")})
        return svg(figure, "scores", "Distribution of scores of preferred and other responses")


def training_figure(curves: Mapping[str, Mapping[str, Sequence[Any]]]) -> str:
    """Loss and accuracy on training batches, a line per learning rate. '' without rows.

    Args:
      curves: {learning rate as text: {"step", "loss", "rewards/accuracies"}}.
    """
    drawn = {name: curve for name, curve in curves.items() if curve.get("step")}
    if not drawn:
        return ""
    colors = dict(zip(sorted(drawn, key=float), itertools.cycle(PALETTE)))
    with _figure(9.0, 3.1) as figure:
        grid = figure.subplots(1, 2)
        for axes, (key, title) in zip(
            grid, (("loss", "loss"), ("rewards/accuracies", "accuracy in the batch"))
        ):
            for name in colors:
                if key in drawn[name]:
                    axes.plot(*thin(drawn[name]["step"], drawn[name][key]), color=colors[name], lw=1.0)
            axes.set_title(title, loc="left")
            axes.set_xlabel("optimiser step")
        _legend(figure, {f"learning rate {name}": (color, "s") for name, color in colors.items()})
        return svg(figure, "training", "Loss and accuracy in training")


def length_range(low: float | None, high: float | None) -> str:
    """A bin of length differences (low < x <= high) as text."""
    if low is None:
        return f"≤ {high:,.0f}"
    return f"> {low:,.0f}" if high is None else f"{low:,.0f} to {high:,.0f}"


# ---- shared ----------------------------------------------------------------------------------------------------


@contextmanager
def _figure(width: float, height: float) -> Generator[Figure]:
    with mpl.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def _panels(figure: Figure, rows: Mapping[str, Any]) -> Iterator[tuple[Axes, tuple[str, Any]]]:
    """A panel per row, two beside each other."""
    grid = figure.subplots(-(-len(rows) // 2), 2, squeeze=False).ravel()
    for axes in grid[len(rows) :]:
        axes.set_visible(False)
    yield from zip(grid, rows.items())


def _legend(figure: Figure, entries: Mapping[str, tuple[str, str]]) -> None:
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="", markersize=8, label=name)
        for name, (color, marker) in entries.items()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4)
