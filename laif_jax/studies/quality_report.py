"""The quality of labels as one self-contained HTML page, and as a table for the terminal."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from markupsafe import Markup
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from laif_jax.config.money import NANOS, show_money
from laif_jax.labeling.spending import Amount, cells_of, spending_rows, total
from laif_jax.records.io import PathLike
from laif_jax.studies.quality import rows_of, shown
from laif_jax.studies.report import environment
from laif_jax.studies.reward_figures import _figure, _legend
from laif_jax.studies.svg import FG, LAIF, MUTED, PAGE, SFT, short, svg
from laif_jax.studies.table import printable

_DOTTED = (0, (1, 2))
_DASHED = (0, (4, 3))


def write_quality_report(path: PathLike, report: Mapping[str, Any], *, name: str) -> epath.Path:
    """Writes the page and returns its path.

    Args:
      report: of `studies.quality.quality`; with `spending` and `tiers` where it is a run's (`studies.labels`).
      name: of what was judged.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(report, name=name))
    return path


def render(report: Mapping[str, Any], *, name: str) -> str:
    """The page as text."""
    report = printable(report)
    critics = report["critics"]
    drawn = {"shares": shares_figure(critics), "calibration": calibration_figure(critics)}
    return (
        environment()
        .get_template("quality.html.jinja")
        .render(
            name=printable(name),
            report=report,
            critics=[{**critic, "rows": rows_of(critic)} for critic in critics],
            shown=shown,
            spending_rows=spending_rows(report["spending"]) if report.get("spending") else [],
            runs=run_rows(report.get("runs") or []),
            tiers=tier_rows(report["tiers"]) if report.get("tiers") else [],
            figures={key: Markup(text) for key, text in drawn.items()},
        )
    )


