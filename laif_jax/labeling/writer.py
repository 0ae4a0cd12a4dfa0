"""The store's one writing thread: what is queued is grouped, and a group is one transaction.

SQLite commits a group with `synchronous=FULL`, so a future that is done means the rows survive SIGKILL and power loss.
If the disk is full or the database out of reach, the group stays in memory and is tried again until it works; nobody
who waits for a commit goes on to the next paid call meanwhile.
"""

import contextlib
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DatabaseError, OperationalError, SQLAlchemyError

from laif_jax.labeling import budget, schema
from laif_jax.labeling.database import WRITER_CACHE
from laif_jax.labeling.errors import LabelError, StoreError
from laif_jax.labeling.statements import TABLES, Row, having, writes

log = logging.getLogger(__name__)
GROUP = 4096  # entries of a group at most


@dataclass(frozen=True, slots=True)
class Settle:
    """What becomes of a call's reservation.

    Attributes:
      kind: "answered", "presumed" (no answer we have, but it may be on the bill) or "free" (certainly not billed).
      nanos: what the call cost, or may have cost; None: the price is not known.
      most: what is reserved for it; 0: nothing.
      tokens: of the prompt, those of it that were cached, of the completion.
    """

    key: str
    job: str
    attempt: int
    kind: str
    nanos: int | None
    date: str
    most: int = 0
    tokens: tuple[int | None, int | None, int | None] = (None, None, None)


Operation = Callable[[Connection], Any]
Done = Callable[[LabelError | None, int], None]


@dataclass(slots=True)
class _Entry:
    """What one caller queued. It hears of the commit by its future or by `done`."""

    rows: dict[str, list[Row]]
    settles: list[Settle]
    operation: Operation | None = None
    future: Future[Any] | None = None
    done: Done | None = None


@dataclass
class _Group:
    """What one transaction writes."""

    rows: dict[str, list[Row]] = field(default_factory=lambda: {name: [] for name in TABLES})
    settles: list[Settle] = field(default_factory=list)
    count: int = 0
    posted: Counter[Done] = field(default_factory=Counter)  # how many entries each one is told of
    awaited: list[tuple[Future[Any], Operation | None]] = field(default_factory=list)

    def add(self, entry: _Entry) -> None:
        self.count += 1
        for name, rows in entry.rows.items():
            self.rows[name] += rows
        self.settles += entry.settles
        if entry.done is not None:
            self.posted[entry.done] += 1
        elif entry.future is not None:
            self.awaited.append((entry.future, entry.operation))

    def end(self, ends: Sequence[tuple[LabelError | None, Any]]) -> None:
        """Tells everybody: `ends` holds an error or a value for each of `awaited`."""
        for done, count in self.posted.items():
            done(None, count)
        for (future, _), (error, value) in zip(self.awaited, ends, strict=True):
            future.set_result(value) if error is None else future.set_exception(error)

    def fail(self, error: LabelError) -> None:
        for done, count in self.posted.items():
            done(error, count)
        for future, _ in self.awaited:
            future.set_exception(error)


