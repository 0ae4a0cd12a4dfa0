"""Who may make which call: a worker claims requests before it sends them, and holds them while it lives.

A claim and its reservation of money are committed before the call is sent. Every worker renews one row (`workers`) and
its requests name it; if it dies, whoever notices first gives its requests back: on the same machine at once (the kernel
lets go of its file lock), elsewhere when its lease has expired.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from laif_jax.labeling import budget
from laif_jax.labeling.database import clock, dead_workers
from laif_jax.labeling.open_batches import Presumed, presumed_for, take_back
from laif_jax.labeling.schema import requests, usage, workers
from laif_jax.labeling.statements import having, inserts

log = logging.getLogger(__name__)
LEASE = 60.0  # seconds that a worker on another machine may be silent
CLAIMABLE = ("pending", "failed")


@dataclass(frozen=True, slots=True)
class Want:
    """A request that a job needs answered.

    Attributes:
      row: the `requests` columns of a request that has not been made yet. most: upper bound of its cost, nano-dollars.
      again: its stored answer cannot be read, so that it is asked again although it is "ok".
    """

    key: str
    row: dict[str, Any]
    most: int = 0
    again: bool = False


@dataclass(slots=True)
class Claimed:
    """What a claim gave.

    Attributes:
      granted: ours now, with the attempts made so far. answered: another worker has stored the answer meanwhile.
      busy: another worker has it in flight. failed: it failed during this run of the job, with the reason.
      denied: the budget has no room for it.
    """

    granted: dict[str, int] = field(default_factory=dict)
    answered: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    denied: list[str] = field(default_factory=list)


def claim(connection: Connection, worker: str, job: str, wants: Sequence[Want], since: str) -> Claimed:
    """Claims what can be claimed, in the order of `wants`, and reserves its cost. Runs inside a write transaction.

    Args:
      since: ISO time at which the job's run began: what failed after it is not asked again in this run.
    """
    claimed = Claimed()
    scopes = [budget.SERVICE, job]
    paid = any(want.most for want in wants)
    rooms: list[int | None] = []
    held: dict[str, Presumed] = {}
    if paid:
        budget.ensure(connection, scopes)
        accounts = budget.accounts(connection, scopes, lock=True)
        rooms = [account.room for account in accounts.values()]
        if accounts[budget.SERVICE].presumed:
            held = presumed_for(connection, [want.key for want in wants])
    known = _known(connection, [want.key for want in wants])
    open_wants: list[Want] = []
    for want in wants:
        state, reason, updated, _ = known.get(want.key, ("", "", "", 0))
        if state == "ok" and not want.again:
            claimed.answered.append(want.key)
        elif state == "in_flight":
            claimed.busy.append(want.key)
        elif state == "failed" and updated >= since:
            claimed.failed[want.key] = reason
        else:
            open_wants.append(want)
    fits = budget.affordable(rooms, [_cost(want, job, held) for want in open_wants])
    taken = [want for want, fit in zip(open_wants, fits, strict=True) if fit]
    claimed.denied = [want.key for want, fit in zip(open_wants, fits, strict=True) if not fit]
    got = _take(connection, worker, job, taken, set(known))
    for want in taken:
        if want.key in got:
            claimed.granted[want.key] = known[want.key][3] if want.key in known else 0
        else:
            claimed.busy.append(want.key)
    if claimed.denied:  # they are known to be left to do
        fresh = [want.row for want in open_wants if want.key in set(claimed.denied) - set(known)]
        _insert(connection, fresh)
    if paid:
        reserved = sum(want.most for want in taken if want.key in got)
        changes = {scope: budget.Change(reserved=reserved) for scope in scopes}
        again = [held[want.key] for want in taken if want.key in got and want.key in held]
        for scope, nanos in take_back(connection, again).items():
            changes.setdefault(scope, budget.Change()).add(presumed=-nanos)
        budget.apply(connection, changes)
    return claimed


def _cost(want: Want, job: str, held: Mapping[str, Presumed]) -> int:
    """What a claim adds to the budgets: less what they hold for a call that a batch may still answer."""
    entries = held[want.key].jobs if want.key in held else ()
    return max(0, want.most - sum(nanos for name, nanos in entries if name == job))


def _known(connection: Connection, keys: Sequence[str]) -> dict[str, tuple[str, str, str, int]]:
    c = requests.c
    found = {}
    for condition in having(connection, c.key, keys):
        query = sa.select(c.key, c.state, c.reason, c.updated, c.attempts).where(condition)
        found |= {row[0]: tuple(row[1:]) for row in connection.execute(query)}
    return found


def _insert(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    if connection.dialect.name == "sqlite":
        _insert_many(connection, rows)
    elif rows:
        once = postgresql.insert(requests).on_conflict_do_nothing(index_elements=["key"])
        connection.execute(once, list(rows))


_insert_many = inserts(sqlite.insert(requests).on_conflict_do_nothing(index_elements=["key"]), requests)


def _take(
    connection: Connection, worker: str, job: str, wants: Sequence[Want], known: Collection[str]
) -> set[str]:
    """Marks requests as in flight for us; the keys that we got."""
    if not wants:
        return set()
    ours = {"owner": worker, "job": job, "state": "in_flight"}
    old = wants
    if connection.dialect.name == "sqlite":
        # We hold the only write lock: what is unknown cannot appear meanwhile.
        _insert(
            connection, [want.row | ours | {"reserved": want.most} for want in wants if want.key not in known]
        )
        old = [want for want in wants if want.key in known]
        got = {want.key for want in old}
    else:
        _insert(connection, [want.row for want in wants if want.key not in known])
        c = requests.c
        again = [want.key for want in wants if want.again]
        query = (
            sa.select(c.key)
            .where(
                c.key.in_([want.key for want in wants]),
                sa.or_(c.state.in_(CLAIMABLE), sa.and_(c.state == "ok", c.key.in_(again))),
            )
            .with_for_update(skip_locked=True)
        )
        got = set(connection.execute(query).scalars())
        old = [want for want in wants if want.key in got]
    if old:
        connection.execute(
            sa.update(requests)
            .where(requests.c.key == sa.bindparam("k"))
            .values(reserved=sa.bindparam("most"), **ours),
            [{"k": want.key, "most": want.most} for want in old],
        )
    return got if connection.dialect.name != "sqlite" else {want.key for want in wants}


def beat(
    connection: Connection, worker: str, host: str, pid: int, started: str, lease: float = LEASE
) -> None:
    """Renews a worker's lease."""
    values = {"host": host, "pid": pid, "started": started, "expires": clock(connection) + lease}
    updated = connection.execute(sa.update(workers).where(workers.c.id == worker).values(**values))
    if not updated.rowcount:
        connection.execute(sa.insert(workers).values(id=worker, **values))


