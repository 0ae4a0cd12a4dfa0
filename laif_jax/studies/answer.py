"""The study's question in plain language: is LAIF better than SFT on the strong teacher here?

The interval decides, never the point estimate: better, worse, or no detectable difference (and then how large a
difference would have been detected). What weakens the answer is said beside it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from laif_jax.config.schema import QuestionSpec
from laif_jax.studies.table import number

PAPER_CONTEXT = (
    "For context: with GPT-4 as critic and judge, Sharma et al. (2024) report SFT on GPT-4's answers 2.6 to 9.8 points "
    "above LAIF on a GPT-3.5-taught policy for five of six base models and 2.0 points below it for the sixth; three of "
    "the six gaps exceed two standard errors."
)

# z(0.975) + z(0.8) over z(0.975): from an interval's half width to the difference found with probability 0.8.
_POWER = 2.80 / 1.96


def answer_text(results: Mapping[str, Any], question: QuestionSpec) -> str:
    """The answer to one question: verdict, caveats and the paper's finding, as plain text."""
    return " ".join([verdict(results, question), *caveats(results, question), PAPER_CONTEXT])


def answers(results: Mapping[str, Any], questions: Sequence[QuestionSpec]) -> dict[str, Any]:
    """The `answer` and `answers` entries of results.json.

    Returns:
      {"answer": all verdicts, what weakens them and the paper's finding, each said once, "answers": [{"laif", "sft",
      "verdict", "caveats", "text"}]}.
    """
    rows = [
        {
            "laif": q.laif,
            "sft": q.sft,
            "verdict": verdict(results, q),
            "caveats": caveats(results, q),
            "text": answer_text(results, q),
        }
        for q in questions
    ]
    if not rows:
        return {
            "answer": "The study asks no question (`questions` is empty); see the table of arms.",
            "answers": [],
        }
    said = [verdict(results, q) for q in questions] + [
        text for q in questions for text in caveats(results, q)
    ]
    return {"answer": " ".join([*dict.fromkeys(said), PAPER_CONTEXT]), "answers": rows}


def verdict(results: Mapping[str, Any], question: QuestionSpec) -> str:
    """One or two sentences: what the interval says, with the numbers behind it."""
    laif, sft = question.laif, question.sft
    for arm in (laif, sft):
        if results["arms"].get(arm, {}).get("win_rate") is None:
            return f"Cannot be answered: arm {arm} has no result.{_failure(results, arm)}"
    row = _comparison(results, laif, sft)
    if row is None:
        return f"Cannot be answered: {laif} and {sft} were not compared on common prompts."
    low, high = row["ci95"]
    numbers = (
        f"{results['arms'][laif]['win_rate']:.1f}% against {results['arms'][sft]['win_rate']:.1f}%, a difference of "
        f"{number(row['delta'], 1, sign=True)} points (95% interval {number(low, 1, sign=True)} to "
        f"{number(high, 1, sign=True)}; {_where(results, row)})."
    )
    # A question may also be about two ways of LAIF: rounds against one round, for example.
    both = results["arms"][sft].get("method", "none") != "none"
    first, second = (laif, sft) if both else (f"LAIF ({laif})", f"SFT ({sft})")
    if low > 0:
        return f"Yes: {first} is better than {second} here: {numbers}"
    if high < 0:
        return f"No: {first} is worse than {second} here: {numbers}"
    detectable = row.get("detectable") or _POWER * (high - low) / 2
    return (
        f"No detectable difference between {first} and {second} here: {numbers} A study of this size would "
        f"find a true difference of about {detectable:.1f} points four times in five; smaller ones remain possible."
    )