class Writer:
    """Queues rows and operations; see the module's text.

    Args:
      worker: its id; a call that is given back only counts if it is still ours.
      where: the store's place, for messages.
    """

    def __init__(self, engine: Engine, worker: str, where: str) -> None:
        self.stalled = ""  # why nothing can be written at present
        self.commits = 0
        self._engine = engine.execution_options(immediate=True)
        self._worker, self._where = worker, where
        self._statements = writes(engine.dialect.name, worker)
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._closing = False
        self._connection: Connection | None = None
        self._wait = threading.Event()
        self._thread = threading.Thread(target=self._run, name="label-store", daemon=True)
        self._thread.start()

    def write(self, rows: dict[str, list[Row]], settles: list[Settle] | None = None) -> Future[None]:
        """Queues rows by table; the future is done when they are committed."""
        future: Future[None] = Future()
        self._put(_Entry(rows, settles or [], future=future))
        return future

    def post(self, rows: dict[str, list[Row]], settles: list[Settle], done: Done) -> None:
        """As `write`, for rows that come by the thousand: `done(error or None, n)` is called in the writer's thread,
        once for all n that were posted with the same `done` and committed together."""
        self._put(_Entry(rows, settles, done=done))

    def do(self, operation: Operation) -> Future[Any]:
        """Queues `operation(connection)`, to run in the transaction of its group, after the rows queued before it; the
        future has its value once that is committed. It may run again if the transaction fails."""
        future: Future[Any] = Future()
        self._put(_Entry({}, [], operation, future))
        return future

    def _put(self, entry: _Entry) -> None:
        if self._closing:
            late = _Group()
            late.add(entry)
            late.fail(StoreError("the store is closed"))
        else:
            self._queue.put(entry)

    def close(self) -> None:
        """Writes what is queued, then ends."""
        if not self._closing:
            self._closing = True
            self._queue.put(None)
            self._thread.join()

    # ---- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._write_groups()
        finally:
            self._let_go()

    def _write_groups(self) -> None:
        while (first := self._queue.get()) is not None:
            group, end = _Group(), False
            group.add(first)
            with contextlib.suppress(queue.Empty):
                while group.count < GROUP:
                    entry = self._queue.get_nowait()
                    if entry is None:
                        end = True
                        break
                    group.add(entry)
            self._commit(group)
            if end:
                return

    @contextlib.contextmanager
    def _transaction(self) -> Generator[Connection]:
        """SQLite keeps the pages that it wrote in its connection's cache: it is the same one each time."""
        if self._engine.dialect.name != "sqlite":
            with self._engine.begin() as connection:
                yield connection
            return
        if self._connection is None:
            self._connection = self._engine.connect()
            self._connection.exec_driver_sql(WRITER_CACHE)
            self._connection.rollback()
        try:
            with self._connection.begin():
                yield self._connection
        except BaseException:
            self._let_go()
            raise

    def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _commit(self, group: _Group) -> None:
        while True:
            try:
                with self._transaction() as connection:
                    self._settle(connection, group)
                    for name, rows in group.rows.items():
                        if rows:
                            self._statements[name](connection, rows)
                    ends = [_operate(connection, operation) for _, operation in group.awaited]
            except OperationalError as error:  # disk full, I/O error, locked, connection lost: can pass
                self.stalled = (
                    f"cannot write the store {self._where} ({cause(error)}). Free space or mend the disk or database: "
                    f"{len(group.rows['responses'])} answers wait in memory and are written as soon as it works"
                )
                log.error("%s", self.stalled)
                if self._closing:
                    return group.fail(StoreError(self.stalled))
                self._wait.wait(0.5)
            except (DatabaseError, SQLAlchemyError) as error:
                log.exception("writing the store failed")
                return group.fail(StoreError(f"store {self._where}: {cause(error)}"))
            else:
                self.stalled = ""
                self.commits += 1
                return group.end(ends)

    def _settle(self, connection: Connection, group: _Group) -> None:
        """Books calls; a reservation that was given back meanwhile (an expired lease) is booked already."""
        settles = group.settles
        if not settles:
            return
        reserved = sorted({settle.key for settle in settles if settle.most})
        ours = self._ours(connection, reserved) if reserved else set()
        changes: dict[str, budget.Change] = {}  # by job
        ledger = []
        for settle in settles:
            nanos = settle.nanos
            if settle.most:
                mine = settle.key in ours
                nanos = nanos or 0 if mine else 0
                change = changes.get(settle.job) or changes.setdefault(settle.job, budget.Change())
                presumed = settle.kind == "presumed"
                change.add(0 if presumed else nanos, nanos if presumed else 0, -settle.most if mine else 0)
            if settle.kind != "free":
                ledger.append(_ledger_row(settle, nanos))
        if ledger:
            self._statements["usage"](connection, ledger)
        total = budget.Change()
        for change in changes.values():
            total.add(change.spent, change.presumed, change.reserved)
        budget.apply(connection, {**changes, budget.SERVICE: total} if changes else {})
        # Calls that end in this group lose their reservation with their change of state.
        kept = sorted(ours.difference(row["k"] for row in group.rows["states"]))
        for condition in having(connection, schema.requests.c.key, kept) if kept else ():
            connection.execute(sa.update(schema.requests).where(condition).values(reserved=0))

    def _ours(self, connection: Connection, keys: list[str]) -> set[str]:
        c = schema.requests.c
        found: set[str] = set()
        for condition in having(connection, c.key, keys):
            found |= set(
                connection.execute(sa.select(c.key).where(condition, c.owner == self._worker)).scalars()
            )
        return found


def _ledger_row(settle: Settle, nanos: int | None) -> Row:
    prompt, cached, completion = settle.tokens
    return {
        "key": settle.key,
        "attempt": settle.attempt,
        "job": settle.job,
        "kind": settle.kind,
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "completion_tokens": completion,
        "nanos": nanos,
        "date": settle.date,
    }


def _operate(connection: Connection, operation: Operation | None) -> tuple[LabelError | None, Any]:
    """(error, value) of an operation. One that fails by itself leaves no trace and does not take others with it."""
    if operation is None:
        return None, None
    try:
        with connection.begin_nested():
            return None, operation(connection)
    except SQLAlchemyError:
        raise
    except LabelError as error:
        return error, None
    except Exception as error:  # a defect must not end the thread and hang everybody
        log.exception("an operation on the store failed")
        return StoreError(f"internal error: {error!r}"), None


def cause(error: Exception) -> str:
    """The driver's own words."""
    return str(getattr(error, "orig", None) or error)
