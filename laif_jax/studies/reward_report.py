"""The report of a reward model: one self-contained HTML page, a table for the terminal, and what both say in words."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.markup import escape

from laif_jax.studies import reward_figures as figures
from laif_jax.studies.report import points
from laif_jax.studies.single import fill, make_table, with_words
from laif_jax.studies.table import number, percent

CUT_SHARE = 0.1  # of pairs with a cut response; more is worth a warning


def render(results: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """The page.

    Args:
      results: the contents of results.json (`docs/reference/results.md`).
      data: `curves`: {learning rate as text: {"step": [...], metric: [...]}}, of training.
    """
    sets = results["sets"]
    drawn = {
        "steps": figures.accuracy_figure(results["rates"]),
        "sets": figures.sets_figure(sets),
        "length": figures.length_figure(sets),
        "calibration": figures.calibration_figure(sets),
        "scores": figures.distribution_figure(sets),
        "training": figures.training_figure(data["curves"]),
    }
    return fill(
        "reward.html.jinja",
        results,
        drawn,
        sets=sets,
        held_out=(sets.get("held_out") or {}).get("n"),
        members={name: row["members"] for name, row in sets.items() if row.get("members")},
        groups={name: row["groups"] for name, row in sets.items() if row.get("groups")},
        data=data_rows(results["data"]),
    )


def data_rows(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per file of pairs: rows read and used, and what was left out, in words."""
    train = data["train"]
    rows = [{"name": "train", **train, "used": data["used"], "left_out": list(_left_out(train))}]
    more = {
        "of prompts in a test set": data["dropped_because_in_test"],
        "tied": data["ties_dropped"],
        "held out": data["held_out"],
    }
    rows[0]["left_out"] += [f"{count:,} {reason}" for reason, count in more.items() if count]
    rows += [
        {"name": name, **row, "used": row["kept"], "left_out": list(_left_out(row))}
        for name, row in data["tests"].items()
    ]
    return [{**row, "left_out": ", ".join(row["left_out"])} for row in rows]


_REASONS = {
    "no_prompt": "without a prompt",
    "empty": "with an empty response",
    "identical": "of two identical responses",
    "no_label": "without a label",
    "different_prompts": "whose dialogues differ before the last turn",
    "no_response": "not ending with a response",
}


def _left_out(row: Mapping[str, int]) -> Iterable[str]:
    return (f"{row[key]:,} {text}" for key, text in _REASONS.items() if row.get(key))


# ---- in words --------------------------------------------------------------------------------------------------


def verdicts(sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence per test set (or about the held-out pairs, where there is none)."""
    tests = {name: row for name, row in sets.items() if name != "held_out"} or sets
    return [_verdict(name, row) for name, row in tests.items() if row["accuracy"] is not None]


def _verdict(name: str, row: Mapping[str, Any]) -> str:
    low, high = row["ci95"]
    less, more = row["gain_ci95"]
    side = "better than" if less > 0 else "worse than" if more < 0 else "not told apart from"
    return (
        f"{name.replace('_', ' ')}: the preferred response scores higher in {percent(row['accuracy'], 1)} of "
        f"{row['n']:,} pairs (95% interval {percent(low, 1)} to {percent(high, 1)}). Taking the longer one is right in "
        f"{percent(row['longest_wins'], 1)}: the model is {side} that ({points(row['gain'])} points, "
        f"{points(less)} to {points(more)})."
    )


def warnings(metrics: Mapping[str, Any]) -> list[str]:
    """What a reader must know."""
    found = []
    for name, row in metrics["sets"].items():
        total = row["n"] + row["ties"]
        if row["accuracy"] is not None and row["ci95"][0] <= 0.5:
            found.append(f"On {name} the model cannot be told from a coin.")
        if total and row["response_truncated"] > CUT_SHARE * total:
            found.append(
                f"In {row['response_truncated']:,} of {total:,} pairs of {name} a response was cut by `max_length`: "
                "the model did not read its end, and the longest-wins baseline did."
            )
        if row["unused"]:
            found.append(
                f"{row['unused']:,} pairs of {name} could not be scored: a text holds a special token's name."
            )
    rates = [row["learning_rate"] for row in metrics["rates"]]
    failed = [row["learning_rate"] for row in metrics["rates"] if row.get("failed")]
    if failed:
        found.append(f"Training was not finite at learning rate {', '.join(f'{rate:g}' for rate in failed)}.")
    best = metrics["learning_rate"]
    if len(rates) > 2 and best in (min(rates), max(rates)):
        edge = "lowest" if best == min(rates) else "highest"
        found.append(
            f"The learning rate that was kept, {best:g}, is the {edge} tried: the best one may lie beyond."
        )
    return found


def reward_table(results: Mapping[str, Any], width: int = 110) -> str:
    """Accuracy per set of pairs, the verdicts and the warnings, as text."""
    columns = ("n", "accuracy %", "95% interval", "longest wins %", "difference", "ECE")
    table = make_table(results, "accuracy of the reward model", "pairs", columns)
    for name, row in results["sets"].items():
        if row["accuracy"] is None:
            continue
        low, high = row["ci95"]
        table.add_row(
            escape(name),
            number(row["n"], 0),
            number(100 * row["accuracy"], 1),
            f"{number(100 * low, 1)} to {number(100 * high, 1)}",
            number(100 * row["longest_wins"], 1),
            points(row["gain"]),
            number(row["calibration"]["ece"], 3),
        )
    return with_words(table, results, width)
