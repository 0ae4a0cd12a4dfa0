"""What a sweep found: a table of settings and arms with intervals over seeds, as JSON, text and a page."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.special import stdtrit

from laif_jax.studies.report import environment
from laif_jax.studies.sweep_axes import Point, label_of
from laif_jax.studies.table import printable

# Name in `results.json` -> heading. A study without a truth has no quality.
COLUMNS = {"win_rate": "win rate", "true_quality": "quality", "mean_length": "length"}


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean, and the 95% interval of the mean over seeds (Student's t; None for one seed)."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return {"mean": mean, "ci95": None, "n": n}
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    half = float(stdtrit(n - 1, 0.975)) * error
    return {"mean": mean, "ci95": [mean - half, mean + half], "n": n}


def summarise(points: Sequence[tuple[Point, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One row per setting (all axes but the seed) and arm, over all seeds of its points.

    Args:
      points: each with its `results.json`.

    Returns:
      Rows of `setting` (key -> value), `label`, `arm`, `seeds`, `points` (their folders), and per metric of `COLUMNS`
      that is known `mean`, `ci95` and `n`.
    """
    settings: dict[str, list[tuple[Point, Mapping[str, Any]]]] = {}
    for point, results in points:
        settings.setdefault(label_of(point.setting), []).append((point, results))
    rows = []
    for label, alike in settings.items():
        arms = dict.fromkeys(name for _, results in alike for name in results["arms"])
        for arm in arms:
            found = [row for _, r in alike if arm in r["arms"] for row in r["arms"][arm]["per_seed"]]
            rows.append(
                {
                    "setting": alike[0][0].setting,
                    "label": label,
                    "arm": arm,
                    "seeds": [row["seed"] for row in found],
                    "points": [point.folder for point, _ in alike],
                    **{
                        name: interval([row[name] for row in found])
                        for name in COLUMNS
                        if found and all(row.get(name) is not None for row in found)
                    },
                }
            )
    return rows


def table_text(results: Mapping[str, Any], width: int) -> str:
    """The table for a terminal of so many columns."""
    results = printable(results)
    table = Table(title=f"{escape(results['name'])}: sweep", box=box.SIMPLE)
    table.add_column("setting")
    table.add_column("arm")
    table.add_column("seeds", justify="right")
    names = columns_of(results)
    for name in names:
        table.add_column(f"{COLUMNS[name]}, 95%", justify="right")
    before = None
    for row in results["rows"]:
        cells = [_cell(row.get(name), name) for name in names]
        shown = "" if row["label"] == before else escape(row["label"])
        table.add_row(shown, escape(row["arm"]), str(len(row["seeds"])), *cells)
        before = row["label"]
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, highlight=False)
    console.print(table)
    for line in [*results["notes"], *(f"Warning: {text}" for text in results["warnings"])]:
        console.print(line, markup=False)
    return buffer.getvalue()


def columns_of(results: Mapping[str, Any]) -> list[str]:
    """The metrics that some row has."""
    return [name for name in COLUMNS if any(name in row for row in results["rows"])]


def _cell(value: Mapping[str, Any] | None, name: str) -> str:
    if value is None:
        return "–"
    digits = 3 if name == "true_quality" else 1
    text = f"{value['mean']:.{digits}f}"
    if value["ci95"] is None:
        return text
    return f"{text} [{value['ci95'][0]:.{digits}f}, {value['ci95'][1]:.{digits}f}]"


def page(results: Mapping[str, Any]) -> str:
    """The HTML page."""
    results = printable(results)
    names = columns_of(results)
    rows = [{**row, "cells": [_cell(row.get(name), name) for name in names]} for row in results["rows"]]
    settings = {name: str(value) for name, value in results["settings"].items() if value is not None}
    template = environment().get_template("sweep.html.jinja")
    headings = [COLUMNS[name] for name in names]
    return template.render(results=results, rows=rows, headings=headings, settings=settings)
