"""Batches that a provider still works on, and those that are settled: for the store's counts, its garbage, and exports.

A batch is open while one of its rows may still get an answer from it: it was, or perhaps was, sent; the row was not
given back; and no answer to it is stored. Everything else is settled.
"""

import datetime
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from laif_jax.labeling import schema
from laif_jax.labeling.budget import SERVICE
from laif_jax.labeling.errors import StoreError
from laif_jax.labeling.providers import ledger

TABLES = {"batches": ledger.batches, "batch_rows": ledger.batch_rows}
# A batch whose fate is not known is looked for among the provider's by its time: settled ones of that time must be
# known as ours, or they could be taken for it.
SETTLED = datetime.timedelta(hours=1)
_batches, _rows = ledger.batches.c, ledger.batch_rows.c


@dataclass(frozen=True)
class OpenBatch:
    """One of them.

    Attributes:
      tag: our name of it. remote_id: the provider's, "" while that is not known. rows: that may still be answered.
      endpoint: its name, for people. created: ISO 8601.
    """

    tag: str
    remote_id: str
    state: str
    rows: int
    endpoint: str
    created: str


def has_batches(connection: Connection) -> bool:
    """Whether the store ever held a batch. Asked with every claim where money is presumed, so without an inspector."""
    query = "SELECT to_regclass('batches')"
    if connection.dialect.name == "sqlite":
        query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'batches'"
    return connection.exec_driver_sql(query).scalar() is not None


def waiting_rows() -> Any:
    """The condition on (`batches`, `batch_rows`) joined that a row may still be answered."""
    answered = sa.exists().where(schema.responses.c.key == _rows.key)
    return sa.and_(_batches.state.in_(("sending", "sent")), _rows.open, ~answered)


def open_tags() -> Any:
    """The tags of open batches, as a query."""
    return sa.select(_batches.tag).join(ledger.batch_rows, _rows.tag == _batches.tag).where(waiting_rows())


def waiting_keys() -> Any:
    """The requests that open batches may still answer, as a query."""
    return sa.select(_rows.key).join(ledger.batches, _rows.tag == _batches.tag).where(waiting_rows())


def open_batches(connection: Connection) -> list[OpenBatch]:
    """All open batches, the oldest first."""
    if not has_batches(connection):
        return []
    jobs = schema.jobs.c
    columns = (_batches.tag, _batches.remote_id, _batches.state, _batches.endpoint_key, _batches.created)
    query = (
        sa.select(*columns, sa.func.count())
        .join_from(ledger.batches, ledger.batch_rows, _rows.tag == _batches.tag)
        .where(waiting_rows())
        .group_by(*columns)
        .order_by(_batches.created)
    )
    found = connection.execute(query).all()
    names = {row[0]: row[1] for row in connection.execute(sa.select(jobs.endpoint_key, jobs.endpoint))}
    return [
        OpenBatch(tag, remote_id, state, rows, names.get(key, key), created)
        for tag, remote_id, state, key, created, rows in found
    ]


@dataclass(frozen=True)
class Presumed:
    """What the store presumes to be on the bill for a call that an open batch may still answer: it was under way when
    its worker ended. `ids`: of the entries of `usage`, `jobs`: their jobs and nano-dollars."""

    ids: tuple[int, ...]
    jobs: tuple[tuple[str, int], ...]


def presumed_for(connection: Connection, keys: Sequence[str]) -> dict[str, Presumed]:
    """By request, of those that open batches hold. Such a call is on the bill once, whoever waits for it: who claims it
    again reserves its cost in the place of what is presumed."""
    if not has_batches(connection):
        return {}
    used, found = schema.usage.c, {}
    for start in range(0, len(keys), 500):
        some = _rows.key.in_(keys[start : start + 500])
        sent = sa.select(_rows.key, sa.func.min(_batches.created)).join(
            ledger.batches, _rows.tag == _batches.tag
        )
        since = {
            row[0]: row[1] for row in connection.execute(sent.where(some, waiting_rows()).group_by(_rows.key))
        }
        if not since:
            continue
        query = sa.select(used.id, used.key, used.job, used.nanos, used.date).where(
            used.kind == "presumed", used.key.in_(list(since)), used.nanos.is_not(None)
        )
        for number, key, job, nanos, date in connection.execute(query):
            if date >= since[key]:  # what was lost before the batch was sent is another call
                old = found.get(key, Presumed((), ()))
                found[key] = Presumed((*old.ids, number), (*old.jobs, (job, nanos)))
    return found


def take_back(connection: Connection, presumed: Sequence[Presumed]) -> dict[str, int]:
    """Strikes presumed calls off the books; nano-dollars by scope of the budget."""
    ids = [number for one in presumed for number in one.ids]
    for start in range(0, len(ids), 500):
        connection.execute(sa.delete(schema.usage).where(schema.usage.c.id.in_(ids[start : start + 500])))
    scopes: Counter[str] = Counter()
    for job, nanos in (entry for one in presumed for entry in one.jobs):
        for scope in {SERVICE, job} - {""}:
            scopes[scope] += nanos
    return dict(scopes)


def give_up(connection: Connection, tag: str) -> None:
    """Asks no more after a batch: its rows may be sent, and paid for, again.

    Raises:
      StoreError: there is no such open batch.
    """
    known = [batch.tag for batch in open_batches(connection)]
    if tag not in known:
        raise StoreError(f"batch {tag}: no open batch; there are {', '.join(known) or 'none'}")
    connection.execute(sa.update(ledger.batches).where(_batches.tag == tag).values(state="lost"))


def forget_settled(connection: Connection) -> int:
    """Removes settled batches; how many. Kept are young ones, and those of an endpoint that has a batch whose fate is
    not known (see `SETTLED`)."""
    if not has_batches(connection):
        return 0
    old = (datetime.datetime.now(datetime.UTC) - SETTLED).isoformat()
    unsure = sa.select(_batches.endpoint_key).where(
        _batches.state == "sending", _batches.tag.in_(open_tags())
    )
    keys = connection.execute(unsure).scalars().all()
    query = sa.select(_batches.tag).where(
        _batches.created < old, _batches.tag.not_in(open_tags()), _batches.endpoint_key.not_in(keys)
    )
    tags = connection.execute(query).scalars().all()
    for start in range(0, len(tags), 500):
        some = tags[start : start + 500]
        connection.execute(sa.delete(ledger.batch_rows).where(_rows.tag.in_(some)))
        connection.execute(sa.delete(ledger.batches).where(_batches.tag.in_(some)))
    return len(tags)


def forget_rows(connection: Connection, keys: list[str]) -> None:
    """Answers that are removed must not make their batches look open again."""
    if has_batches(connection):
        connection.execute(sa.update(ledger.batch_rows).where(_rows.key.in_(keys)).values(open=False))