def shares_figure(critics: list[dict[str, Any]]) -> str:
    """What each critic does in shares, beside the longer text: accuracy, longer wins, first shown wins, consistency."""
    rows = [
        (f"{critic['critic']}: {row['name']}" if len(critics) > 1 else row["name"], row)
        for critic in critics
        for row in rows_of(critic)
        if row["name"]
        in (
            "accuracy against people",
            "longer one wins",
            "first shown wins",
            "swap consistency",
            "own model wins",
        )
    ]
    if not rows:
        return ""
    with _figure(8.0, 1.1 + 0.42 * len(rows)) as figure:
        axes = figure.subplots()
        for y, (_, row) in enumerate(rows):
            low, high = row["ci95"]
            axes.plot([100 * low, 100 * high], [y, y], color=LAIF, lw=2, solid_capstyle="butt")
            if row["longest"] is not None:  # a little lower: neither hides the other
                axes.plot(100 * row["longest"], y + 0.22, "s", color=SFT, markeredgecolor=PAGE, markersize=5)
            axes.plot(100 * row["value"], y, "o", color=LAIF, markeredgecolor=PAGE, markersize=7)
        axes.axvline(50, color=MUTED, linestyle=_DOTTED, linewidth=1)
        axes.set_yticks(range(len(rows)), [short(label, 60) for label, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-3, 103)
        axes.set_xlabel("% (95% interval over prompts; dotted: a coin)")
        _legend(figure, {"critic": (LAIF, "o"), "longest wins": (SFT, "s")})
        return svg(figure, "shares", "Shares of each critic beside the longest-wins baseline")


def calibration_figure(critics: list[dict[str, Any]]) -> str:
    """Accuracy by confidence, a panel per critic; '' without people's labels."""
    drawn = [critic for critic in critics if critic["calibration"]]
    if not drawn:
        return ""
    columns = min(3, len(drawn))
    lines = -(-len(drawn) // columns)
    with _figure(2.9 * columns + 0.6, 3.0 * lines) as figure:
        _panels(figure, drawn, lines, columns)
        return svg(figure, "calibration", "Accuracy by confidence for each critic")


def _panels(figure: Figure, drawn: list[dict[str, Any]], lines: int, columns: int) -> None:
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for place, axes in enumerate(grid.flat):
        if place >= len(drawn):
            axes.set_visible(False)
            continue
        critic = drawn[place]
        total = critic["calibration"]["n"]
        axes.plot([50, 100], [50, 100], color=FG, linestyle=_DASHED, linewidth=1)
        for row in critic["calibration"]["bins"]:
            x, y = 100 * row["confidence"], 100 * row["accuracy"]
            axes.plot([x, x], [100 * end for end in row["ci95"]], color=LAIF, lw=1.5, solid_capstyle="butt")
            size = 4 + 10 * (row["n"] / total) ** 0.5
            axes.plot(x, y, "o", color=LAIF, markeredgecolor=PAGE, markersize=size, clip_on=False)
        axes.set_xlim(48, 102)
        axes.set_ylim(-3, 103)
        axes.set_title(short(critic["critic"], 34))
        axes.set_xlabel("confidence, %")
    grid[0, 0].set_ylabel("people agree, %")


def run_rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Planned against spent of each run, and their sum, as text."""
    rows: list[Mapping[str, Any]] = [{"who": run["date"], **run} for run in runs]
    sums = {
        side: dataclasses.asdict(total(Amount(**run[side]) for run in runs if run[side]))
        if all(run[side] for run in runs)
        else None
        for side in ("planned", "spent")
    }
    rows.append({"who": "all runs", **sums})
    return [{**cells_of(row), "who": str(row["who"])} for row in rows]


def tier_rows(tiers: Mapping[str, Any]) -> list[dict[str, str]]:
    """What two tiers used, beside what the strong critic alone would have, as text: `who`, `comparisons`, `calls`,
    `tokens`, `dollars`."""
    names = {
        "first": "first critic",
        "strong": "strong critic, where that one was not sure",
        "strong_alone": "the strong critic alone (estimate)",
        "saved": "saved (estimate)",
    }
    rows = []
    for key, name in names.items():
        used = tiers[key]
        if used is not None:
            count, cost = used.get("comparisons"), used["cost"]
            tokens = used["prompt_tokens"] + used["completion_tokens"]
            rows.append(
                {
                    "who": name,
                    "comparisons": "–" if count is None else f"{count:,.0f}",
                    "calls": f"{used['calls']:,.0f}",
                    "tokens": f"{tokens:,.0f}",
                    "dollars": show_money(None if cost is None else round(cost * NANOS)),
                }
            )
    return rows


def tier_text(tiers: Mapping[str, Any]) -> str:
    """The saving of two tiers in a sentence."""
    strong, first = tiers["strong"]["comparisons"], tiers["first"]["comparisons"]
    text = f"two tiers: the strong critic was asked about {strong:,} of {first:,} pairs"
    saved = tiers["saved"]
    if saved is None:
        return f"{text}; what it alone would have used is not known"
    money = show_money(None if saved["cost"] is None else round(saved["cost"] * NANOS))
    return (
        f"{text}; against asking it alone that saved about {saved['calls']:,.0f} calls and {money} (estimate)"
    )


def quality_table(report: Mapping[str, Any], *, width: int = 110) -> str:
    """Every measure, between critics, drift, verdicts and warnings, as text."""
    report = printable(report)
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, highlight=False)
    for critic in report["critics"]:
        title = f"{critic['critic']}, {critic['model']}: {critic['n']:,} comparisons of {critic['prompts']:,} prompts"
        table = Table(title=escape(title), box=box.SIMPLE)
        table.add_column("measure")
        for column in ("value", "95% interval", "n", "longest wins", "random"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows_of(critic):
            kind = row["kind"]
            low, high = (shown(end, kind) for end in row["ci95"])
            baselines = (shown(row["longest"], kind), shown(row["random"], kind))
            table.add_row(
                row["name"], shown(row["value"], kind), f"{low} to {high}", f"{row['n']:,}", *baselines
            )
        console.print(table)
        states = ", ".join(f"{count:,} {state}" for state, count in critic["states"].items())
        console.print(f"states: {states}", markup=False)
    for row in report["between"]:
        if row["n"]:
            text = (
                f"{row['one']} and {row['other']}: same label {shown(row['raw']['value'], 'share')}, kappa "
            )
            text += (
                f"{shown(row['kappa']['value'], 'number')}, alpha {shown(row['alpha']['value'], 'number')} "
            )
            console.print(f"{text}({row['n']:,} comparisons)", markup=False)
    if report["people"]:
        raw, alpha = (report["people"][name]["value"] for name in ("raw", "alpha"))
        text = f"people among themselves: same label {shown(raw, 'share')}, alpha {shown(alpha, 'number')}"
        console.print(f"{text} ({report['people']['n']:,} pairs)", markup=False)
    for row in report["drift"]:
        for late in row["against_first"]:
            text = f"drift probe of {row['critic']}: {late['round']} against {late['first']}: same verdict "
            console.print(f"{text}{shown(late['same']['value'], 'share')} of {late['n']}", markup=False)
    for line in [*report["verdicts"], *(f"Warning: {text}" for text in report["warnings"])]:
        console.print(line, markup=False)
    return buffer.getvalue()
