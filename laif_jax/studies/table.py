"""The results as a table for the terminal."""

import io
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text


def results_table(results: Mapping[str, Any], *, width: int = 110, color: bool = False) -> str:
    """Arms, comparisons and the answer, as text.

    Args:
      results: the contents of results.json. width: columns of the terminal. color: ANSI colours.
    """
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, force_terminal=color, no_color=not color, highlight=False)
    parts: list[Any] = [_arms(results)]
    if results.get("comparisons"):
        parts.append(_comparisons(results))
    if results.get("answer"):
        parts.append(Text(str(results["answer"])))
    console.print(Group(*parts))
    return buffer.getvalue()


def _arms(results: Mapping[str, Any]) -> Table:
    rows = results["arms"]
    truth = any(arm.get("true_quality") is not None for arm in rows.values())
    table = Table(
        title=f"{escape(str(results.get('name', 'study')))}: win rate against the reference", box=box.SIMPLE
    )
    table.add_column("arm")
    names = ["win rate %", "± SE", "n", "wins", "ties", "losses", "coverage", "length"]
    for name in names + (["true quality"] if truth else []):
        table.add_column(name, justify="right")
    for name, arm in rows.items():
        cells = [number(arm.get("win_rate"), 1), number(arm.get("standard_error"), 1)]
        cells += [number(arm.get(key), 0) for key in ("n", "wins", "ties", "losses")]
        cells += [percent(arm.get("coverage")), number(arm.get("mean_length"), 1)]
        table.add_row(escape(str(name)), *cells, *([number(arm.get("true_quality"), 3)] if truth else []))
    return table


def _comparisons(results: Mapping[str, Any]) -> Table:
    table = Table(title="Differences, paired on prompts and seeds (points)", box=box.SIMPLE)
    table.add_column("a - b")
    for name in ("difference", "95% interval", "p", "n"):
        table.add_column(name, justify="right")
    for row in results["comparisons"]:
        low, high = row["ci95"]
        interval = f"{number(low, 1, sign=True)} to {number(high, 1, sign=True)}"
        cells = [number(row["delta"], 1, sign=True), interval, number(row.get("p_value"), 3)]
        table.add_row(escape(f"{row['a']} - {row['b']}"), *cells, number(row.get("n"), 0))
    return table


def number(value: float | None, digits: int, *, sign: bool = False) -> str:
    """A number with that many digits; a dash for what is not known."""
    if value is None or value != value:
        return "–"
    return f"{value:{'+' if sign else ''},.{digits}f}"


def percent(value: float | None, digits: int = 0) -> str:
    """A share in [0, 1] as a percentage; a dash for what is not known."""
    return "–" if value is None or value != value else f"{100 * value:.{digits}f}%"
