"""What `laif label run` will ask, before anything is sent: every call is made up and looked for in the store."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from laif_jax.config.endpoints import EndpointSpec, LabelingSpec
from laif_jax.config.label import LabelConfig
from laif_jax.labeling import schema
from laif_jax.labeling.calls import Call, Endpoint
from laif_jax.labeling.critic import Critic
from laif_jax.labeling.database import is_address
from laif_jax.labeling.jobs import JudgeJob
from laif_jax.labeling.judge import JudgeWork
from laif_jax.labeling.local_servers import weights_id
from laif_jax.labeling.pair_files import read_pairs
from laif_jax.labeling.pairs import Tier, tiers_of
from laif_jax.labeling.plan import ESTIMATED, Plan, PlanRow, check_askable, show_plan, tokens_of
from laif_jax.labeling.prices import need_price
from laif_jax.labeling.probe import probe_set, today
from laif_jax.labeling.scheduler import Outcome, stored_outcome
from laif_jax.labeling.store import Row, Store
from laif_jax.labeling.work import Work
from laif_jax.records import Comparison

STRONG = "it is asked only where the first critic is not sure"
VERDICT = "a verdict is asked for only where its rationale came"
WINDOW = 1000  # pairs that are looked at together
ANOTHER = "what the service at `labeling.url` has stored is not known here"


@dataclass
class PairsPlan(Plan):
    """`pairs`: rows of the file."""

    pairs: int = 0


def plan_pairs(config: LabelConfig) -> PairsPlan:
    """Counts a run's calls one by one, without those whose answer is in the store. Sends nothing.

    Raises:
      DataError, CriticError, EndpointError: as `label_pairs`; also EndpointError if the provider cannot answer as the
        critic needs it, or if there is a budget and a model without a price.
    """
    comparisons = [pair.comparison for pair in read_pairs(config.pairs, labels=False)]
    rows, probe = [], config.labeling.probe
    probed = [] if probe is None else probe_set(probe)
    store = _open(config.labeling)
    try:
        for number, tier in enumerate(tiers_of(config)):
            check_askable(tier.spec, tier.critic)
            row = _row("critic", tier, comparisons, config.seed, store)
            if number:
                row.bound(STRONG)
            rows.append(row)
            if probed and tier.critic.kind == "comparison":
                rows.append(_row("probe", tier, probed, config.seed, store, probe=today()))
    finally:
        if store is not None:
            store.close()
    caps = (config.budget, config.labeling.budget)
    if any(cap not in (None, "none") for cap in caps) or config.labeling.job_budget:
        for row in rows:
            need_price(row.spec, row.today)
    notes = [*ESTIMATED] + ([ANOTHER] if config.labeling.url is not None else [])
    return PairsPlan(rows, notes, pairs=len(comparisons))


def show_pairs_plan(plan: PairsPlan) -> str:
    """The plan as text for a terminal."""
    return f"{plan.pairs:,} pairs\n{show_plan(plan)}"


def _open(spec: LabelingSpec) -> Store | None:
    """The store that a run would use, if it is on this machine and there already."""
    where = spec.store or "labels"
    if spec.url is not None or is_address(where) or not (Path(where) / "labels.sqlite").is_file():
        return None
    return Store(where, shared=True)


def _endpoint(spec: EndpointSpec) -> Endpoint:
    """The endpoint as the store knows it: a local model's server need not run for that."""
    local = spec.provider in ("llama_cpp", "checkpoint")
    base_url = "http://127.0.0.1/v1" if local else None
    return Endpoint.from_spec(spec, base_url=base_url, identity=weights_id(spec) if local else "")


def _row(
    role: str,
    tier: Tier,
    comparisons: Sequence[Comparison],
    seed: int,
    store: Store | None,
    probe: str = "",
) -> PlanRow:
    row = PlanRow(role, tier.name, tier.key, tier.spec, tier.critic.name)
    job = JudgeJob(
        endpoint=_endpoint(tier.spec),
        critic=tier.critic,
        comparisons=tuple(comparisons),
        order=tier.order,  # ty: ignore[invalid-argument-type]
        seed=seed,
        probe=probe,
    )
    _Counter(row, job.work(), tier.critic, store).count()
    return row


class _Counter:
    """Counts a work's calls into a row, some positions at a time, so that a file of a million pairs needs little
    memory. Equal calls count once."""

    def __init__(self, row: PlanRow, work: Work, critic: Critic, store: Store | None) -> None:
        self._row, self._work, self._critic, self._store = row, work, critic, store
        self._seen: set[str] = set()

    def count(self) -> None:
        for start in range(0, len(self._work), WINDOW):
            positions = range(start, min(start + WINDOW, len(self._work)))
            items = {position: self._work.calls(position) for position in positions}
            new = self._add(call for calls in items.values() for call in calls)
            if isinstance(self._work, JudgeWork) and self._work.stages > 1:
                thinking = {p: calls for p, calls in items.items() if any(call.key in new for call in calls)}
                self._add(self._verdicts(self._work, thinking))

    def _add(self, calls: Iterable[Call]) -> set[str]:
        """Counts calls that were not counted yet; their keys."""
        new = {call.key: call for call in calls if call.key not in self._seen}
        self._seen.update(new)
        stored = self._stored(list(new))
        self._row.stored += len(stored)
        for key, call in new.items():
            if key not in stored:
                self._row.add(1, _tokens(call), call.max_tokens or 0)
        return set(new)

    def _verdicts(self, work: JudgeWork, items: Mapping[int, Sequence[Call]]) -> Iterator[Call]:
        """The second stage of a critic that thinks first: its calls where the rationales are stored; else at most one
        verdict per rationale is counted, whose prompt is as long as the rationale's and the rationale together."""
        critic = self._critic
        thought = critic.rationale.max_tokens if critic.rationale else 0
        keys = [call.key for calls in items.values() for call in calls]
        answers = self._store.answered(keys) if self._store else {}
        for position, calls in items.items():
            outcomes = list(_outcomes(calls, answers))
            if len(outcomes) == len(calls):
                yield from work.further(position, outcomes)
                continue
            self._row.bound(VERDICT)
            for call in calls:
                self._row.add(1, _tokens(call) + thought, critic.max_tokens)

    def _stored(self, keys: Sequence[str]) -> set[str]:
        """Which of these calls are answered."""
        found: set[str] = set()
        if self._store is None:
            return found
        column = schema.responses.c.key
        with self._store.engine.connect() as connection:
            for start in range(0, len(keys), 500):
                query = sa.select(column).where(column.in_(keys[start : start + 500]))
                found.update(connection.execute(query).scalars())
        return found


def _outcomes(calls: Sequence[Call], answers: Mapping[str, Row]) -> Iterator[Outcome]:
    for call in calls:
        outcome = stored_outcome(call, answers[call.key]) if call.key in answers else None
        if outcome is not None:
            yield outcome


def _tokens(call: Call) -> int:
    return tokens_of(message["content"] for message in call.messages)
