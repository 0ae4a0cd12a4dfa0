"""Figures of reward models, reinforcement learning and rounds, in the report's style.

With `reward.learning_rates` and `ppo.sweep` they are Figures 8 to 10 of Sharma et al. (2024).
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from laif_jax.studies.kl_reward import NATS
from laif_jax.studies.svg import FG, MUTED, PALETTE, STYLE, short, svg, thin

Runs = Sequence[Mapping[str, Any]]


# ---- reward models ---------------------------------------------------------------------------------------------


def reward_figure(curves: Runs) -> str:
    """Accuracy on held-out pairs over steps, a colour per learning rate, a thin line per model. '' without curves.

    Args:
      curves: [{"learning_rate", "step": [...], "accuracy": [...] in [0, 1], "longest_wins": a share or None}].
    """
    drawn = [curve for curve in curves if curve.get("step")]
    if not drawn:
        return ""
    rates = sorted({curve["learning_rate"] for curve in drawn})
    colors = dict(zip(rates, itertools.cycle(PALETTE)))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 3.6), layout="constrained")
        axes = figure.subplots()
        for rate in rates:
            group = [curve for curve in drawn if curve["learning_rate"] == rate]
            lines = [thin(curve["step"], curve["accuracy"]) for curve in group]
            _bundle(axes, [(x, 100 * y) for x, y in lines], colors[rate], scientific(rate))
        longest = [curve["longest_wins"] for curve in drawn if curve.get("longest_wins") is not None]
        if longest:
            mean = 100 * float(np.mean(longest))
            axes.axhline(mean, color=FG, linestyle=(0, (4, 3)), linewidth=1.2, label="longest wins")
        axes.axhline(50, color=MUTED, linestyle=(0, (1, 2)), linewidth=1)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("accuracy on held-out pairs, %")
        _legend(figure, axes, "learning rate")
        return svg(figure, "reward", "Reward-model accuracy over steps per learning rate")


# ---- PPO -------------------------------------------------------------------------------------------------------


def ppo_figure(runs: Runs, part: str) -> str:
    """Reward over iterations: a panel per learning rate, a colour per KL coefficient, a thin line per run, a thick one
    for the mean over seeds. '' without rows.

    Args:
      runs: [{"learning_rate", "kl_coef", "train": {"iteration", "reward"}, "eval": {"iteration", "reward", ...}}].
      part: "train" or "eval": of the rollouts, or on held-out prompts.
    """
    drawn = [run for run in runs if run[part].get("iteration") and run[part].get("reward")]
    if not drawn:
        return ""
    rates, coefs = (sorted({run[key] for run in drawn}) for key in ("learning_rate", "kl_coef"))
    colors = dict(zip(coefs, itertools.cycle(PALETTE)))
    columns = min(3, len(rates))
    rows = -(-len(rates) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.0 if columns > 1 else 6.0, 2.9 * rows + 0.5), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for axes, rate in zip(grid, rates):
            for coef, width in zip(coefs, _nested(len(coefs))):
                group = [run for run in drawn if (run["learning_rate"], run["kl_coef"]) == (rate, coef)]
                lines = [thin(run[part]["iteration"], run[part]["reward"]) for run in group]
                _bundle(axes, lines, colors[coef], f"{coef:g}", width=width + 0.6)
            axes.set_title(f"learning rate {scientific(rate)}", loc="left")
            axes.set_xlabel("iteration")
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in grid[len(rates) :]:
            axes.set_visible(False)
        grid[0].set_ylabel("reward" if part == "train" else "reward on held-out prompts")
        _legend(figure, grid[0], "KL coefficient")
        what = "Train" if part == "train" else "Validation"
        return svg(figure, f"ppo-{part}", f"{what} reward of PPO per KL coefficient and learning rate")


def kl_figure(settings: Runs) -> str:
    """Reward by the reward model, and true quality where it is known, against sqrt(KL), both on held-out prompts.

    Points are evaluations, dashed lines the square-root law, a ring marks where true quality turns. Of runs that cover
    each other, the later ones are drawn smaller and thinner, over the earlier ones. '' without any.

    Args:
      settings: [{"label", "kl": [...], "reward": [...], "true_quality": [...] or None, "fit", "no_fit", "turn"}], each
        a mean over seeds; the last three as `kl_reward.analysed` gives them.
    """
    drawn = [row for row in settings if row["kl"]]
    if not drawn:
        return ""
    truth = any(row.get("true_quality") for row in drawn)
    labels = [
        _middle_cut(row["label"], 56) + (f" (no fit: {row['no_fit']})" if row["no_fit"] else "")
        for row in drawn
    ]
    # About 13 characters per inch, and 7 for a line's sample.
    columns = max(1, min(3, 117 // (7 + max(map(len, labels)))))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.5 + 0.22 * -(-len(drawn) // columns)), layout="constrained")
        panels = figure.subplots(1, 2 if truth else 1, squeeze=False).ravel()
        for place, (row, label, width) in enumerate(zip(drawn, labels, _nested(len(drawn)))):
            x = _root(row["kl"])
            again, color = divmod(place, len(PALETTE))
            style = {
                "color": PALETTE[color],
                "lw": width,
                "marker": "osD^"[again % 4],
                "ms": 2.0 * width + 1.5,
            }
            panels[0].plot(x, _numbers(row["reward"]), label=label, **style)
            if row["fit"]:
                ends = np.array([0.0, np.sqrt(row["fit"]["max_kl"])])
                line = row["fit"]["intercept"] + row["fit"]["slope"] * ends
                panels[0].plot(ends, line, color=style["color"], lw=1, linestyle=(0, (4, 3)))
            if row.get("true_quality"):
                quality = _numbers(row["true_quality"])
                panels[1].plot(x, quality, **style)
                if row["turn"]:
                    at = row["turn"]["at"]
                    panels[1].plot(x[at], quality[at], "o", markersize=14, mfc="none", mec=FG)
        names = ("proxy: the reward model's score", "true quality")
        for axes, name in zip(panels, names):
            axes.set_title(name, loc="left")
            axes.set_xlabel("√KL from the start, nats per response")
            # What is too near to the start for a fit shall look near, not fill the axis.
            axes.set_xlim(right=max(axes.get_xlim()[1], np.sqrt(NATS)))
        _legend(figure, panels[0], "", columns)
        return svg(figure, "kl", "Reward and true quality against the square root of KL")


def _middle_cut(name: str, width: int) -> str:
    """A name of at most `width` characters that keeps its end, where settings stand."""
    half = width // 2
    return name if len(name) <= width else f"{name[: width - half - 1]}…{name[-half:]}"


# ---- rounds ----------------------------------------------------------------------------------------------------


def rounds_figure(
    rounds: Mapping[str, Sequence[Mapping[str, Any]]], single: Mapping[str, Mapping[str, Any]]
) -> str:
    """Win rate, and true quality where it is known, after each round; round 0 is the start. Thick: the mean over seeds.
    Dashed: arms that used the same budget in one round. '' without evaluations.

    Args:
      rounds: {arm: [{"seed", "round", "win_rate", "true_quality" or None}]}. single: {arm: its entry in `arms`}.
    """
    rows = {arm: [row for row in made if row.get("win_rate") is not None] for arm, made in rounds.items()}
    rows = {arm: made for arm, made in rows.items() if any(row["round"] > 0 for row in made)}
    if not rows:
        return ""
    truth = any(row.get("true_quality") is not None for made in rows.values() for row in made)
    measures = [("win_rate", "win rate, %")] + ([("true_quality", "true quality")] if truth else [])
    colors = dict(zip([*rows, *single], itertools.cycle(PALETTE)))
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(4.5 * len(measures) + (1.0 if len(measures) == 1 else 0.0), 3.6), layout="constrained"
        )
        panels = figure.subplots(1, len(measures), squeeze=False).ravel()
        for axes, (key, name) in zip(panels, measures):
            for arm, made in rows.items():
                _bundle(axes, list(_by_seed(made, key)), colors[arm], short(arm), marker="o")
            for arm, entry in single.items():
                if entry.get(key) is not None:
                    axes.axhline(
                        entry[key],
                        color=colors[arm],
                        lw=1.4,
                        linestyle=(0, (4, 3)),
                        label=short(f"{arm} (one round)", 44),
                    )
            axes.set_title(name, loc="left")
            axes.set_xlabel("rounds done")
            axes.set_xticks(sorted({row["round"] for made in rows.values() for row in made}))
        _legend(figure, panels[0], "", 3)
        return svg(figure, "rounds", "Win rate and true quality after each round")


def _by_seed(rows: Iterable[Mapping[str, Any]], key: str) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    ordered = sorted(
        (row for row in rows if row.get(key) is not None), key=lambda row: (row["seed"], row["round"])
    )
    for _, group in itertools.groupby(ordered, key=lambda row: row["seed"]):
        points = [(row["round"], row[key]) for row in group]
        yield np.array([p[0] for p in points], np.float64), np.array([p[1] for p in points], np.float64)


# ---- shared ----------------------------------------------------------------------------------------------------


def _nested(count: int) -> list[float]:
    """Widths by which lines can be told apart where they cover each other: each leaves a rim of the one below it."""
    return [1.2 + min(1.6, 5.0 / count) * above for above in range(count - 1, -1, -1)]


def _bundle(
    axes: Axes,
    lines: Sequence[tuple[np.ndarray, np.ndarray]],
    color: str,
    label: str,
    marker: str = "",
    width: float = 2.0,
) -> None:
    """Thin lines, and their mean over the places that all of them have, thick and in the legend."""
    if not lines:
        return
    if len(lines) > 1:
        for x, y in lines:
            axes.plot(x, y, color=color, lw=0.8, alpha=0.55)
    common = sorted(set.intersection(*(set(x.tolist()) for x, _ in lines)))
    tables = [dict(zip(x.tolist(), y.tolist())) for x, y in lines]
    mean = [np.mean([table[x] for table in tables]) for x in common]
    axes.plot(common, mean, color=color, lw=width, label=label, marker=marker, markersize=4.5)


def scientific(value: float) -> str:
    """A learning rate as people write it: 1e-4, 1.41e-5."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _legend(figure: Figure, axes: Axes, title: str, columns: int = 6) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if title:
        labels = [f"{title} {label}" if index == 0 else label for index, label in enumerate(labels)]
    figure.legend(handles, labels, loc="outside upper left", ncols=min(columns, len(labels)))


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _root(kl: Sequence[float | None]) -> np.ndarray:
    return np.sqrt(np.maximum(_numbers(kl), 0.0))
