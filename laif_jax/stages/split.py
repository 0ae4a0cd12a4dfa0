"""Which prompts serve supervised fine-tuning and which preferences."""

from collections.abc import Sequence
from typing import TypeVar

from laif_jax.config import IterateSpec
from laif_jax.stages.artifact import StageError

Row = TypeVar("Row")


def sft_count(total: int, share: float) -> int:
    """How many of `total` prompts a share takes: rounded, at least one."""
    return max(1, round(total * share))


def split(rows: Sequence[Row], share: float) -> tuple[Sequence[Row], Sequence[Row]]:
    """(the first `share`, for SFT; the rest, for preferences). The rows were shuffled when they were written, so that
    a larger share contains every smaller one."""
    count = sft_count(len(rows), share)
    return rows[:count], rows[count:]


def round_slice(total: int, share: float, spec: IterateSpec, number: int) -> tuple[int, int]:
    """The prompts `start:stop` of round `number` (from 1): those that SFT left, divided evenly over the rounds, or
    `prompts_per_round` each. No prompt is in two rounds, so that all rounds together ask for as many comparisons, on
    the same prompts, as one round over all of them.

    Raises:
      StageError: there are fewer prompts than the rounds need.
    """
    first = sft_count(total, share)
    left = total - first
    needed = spec.rounds * (spec.prompts_per_round or 1)
    if left < needed:
        raise StageError(
            f"{spec.rounds} rounds need {needed} prompts, but SFT on {share:.0%} of {total} leaves {left}: give more "
            "prompts (`data.train`), or fewer `iterate.rounds` or `iterate.prompts_per_round`"
        )
    if spec.prompts_per_round is not None:
        return first + (number - 1) * spec.prompts_per_round, first + number * spec.prompts_per_round
    return first + left * (number - 1) // spec.rounds, first + left * number // spec.rounds


def round_share(total: int, rounds: int, number: int) -> int:
    """How many of `total` updates round `number` (from 1) makes, so that all rounds together make `total`."""
    return total * number // rounds - total * (number - 1) // rounds
