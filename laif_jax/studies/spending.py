"""Planned against spent of a study: its plan, beside what its labelling store has booked."""

import dataclasses
from pathlib import Path
from typing import Any

from laif_jax.config import EndpointSpec, StudyConfig
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.errors import LabelError
from laif_jax.labeling.local_servers import weights_id
from laif_jax.labeling.spending import Amount, booked_by_critic, entry, spending_rows, total
from laif_jax.labeling.store import Store
from laif_jax.stages.context import with_weights
from laif_jax.studies.plan import Plan

__all__ = ["spending", "spending_rows"]

Group = tuple[str, str]  # endpoint's key, critic ("" where nobody judges)


def spending(config: StudyConfig, plan: Plan | None, store: Path | None) -> dict[str, Any]:
    """What `results.json` says of it.

    Roles that put the same critic to the same endpoint share a row: an answer that one of them paid for is free for the
    other. Spent is what the store has booked over all its runs, attempts without a usable answer that may be on the
    bill included.

    Args:
      plan: None: it could not be made. store: None: the labelling service is another's, who knows what was spent.
    """
    booked, notes = _booked(store)
    unknown = store is None
    rows = [
        entry(
            described.roles,
            described.endpoint,
            described.model,
            group[1],
            described.amount,
            None if unknown else booked.pop(group, Amount()),
        )
        for group, described in _planned(config, plan).items()
    ]
    rows += [entry([], "", "", critic, None, amount) for (_, critic), amount in sorted(booked.items())]
    spent = total(Amount(**row["spent"]) for row in rows if row["spent"])
    if plan is None:
        notes.append("no plan could be made; the log says why")
    else:
        notes += [*plan.notes, *plan.reasons]
    return {
        "rows": rows,
        "planned": dataclasses.asdict(total(plan.rows)) if plan else None,
        "spent": None if unknown else dataclasses.asdict(spent),
        "notes": notes,
    }


@dataclasses.dataclass
class _Planned:
    """The roles that share a row."""

    endpoint: str
    model: str
    roles: list[str] = dataclasses.field(default_factory=list)
    amount: Amount = dataclasses.field(default_factory=Amount)


def _planned(config: StudyConfig, plan: Plan | None) -> dict[Group, _Planned]:
    found: dict[Group, _Planned] = {}
    for row in plan.rows if plan else ():
        group = (_key(config.endpoints[row.endpoint]), row.critic)
        described = found.setdefault(group, _Planned(row.endpoint, row.model))
        described.roles.append(f"{row.role} {row.name}")
        described.amount.add(row)
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
        return booked_by_critic(opened.engine), []
    finally:
        opened.close()
