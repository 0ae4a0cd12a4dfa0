"""The report of `laif ppo`: one self-contained HTML page, a table for the terminal, and what both say in words."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.markup import escape

from laif_jax.studies.kl_reward import analysed
from laif_jax.studies.rl_figures import kl_figure
from laif_jax.studies.single import fill, make_table, with_words
from laif_jax.studies.svg import PALETTE, STYLE, svg, thin
from laif_jax.studies.table import number, percent

Rows = Sequence[Mapping[str, Any]]
CLIPPED = 0.5  # share of responses cut at the token limit; more is worth a warning
LOGP_DIFFERENCE = 0.05  # per token, between sampler and trainer; more spoils the ratios
EXPLAINED = 0.0  # below it, the value model is worse than a constant

# What a panel shows: title, and metric -> label.
PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("reward", {"objective/scores": "train", "eval/reward": "held out"}),
    ("KL per response", {"objective/kl": "train", "eval/objective/kl": "held out"}),
    ("response length, tokens", {"response_length/mean": "train", "eval/response_length": "held out"}),
    ("entropy per token", {"policy/entropy_avg": ""}),
    ("explained variance of values", {"critic/vf_explained_var": ""}),
    ("clipped ratios", {"policy/clipfrac_avg": ""}),
)
# Rows of the table, before and after: metric -> (label, digits).
COMPARED = {
    "eval/reward": ("reward", 4),
    "eval/quality": ("true quality", 4),
    "eval/objective/kl": ("KL per response", 3),
    "eval/response_length": ("response length", 1),
    "eval/ended": ("share that ended", 3),
}


def render(results: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """The page.

    Args:
      results: the contents of results.json. data: `rows` (metrics.jsonl) and `samples`.
    """
    figures = {"curves": curves_figure(data["rows"]), "kl": kl_curve(data["rows"])}
    return fill(
        "ppo.html.jinja", results, figures, compared=compared(results["metrics"]), samples=data["samples"]
    )


def curves_figure(rows: Rows) -> str:
    """A panel per metric over iterations. '' without rows."""
    with mpl.rc_context(STYLE):
        drawn = [(title, lines) for title, names in PANELS if (lines := _lines(rows, names))]
        if not drawn:
            return ""
        columns = min(3, len(drawn))
        figure = Figure(figsize=(9.5, 2.5 * -(-len(drawn) // columns)), layout="constrained")
        grid = figure.subplots(-(-len(drawn) // columns), columns, squeeze=False).ravel()
        for axes, (title, lines) in zip(grid, drawn):
            for color, (label, x, y) in zip(PALETTE, lines):
                axes.plot(
                    x, y, color=color, lw=1.3, label=label or None, marker="o" if len(x) < 12 else None, ms=3
                )
            axes.set_title(title, loc="left")
            axes.set_xlabel("iteration")
            if len(lines) > 1:
                axes.legend()
        for axes in grid[len(drawn) :]:
            axes.set_visible(False)
        return svg(figure, "ppo-curves", "Metrics of PPO over iterations")


def _lines(rows: Rows, names: Mapping[str, str]) -> list[tuple[str, Any, Any]]:
    found = []
    for name, label in names.items():
        kept = [row for row in rows if row.get(name) is not None]
        if len(kept) > 1:
            found.append((label, *thin([row["step"] for row in kept], [row[name] for row in kept])))
    return found


def kl_curve(rows: Rows) -> str:
    """Reward, and true quality where it is known, against sqrt(KL) on held-out prompts. '' with too few evaluations."""
    kept = [row for row in rows if row.get("eval/reward") is not None]
    if len(kept) < 4:
        return ""
    quality = [row.get("eval/quality") for row in kept]
    entry = {
        "label": "held-out prompts",
        "kl": [row["eval/objective/kl"] for row in kept],
        "reward": [row["eval/reward"] for row in kept],
        "true_quality": quality if any(value is not None for value in quality) else None,
    }
    return kl_figure([analysed(entry)])


def compared(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per held-out metric: before, after, digits."""
    first, last = metrics["first"], metrics["last"]
    names = {f"eval/rewards/{name}/mean": (f"reward `{name}`", 4) for name in _named(metrics)}
    return [
        {"label": label, "digits": digits, "first": first[name], "last": last[name]}
        for name, (label, digits) in {**COMPARED, **names}.items()
        if first.get(name) is not None and last.get(name) is not None
    ]


def _named(metrics: Mapping[str, Any]) -> list[str]:
    found = [name.split("/")[1] for name in metrics if name.startswith("rewards/") and name.endswith("/mean")]
    return found if len(found) > 1 else []


# ---- in words --------------------------------------------------------------------------------------------------


def verdicts(metrics: Mapping[str, Any]) -> list[str]:
    """What happened on held-out prompts."""
    first, last = metrics["first"], metrics["last"]
    if not first or first.get("eval/reward") is None or last.get("eval/reward") is None:
        return []
    text = (
        f"On held-out prompts the reward went from {first['eval/reward']:.3f} to {last['eval/reward']:.3f} in "
        f"{metrics['iterations']:,} iterations ({metrics['episodes']:,} responses), at a KL of "
        f"{last['eval/objective/kl'] or 0.0:.2f} per response from the reference."
    )
    found = [text]
    if first.get("eval/quality") is not None and last.get("eval/quality") is not None:
        found.append(f"True quality went from {first['eval/quality']:.3f} to {last['eval/quality']:.3f}.")
    return found


def warnings(metrics: Mapping[str, Any], rows: Rows) -> list[str]:
    """What a reader must know."""
    found = []
    last = rows[-1] if rows else {}
    clipped = last.get("response_length/clip_ratio") or 0.0
    if clipped > CLIPPED:
        found.append(
            f"In the last iteration {percent(clipped)} of the responses were cut at `sampling.max_new_tokens`: their "
            "scores are of unfinished text. Raise it, or set `missing_eos_penalty`."
        )
    if metrics["prompts_cut"]:
        found.append(
            f"{metrics['prompts_cut']:,} of {metrics['prompts']:,} prompts lost their start to fit the context."
        )
    difference = max((row.get("sampling/logp_diff") or 0.0 for row in rows), default=0.0)
    if difference > LOGP_DIFFERENCE:
        found.append(
            f"Sampler and trainer differ by up to {difference:.3f} per token in their log-probs: ratios and KL are of "
            "that much noise. Compute in float32, or expect clipped updates."
        )
    explained = last.get("critic/vf_explained_var")
    if explained is not None and explained < EXPLAINED:
        found.append(
            f"The value model explains {explained:.2f} of the returns' variance, worse than a constant: train it "
            "longer (`head_start`, a higher `value_coef`)."
        )
    return found


def ppo_table(results: Mapping[str, Any], width: int = 110) -> str:
    """Held-out values before and after, the verdicts and the warnings, as text."""
    table = make_table(results, "held-out prompts", "", ("before", "after"))
    for row in compared(results["metrics"]):
        values = (number(row[side], row["digits"]) for side in ("first", "last"))
        table.add_row(escape(row["label"]), *values)
    return with_words(table, results, width)
