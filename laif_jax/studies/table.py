"""The results as a table for the terminal."""

import io
import re
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from laif_jax.labeling.spending import spending_rows

# Control characters but tab and line break (escape sequences are made of them), and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
COMPARISONS_SHOWN = 12  # in the terminal; the report has all


def printable(value: Any) -> Any:
    """The same structure with every character that neither HTML nor a terminal can take, in any text, replaced."""
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {printable(key): printable(item) for key, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, list | tuple) else value


def is_laif(name: str, arm: Mapping[str, Any]) -> bool:
    """Whether an arm learned from AI feedback: by its `method`; without one, by its name."""
    return arm["method"] != "none" if "method" in arm else "laif" in name.lower()


def ranked_comparisons(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Comparisons with the study's questions first (turned so that `a` is the LAIF arm), then LAIF against SFT, then
    the rest."""
    asked = [(row["laif"], row["sft"]) for row in results.get("answers") or []]
    arms = results["arms"]
    rows = []
    for row in results.get("comparisons") or []:
        pair = (row["a"], row["b"])
        turn = pair[::-1] in asked or (
            pair not in asked and all(name in arms for name in pair) and is_laif(pair[1], arms[pair[1]])
            and not is_laif(pair[0], arms[pair[0]])
        )  # fmt: skip
        rows.append(_turned(row) if turn else dict(row))
    for row in rows:
        row["asked"] = (row["a"], row["b"]) in asked
        mixed = row["a"] in arms and row["b"] in arms
        row["mixed"] = mixed and is_laif(row["a"], arms[row["a"]]) != is_laif(row["b"], arms[row["b"]])
    place = {pair: i for i, pair in enumerate(asked)}
    return sorted(rows, key=lambda row: (place.get((row["a"], row["b"]), len(asked)), not row["mixed"]))


def _turned(row: Mapping[str, Any]) -> dict[str, Any]:
    low, high = row["ci95"]
    return {**row, "a": row["b"], "b": row["a"], "delta": -row["delta"], "ci95": [-high, -low]}


def results_table(results: Mapping[str, Any], *, width: int = 110, color: bool = False) -> str:
    """Arms, comparisons and the answer, as text.

    Args:
      results: the contents of results.json. width: columns of the terminal. color: ANSI colours.
    """
    results = printable(results)
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, force_terminal=color, no_color=not color, highlight=False)
    parts: list[Any] = [_arms(results)]
    if results.get("comparisons"):
        parts.append(_comparisons(results))
    if (results.get("spending") or {}).get("rows"):
        parts.append(_spending(results["spending"]))
    parts += [Text(f"{line}\n") for line in _answer_lines(results)]
    console.print(Group(*parts))
    return buffer.getvalue()


def _answer_lines(results: Mapping[str, Any]) -> list[str]:
    """A paragraph per question, then what weakens the answers, each sentence once; without questions, `answer`."""
    rows = results.get("answers") or []
    if not rows:
        return [str(results["answer"])] if results.get("answer") else []
    caveats = dict.fromkeys(text for row in rows for text in row.get("caveats") or [])
    return [str(row["verdict"]) for row in rows] + ([" ".join(caveats)] if caveats else [])


def _arms(results: Mapping[str, Any]) -> Table:
    rows = results["arms"]
    truth = any(arm.get("true_quality") is not None for arm in rows.values())
    table = Table(
        title=f"{escape(str(results.get('name', 'study')))}: win rate against the reference",
        box=box.SIMPLE,
        collapse_padding=True,
        pad_edge=False,
    )
    gaps = any((arm.get("coverage") or 1.0) < 1.0 for arm in rows.values())
    table.add_column("arm", min_width=min(24, max((len(str(name)) for name in rows), default=3)))
    names = ["win %", "± SE", "n", "win/tie/loss", *(["coverage"] if gaps else []), "length"]
    for name in names + (["quality"] if truth else []):
        table.add_column(name, justify="right")
    for name, arm in rows.items():
        cells = [
            number(arm.get("win_rate"), 1),
            number(arm.get("standard_error"), 1),
            number(arm.get("n"), 0),
        ]
        cells += ["/".join(number(arm.get(key), 0) for key in ("wins", "ties", "losses"))]
        cells += [percent(arm.get("coverage"))] if gaps else []
        cells += [number(arm.get("mean_length"), 1)]
        table.add_row(escape(str(name)), *cells, *([number(arm.get("true_quality"), 3)] if truth else []))
    return table


def _comparisons(results: Mapping[str, Any]) -> Table:
    table = Table(title="Differences, paired on prompts and seeds (points)", box=box.SIMPLE)
    table.add_column("a - b")
    for name in ("difference", "95% interval", "p", "n"):
        table.add_column(name, justify="right")
    rows = ranked_comparisons(results)
    for row in rows[:COMPARISONS_SHOWN]:
        low, high = row["ci95"]
        interval = f"{number(low, 1, sign=True)} to {number(high, 1, sign=True)}"
        cells = [number(row["delta"], 1, sign=True), interval, number(row.get("p_value"), 3)]
        table.add_row(escape(f"{row['a']} - {row['b']}"), *cells, number(row.get("n"), 0))
    if len(rows) > COMPARISONS_SHOWN:
        table.caption = f"{len(rows) - COMPARISONS_SHOWN} more in the report"
    return table


def spending_table(found: Mapping[str, Any], *, width: int = 110) -> str:
    """Planned against spent, as text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, highlight=False).print(_spending(printable(found)))
    return buffer.getvalue()


def _spending(found: Mapping[str, Any]) -> Table:
    table = Table(
        title="Calls to other models: planned, spent", box=box.SIMPLE, collapse_padding=True, pad_edge=False
    )
    table.add_column("who", overflow="fold")
    for name in ("calls", "spent", "tokens", "spent", "dollars", "spent"):
        table.add_column(name, justify="right")
    for row in spending_rows(found):
        cells = [
            row[f"{side}_{name}"] for name in ("calls", "tokens", "money") for side in ("planned", "spent")
        ]
        table.add_row(escape(row["who"]), *cells)
    return table


def number(value: float | None, digits: int, *, sign: bool = False) -> str:
    """A number with that many digits; a dash for what is not known."""
    if value is None or value != value:
        return "–"
    value = round(value, digits) + 0.0  # no "-0.0"
    return f"{value:{'+' if sign else ''},.{digits}f}"


def percent(value: float | None, digits: int = 0) -> str:
    """A share in [0, 1] as a percentage; a dash for what is not known."""
    return "–" if value is None or value != value else f"{100 * value:.{digits}f}%"
