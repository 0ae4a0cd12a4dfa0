"""What calls to other models used."""

from collections.abc import Iterable

from laif_jax.config import EndpointSpec
from laif_jax.records import Completion, Judgement, Rating, Usage


def usage_of(
    records: Iterable[Completion | Judgement | Rating], endpoint: EndpointSpec | None
) -> dict[str, float | None]:
    """Tokens that the records used, and `cost`, US dollars by the endpoint's prices (None where it has none).

    Args:
      endpoint: who was asked; None: nobody, the records come from the data.
    """
    used = [record.usage for record in records if record.usage]
    prompt, completion = (
        sum(usage.prompt_tokens for usage in used),
        sum(usage.completion_tokens for usage in used),
    )
    cost = None
    if endpoint and endpoint.prompt_price is not None and endpoint.completion_price is not None:
        cost = (prompt * endpoint.prompt_price + completion * endpoint.completion_price) / 1e6
    return {"prompt_tokens": prompt, "completion_tokens": completion, "cost": cost}


def cost_of(used: Usage | None, endpoint: EndpointSpec) -> float | None:
    """US dollars by the endpoint's prices; None where it has none. Nothing used costs nothing."""
    if used is None:
        return 0.0
    if endpoint.prompt_price is None or endpoint.completion_price is None:
        return None
    return (
        used.prompt_tokens * endpoint.prompt_price + used.completion_tokens * endpoint.completion_price
    ) / 1e6
