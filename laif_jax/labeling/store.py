"""The store: every request, answer, failure and result in one SQLite file (WAL), written by one thread.

Writes go through `Store.write`: they are grouped, and a group is one transaction with `synchronous=FULL`, so a future
that is done means the rows survive SIGKILL and power loss. If the disk is full, the group stays in memory, the writer
tries again until there is space, and nobody who waits for a commit goes on to the next paid call meanwhile.
"""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.dialects.sqlite.dml import Insert
from sqlalchemy.exc import DatabaseError, OperationalError, SQLAlchemyError

from laif_jax.labeling import schema
from laif_jax.labeling.errors import StoreError

log = logging.getLogger(__name__)
Row = dict[str, Any]


def now() -> str:
    """UTC time, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _upsert(table: sa.Table) -> Insert:
    statement = sqlite_insert(table)
    keys = [column.name for column in table.primary_key.columns]
    values = {c.name: statement.excluded[c.name] for c in table.columns if c.name not in keys}
    return statement.on_conflict_do_update(index_elements=keys, set_=values)


# In the order in which a group is written. A request row exists before its state changes.
_STATEMENTS: dict[str, Any] = {
    "requests": sqlite_insert(schema.requests).on_conflict_do_nothing(),
    "states": sa.update(schema.requests)
    .where(schema.requests.c.key == sa.bindparam("k"))
    .values({name: sa.bindparam(name) for name in ("state", "attempts", "reason", "updated")}),
    "responses": _upsert(schema.responses),
    "failures": _upsert(schema.failures),
    "results": _upsert(schema.results),
    "jobs": _upsert(schema.jobs),
    "job_items": _upsert(schema.job_items),
}


@dataclass
class _Group:
    rows: dict[str, list[Row]] = field(default_factory=lambda: {name: [] for name in _STATEMENTS})
    futures: list[Future[None]] = field(default_factory=list)

    def add(self, rows: dict[str, list[Row]], future: Future[None]) -> None:
        for name, new in rows.items():
            self.rows[name] += new
        self.futures.append(future)


class Store:
    """One open store. Only one process at a time may have it open.

    Args:
      folder: where `labels.sqlite` lives; made if absent.
      patience: seconds to wait for another service that has it open, which may be ending.

    Raises:
      StoreError: the folder cannot be written, another service uses it, or the file is no store of this version.
    """

    def __init__(self, folder: str | Path, *, patience: float = 0.0) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "labels.sqlite"
        self.stalled = ""  # why the writer cannot write at present
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreError(
                f"store {self.folder}: {error.strerror}. Choose a folder that can be written"
            ) from error
        self._take_lock(patience)
        try:
            self._open()
        except SQLAlchemyError as error:
            os.close(self._lock)
            raise StoreError(
                f"store {self.path}: cannot be opened ({_cause(error)}). If it is damaged, put a copy in its place "
                "or move it away; a new one is then made"
            ) from error
        except StoreError:
            os.close(self._lock)
            raise
        self._queue: queue.SimpleQueue[tuple[dict[str, list[Row]], Future[None]] | None] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._write_groups, name="label-store", daemon=True)
        self._thread.start()

    def _take_lock(self, patience: float) -> None:
        limit = time.monotonic() + patience
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if time.monotonic() < limit:
                    time.sleep(0.05)
                    continue
                os.close(self._lock)
                raise StoreError(
                    f"store {self.folder}: another labelling service uses it. Stop that one, or use another store"
                ) from error

    def _open(self) -> None:
        self.engine = sa.create_engine(f"sqlite:///{self.path}", connect_args={"timeout": 30.0})

        @event.listens_for(self.engine, "connect")
        def _pragmas(connection: Any, _: Any) -> None:
            cursor = connection.cursor()
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "temp_store=MEMORY", "cache_size=-65536"):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

        requests, jobs = schema.requests.c, schema.jobs.c
        with self.engine.begin() as connection:
            schema.metadata.create_all(connection)
            version = connection.execute(
                sa.select(schema.meta.c.value).where(schema.meta.c.name == "schema_version")
            ).scalar()
            if version is None:
                connection.execute(
                    sa.insert(schema.meta).values(name="schema_version", value=str(schema.SCHEMA_VERSION))
                )
            elif version != str(schema.SCHEMA_VERSION):
                raise StoreError(
                    f"store {self.path} has version {version}, this program writes {schema.SCHEMA_VERSION}. "
                    "Use another store, or the release that wrote it"
                )
            # What was under way when the last service ended had no stored answer: it is to be asked again.
            connection.execute(
                sa.update(schema.requests).where(requests.state == "in_flight").values(state="pending")
            )
            connection.execute(
                sa.update(schema.jobs)
                .where(jobs.state == "running")
                .values(state="interrupted", reason="the service ended before the job did; submit it again")
            )

    # ---- writing -----------------------------------------------------------------------------------------------

    def write(self, **rows: list[Row]) -> Future[None]:
        """Queues rows by table (`requests`, `states`, `responses`, ...); the future is done when they are committed."""
        future: Future[None] = Future()
        if self._closing:
            future.set_exception(StoreError("the store is closed"))
        else:
            self._queue.put((rows, future))
        return future

    def _write_groups(self) -> None:
        while (first := self._queue.get()) is not None:
            group, end = _Group(), False
            group.add(*first)
            with contextlib.suppress(queue.Empty):
                while len(group.futures) < 4096:
                    entry = self._queue.get_nowait()
                    if entry is None:
                        end = True
                        break
                    group.add(*entry)
            self._commit(group)
            if end:
                return

    def _commit(self, group: _Group) -> None:
        wait = threading.Event()
        while True:
            try:
                with self.engine.begin() as connection:
                    for name, statement in _STATEMENTS.items():
                        if group.rows[name]:
                            connection.execute(statement, group.rows[name])
            except OperationalError as error:  # disk full, I/O error, locked: can pass
                self.stalled = (
                    f"cannot write the store {self.path} ({_cause(error)}). Free space or mend the disk: "
                    f"{len(group.rows['responses'])} answers wait in memory and are written as soon as it works"
                )
                log.error(self.stalled)
                if self._closing:
                    self._fail(group, StoreError(self.stalled))
                    return
                wait.wait(0.5)
            except (DatabaseError, SQLAlchemyError) as error:
                log.exception("writing the store failed")
                self._fail(group, StoreError(f"store {self.path}: {_cause(error)}"))
                return
            else:
                self.stalled = ""
                for future in group.futures:
                    future.set_result(None)
                return

    @staticmethod
    def _fail(group: _Group, error: StoreError) -> None:
        for future in group.futures:
            future.set_exception(error)

    def close(self) -> None:
        """Writes what is queued and lets go of the file."""
        if not self._closing:
            self._closing = True
            self._queue.put(None)
            self._thread.join()
            self.engine.dispose()
            os.close(self._lock)

    # ---- reading -----------------------------------------------------------------------------------------------

    def answered(self, keys: Sequence[str]) -> dict[str, Row]:
        """Stored responses (columns of `responses`) of those keys that have one."""
        return self._by_key(schema.responses, keys)

    def attempts(self, keys: Sequence[str]) -> dict[str, int]:
        """Attempts made so far for the keys that are known."""
        return {key: row["attempts"] for key, row in self._by_key(schema.requests, keys).items()}

    def _by_key(self, table: sa.Table, keys: Sequence[str]) -> dict[str, Row]:
        found: dict[str, Row] = {}
        with self.engine.connect() as connection:
            for start in range(0, len(keys), 500):
                query = sa.select(table).where(table.c.key.in_(keys[start : start + 500]))
                found |= {row["key"]: dict(row) for row in connection.execute(query).mappings()}
        return found

    def job(self, job_id: str) -> Row | None:
        """A job's row, its counts decoded."""
        with self.engine.connect() as connection:
            row = (
                connection.execute(sa.select(schema.jobs).where(schema.jobs.c.id == job_id))
                .mappings()
                .first()
            )
        return None if row is None else {**row, "counts": json.loads(row["counts"])}

    def job_list(self, limit: int = 100) -> list[Row]:
        """The newest jobs."""
        query = sa.select(schema.jobs).order_by(schema.jobs.c.created.desc()).limit(limit)
        with self.engine.connect() as connection:
            return [{**r, "counts": json.loads(r["counts"])} for r in connection.execute(query).mappings()]

    def job_results(
        self, job_id: str, *, parts: bool = False, offset: int = 0, limit: int | None = None
    ) -> Iterator[str]:
        """JSON records of a job in the order of its items: the final results, or the single orders behind them."""
        items, results = schema.job_items.c, schema.results.c
        query = (
            sa.select(results.record)
            .join_from(schema.job_items, schema.results, items.result == results.key)
            .where(items.job == job_id, items.part > 0 if parts else items.part == 0)
            .order_by(items.position, items.part)
            .offset(offset)
        )
        if limit is not None:
            query = query.limit(limit)
        with self.engine.connect() as connection:
            yield from connection.execution_options(yield_per=1000).execute(query).scalars()

    def stats(self) -> Row:
        """Counts by state, and the usage of all answers."""
        c, responses = sa.func.count, schema.responses.c
        with self.engine.connect() as connection:

            def by(table: sa.Table, column: Any) -> dict[str, int]:
                query = sa.select(column, c()).select_from(table).group_by(column)
                return {row[0]: row[1] for row in connection.execute(query)}

            usage = connection.execute(
                sa.select(
                    c(),
                    sa.func.coalesce(sa.func.sum(responses.prompt_tokens), 0),
                    sa.func.coalesce(sa.func.sum(responses.completion_tokens), 0),
                    sa.func.coalesce(sa.func.sum(responses.cost), 0.0),
                )
            ).one()
            return {
                "requests": by(schema.requests, schema.requests.c.state),
                "failures": by(schema.failures, schema.failures.c.kind),
                "results": by(schema.results, schema.results.c.status),
                "jobs": by(schema.jobs, schema.jobs.c.state),
                "answers": usage[0],
                "prompt_tokens": usage[1],
                "completion_tokens": usage[2],
                "cost": usage[3],
            }


def _cause(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error)
