"""Rounds of feedback: whether one may begin, on which prompts, and the labels that it trains on."""

from collections.abc import Sequence
from typing import Any

from etils import epath

from laif_jax.config import IterateSpec
from laif_jax.records import write_jsonl
from laif_jax.stages import label
from laif_jax.stages.artifact import Artifact, run_stage
from laif_jax.stages.context import StudyContext
from laif_jax.stages.split import round_slice


def begin(
    ctx: StudyContext,
    prompts: Artifact,
    spec: IterateSpec,
    *,
    number: int,
    share: float,
    previous: Artifact | None = None,
    labels: Sequence[Artifact] = (),
) -> Artifact:
    """Decides whether a round begins: not if it would pass a bound on what is asked for, nor if the one before did not.

    Metrics: `begun`, `reason` (why not), `start` and `stop` (of its prompts), `comparisons` (at most, of this round),
    `comparisons_so_far`, `cost_so_far` and `expected_cost` (US dollars; None where the endpoint has no prices).

    Args:
      number: of the round, from 1. share: of the prompts, that SFT used.
      previous: the same stage of the round before. labels: those of all rounds before.

    Raises:
      StageError: there are fewer prompts than the rounds need.
    """
    settings = {
        "round": number,
        "rounds": spec.rounds,
        "share": share,
        "prompts_per_round": spec.prompts_per_round,
        "max_comparisons": spec.max_comparisons,
        "max_cost": spec.max_cost,
    }
    inputs = {"prompts": prompts} | ({"previous": previous} if previous else {})
    inputs |= {f"labels{index}": artifact for index, artifact in enumerate(labels, 1)}

    def work(_: epath.Path) -> dict[str, Any]:
        start, stop = round_slice(prompts.metrics["train"], share, spec, number)
        asked = sum(artifact.metrics["comparisons"] for artifact in labels if was_begun(artifact))
        cost, expected = _costs(labels, asked, stop - start)
        if previous is not None and not was_begun(previous):
            reason = previous.metrics["reason"]
        else:
            reason = _passed(spec, number, asked, stop - start, cost, expected)
        return {
            "round": number,
            "begun": not reason,
            "reason": reason,
            "start": start,
            "stop": stop,
            "comparisons": stop - start,
            "comparisons_so_far": asked,
            "cost_so_far": cost,
            "expected_cost": expected,
        }

    return run_stage("round", settings, inputs, ctx.root, work, main_only=True)


def was_begun(artifact: Artifact) -> bool:
    """False for the decision that stands in the place of a stage of a round which was not begun."""
    return bool(artifact.metrics.get("begun", True))


def pool(ctx: StudyContext, labels: Sequence[Artifact]) -> Artifact:
    """The preferences of several rounds as one artifact; of one round, that round's own."""
    if len(labels) == 1:
        return labels[0]
    inputs = {f"labels{index}": artifact for index, artifact in enumerate(labels, 1)}

    def work(folder: epath.Path) -> dict[str, Any]:
        preferences = [row for artifact in labels for row in label.read_preferences(artifact)]
        write_jsonl(folder / label.PREFERENCES, preferences)
        return {"preferences": len(preferences)}

    return run_stage("pool", {}, inputs, ctx.root, work, main_only=True)


def _costs(labels: Sequence[Artifact], asked: int, planned: int) -> tuple[float | None, float | None]:
    """(US dollars so far, what `planned` comparisons would cost at that rate)."""
    costs = [(artifact.metrics.get("usage") or {}).get("cost") for artifact in labels if was_begun(artifact)]
    known = [cost for cost in costs if cost is not None]
    if not known or not asked:
        return None, None
    return sum(known), sum(known) / asked * planned


def _passed(
    spec: IterateSpec, number: int, asked: int, planned: int, cost: float | None, expected: float | None
) -> str:
    """Which bound the round would pass; "" if none."""
    if spec.max_comparisons is not None and asked + planned > spec.max_comparisons:
        return (
            f"round {number} would ask for {planned} comparisons after {asked}, more than `iterate.max_comparisons` "
            f"{spec.max_comparisons} allows"
        )
    if spec.max_cost is None or cost is None or expected is None or cost + expected <= spec.max_cost:
        return ""
    return (
        f"round {number} would cost about US$ {expected:.2f} after {cost:.2f}, more than `iterate.max_cost` "
        f"{spec.max_cost:g} allows"
    )
