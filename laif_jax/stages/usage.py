"""What calls to other models used."""

from collections.abc import Iterable

from laif_jax.records import Completion, Judgement


def usage_of(records: Iterable[Completion | Judgement]) -> dict[str, float]:
    """Tokens that the records used, and dollars where a price was known."""
    total = {"prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}
    for record in records:
        if record.usage:
            total["prompt_tokens"] += record.usage.prompt_tokens
            total["completion_tokens"] += record.usage.completion_tokens
        total["cost"] += getattr(record, "cost", None) or 0.0
    return total
