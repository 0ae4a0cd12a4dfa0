"""Rounds of feedback: whether one may begin, on which prompts, and the labels that it trains on."""

import logging
from collections.abc import Sequence
from typing import Any

from etils import epath

from laif_jax.config import EndpointSpec, IterateSpec
from laif_jax.records import write_jsonl
from laif_jax.stages import label
from laif_jax.stages.artifact import Artifact, run_stage
from laif_jax.stages.context import StudyContext
from laif_jax.stages.spend import over_bounds, spend_of
from laif_jax.stages.split import round_slice

logger = logging.getLogger(__name__)


def begin(
    ctx: StudyContext,
    prompts: Artifact,
    spec: IterateSpec,
    *,
    number: int,
    share: float,
    endpoint: EndpointSpec | None,
    previous: Artifact | None = None,
    labels: Sequence[Artifact] = (),
) -> Artifact:
    """Decides whether a round begins: not if it would pass a bound on what is asked for, nor if the one before did not.

    Metrics: `begun`, `reason` (why not), `start` and `stop` (of its prompts), `comparisons` (of this round, at most),
    `comparisons_so_far` and `cost_so_far` (US dollars; None where the endpoint has no prices).

    Args:
      number: of the round, from 1. share: of the prompts, that SFT used.
      endpoint: who is asked; None: people.
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
        "prices": [endpoint.prompt_price, endpoint.completion_price] if endpoint else None,
    }
    inputs = {"prompts": prompts} | ({"previous": previous} if previous else {})
    inputs |= {f"labels{index}": artifact for index, artifact in enumerate(labels, 1)}

    def work(_: epath.Path) -> dict[str, Any]:
        start, stop = round_slice(prompts.metrics["train"], share, spec, number)
        asked = [artifact for artifact in labels if was_begun(artifact)]
        if previous is not None and not was_begun(previous):
            reason = previous.metrics["reason"]
        else:
            reason = over_bounds(spec, asked, endpoint, stop - start)
        used = spend_of(asked, endpoint)
        if reason:
            logger.warning("round %d is not begun: %s", number, reason)
        return {
            "round": number,
            "begun": not reason,
            "reason": reason,
            "start": start,
            "stop": stop,
            "comparisons": stop - start,
            "comparisons_so_far": used["comparisons"],
            "cost_so_far": used["cost"],
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
