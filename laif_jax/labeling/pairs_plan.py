"""What `laif label run` will ask, before anything is sent: every call is made up and looked for in the store."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from laif_jax.config.endpoints import EndpointSpec, LabelingSpec
from laif_jax.config.label import LabelConfig
from laif_jax.labeling import schema
from laif_jax.labeling.calls import Call, Endpoint
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
from laif_jax.records import Comparison

STRONG = "it is asked only where the first critic is not sure"
VERDICT = "a verdict is asked for only where its rationale came"
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
    work = job.work()
    calls = {call.key: call for position in range(len(work)) for call in work.calls(position)}
    _count(row, calls, store)
    if isinstance(work, JudgeWork) and work.stages > 1:
        thought = tier.critic.rationale.max_tokens if tier.critic.rationale else 0
        answers = store.answered(list(calls)) if store else {}
        _count_verdicts(row, work, answers, store, thought, tier.critic.max_tokens)
    return row


def _count(row: PlanRow, calls: dict[str, Call], store: Store | None) -> None:
    stored = _stored(store, list(calls))
    for key, call in calls.items():
        if key in stored:
            row.stored += 1
        else:
            row.add(1, _tokens(call), call.max_tokens or 0)


def _count_verdicts(
    row: PlanRow, work: JudgeWork, answers: dict[str, Row], store: Store | None, thought: int, verdict: int
) -> None:
    """The second stage of a critic that thinks first: counted where the rationales are stored, else at most one verdict
    per rationale, whose prompt is as long as the rationale's and the rationale together."""
    known: dict[str, Call] = {}
    for position in range(len(work)):
        calls = work.calls(position)
        outcomes = list(_outcomes(calls, answers))
        if len(outcomes) == len(calls):
            known |= {call.key: call for call in work.further(position, outcomes)}
            continue
        row.bound(VERDICT)
        for call in calls:
            row.add(1, _tokens(call) + thought, verdict)
    _count(row, known, store)


def _outcomes(calls: Sequence[Call], answers: dict[str, Row]) -> Iterator[Outcome]:
    for call in calls:
        outcome = stored_outcome(call, answers[call.key]) if call.key in answers else None
        if outcome is not None:
            yield outcome


def _tokens(call: Call) -> int:
    return tokens_of(message["content"] for message in call.messages)


def _stored(store: Store | None, keys: Sequence[str]) -> set[str]:
    """Which of these calls are answered."""
    found: set[str] = set()
    if store is None:
        return found
    column = schema.responses.c.key
    with store.engine.connect() as connection:
        for start in range(0, len(keys), 500):
            query = sa.select(column).where(column.in_(keys[start : start + 500]))
            found.update(connection.execute(query).scalars())
    return found
