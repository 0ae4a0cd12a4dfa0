"""What calls to other models used, and what that costs by `labeling.prices`, as everywhere else."""

from collections.abc import Iterable

from laif_jax.config import EndpointSpec
from laif_jax.labeling.prices import paid
from laif_jax.records import Completion, Judgement, Rating, Usage


def usage_of(
    records: Iterable[Completion | Judgement | Rating], endpoint: EndpointSpec | None
) -> dict[str, float | None]:
    """Tokens that the records used, and `cost`, US dollars at the endpoint's present price: its own, or that of the
    price table; None where neither has one. Local and simulated models cost nothing unless they have prices.

    Args:
      endpoint: who was asked; None: nobody, the records come from the data.
    """
    used = [record for record in records if record.usage]
    costs = [cost_of(record.usage, endpoint, calls_of(record)) if endpoint else None for record in used]
    nothing = None if endpoint is None else cost_of(Usage(), endpoint)
    return {
        "prompt_tokens": sum(record.usage.prompt_tokens for record in used if record.usage),
        "completion_tokens": sum(record.usage.completion_tokens for record in used if record.usage),
        "cost": nothing if not used else None if None in costs else sum(c for c in costs if c is not None),
    }


def calls_of(record: Completion | Judgement | Rating) -> int:
    """How many calls a record's usage is the sum of."""
    return int(record.meta.get("calls", 1)) or 1


def cost_of(used: Usage | None, endpoint: EndpointSpec, calls: int = 1) -> float | None:
    """US dollars at the endpoint's present price; None where it is not known. Nothing used costs nothing.

    Args:
      calls: of how many calls `used` is the sum.
    """
    return paid(endpoint, used, calls=calls)
