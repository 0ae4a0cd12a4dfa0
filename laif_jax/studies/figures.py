"""The report's figures, as inline SVG that follows the page's light or dark colours and needs nothing from outside."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from laif_jax.studies.svg import FG, LAIF, MUTED, PAGE, PALETTE, SFT, STYLE, short, svg, thin, wrap
from laif_jax.studies.table import is_laif

# ---- the arms --------------------------------------------------------------------------------------------------


def arms_figure(results: Mapping[str, Any]) -> str:
    """Win rates as bars, SFT arms first, then LAIF arms (the form of the paper's Figure 1); whiskers are +/- 1 standard
    error, dots are seeds. '' if no arm has a result."""
    arms = {name: arm for name, arm in results["arms"].items() if _known(arm.get("win_rate"))}
    if not arms:
        return ""
    groups = [[name for name, arm in arms.items() if is_laif(name, arm) == laif] for laif in (False, True)]
    order = groups[0] + groups[1]
    gap = 0.6 if all(groups) else 0.0  # between the two groups
    x = np.array([i + gap * (name in groups[1]) for i, name in enumerate(order)])
    with mpl.rc_context(STYLE):
        width = max(5.0, min(12.0, 1.5 + 1.25 * len(order)))
        room = int(12 * (width - 1) / (len(order) + gap))  # characters under a bar, at about 12 an inch
        figure = Figure(figsize=(width, 4.2), layout="constrained")
        axes = figure.subplots()
        heights = [arms[name]["win_rate"] for name in order]
        errors = [arms[name].get("standard_error") or 0.0 for name in order]
        colors = [LAIF if name in groups[1] else SFT for name in order]
        axes.bar(x, heights, 0.68, color=colors)
        axes.errorbar(x, heights, yerr=errors, fmt="none", ecolor=FG, elinewidth=1.3, capsize=4)
        top = _seed_dots(axes, x, [arms[name] for name in order])
        for place, height, error in zip(x, heights, errors):
            axes.annotate(
                f"{height:.1f}", (place, max(height + error, top.get(place, 0.0))), (0, 4),
                textcoords="offset points", ha="center", va="bottom", color=FG, fontweight="bold",
            )  # fmt: skip
        axes.axhline(50, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
        axes.set_xticks(x, [wrap(short(name, 60), room) for name in order])
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False, axis="x")
        ceiling = max([50.0, *(h + e for h, e in zip(heights, errors)), *top.values()])
        axes.set_ylim(0, min(110.0, 1.14 * ceiling))
        axes.set_xlim(x[0] - 0.6, x[-1] + 0.6)
        axes.set_ylabel("win rate against the reference, %")
        if all(groups):
            handles = [Patch(color=SFT, label="SFT"), Patch(color=LAIF, label="LAIF")]
            figure.legend(handles=handles, loc="outside upper left", ncols=2)
        return svg(figure, "arms", "Bar chart of the arms' win rates with standard errors")


def _seed_dots(axes: Axes, x: np.ndarray, arms: Sequence[Mapping[str, Any]]) -> dict[float, float]:
    """Draws each seed's win rate beside its arm's whisker; returns the highest dot per place."""
    top: dict[float, float] = {}
    for place, arm in zip(x, arms):
        rates = [_seed_rate(row) for row in arm.get("per_seed") or []]
        dots = [float(rate) for rate in rates if rate is not None and rate == rate]
        if len(dots) < 2:
            continue
        offsets = np.linspace(-0.2, 0.2, len(dots))
        axes.plot(
            place + offsets, dots, "o", markersize=4, color=PAGE, markeredgecolor=FG, markeredgewidth=0.9
        )
        top[place] = max(dots)
    return top


def _seed_rate(row: Any) -> float | None:
    return row.get("win_rate") if isinstance(row, Mapping) else row


# ---- comparisons -----------------------------------------------------------------------------------------------


def comparisons_figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """Differences with 95% intervals, one line each, zero marked. '' if there are none."""
    if not rows:
        return ""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 0.9 + 0.36 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for y, row in enumerate(rows):
            low, high = row["ci95"]
            decided = low > 0 or high < 0
            axes.plot(
                [low, high], [y, y], color=FG if decided else MUTED, linewidth=1.8, solid_capstyle="butt"
            )
            axes.plot(
                row["delta"], y, "o", color=FG if decided else PAGE, markeredgecolor=FG if decided else MUTED
            )
        axes.axvline(0, color=FG, linewidth=1)
        axes.set_yticks(range(len(rows)), [f"{short(row['a'])} − {short(row['b'])}" for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel("difference of win rates, points (95% interval)")
        return svg(figure, "comparisons", "Differences between arms with 95% intervals")


# ---- training curves -------------------------------------------------------------------------------------------

_PANELS = {
    "sft": (("loss", "SFT: loss"),),
    "dpo": (
        ("loss", "DPO: loss"),
        ("rewards/margins", "DPO: rewards/margins"),
        ("rewards/accuracies", "DPO: rewards/accuracies"),
    ),
}


def curves_figure(curves: Mapping[str, Any]) -> str:
    """Training curves: a panel per stage and metric, a colour per arm, a thin line per seed. '' if there are none.

    Args:
      curves: {arm: {seed: stage or [stages]}}, a stage being {"stage", "step": [...], metric: [...]}.
    """
    arms = list(curves)
    colors = dict(zip(arms, itertools.cycle(PALETTE)))
    lines = list(_lines(curves))
    panels = [
        (stage, metric, title)
        for stage, metrics in _stage_panels(lines).items()
        for metric, title in metrics
        if any(kind == stage and metric in data for _, kind, data in lines)
    ]
    if not panels:
        return ""
    with mpl.rc_context(STYLE):
        columns = min(2, len(panels))
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(9.0, 2.7 * rows + 0.5), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        drawn: dict[str, Any] = {}
        for axes, (stage, metric, title) in zip(grid, panels):
            for arm, kind, data in lines:
                if kind == stage and metric in data:
                    line = axes.plot(*thin(data["step"], data[metric]), color=colors[arm], lw=0.9, alpha=0.85)
                    drawn.setdefault(arm, line[0])
            axes.set_title(title, loc="left")
            axes.set_xlabel("optimiser step")
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        names = [name for name in arms if name in drawn]
        handles, labels = [drawn[name] for name in names], [short(name) for name in names]
        legend = figure.legend(handles, labels, loc="outside upper left", ncols=min(3, len(names)))
        for handle in legend.get_lines():
            handle.set(linewidth=3, alpha=1)
        return svg(figure, "curves", "Training curves per arm")


def _lines(curves: Mapping[str, Any]) -> Iterable[tuple[str, str, Mapping[str, Any]]]:
    """(arm, stage, data) for every curve; a prefix that several arms share is drawn once, for the first of them."""
    seen: set[str] = set()
    for arm, seeds in curves.items():
        for seed, stages in seeds.items():
            for data in [stages] if isinstance(stages, Mapping) else stages:
                identity = repr((seed, sorted((name, str(values)) for name, values in data.items())))
                if identity not in seen and data.get("step"):
                    seen.add(identity)
                    yield arm, str(data["stage"]), data


def _stage_panels(lines: Iterable[tuple[str, str, Any]]) -> dict[str, tuple[tuple[str, str], ...]]:
    """The panels of the stages that occur; a stage unknown here shows its loss."""
    kinds = dict.fromkeys(kind for _, kind, _ in lines)
    order = [kind for kind in _PANELS if kind in kinds] + [kind for kind in kinds if kind not in _PANELS]
    return {kind: _PANELS.get(kind, (("loss", f"{kind}: loss"),)) for kind in order}


def _known(value: Any) -> bool:
    return value is not None and value == value
