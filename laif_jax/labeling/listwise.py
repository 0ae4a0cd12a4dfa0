"""Rankings: from an answer "[2] > [1] = [3]" to the rank of each response (the form of RankGPT, Sun et al. 2023)."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from laif_jax.labeling.answers import Answer, Rendered
from laif_jax.records import Status

MAX_TEXT = 20_000  # characters of an answer that are looked at
_ITEM = r"\[?\d{1,3}\]?"
_CHAIN = re.compile(rf"(?<![\w\[.]){_ITEM}(?:[ \t]*[>=][ \t]*{_ITEM})+(?![\w\]]|\.\d)")


class ListwiseOptions(BaseModel):
    """`most`: how many responses are put into one list."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    most: int = Field(default=10, ge=2, le=100)


@dataclass(frozen=True, slots=True)
class Ranking:
    """Ranks of the responses in the order shown, 0 the best; equal numbers are a tie. None unless `status` is ok."""

    status: Status
    ranks: tuple[int, ...] | None = None
    reason: str = ""


class ListwiseParser:
    """Reads a chain of response numbers joined by > and =, that names each response once; several chains must agree.
    `parse` never raises."""

    needs_logprobs = False

    def __init__(self, options: ListwiseOptions) -> None:
        self.options = options

    def parse(self, answer: Answer, count: int) -> Ranking:
        """The ranking of `count` responses."""
        found = {_ranks(chain, count) for chain in _CHAIN.findall(answer.text[:MAX_TEXT])}
        if len(found) != 1:
            return _unparsable(
                "the answer holds several rankings" if found else 'the answer holds no ranking "[1] > [2]"'
            )
        ranks = found.pop()
        if ranks is None:
            return _unparsable(f"the answer's ranking does not name each of the {count} responses once")
        return Ranking(Status.OK, ranks)

    def render(self, scores: Sequence[float]) -> Rendered:
        """A simulated answer: the higher score first, equal scores as a tie."""
        places = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        text = f"[{places[0] + 1}]"
        for before, place in itertools.pairwise(places):
            text += f" {'=' if scores[before] == scores[place] else '>'} [{place + 1}]"
        return Rendered(text)


def _ranks(chain: str, count: int) -> tuple[int, ...] | None:
    numbers = [int(number) for number in re.findall(r"\d+", chain)]
    if sorted(numbers) != list(range(1, count + 1)):
        return None
    ranks, rank = {numbers[0]: 0}, 0
    for number, sign in zip(numbers[1:], re.findall("[>=]", chain), strict=True):
        rank += sign == ">"
        ranks[number] = rank
    return tuple(ranks[number] for number in range(1, count + 1))


def _unparsable(reason: str) -> Ranking:
    return Ranking(Status.UNPARSABLE, reason=reason)
