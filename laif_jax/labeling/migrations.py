"""Brings a store of an older version to the present one, in place and in one transaction.

`STEPS[n]` goes from version n to n + 1, and reads the tables as version n had them. Only the last step may make tables
from the present schema: whoever adds a step after it writes out the tables that the one before it makes.
"""

import logging
from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from laif_jax.labeling import schema
from laif_jax.labeling.errors import StoreError

log = logging.getLogger(__name__)


def prepare(engine: Engine, where: str) -> None:
    """Makes the tables of a new store, or upgrades an old one.

    Raises:
      StoreError: the store was written by a newer release, or by one older than every step here.
    """
    with engine.execution_options(immediate=True).begin() as connection:
        if connection.dialect.name != "sqlite":  # two services that start at once make the tables once
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(4720613)"))
        schema.meta.create(connection, checkfirst=True)
        version = connection.execute(
            sa.select(schema.meta.c.value).where(schema.meta.c.name == "schema_version")
        ).scalar()
        if version is None:
            schema.metadata.create_all(connection)
            connection.execute(
                sa.insert(schema.meta).values(name="schema_version", value=str(schema.SCHEMA_VERSION))
            )
            return
        if version == str(schema.SCHEMA_VERSION):
            return
        if not version.isdigit() or int(version) > schema.SCHEMA_VERSION or int(version) not in STEPS:
            raise StoreError(
                f"store {where} has version {version}, this program writes {schema.SCHEMA_VERSION}. "
                "Use another store, or the release that wrote it"
            )
        for number in range(int(version), schema.SCHEMA_VERSION):
            log.info("store %s: from version %d to %d", where, number, number + 1)
            STEPS[number](connection)
        connection.execute(
            sa.update(schema.meta)
            .where(schema.meta.c.name == "schema_version")
            .values(value=str(schema.SCHEMA_VERSION))
        )


_MOVED = ("requests", "responses", "failures", "results", "jobs", "job_items")


def _from_1(connection: Connection) -> None:
    """Texts and usage get tables of their own; rows are appended instead of kept in the order of their keys."""
    run = connection.exec_driver_sql
    for name in _MOVED:
        run(f"ALTER TABLE {name} RENAME TO old_{name}")
    for index in ("requests_state", "results_item"):
        run(f"DROP INDEX IF EXISTS {index}")
    schema.metadata.create_all(connection)
    run(
        "INSERT INTO requests (key, endpoint_key, model, state, attempts, reason, owner, job, reserved, created, "
        "updated) SELECT key, endpoint_key, model, state, attempts, reason, '', '', 0, created, updated "
        "FROM old_requests ORDER BY created"
    )
    run("INSERT INTO request_texts (key, request) SELECT key, request FROM old_requests ORDER BY created")
    run(
        "INSERT INTO responses (key, body, model, system_fingerprint, latency, attempt, date) "
        "SELECT key, body, model, system_fingerprint, latency, attempt, date FROM old_responses ORDER BY date"
    )
    run(
        "INSERT INTO usage (key, attempt, job, kind, prompt_tokens, cached_tokens, completion_tokens, nanos, date) "
        "SELECT key, attempt, '', 'answered', prompt_tokens, NULL, completion_tokens, "
        "CAST(round(cost * 1e9) AS INTEGER), date FROM old_responses ORDER BY date"
    )
    for name, columns in {
        "failures": "key, attempt, kind, reason, body, latency, date",
        "results": "key, kind, item, status, endpoint_key, critic_hash, record, updated",
        "jobs": "id, kind, endpoint, endpoint_key, critic, state, reason, total, counts, created, updated",
        "job_items": "job, position, part, result",
    }.items():
        run(f"INSERT INTO {name} ({columns}) SELECT {columns} FROM old_{name}")
    run(
        "UPDATE job_items SET status = COALESCE((SELECT status FROM results WHERE results.key = job_items.result), '')"
    )
    for name in _MOVED:
        run(f"DROP TABLE old_{name}")


STEPS: dict[int, Callable[[Connection], None]] = {1: _from_1}
