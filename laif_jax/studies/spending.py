"""Planned against spent: what a study's plan said of its calls, beside what its labelling store has booked."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from laif_jax.config import EndpointSpec, StudyConfig
from laif_jax.labeling import schema
from laif_jax.labeling.budget import show_money
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.errors import LabelError
from laif_jax.labeling.local_servers import weights_id
from laif_jax.labeling.store import Store
from laif_jax.stages.context import with_weights
from laif_jax.studies.plan import Plan, PlanRow

COUNTS = ("calls", "prompt_tokens", "completion_tokens")
Group = tuple[str, str]  # endpoint's key, critic ("" where nobody judges)


@dataclasses.dataclass
class Amount:
    """`nanos`: nano-dollars; None: a price is not known."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    nanos: int | None = 0

    def add(self, other: "Amount | PlanRow") -> None:
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.nanos = None if self.nanos is None or other.nanos is None else self.nanos + other.nanos


def spending(config: StudyConfig, plan: Plan | None, store: Path | None) -> dict[str, Any]:
    """What `results.json` says of it.

    Roles that put the same critic to the same endpoint share a row: an answer that one of them paid for is free for the
    other. Spent is what the store has booked over all its runs, attempts without a usable answer that may be on the
    bill included.

    Args:
      plan: None: it could not be made. store: None: the labelling service is another's, who knows what was spent.
    """
    booked, notes = _booked(store)
    rows = [
        {**row, "planned": dataclasses.asdict(planned), "spent": _plain(booked.pop(group, None), store)}
        for group, (row, planned) in _planned(config, plan).items()
    ]
    rows += [
        {
            "roles": [],
            "endpoint": "",
            "model": "",
            "critic": critic,
            "planned": None,
            "spent": _plain(amount, store),
        }
        for (_, critic), amount in sorted(booked.items())
    ]
    known = [row["spent"] for row in rows if row["spent"]]
    total = Amount()
    for spent in known:
        total.add(Amount(**spent))
    if plan is None:
        notes.append("no plan could be made; the log says why")
    else:
        notes += plan.notes
    all_planned = _sum(plan.rows) if plan else None
    return {
        "rows": rows,
        "planned": dataclasses.asdict(all_planned) if all_planned else None,
        "spent": dataclasses.asdict(total) if store is not None else None,
        "notes": notes,
    }


def _plain(amount: Amount | None, store: Path | None) -> dict[str, Any] | None:
    if store is None:
        return None
    return dataclasses.asdict(amount or Amount())


def _sum(rows: Iterable[PlanRow]) -> Amount:
    total = Amount()
    for row in rows:
        total.add(row)
    return total


def _planned(config: StudyConfig, plan: Plan | None) -> dict[Group, tuple[dict[str, Any], Amount]]:
    found: dict[Group, tuple[dict[str, Any], Amount]] = {}
    for row in plan.rows if plan else ():
        group = (_key(config.endpoints[row.endpoint]), row.critic)
        shown = {"roles": [], "endpoint": row.endpoint, "model": row.model, "critic": row.critic}
        described, amount = found.setdefault(group, (shown, Amount()))
        described["roles"].append(f"{row.role} {row.name}")
        amount.add(row)
    return found


def _key(spec: EndpointSpec) -> str:
    """The key under which the store knows an endpoint; a local model's is in its weights, not in its address."""
    if spec.provider in ("llama_cpp", "checkpoint"):
        spec = with_weights(spec)
        return Endpoint.from_spec(spec, base_url="http://127.0.0.1/v1", identity=weights_id(spec)).key
    return Endpoint.from_spec(spec).key


def _booked(store: Path | None) -> tuple[dict[Group, Amount], list[str]]:
    if store is None:
        return {}, ["what was spent is known to the service at `labeling.url`; its dashboard shows it"]
    if not (store / "labels.sqlite").is_file():
        return {}, []
    try:
        opened = Store(store, shared=True)
    except LabelError as error:
        return {}, [f"what was spent could not be read: {error}"]
    try:
        return _read(opened), []
    finally:
        opened.close()


def _read(store: Store) -> dict[Group, Amount]:
    used, jobs = schema.usage.c, schema.jobs.c
    unknown = sa.func.count() - sa.func.count(used.nanos)
    query = (
        sa.select(
            sa.func.coalesce(jobs.endpoint_key, ""),
            sa.func.coalesce(jobs.critic, ""),
            sa.func.count(),
            sa.func.coalesce(sa.func.sum(used.prompt_tokens), 0),
            sa.func.coalesce(sa.func.sum(used.completion_tokens), 0),
            sa.func.coalesce(sa.func.sum(used.nanos), 0),
            unknown,
        )
        .select_from(schema.usage.outerjoin(schema.jobs, used.job == jobs.id))
        .where(used.kind != "imported")
        .group_by(jobs.endpoint_key, jobs.critic)
    )
    with store.engine.connect() as connection:
        return {
            (row[0], row[1]): Amount(row[2], int(row[3]), int(row[4]), None if row[6] else int(row[5]))
            for row in connection.execute(query)
        }


# ---- shown -------------------------------------------------------------------------------------------------------


def spending_rows(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows of the table, and their sum, as text: `who`, `model`, and planned and spent of each count."""
    rows = [
        {
            "who": " + ".join(row["roles"]) or "not planned",
            "model": row["model"] or row["critic"],
            **_cells(row),
        }
        for row in found["rows"]
    ]
    return [*rows, {"who": "total", "model": "", **_cells(found)}]


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    cells = {}
    for side in ("planned", "spent"):
        amount = row[side]
        texts = ("–", "–", "–")
        if amount:
            tokens = amount["prompt_tokens"] + amount["completion_tokens"]
            texts = (f"{amount['calls']:,}", f"{tokens:,}", show_money(amount["nanos"]))
        cells |= dict(zip((f"{side}_calls", f"{side}_tokens", f"{side}_money"), texts, strict=True))
    return cells