def reclaim(connection: Connection, folder: Path | None, me: str, date: str) -> int:
    """Gives back what dead workers had in flight, and books their reservations as presumably paid; how many requests.

    Args:
      folder: of a SQLite store, whose workers are all on this machine, where a dead one is known at once; None: only
        expired leases count.
    """
    c = workers.c
    rows = connection.execute(sa.select(c.id, c.expires).where(c.id != me)).all()
    now = clock(connection)
    expired = [row.id for row in rows if row.expires < now]
    dead = sorted({*expired, *(dead_workers(folder, [row.id for row in rows]) if folder is not None else ())})
    owned = set(
        connection.execute(
            sa.select(requests.c.owner).where(requests.c.state == "in_flight").distinct()
        ).scalars()
    )
    # Owners without a row in `workers`: of a store of an older version, or already struck off.
    dead += sorted(owned - {row.id for row in rows} - {me} - set(dead))
    if not dead:
        return 0
    count = release(connection, dead, date)
    connection.execute(sa.delete(workers).where(c.id.in_(dead)))
    return count


def release(connection: Connection, owners: Sequence[str], date: str) -> int:
    """Makes the requests of these workers pending again; what was reserved for them is presumed to be paid."""
    c = requests.c
    theirs = sa.and_(c.state == "in_flight", c.owner.in_(owners))
    rows = connection.execute(
        sa.select(c.key, c.attempts, c.job, c.reserved).where(theirs).with_for_update()
    ).all()
    changes: dict[str, budget.Change] = {}
    ledger = []
    for row in rows:
        if row.reserved:
            for scope in {budget.SERVICE, row.job} - {""}:
                changes.setdefault(scope, budget.Change()).add(presumed=row.reserved, reserved=-row.reserved)
            ledger.append(
                {
                    "key": row.key,
                    "attempt": row.attempts,
                    "job": row.job,
                    "kind": "presumed",
                    "nanos": row.reserved,
                    "date": date,
                }
            )
    if rows:
        connection.execute(sa.update(requests).where(theirs).values(state="pending", owner="", reserved=0))
        log.warning("%d calls of workers that ended are to be made again", len(rows))
    if ledger:
        connection.execute(sa.insert(usage), ledger)
    budget.apply(connection, changes)
    return len(rows)
