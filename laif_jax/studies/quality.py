"""`laif label quality`: how good the labels of a store are, from what it holds; nobody is asked. No JAX here."""

from collections.abc import Sequence
from typing import Any

from laif_jax.evaluation.drift import drift
from laif_jax.evaluation.quality import quality_report
from laif_jax.labeling.judged import Judged
from laif_jax.records.errors import LaifError

FEW = 100  # pairs with people's labels; with fewer an accuracy is known to ten points at best
OUTSIDE = 0.5  # probability outside the options beyond which labels are read from little
COVERAGE = 0.9


def quality(
    judged: Judged, *, only: str = "", own: Sequence[str] = (), samples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """The report as plain JSON: what `evaluation.quality.quality_report` gives, `drift` by critic, `verdicts` (a
    sentence per critic) and `warnings`.

    Raises:
      LaifError: there is no critic (whose name or model holds `only`).
    """
    critics = judged.critics(only=only, own=own)
    probes = judged.probes(only=only)
    if not critics and not probes:
        raise LaifError(
            f"there is no judgement of a critic whose name or model holds {only!r}"
            if only
            else "there are no judgements here: label something first (`laif label run`)"
        )
    report = quality_report(critics, judged.pairs, samples=samples, seed=seed)
    report["drift"] = [
        {
            "critic": probe.name,
            "model": probe.model,
            "rounds": {name: len(answers) for name, answers in probe.rounds.items()},
            "fingerprints": probe.fingerprints,
            "against_first": drift(probe.rounds, samples=samples, seed=seed),
        }
        for probe in probes
    ]
    report["verdicts"] = [text for critic in report["critics"] for text in _verdict(critic)]
    report["warnings"] = [text for critic in report["critics"] for text in _warnings(critic)] + [
        text for row in report["drift"] for text in _drift_warnings(row, report["critics"])
    ]
    return report


def _pct(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _range(block: dict[str, Any]) -> str:
    return f"{_pct(block['value'])} ({_pct(block['ci95'][0])} to {_pct(block['ci95'][1])})"


def _verdict(critic: dict[str, Any]) -> list[str]:
    people = critic["people"]
    if people is None or people["accuracy"]["value"] is None:
        return []
    low, high = people["accuracy"]["ci95"]
    coin = (
        "better than a coin"
        if low > 0.5
        else "worse than a coin"
        if high < 0.5
        else "not told apart from a coin"
    )
    text = (
        f"{critic['critic']}: names the side that people prefer in {_range(people['accuracy'])} of "
        f"{people['decided']:,} pairs: {coin}."
    )
    gain = people["gain_over_longest"]
    if gain["value"] is not None:
        less, more = gain["ci95"]
        side = "better than" if less > 0 else "worse than" if more < 0 else "not told apart from"
        longest = people["longest_wins"]["accuracy"]["value"]
        text += f" Taking the longer text is right in {_pct(longest)}: the critic is {side} that."
    return [text]


def _warnings(critic: dict[str, Any]) -> list[str]:
    name, found = critic["critic"], []
    people, swap, position = critic["people"], critic["swap"], critic["position"]["first_wins"]
    if people is None:
        found.append(f"{name}: no labels by people (`--pairs`): its accuracy and calibration are not known.")
    elif people["decided"] < FEW:
        found.append(f"{name}: only {people['decided']} pairs on which people name a side.")
    if (
        people is not None
        and people["accuracy"]["value"] is not None
        and people["accuracy"]["ci95"][0] <= 0.5
    ):
        found.append(f"{name} cannot be told from a coin on these pairs.")
    if swap is not None and swap["consistency"]["value"] < 0.5:
        found.append(
            f"{name}: the order of showing decides most verdicts: both orders name the same side in only "
            f"{_range(swap['consistency'])}."
        )
    if position["value"] is not None and not position["ci95"][0] <= 0.5 <= position["ci95"][1]:
        place = "first" if position["value"] > 0.5 else "second"
        found.append(f"{name} favours the response shown {place}: the first one wins {_range(position)}.")
    beyond = critic["length"]["beyond_people"]
    if beyond["value"] is not None and beyond["ci95"][0] > 0:
        found.append(
            f"{name} takes the longer text more often than people do: by {100 * beyond['value']:.1f} points "
            f"({100 * beyond['ci95'][0]:.1f} to {100 * beyond['ci95'][1]:.1f})."
        )
    own = critic["own"]
    if own is not None and own["beyond_people"]["value"] is not None and own["beyond_people"]["ci95"][0] > 0:
        found.append(f"{name} prefers its own model's responses beyond what people do.")
    errors = critic["calibration"]
    if errors is not None and errors["ece"]["value"] > (errors["ece_if_calibrated"]["p95"] or 1.0):
        sure = "sure" if errors["overconfidence"]["value"] > 0 else "unsure"
        found.append(
            f"{name}: its probabilities are off by {errors['ece']['value']:.3f} on average (a calibrated critic would "
            f"show up to {errors['ece_if_calibrated']['p95']:.3f} here): too {sure}."
        )
    outside = critic["outside"]
    if outside is not None and outside["mean"]["value"] > OUTSIDE:
        found.append(
            f"{name} gives the two options {_pct(1 - outside['mean']['value'])} of its probability on average: its "
            "labels are read from what little is left."
        )
    if critic["coverage"]["value"] is not None and critic["coverage"]["value"] < COVERAGE:
        found.append(f"{name} gave a label to only {_pct(critic['coverage']['value'])} of the comparisons.")
    return found


def _drift_warnings(row: dict[str, Any], critics: Sequence[dict[str, Any]]) -> list[str]:
    """A round that changed more than asking again does (nothing, where nobody asked twice)."""
    again = [c["repeats"]["same"]["value"] for c in critics if c["critic"] == row["critic"] and c["repeats"]]
    usual = again[0] if again else 1.0
    found = []
    for late in row["against_first"]:
        same = late["same"]
        if late["n"] and (same["value"] < usual if usual == 1.0 else same["ci95"][1] < usual):
            found.append(
                f"Drift: {row['critic']} ({row['model']}) changed {late['changed']} of {late['n']} verdicts on the "
                f"probe set between {late['first']} and {late['round']}. Labels of before and after do not mix."
            )
        if late["lost"] or late["gained"]:
            found.append(
                f"Drift: {row['critic']} lost {late['lost']} and gained {late['gained']} labels on the probe set by "
                f"{late['round']}."
            )
        before, after = (row["fingerprints"].get(late[name]) for name in ("first", "round"))
        if before and after and before != after:
            found.append(
                f"Drift: the model behind {row['critic']} calls itself {', '.join(after)} in {late['round']}; it was "
                f"{', '.join(before)} in {late['first']}."
            )
    return found


# ---- rows, for the page and the terminal -------------------------------------------------------------------------


def rows_of(critic: dict[str, Any]) -> list[dict[str, Any]]:
    """Every measure of a critic as `name, value, ci95, n, longest, random, kind` ("share", "number" or "points")."""
    people, swap, own = critic["people"] or {}, critic["swap"] or {}, critic["own"] or {}
    length, position, errors = critic["length"], critic["position"], critic["calibration"] or {}
    repeats, cycles, outside = (critic[name] or {} for name in ("repeats", "transitivity", "outside"))
    longest = people.get("longest_wins", {})
    method = f" ({length['method']})" if length["method"] else ""

    def value(block: dict[str, Any], *path: str) -> Any:
        for name in path:
            block = block.get(name) or {}
        return block.get("value") if isinstance(block, dict) and "value" in block else block or None

    table = [
        ("share", "accuracy against people", people.get("accuracy"), value(longest, "accuracy"), 0.5),
        ("points", "accuracy beyond longest wins", people.get("gain_over_longest"), None, None),
        ("share", "raw agreement with people, ties too", people.get("raw"), value(longest, "raw"), None),
        ("number", "Cohen's kappa with people", people.get("kappa"), value(longest, "kappa"), 0.0),
        ("number", "Krippendorff's alpha with people", people.get("alpha"), None, 0.0),
        ("share", "swap consistency", swap.get("consistency"), 1.0, 0.5),
        (
            "share",
            "first shown wins",
            position["first_wins"],
            value(position, "longest_wins", "first_wins"),
            0.5,
        ),
        ("number", f"position bias, logit{method}", position["logit"], 0.0, 0.0),
        ("share", "longer one wins", length["longer_wins"], 1.0, 0.5),
        ("share", "longer one wins, by people", length["people"], None, None),
        ("points", "longer one wins, beyond people", length["beyond_people"], None, None),
        ("number", f"length bias, logit slope{method}", length["slope"], None, 0.0),
        ("number", "length bias beyond people, logit slope", length["slope_beyond_people"], None, 0.0),
        ("share", "own model wins", own.get("wins"), value(own, "longest_wins", "wins"), 0.5),
        ("points", "own model wins, beyond people", own.get("beyond_people"), None, None),
        (
            "share",
            "the same when asked again",
            repeats.get("same"),
            None,
            repeats.get("random", {}).get("same"),
        ),
        ("number", "spread when asked again", repeats.get("spread"), None, None),
        ("number", "calibration error (ECE)", errors.get("ece"), None, None),
        ("number", "overconfidence", errors.get("overconfidence"), None, None),
        ("number", "Brier score", errors.get("brier"), None, 0.25),
        ("share", "cycles among triples", cycles.get("cycles"), 0.0, 0.25),
        ("share", "probability outside the options", outside.get("mean"), None, None),
        ("share", "ties", critic["ties"], None, None),
        ("share", "coverage", critic["coverage"], None, None),
    ]
    return [
        {"kind": kind, "name": name, **block, "longest": longer, "random": random}
        for kind, name, block, longer, random in table
        if block is not None and block["value"] is not None
    ]


def shown(value: float | None, kind: str) -> str:
    """A value as text: shares in per cent, differences in points, numbers with three digits."""
    if value is None:
        return "–"
    return (
        f"{value:.3f}"
        if kind == "number"
        else f"{100 * value:+.1f}"
        if kind == "points"
        else f"{100 * value:.1f}%"
    )