def caveats(results: Mapping[str, Any], question: QuestionSpec) -> list[str]:
    """What weakens the answer, one sentence each: seeds, judge (also as the critic), length, missing verdicts, true
    quality."""
    arms = [results["arms"].get(name, {}) for name in (question.laif, question.sft)]
    if any(arm.get("win_rate") is None for arm in arms):
        return []
    laif, sft = arms
    said = []
    row = _comparison(results, question.laif, question.sft)
    if _seeds(results, row or {}) == 1:
        said.append("One training seed: the interval is about these two models, not about the recipes.")
    said += _judge_caveat(results.get("judge") or {})
    critic = laif.get("critic_endpoint")
    if (
        critic
        and critic == (results.get("judge") or {}).get("endpoint")
        and critic != sft.get("critic_endpoint")
    ):
        said.append(
            f"Critic and judge are one model ({critic}): {question.laif} was trained towards what this judge likes, "
            "which favours it here."
        )
    if laif.get("mean_length") and sft.get("mean_length"):
        ratio = laif["mean_length"] / sft["mean_length"]
        if abs(ratio - 1) > 0.1:
            more = "longer" if ratio > 1 else "shorter"
            said.append(
                f"{question.laif}'s answers are {abs(ratio - 1):.0%} {more} than {question.sft}'s, and judges tend to "
                "favour length."
            )
    for name in (question.laif, question.sft):
        drawn = (results.get("best_of_n") or {}).get(name)
        if drawn and results["arms"][name].get("method") == "best_of_n":
            said.append(f"{name} draws {drawn[0]['n']} samples for each answer, the other arm one.")
    thin = [
        name for name, arm in zip((question.laif, question.sft), arms) if (arm.get("coverage") or 1) < 0.98
    ]
    if thin:
        shares = ", ".join(f"{name} {results['arms'][name]['coverage']:.0%}" for name in thin)
        said.append(f"Verdicts are missing (coverage: {shares}); what is missing may not be like the rest.")
    if laif.get("true_quality") is not None and sft.get("true_quality") is not None:
        said.append(
            f"By the world's own measure of quality: {question.laif} {laif['true_quality']:.3f}, {question.sft} "
            f"{sft['true_quality']:.3f}."
        )
    return said


def _judge_caveat(judge: Mapping[str, Any]) -> list[str]:
    rows = judge.get("agreement") or []
    if not rows:
        return [judge["note"]] if judge.get("note") else []
    row = rows[0]
    if row.get("without_ties") is None:
        return [
            "The judge gave no usable verdict on the human-labelled pairs, so nothing is known about its worth."
        ]
    low, high = row["ci95"]
    share = f"{row['without_ties']:.0%} of decided pairs (95% interval {low:.0%} to {high:.0%})"
    text = f"The judge agrees with humans on {share}"
    rivals = {"a coin": row.get("random") or 0.5, "picking the longer answer": row.get("longest_wins") or 0.0}
    name, best = max(rivals.items(), key=lambda item: item[1])
    if low <= best:
        return [
            f"{text}, not clearly better than {name} ({best:.0%}): win rates are this judge's taste, not quality."
        ]
    return [f"{text}, against {best:.0%} for {name}."]


def _comparison(results: Mapping[str, Any], laif: str, sft: str) -> dict[str, Any] | None:
    """The comparison of the two arms, turned so that a positive difference favours LAIF."""
    for row in results.get("comparisons") or []:
        if (row["a"], row["b"]) == (laif, sft):
            return dict(row)
        if (row["a"], row["b"]) == (sft, laif):
            low, high = row["ci95"]
            return {**row, "a": laif, "b": sft, "delta": -row["delta"], "ci95": [-high, -low]}
    return None


def _where(results: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    seeds = _seeds(results, row)
    judge = judge_name(results.get("judge") or {})
    return f"{row['n']} prompts, {seeds} seed{'s' if seeds > 1 else ''}, judge: {judge}"


def _seeds(results: Mapping[str, Any], row: Mapping[str, Any]) -> int:
    """Seeds behind a comparison: fewer than the study's where a replicate of an arm failed."""
    return row.get("seeds") or len(results.get("seeds") or [0])


def judge_name(judge: Mapping[str, Any]) -> str:
    """What to call the judge: its `name`, or its endpoint with model and critic prompt."""
    if judge.get("name"):
        return str(judge["name"])
    known = [str(judge[key]).rpartition("/")[2] for key in ("model", "critic") if judge.get(key)]
    return f"{judge.get('endpoint') or 'unnamed'}" + (f" ({', '.join(known)})" if known else "")


def _failure(results: Mapping[str, Any], arm: str) -> str:
    for stage in results.get("stages") or []:
        if stage.get("arm") in (arm, None) and stage.get("status") == "failed":
            reason = str(stage.get("error") or "see its log").rstrip(".")
            return f" Its stage {stage['stage']} failed: {reason}."
    return ""
