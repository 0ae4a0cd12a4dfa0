"""The database behind a store: a SQLite file in a folder, or PostgreSQL. Opening, locking, and who is alive."""

import contextlib
import fcntl
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError

from laif_jax.labeling.errors import StoreError

log = logging.getLogger(__name__)
WRITER_CACHE = "PRAGMA cache_size=-65536"
CHECKPOINT = 0.25  # seconds between two checkpoints while there is something to do
PRAGMAS = (
    "journal_mode=WAL",
    "synchronous=FULL",
    "temp_store=MEMORY",
    "cache_size=-4096",  # KiB. Of who reads: what others write empties it anyway
    # Committing does the rest of what `Checkpoints` does beside it: then the log starts anew.
    "wal_autocheckpoint=16000",
)


def is_address(where: str | Path) -> bool:
    """Whether a store's place is the address of a PostgreSQL database rather than a folder."""
    return str(where).startswith(("postgresql:", "postgres:", "postgresql+psycopg:"))


def connect(where: str | Path) -> tuple[Engine, Path | None]:
    """(engine, folder): the folder is None for PostgreSQL.

    Raises:
      StoreError: the folder cannot be written, the address is malformed, or the driver is absent.
    """
    if is_address(where):
        return _postgres(str(where)), None
    folder = Path(where)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"store {folder}: {error.strerror}. Choose a folder that can be written") from error
    return _sqlite(folder / "labels.sqlite"), folder


def _sqlite(path: Path) -> Engine:
    engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 60.0})

    @event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say so, below
        cursor = connection.cursor()
        for pragma in PRAGMAS:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A transaction that reads and then writes must hold the write lock from its start: another process may write.
        immediate = connection.get_execution_options().get("immediate")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


class Checkpoints:
    """Copies what SQLite's write-ahead log holds into the database, in a thread of its own while it is written to.

    A commit that does this itself takes as long as hundreds of others; nobody's answer is stored meanwhile.

    Args:
      written: a number that grows with each commit.
    """

    def __init__(self, path: Path, written: Callable[[], int]) -> None:
        self._path, self._written = path, written
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="label-checkpoints", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        done = self._written()
        with contextlib.closing(sqlite3.connect(self._path, isolation_level=None)) as connection:
            while not self._end.wait(CHECKPOINT):
                if (seen := self._written()) == done:
                    continue
                done = seen
                try:
                    connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                except sqlite3.Error as error:  # a full disk: whoever commits says so, and does it again
                    log.debug("no checkpoint: %s", error)

    def close(self) -> None:
        self._end.set()
        self._thread.join()


def _postgres(address: str) -> Engine:
    try:
        url = make_url(address).set(drivername="postgresql+psycopg")
        return sa.create_engine(url, pool_size=4, max_overflow=8, pool_pre_ping=True)
    except ArgumentError as error:
        raise StoreError("the store's address is not postgresql://user@host:port/database") from error
    except ModuleNotFoundError as error:
        raise StoreError("a store in PostgreSQL needs psycopg: pip install 'laif_jax[postgres]'") from error


def shown(where: str | Path) -> str:
    """A store's place for messages and logs: without the password that an address may hold."""
    if not is_address(where):
        return str(where)
    parts = urlsplit(str(where))
    port = f":{parts.port}" if parts.port else ""
    return f"postgresql://{parts.hostname or 'local'}{port}{parts.path}"


def clock(connection: Connection) -> float:
    """Seconds since 1970 by the clock that all workers of the store share."""
    if connection.dialect.name == "sqlite":
        return time.time()
    return float(connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())


class FileLock:
    """A lock that the kernel lets go when its process dies, however that happens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreError(
                f"store {path.parent}: {error.strerror}. Choose a folder that can be written"
            ) from error

    def take(self, patience: float = 0.0) -> bool:
        """Takes it within `patience` seconds; False if another process holds it."""
        limit = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() >= limit:
                    return False
                time.sleep(0.05)
            else:
                return True

    def close(self) -> None:
        os.close(self._file)


def worker_lock(folder: Path, worker: str) -> Path:
    """The file that a living worker on this machine holds locked."""
    return folder / "workers" / worker


def dead_workers(folder: Path, workers: Iterator[str] | list[str]) -> list[str]:
    """Those of `workers` whose process, on this machine, has ended: their lock can be taken, or is gone."""
    dead = []
    for worker in workers:
        path = worker_lock(folder, worker)
        if not path.exists():
            dead.append(worker)
            continue
        lock = FileLock(path)
        if lock.take():
            dead.append(worker)
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        lock.close()
    return dead
