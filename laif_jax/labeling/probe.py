"""Drift probes: a small fixed set of comparisons that is judged anew with every run, once a day.

A model behind a name may change without notice. Stored answers hide that, since nothing is asked twice; so a probe's
requests carry the round (the date) in their sample index: each round asks afresh, and within one nothing is paid twice.
The answers are kept by round, apart from the labels.
"""

import datetime
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laif_jax.labeling.calls import Call, Endpoint
from laif_jax.labeling.critic import Critic, load_critic
from laif_jax.labeling.judge import JudgeWork
from laif_jax.labeling.pair_files import read_pairs
from laif_jax.labeling.scheduler import Outcome
from laif_jax.labeling.work import Result
from laif_jax.records import Comparison, Judgement, content_id

if TYPE_CHECKING:
    from laif_jax.labeling.client import LabelClient

log = logging.getLogger(__name__)
SHIPPED = "shipped"
PROBE = "probe"  # kind of the results
_FILE = Path(__file__).parent / "probe_set.json"


class ProbeWork(JudgeWork):
    """One round of a probe set, in both orders."""

    def __init__(
        self, endpoint: Endpoint, critic: Critic, comparisons: Sequence[Comparison], number: str
    ) -> None:
        super().__init__(endpoint, critic, comparisons, "both", 0)
        self.round = number

    @cached_property
    def id(self) -> str:
        items = [comparison.id for comparison in self._comparisons]
        return content_id([PROBE, self.endpoint.key, self._critic.hash, self.round, items])

    def calls(self, position: int) -> list[Call]:
        return [self._fresh(call) for call in super().calls(position)]

    def further(self, position: int, outcomes: Sequence[Outcome]) -> list[Call]:
        return [self._fresh(call) for call in super().further(position, outcomes)]

    def _fresh(self, call: Call) -> Call:
        """The call with a sample index that only this round has."""
        start = int(hashlib.sha256(self.round.encode()).hexdigest()[:10], 16)
        return replace(call, sample=64 * (start + 1) + call.sample)

    def results(self, position: int, outcomes: Sequence[Outcome]) -> list[Result]:
        return [self._probed(result) for result in super().results(position, outcomes)]

    def _probed(self, result: Result) -> Result:
        judgement = Judgement.model_validate_json(result.record)
        judgement = judgement.model_copy(update={"meta": {**judgement.meta, "round": self.round}})
        key = content_id([result.key, PROBE, self.round])
        return replace(result, key=key, kind=PROBE, record=judgement.model_dump_json())


def today() -> str:
    """The round of this day, UTC: "2026-11-22"."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def probe_set(name: str) -> list[Comparison]:
    """The shipped set (`shipped`), or that of a file of pairs.

    Raises:
      DataError: the file cannot be read.
    """
    return [pair.comparison for pair in read_pairs(_FILE if name == SHIPPED else name)]


def ask_probe(
    client: "LabelClient", endpoint: Any, critic: str | Path | Critic, name: str | None, number: str = ""
) -> list[Judgement]:
    """Judges a probe set; [] if `name` is None, or for a critic that does not compare two responses.

    Args:
      name: `shipped`, or a file of pairs. number: the round, by default this day.

    Raises:
      DataError: see `probe_set`. LabelServiceError: the service cannot be used.
    """
    critic = critic if isinstance(critic, Critic) else load_critic(critic)
    if name is None or critic.kind != "comparison":
        return []
    found = client.judge(endpoint, critic, probe_set(name), probe=number or today())
    failed = sum(judgement.p_b is None for judgement in found)
    if failed:
        log.warning("drift probe of %s: %d of %d comparisons have no label", critic.name, failed, len(found))
    return found
