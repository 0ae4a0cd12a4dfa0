"""What rounds of feedback have used so far, and whether the next one would pass a bound (`IterateSpec`)."""

from collections.abc import Iterable
from typing import TypedDict

from laif_jax.config import EndpointSpec, IterateSpec
from laif_jax.records import Usage
from laif_jax.stages.artifact import Artifact
from laif_jax.stages.usage import cost_of


class Spend(TypedDict):
    """Comparisons asked for, and US dollars (None: not known)."""

    comparisons: int
    cost: float | None


def spend_of(artifacts: Iterable[Artifact], endpoint: EndpointSpec | None) -> Spend:
    """What finished stages of labels (`stages.label`, `stages.human`) used.

    Args:
      endpoint: who was asked, whose present prices count, its own or the price table's (without the discount for cached
        tokens: the cost is an upper bound); None: people, who are paid elsewhere. An endpoint on our own machine costs
        nothing unless it has prices.
    """
    comparisons, prompt, completion = 0, 0.0, 0.0
    several: float | None = 0.0  # of stages that asked several critics, each with its own prices
    for artifact in artifacts:
        usage = artifact.metrics["usage"]
        comparisons += artifact.metrics["comparisons"]
        if usage.get("priced"):
            several = None if several is None or usage["cost"] is None else several + usage["cost"]
            continue
        prompt, completion = prompt + usage["prompt_tokens"], completion + usage["completion_tokens"]
    cost = _cost(endpoint, prompt, completion, comparisons)
    return Spend(comparisons=comparisons, cost=None if cost is None or several is None else cost + several)


def _cost(endpoint: EndpointSpec | None, prompt: float, completion: float, calls: int) -> float | None:
    if endpoint is None:
        return 0.0
    return cost_of(Usage(prompt_tokens=int(prompt), completion_tokens=int(completion)), endpoint, calls)


def over_bounds(
    spec: IterateSpec, artifacts: Iterable[Artifact], endpoint: EndpointSpec | None, planned: int
) -> str:
    """Why a round of `planned` comparisons must not be begun, for the log and the report; "" if it may.

    Its cost is projected from the last round's cost per comparison. Before the first round nothing is known of it, so
    `max_cost` forbids that one only where no cost could be known afterwards either.

    Args:
      artifacts: the stages of labels of the rounds before, in order.
    """
    rounds = list(artifacts)
    used = spend_of(rounds, endpoint)
    total = used["comparisons"] + planned
    if spec.max_comparisons is not None and total > spec.max_comparisons:
        return (
            f"{used['comparisons']} comparisons were asked for, and {planned} more would pass "
            f"`iterate.max_comparisons` {spec.max_comparisons}"
        )
    if spec.max_cost is None:
        return ""
    if used["cost"] is None:
        return "`iterate.max_cost` cannot be held: the endpoint has no `prompt_price` and `completion_price`. Give both"
    if not rounds:
        return ""
    last = spend_of(rounds[-1:], endpoint)
    projected = (last["cost"] or 0.0) / max(1, last["comparisons"]) * planned
    if used["cost"] + projected > spec.max_cost:
        return (
            f"{used['cost']:.2f} US dollars were spent, and about {projected:.2f} more would pass `iterate.max_cost` "
            f"{spec.max_cost:g}"
        )
    return ""
