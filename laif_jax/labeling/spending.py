"""Planned against spent: rows of what was planned, beside what a store has booked."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from laif_jax.labeling import schema
from laif_jax.labeling.budget import show_money
from laif_jax.labeling.plan import PlanRow

COUNTS = ("calls", "prompt_tokens", "completion_tokens")
_USED = schema.usage.c
_SUMS = (
    sa.func.count(),
    sa.func.coalesce(sa.func.sum(_USED.prompt_tokens), 0),
    sa.func.coalesce(sa.func.sum(_USED.completion_tokens), 0),
    sa.func.coalesce(sa.func.sum(_USED.nanos), 0),
    sa.func.count() - sa.func.count(_USED.nanos),
)


@dataclasses.dataclass
class Amount:
    """`nanos`: nano-dollars; None: a price is not known. `at_most`: `calls` is an upper bound."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    nanos: int | None = 0
    at_most: bool = False

    def add(self, other: "Amount | PlanRow") -> None:
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.nanos = None if self.nanos is None or other.nanos is None else self.nanos + other.nanos
        self.at_most = self.at_most or bool(other.at_most)


def total(rows: Iterable[Amount | PlanRow]) -> Amount:
    """All rows together."""
    summed = Amount()
    for row in rows:
        summed.add(row)
    return summed


def booked_by_critic(engine: Engine) -> dict[tuple[str, str], Amount]:
    """What a store has booked over all its runs, by endpoint (its key) and critic ("" where nobody judges): attempts
    without a usable answer that may be on the bill included, imported answers not."""
    jobs = schema.jobs.c
    names = (sa.func.coalesce(jobs.endpoint_key, ""), sa.func.coalesce(jobs.critic, ""))
    query = (
        sa.select(*names, *_SUMS)
        .select_from(schema.usage.outerjoin(schema.jobs, _USED.job == jobs.id))
        .where(_USED.kind != "imported")
        .group_by(jobs.endpoint_key, jobs.critic)
    )
    with engine.connect() as connection:
        return {(row[0], row[1]): _amount(row[2:]) for row in connection.execute(query)}


def last_booked(engine: Engine) -> int:
    """The number of the newest entry, to tell a run's own from those before it."""
    with engine.connect() as connection:
        return connection.execute(sa.select(sa.func.coalesce(sa.func.max(_USED.id), 0))).scalar_one()


def booked_for(engine: Engine, job: str, since: int) -> Amount:
    """What was booked for a job after an entry."""
    query = sa.select(*_SUMS).where(_USED.job == job, _USED.id > since, _USED.kind != "imported")
    with engine.connect() as connection:
        return _amount(connection.execute(query).one())


def _amount(row: Sequence[Any]) -> Amount:
    return Amount(row[0], int(row[1]), int(row[2]), None if row[4] else int(row[3]))


# ---- shown -------------------------------------------------------------------------------------------------------


def entry(
    roles: Sequence[str], endpoint: str, model: str, critic: str, planned: Amount | None, spent: Amount | None
) -> dict[str, Any]:
    """A row as it stands in results.json."""
    sides = {"planned": planned, "spent": spent}
    shown = {"roles": list(roles), "endpoint": endpoint, "model": model, "critic": critic}
    return shown | {name: amount and dataclasses.asdict(amount) for name, amount in sides.items()}


def spending_rows(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows of the table, and their sum, as text: `who`, `model`, and planned and spent of each count."""
    rows = [
        {
            "who": " + ".join(row["roles"]) or "not planned",
            "model": row["model"] or row["critic"],
            **cells_of(row),
        }
        for row in found["rows"]
    ]
    return [*rows, {"who": "total", "model": "", **cells_of(found)}]


def cells_of(row: Mapping[str, Any]) -> dict[str, str]:
    """Calls, tokens and dollars of what was `planned` and `spent`, as text; dashes where it is not known."""
    cells = {}
    for side in ("planned", "spent"):
        amount = row[side]
        texts = ("–", "–", "–")
        if amount:
            tokens = amount["prompt_tokens"] + amount["completion_tokens"]
            calls = f"{'≤ ' if amount.get('at_most') else ''}{amount['calls']:,}"
            texts = (calls, f"{tokens:,}", show_money(amount["nanos"]))
        cells |= dict(zip((f"{side}_calls", f"{side}_tokens", f"{side}_money"), texts, strict=True))
    return cells
