"""Garbage: what no job lists any more. Answers were paid for, so they go only when asked for by name."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from laif_jax.labeling import schema
from laif_jax.labeling.errors import StoreError
from laif_jax.labeling.open_batches import forget_rows, forget_settled, give_up, has_batches, waiting_keys
from laif_jax.labeling.store import Store

_DROPPABLE = ("done", "failed", "interrupted")


@dataclass(frozen=True)
class Garbage:
    """Rows that nothing references.

    Attributes:
      results: no job lists them. failures: of requests that are answered or gone. requests: never answered, asked for
        by no job under way, and in no open batch. answers: no kept result was read from them (only with
        `answers=True`). batches: settled: nothing is to come of them any more.
      bytes: of answers and results, as text.
    """

    results: int = 0
    failures: int = 0
    requests: int = 0
    answers: int = 0
    batches: int = 0
    bytes: int = 0


def collect(
    store: Store,
    *,
    jobs: Sequence[str] = (),
    batches: Sequence[str] = (),
    answers: bool = False,
    dry_run: bool = True,
) -> Garbage:
    """Counts what can go; removes it unless `dry_run`. What an open batch may still answer stays.

    Args:
      jobs: ids of jobs that are given up first, with what only they list.
      batches: tags of open batches that are given up first: their answers, which are on the bill, will not be read.
      answers: also answers from which no kept result was read. They cost money; a new critic may want them.

    Raises:
      StoreError: a job is unknown or under way, a batch is not open, or (to remove) other workers use the store.
    """
    if not dry_run and store.others():
        raise StoreError(
            f"store {store.where}: other workers use it. Stop the service before anything is removed"
        )

    def operation(connection: Connection) -> Garbage:
        with connection.begin_nested() as trial:
            for tag in batches:
                give_up(connection, tag)
            found = _collect(connection, jobs, answers)
            if dry_run:
                trial.rollback()
        return found

    garbage = store.do(operation).result()
    if not dry_run and store.engine.dialect.name == "sqlite":
        with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    return garbage


def _collect(connection: Connection, jobs: Sequence[str], answers: bool) -> Garbage:
    items, results, requests = schema.job_items, schema.results, schema.requests
    for job in jobs:
        state = connection.execute(sa.select(schema.jobs.c.state).where(schema.jobs.c.id == job)).scalar()
        if state not in _DROPPABLE:
            raise StoreError(
                f"job {job}: " + ("no such job" if state is None else f"is {state}; stop it first")
            )
        for table, column in ((items, items.c.job), (schema.jobs, schema.jobs.c.id)):
            connection.execute(sa.delete(table).where(column == job))
        connection.execute(sa.delete(schema.job_bodies).where(schema.job_bodies.c.job == job))
    gone_batches = forget_settled(connection)  # before answers go, which tell that they are settled
    unlisted = results.c.key.not_in(sa.select(items.c.result))
    size = sa.select(sa.func.coalesce(sa.func.sum(sa.func.length(results.c.record)), 0)).where(unlisted)
    total = int(connection.execute(size).scalar_one())
    gone_results = connection.execute(sa.delete(results).where(unlisted)).rowcount
    count_answers = 0
    if answers:
        read = _read_requests(connection)
        unread = [
            key for key in connection.execute(sa.select(schema.responses.c.key)).scalars() if key not in read
        ]
        count_answers = len(unread)
        for start in range(0, len(unread), 500):
            keys = unread[start : start + 500]
            length = sa.select(sa.func.sum(sa.func.length(schema.responses.c.body)))
            total += int(connection.execute(length.where(schema.responses.c.key.in_(keys))).scalar() or 0)
            forget_rows(connection, keys)
            for table in (schema.responses, schema.request_texts, schema.failures, requests):
                connection.execute(sa.delete(table).where(table.c.key.in_(keys)))
    busy = connection.execute(
        sa.select(sa.func.count()).select_from(schema.jobs).where(schema.jobs.c.state.not_in(_DROPPABLE))
    ).scalar_one()
    gone_requests = 0
    if not busy:
        idle = requests.c.state.in_(("pending", "failed"))
        if has_batches(connection):
            idle = sa.and_(idle, requests.c.key.not_in(waiting_keys()))
        keys = sa.select(requests.c.key).where(idle)
        connection.execute(sa.delete(schema.request_texts).where(schema.request_texts.c.key.in_(keys)))
        gone_requests = connection.execute(sa.delete(requests).where(idle)).rowcount
    open_keys = sa.select(requests.c.key).where(requests.c.state != "ok")
    failures = schema.failures
    gone_failures = connection.execute(sa.delete(failures).where(failures.c.key.not_in(open_keys))).rowcount
    return Garbage(gone_results, gone_failures, gone_requests, count_answers, gone_batches, total)


def _read_requests(connection: Connection) -> set[str]:
    """Keys of the requests that kept results were read from: `meta.request`, or `meta.requests` where several were."""
    record = schema.results.c.record
    if connection.dialect.name == "sqlite":
        request = sa.func.json_extract(record, "$.meta.request")
        requests = sa.func.json_extract(record, "$.meta.requests")
    else:
        meta = sa.cast(record, sa.JSON)["meta"]
        request, requests = meta["request"].as_string(), meta["requests"].as_string()
    found = set(connection.execute(sa.select(request)).scalars()) - {None}
    for keys in connection.execute(sa.select(requests).where(requests.is_not(None))).scalars():
        found.update(json.loads(keys))
    return found
