"""Which prompts serve supervised fine-tuning and which preferences."""

from collections.abc import Sequence
from typing import TypeVar

Row = TypeVar("Row")


def sft_count(total: int, share: float) -> int:
    """How many of `total` prompts a share takes: rounded, at least one."""
    return max(1, round(total * share))


def split(rows: Sequence[Row], share: float) -> tuple[Sequence[Row], Sequence[Row]]:
    """(the first `share`, for SFT; the rest, for preferences). The rows were shuffled when they were written, so that
    a larger share contains every smaller one."""
    count = sft_count(len(rows), share)
    return rows[:count], rows[count:]
