"""What a job consists of: items, each of which needs calls and gives results. Pure: no I/O."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from laif_jax.labeling.calls import Call, Endpoint
from laif_jax.labeling.scheduler import Outcome


@dataclass(frozen=True, slots=True)
class Result:
    """A row of the store's `results`: `record` is JSON, `part` 0 the final result, 1.. the single orders behind it."""

    key: str
    kind: str
    item: str
    status: str
    critic_hash: str
    record: str
    part: int = 0

    def at(self, part: int) -> "Result":
        """The same result at another place."""
        return Result(self.key, self.kind, self.item, self.status, self.critic_hash, self.record, part)


class Work(Protocol):
    """A job's items, by position."""

    kind: str
    endpoint: Endpoint
    critic: str

    @property
    def id(self) -> str:
        """Hash of everything asked for: the same job submitted twice has the same id."""
        ...

    def __len__(self) -> int: ...

    def calls(self, position: int) -> list[Call]:
        """The calls of an item; none if its result is known without one."""
        ...

    def results(self, position: int, outcomes: Sequence[Outcome]) -> list[Result]:
        """The results of an item, given one outcome per call, in order."""
        ...


class StagedWork(Work, Protocol):
    """Work some of whose calls depend on earlier answers (a verdict on a rationale, the revision of a revision).

    Each stage's answers are in the store before the next is asked, so a run that was killed pays for none twice.

    Attributes:
      stages: how many stages an item has at most; `Work` without it has one.
    """

    stages: int

    def further(self, position: int, outcomes: Sequence[Outcome]) -> list[Call]:
        """The calls of the next stage, given the outcomes of all calls so far; none if the item is complete."""
        ...
