"""The study's report: one self-contained HTML page, and the same results as a table for the terminal.

Nothing in the page is fetched from anywhere and nothing in it runs: no script, a content-security policy that forbids
both, and every text (model outputs above all) escaped by the template.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from etils import epath
from markupsafe import Markup
from rich.console import Console

from laif_jax.labeling.spending import spending_rows
from laif_jax.studies.answer import PAPER_CONTEXT
from laif_jax.studies.figures import arms_figure, comparisons_figure, curves_figure
from laif_jax.studies.kl_reward import analysed
from laif_jax.studies.rl_figures import kl_figure, ppo_figure, reward_figure, rounds_figure
from laif_jax.studies.table import is_laif, number, percent, printable, ranked_comparisons, results_table

FOREST_ROWS = 14  # comparisons drawn; all are in the table
_STATES = ("ok", "tie", "unparsable", "refused", "failed")


def write_report(
    path: str | epath.Path,
    results: Mapping[str, Any],
    curves: Mapping[str, Any] | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
    figures: Mapping[str, Any] | None = None,
) -> epath.Path:
    """Writes the report and returns its path.

    Args:
      path: of the HTML file. results: the contents of results.json (`docs/reference/results.md`).
      curves: {arm: {seed: training stage or list of them}}, a stage being {"stage", "step": [...], metric: [...]}.
      samples: [{"prompt", "reference", "outputs": {arm: text}, "verdicts": {arm: probability of beating the reference,
        or None}}].
      figures: {"reward": [...], "ppo": [...]}, the curves that `rl_figures` draws.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(results, curves or {}, samples, figures or {}))
    return path


