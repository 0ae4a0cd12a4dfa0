"""The store: every request, answer, cost, failure and result, in SQLite or PostgreSQL. See `writer` and `leases`."""

import contextlib
import datetime
import functools
import os
import socket
import time
import uuid
import zlib
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from laif_jax.labeling import budget, leases, migrations, schema
from laif_jax.labeling.database import Checkpoints, FileLock, connect, shown, worker_lock
from laif_jax.labeling.errors import StoreError
from laif_jax.labeling.store_read import StoreReader
from laif_jax.labeling.writer import Done, Operation, Row, Settle, Writer, cause

__all__ = ["Done", "Row", "Settle", "Store", "now"]


def now() -> str:
    """UTC time, ISO 8601, to the millisecond."""
    return _iso(time.time_ns() // 1_000_000)


@functools.lru_cache(maxsize=8)  # thousands are asked for in a second
def _iso(millis: int) -> str:
    start = datetime.datetime.fromtimestamp(millis // 1000, datetime.UTC)
    return start.replace(microsecond=millis % 1000 * 1000).isoformat(timespec="milliseconds")


class Store(StoreReader):
    """One open store.

    Args:
      where: a folder, where `labels.sqlite` lives, made if absent; or postgresql://user@host:port/database.
      patience: seconds to wait for another service that has it open, which may be ending.
      shared: open it as one of several workers. Otherwise, in a folder, one process at a time may have it open like
        this (a service); workers may come and go beside it.
      lease: seconds that it may be silent before others take over its calls. (In a folder a dead one is known at once.)

    Raises:
      StoreError: it cannot be reached or written, another service uses it, or the file is no store that this program
        can read or upgrade.
    """

    def __init__(
        self, where: str | Path, *, patience: float = 0.0, shared: bool = False, lease: float = leases.LEASE
    ) -> None:
        self.engine, folder = connect(where)
        self.folder = folder
        self.path = folder / "labels.sqlite" if folder is not None else Path(shown(where))
        self.where = shown(where) if folder is None else str(self.path)
        self.worker, self.lease = uuid.uuid4().hex, lease
        self._started, self._closed = now(), False
        self._locks: list[FileLock] = []
        try:
            if folder is not None:
                self._lock(folder, patience, shared)
            migrations.prepare(self.engine, self.where)
            with self.engine.execution_options(immediate=True).begin() as connection:
                self._sign_on(connection)
        except SQLAlchemyError as error:
            self._let_go()
            raise StoreError(
                f"store {self.where}: cannot be opened ({cause(error)}). If it is damaged, put a copy in its place "
                "or move it away; a new one is then made"
            ) from error
        except StoreError:
            self._let_go()
            raise
        self._writer = Writer(self.engine, self.worker, self.where)
        self._checkpoints = (
            Checkpoints(self.path, lambda: self._writer.commits) if folder is not None else None
        )

    def _lock(self, folder: Path, patience: float, shared: bool) -> None:
        if not shared:
            service = FileLock(folder / "lock")
            self._locks.append(service)
            if not service.take(patience):
                raise StoreError(
                    f"store {folder}: another labelling service uses it. Stop that one, or use another store"
                )
        worker_lock(folder, self.worker).parent.mkdir(exist_ok=True)
        alive = FileLock(worker_lock(folder, self.worker))
        self._locks.append(alive)
        alive.take()

    def _sign_on(self, connection: Connection) -> None:
        """Takes part; gives back what dead workers had in flight. Jobs that nobody runs any more are interrupted."""
        leases.reclaim(connection, self.folder, self.worker, now())
        others = connection.execute(sa.select(sa.func.count()).select_from(schema.workers)).scalar_one()
        self._beat(connection)
        if not others:
            state = schema.jobs.c.state
            connection.execute(
                sa.update(schema.jobs)
                .where(state.in_(("running", "out_of_budget")))
                .values(state="interrupted", reason="the service ended before the job did; submit it again")
            )

    def _beat(self, connection: Connection) -> None:
        leases.beat(connection, self.worker, socket.gethostname(), os.getpid(), self._started, self.lease)

    def _let_go(self) -> None:
        self.engine.dispose()
        for lock in self._locks:
            lock.close()
        if self.folder is not None:
            with contextlib.suppress(OSError):
                worker_lock(self.folder, self.worker).unlink()

    # ---- writing -----------------------------------------------------------------------------------------------

    @property
    def stalled(self) -> str:
        """Why nothing can be written at present; "" if all is well."""
        return self._writer.stalled

    def write(self, settles: list[Settle] | None = None, **rows: list[Row]) -> Future[None]:
        """Queues rows by table (`requests`, `states`, `responses`, ...); the future is done when they are committed."""
        return self._writer.write(rows, settles)

    def post(self, rows: dict[str, list[Row]], settles: list[Settle], done: Done) -> None:
        """Queues rows without a future; see `Writer.post`."""
        self._writer.post(rows, settles, done)

    def do(self, operation: Operation) -> Future[Any]:
        """Queues an operation in the writer's next transaction; see `Writer.do`."""
        return self._writer.do(operation)

    def claim(self, job: str, wants: Sequence[leases.Want], since: str) -> Future[leases.Claimed]:
        """Claims requests for this worker; see `leases.claim`."""
        return self.do(lambda connection: leases.claim(connection, self.worker, job, wants, since))

    def reserve(self, job: str, key: str, most: int) -> Future[bool]:
        """Reserves once more for a request that is ours (a further attempt); False if the budget has no room."""

        def operation(connection: Connection) -> bool:
            scopes = [budget.SERVICE, job]
            budget.ensure(connection, scopes)
            rooms = [account.room for account in budget.accounts(connection, scopes, lock=True).values()]
            fits = budget.affordable(rooms, [most])[0]
            c = schema.requests.c
            if fits:
                mine = sa.and_(c.key == key, c.owner == self.worker, c.state == "in_flight")
                fits = bool(
                    connection.execute(sa.update(schema.requests).where(mine).values(reserved=most)).rowcount
                )
            if fits:
                budget.apply(connection, {scope: budget.Change(reserved=most) for scope in scopes})
            return fits

        return self.do(operation)

    def give_back(self, job: str, keys: Sequence[str]) -> Future[None]:
        """Makes requests of ours that were not sent pending again and frees what was reserved for them."""

        def operation(connection: Connection) -> None:
            c = schema.requests.c
            mine = sa.and_(c.key.in_(keys), c.owner == self.worker, c.state == "in_flight")
            freed = connection.execute(sa.select(sa.func.sum(c.reserved)).where(mine)).scalar() or 0
            connection.execute(
                sa.update(schema.requests).where(mine).values(state="pending", owner="", reserved=0)
            )
            if freed:
                change = {scope: budget.Change(reserved=-int(freed)) for scope in (budget.SERVICE, job)}
                budget.apply(connection, change)

        return self.do(operation)

    def beat(self) -> Future[int]:
        """Renews this worker's lease and gives back what dead ones held; how many requests that were."""

        def operation(connection: Connection) -> int:
            self._beat(connection)
            return leases.reclaim(connection, self.folder, self.worker, now())

        return self.do(operation)

    def set_cap(self, cap: int | None, scope: str = budget.SERVICE) -> None:
        """Sets a hard budget in nano-dollars; None lifts it. Jobs that were out of budget go on by themselves."""
        self.do(lambda connection: budget.set_cap(connection, scope, cap)).result()

    def begin_job(self, row: Row, body: bytes | None, cap: int | None) -> Future[int]:
        """Writes a job's row for a new run, its budget, and its body for other workers; the number of the run."""

        def operation(connection: Connection) -> int:
            jobs, bodies = schema.jobs, schema.job_bodies
            old = connection.execute(sa.select(jobs.c.run).where(jobs.c.id == row["id"])).scalar()
            run = (old or 0) + 1
            connection.execute(sa.delete(jobs).where(jobs.c.id == row["id"]))
            connection.execute(sa.insert(jobs).values(**row, run=run))
            connection.execute(sa.delete(bodies).where(bodies.c.job == row["id"]))
            if body is not None:
                connection.execute(sa.insert(bodies).values(job=row["id"], body=packed))
            if cap is not None:
                budget.set_cap(connection, row["id"], cap)
            return run

        packed = zlib.compress(body, 1) if body is not None else b""
        return self.do(operation)

    def end_job(self, job: str, run: int, state: str, reason: str, counts: str) -> Future[bool]:
        """Writes how a run of a job ended, once: False if another worker did, or if it was run again."""

        def operation(connection: Connection) -> bool:
            jobs = schema.jobs
            ours = sa.and_(
                jobs.c.id == job,
                jobs.c.run == run,
                jobs.c.state.in_(("running", "out_of_budget")),
            )
            values = {"state": state, "reason": reason, "counts": counts, "updated": now()}
            done = bool(connection.execute(sa.update(jobs).where(ours).values(**values)).rowcount)
            if done and state in ("done", "failed"):
                connection.execute(sa.delete(schema.job_bodies).where(schema.job_bodies.c.job == job))
            return done

        return self.do(operation)

    def set_job_state(self, job: str, run: int, state: str) -> Future[None]:
        """A change of state within a run."""
        jobs = schema.jobs
        ours = sa.and_(jobs.c.id == job, jobs.c.run == run)
        return self.do(
            lambda connection: (
                connection.execute(sa.update(jobs).where(ours).values(state=state, updated=now())).rowcount
            )
        )

    def others(self) -> int:
        """How many other workers take part in the store."""
        workers = schema.workers
        query = sa.select(sa.func.count()).select_from(workers).where(workers.c.id != self.worker)
        with self.engine.connect() as connection:
            return connection.execute(query).scalar_one()

    def close(self) -> None:
        """Writes what is queued, gives back what is ours, and lets go of the store."""
        if self._closed:
            return
        self._closed = True
        self._writer.close()
        if self._checkpoints is not None:
            self._checkpoints.close()
        with (
            contextlib.suppress(SQLAlchemyError),
            self.engine.execution_options(immediate=True).begin() as connection,
        ):
            leases.release(connection, [self.worker], now())
            connection.execute(sa.delete(schema.workers).where(schema.workers.c.id == self.worker))
        self._let_go()
