"""What is known of batches that a provider works on, kept in the store's database: polling goes on after a crash.

The order of writing is what keeps a batch from being paid twice: its rows are noted before it is sent, its id after. A
batch that is noted without an id was perhaps sent; the provider is asked before its rows are sent again.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import sqlalchemy as sa

metadata = sa.MetaData()

batches = sa.Table(
    "batches",
    metadata,
    sa.Column("tag", sa.String(32), primary_key=True),  # our own name
    sa.Column("endpoint_key", sa.String(16), nullable=False),
    sa.Column("remote_id", sa.Text, nullable=False),  # the provider's name, "" until it is known
    sa.Column("state", sa.String(16), nullable=False),  # sending / sent / ended / lost
    sa.Column("rows", sa.Integer, nullable=False),
    sa.Column("created", sa.String, nullable=False),
    sa.Index("batches_endpoint", "endpoint_key", "state"),
)

batch_rows = sa.Table(
    "batch_rows",
    metadata,
    sa.Column("tag", sa.String(32), primary_key=True),
    sa.Column("key", sa.String(64), primary_key=True),  # of the request
    sa.Column("open", sa.Boolean, nullable=False),  # False: gave no answer, and may be sent again
    sa.Index("batch_rows_key", "key"),
)


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as it is noted. `remote_id` is "" if it is not known whether the provider has it."""

    tag: str
    remote_id: str
    rows: int
    created: datetime.datetime


class Ledger(Protocol):
    """Notes of batches. Every method has written when it returns; they are called from threads."""

    def find(self, endpoint_key: str, keys: Sequence[str]) -> dict[str, Batch]:
        """The batches in which these requests may have an answer, or get one."""
        ...

    def known(self, endpoint_key: str) -> set[str]:
        """The provider's names of all batches ever noted."""
        ...

    def begin(self, tag: str, endpoint_key: str, keys: Sequence[str]) -> Batch:
        """Notes that a batch is about to be sent."""
        ...

    def sent(self, tag: str, remote_id: str) -> None: ...

    def release(self, tag: str, keys: Sequence[str]) -> None:
        """These rows gave no answer: they may be sent again."""
        ...

    def lost(self, tag: str) -> None:
        """The provider has no such batch, or not any more: its rows may be sent again."""
        ...


class SqlLedger:
    """A ledger in two tables beside the store's, in SQLite or PostgreSQL."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        metadata.create_all(engine)

    def find(self, endpoint_key: str, keys: Sequence[str]) -> dict[str, Batch]:
        found: dict[str, Batch] = {}
        columns = (batch_rows.c.key, batches.c.tag, batches.c.remote_id, batches.c.rows, batches.c.created)
        with self._engine.connect() as connection:
            for start in range(0, len(keys), 500):
                query = (
                    sa.select(*columns)
                    .join_from(batch_rows, batches, batch_rows.c.tag == batches.c.tag)
                    .where(
                        batch_rows.c.key.in_(keys[start : start + 500]),
                        batch_rows.c.open,
                        batches.c.endpoint_key == endpoint_key,
                        batches.c.state.in_(("sending", "sent")),
                    )
                )
                for key, tag, remote_id, rows, created in connection.execute(query):
                    found[key] = Batch(tag, remote_id, rows, datetime.datetime.fromisoformat(created))
        return found

    def known(self, endpoint_key: str) -> set[str]:
        query = sa.select(batches.c.remote_id).where(batches.c.endpoint_key == endpoint_key)
        with self._engine.connect() as connection:
            return set(connection.execute(query).scalars())

    def begin(self, tag: str, endpoint_key: str, keys: Sequence[str]) -> Batch:
        created = datetime.datetime.now(datetime.UTC)
        with self._engine.begin() as connection:
            connection.execute(
                sa.insert(batches).values(
                    tag=tag,
                    endpoint_key=endpoint_key,
                    remote_id="",
                    state="sending",
                    rows=len(keys),
                    created=created.isoformat(),
                )
            )
            connection.execute(
                sa.insert(batch_rows), [{"tag": tag, "key": key, "open": True} for key in keys]
            )
        return Batch(tag, "", len(keys), created)

    def sent(self, tag: str, remote_id: str) -> None:
        self._set(tag, remote_id=remote_id, state="sent")

    def release(self, tag: str, keys: Sequence[str]) -> None:
        with self._engine.begin() as connection:
            for start in range(0, len(keys), 500):
                chosen = batch_rows.c.key.in_(keys[start : start + 500])
                connection.execute(
                    sa.update(batch_rows).where(batch_rows.c.tag == tag, chosen).values(open=False)
                )

    def lost(self, tag: str) -> None:
        self._set(tag, state="lost")

    def _set(self, tag: str, **values: str) -> None:
        with self._engine.begin() as connection:
            connection.execute(sa.update(batches).where(batches.c.tag == tag).values(**values))