def print_results(results: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Prints arms, comparisons, the answer, and where its files are (name -> path), to standard output."""
    console = Console(highlight=False)
    width = max(80, console.width) if console.is_terminal else 110
    text = results_table(results, width=width, color=console.is_terminal)
    console.file.write(text + "".join(f"{name}: {path}\n" for name, path in files.items()))


def print_text(text: str) -> None:
    """Prints text that came from the study's own files, to standard output."""
    Console(highlight=False).file.write(f"{printable(text)}\n")


def render(
    results: Mapping[str, Any],
    curves: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    figures: Mapping[str, Any] | None = None,
) -> str:
    """The page as text; arguments as `write_report`."""
    results, curves, samples, figures = map(printable, (results, curves, samples, figures or {}))
    comparisons = ranked_comparisons(results)
    verdicts, beside = _answers(results)
    return environment().get_template("report.html.jinja").render(
        results=results,
        verdicts=verdicts,
        beside=beside,
        arms=[{"name": name, "laif": is_laif(name, arm), **arm} for name, arm in results["arms"].items()],
        has_truth=any(arm.get("true_quality") is not None for arm in results["arms"].values()),
        comparisons=comparisons,
        judge=results.get("judge") or {},
        labels=[label_row(name, row) for name, row in (results.get("labels") or {}).items()],
        stages=results.get("stages") or [],
        stage_totals=stage_totals(results.get("stages") or []),
        spending=results.get("spending") or {},
        spending_rows=spending_rows(results["spending"]) if results.get("spending") else [],
        samples=samples,
        settings=_settings(results),
        figures={
            "arms": Markup(arms_figure(results)),
            "comparisons": Markup(comparisons_figure(comparisons[:FOREST_ROWS])),
            "curves": Markup(curves_figure(curves)),
            **_reinforced_figures(results, figures),
        },
        **_reinforced(results),
        forest_rows=FOREST_ROWS,
    )  # fmt: skip


# ---- what the page shows ---------------------------------------------------------------------------------------


def label_row(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the labels table: counts of states, certainty, and whether order mattered (None: not measured)."""
    counts = {state: int(row.get(state) or 0) for state in _STATES}
    others = ("preferences", "mean_margin", "swap_consistency", "first_shown_wins")
    return {
        "name": name,
        "n": row.get("n", sum(counts.values())),
        **counts,
        **{key: row.get(key) for key in others},
    }


def stage_totals(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per kind of stage: how often it ran, how it ended, seconds, tokens and dollars. A stage that several arms share
    (same key) counts once."""
    totals: dict[str, dict[str, Any]] = {}
    states: dict[str, Counter[str]] = defaultdict(Counter)
    seen: set[str] = set()
    for stage in stages:
        key = stage.get("key")
        if key and key in seen:
            continue
        seen.add(key or "")
        kind = str(stage.get("kind") or stage["stage"])
        total = totals.setdefault(kind, {"kind": kind, "runs": 0, "seconds": 0.0, "tokens": 0, "cost": 0.0})
        usage = stage.get("usage") or {}
        total["runs"] += 1
        total["seconds"] += stage.get("seconds") or 0.0
        total["tokens"] += usage.get("prompt_tokens", 0) + usage.get("completion_tokens", 0)
        total["cost"] += usage.get("cost") or stage.get("cost") or 0.0
        states[kind][str(stage.get("status", ""))] += 1
    for kind, total in totals.items():
        total["states"] = ", ".join(f"{count} {state}" for state, count in states[kind].items())
    return list(totals.values())


def _reinforced(results: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of reward models, reinforcement learning, rounds and best-of-n; empty where a study has none."""
    rounds = results.get("rounds") or {}
    chosen = results.get("best_of_n") or {}
    return {
        "rewards": results.get("rewards") or [],
        "ppo": results.get("ppo") or [],
        "kl_reward": _kl_rows(results),
        "rounds": rounds,
        "round_rows": [{"arm": arm, **row} for arm, rows in rounds.items() for row in rows],
        "chosen": [{"arm": arm, **row} for arm, rows in chosen.items() for row in rows],
        "several_seeds": len(results.get("seeds") or []) > 1,
    }


def _reinforced_figures(results: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Markup]:
    runs = figures.get("ppo") or []
    names = dict.fromkeys(name for arms in (results.get("one_round") or {}).values() for name in arms)
    single = {name: results["arms"][name] for name in names if name in results["arms"]}
    made = {
        "reward": reward_figure(figures.get("reward") or []),
        "ppo_train": ppo_figure(runs, "train"),
        "ppo_eval": ppo_figure(runs, "eval"),
        "kl": kl_figure(_kl_rows(results)),
        "rounds": rounds_figure(results.get("rounds") or {}, single),
    }
    return {name: Markup(text) for name, text in made.items()}


def _kl_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Fits and turns are found again, so that the page of an older study follows the same rules."""
    return [analysed(row) for row in results.get("kl_reward") or [] if row["kl"]]


def points(share: float | None) -> str:
    """A difference of shares in percentage points, with its sign; a dash for what is not known."""
    return number(None if share is None else 100 * share, 1, sign=True)


def _answers(results: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What stands at the top: the verdicts, and below them, each once, what weakens them and the paper's finding."""
    rows = results.get("answers") or []
    if not rows or any("verdict" not in row for row in rows):
        return ([results["answer"]] if results.get("answer") else []), []
    said = [text for row in rows for text in row.get("caveats", [])]
    return [row["verdict"] for row in rows], list(dict.fromkeys([*said, PAPER_CONTEXT]))


def _settings(results: Mapping[str, Any]) -> dict[str, str]:
    rows = {"configuration": results.get("config_path"), "scale": results.get("scale")}
    rows["seeds"] = ", ".join(str(seed) for seed in results.get("seeds") or [])
    judge = results.get("judge") or {}
    rows |= {f"judge: {key}": value for key, value in judge.items() if isinstance(value, str | int | float)}
    rows |= {f"version: {key}": value for key, value in (results.get("versions") or {}).items()}
    return {key: str(value) for key, value in rows.items() if value not in (None, "")}


# ---- template --------------------------------------------------------------------------------------------------


def environment() -> jinja2.Environment:
    """Where the pages' templates come from, with their filters."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("laif_jax.studies"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {"num": number, "pct": percent, "points": points, "duration": duration, "verdict": verdict_name}
    environment.filters |= {name: _absent_is_none(function) for name, function in filters.items()}
    return environment


def _absent_is_none(function: Callable[..., str]) -> Callable[..., str]:
    """A filter to which a field that results.json does not have is None, as one without a value is."""

    def call(value: Any, *args: Any, **options: Any) -> str:
        return function(None if isinstance(value, jinja2.Undefined) else value, *args, **options)

    return call


def duration(seconds: float | None) -> str:
    """Seconds as `0.4 s`, `12 s`, `3 min 05 s` or `2 h 07 min`."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def verdict_name(p: float | None) -> str:
    """A verdict on an output against the reference: win, tie, loss or none."""
    if p is None or p != p:
        return "none"
    return "tie" if p == 0.5 else "win" if p > 0.5 else "loss"
