"""A store's content as files, and back: what was paid for once can be used in another store without paying again."""

import gzip
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from laif_jax.labeling import schema
from laif_jax.labeling.errors import StoreError
from laif_jax.labeling.open_batches import TABLES, has_batches, open_tags
from laif_jax.labeling.store import Store
from laif_jax.labeling.writer import Row
from laif_jax.records import read_rows

CHUNK = 2000
# In this order: a request stands before what belongs to it.
EXPORTED = (
    *("requests", "request_texts", "responses", "usage", "failures", "results", "jobs", "job_items"),
    *TABLES,
)
_LOCAL = {"id", "owner", "reserved"}  # of this store's workers and row numbers


def _table(name: str) -> sa.Table:
    return TABLES[name] if name in TABLES else schema.metadata.tables[name]


def rows_of(store: Store) -> Iterator[Row]:
    """All rows of a store, each with the name of its `table`; of batches the open ones."""
    with store.engine.connect() as connection:
        for name in EXPORTED:
            table = _table(name)
            drop = _LOCAL if "key" in table.columns else set()
            columns = [column for column in table.columns if column.name not in drop]
            query = sa.select(*columns).order_by(*table.primary_key.columns)
            if name in TABLES:
                if not has_batches(connection):
                    continue
                query = query.where(table.c.tag.in_(open_tags()))
            for row in connection.execution_options(yield_per=CHUNK).execute(query).mappings():
                yield {"table": name, **row}


def export_store(store: Store, path: str | Path) -> dict[str, int]:
    """Writes everything but budgets and leases to a .jsonl, .jsonl.gz or .parquet file; rows by table.

    Batches that a provider still works on go along: the store that asks for their calls reads their answers, and books
    what they cost.

    Raises:
      StoreError: another ending, or the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    try:
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            counts = _write_lines(store, partial, gzipped=path.name.endswith(".gz"))
        elif path.suffix == ".parquet":
            counts = _write_parquet(store, partial)
        else:
            raise StoreError(f"{path}: the name must end in .jsonl, .jsonl.gz or .parquet")
        partial.replace(path)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}. Choose a file that can be written") from error
    return counts


def _counted(rows: Iterator[Row], counts: dict[str, int]) -> Iterator[Row]:
    for row in rows:
        counts[row["table"]] = counts.get(row["table"], 0) + 1
        yield row


def _write_lines(store: Store, path: Path, *, gzipped: bool) -> dict[str, int]:
    counts: dict[str, int] = {}
    with ExitStack() as stack:
        raw = stack.enter_context(path.open("wb"))
        file: Any = stack.enter_context(gzip.GzipFile(fileobj=raw, mode="wb", mtime=0)) if gzipped else raw
        for row in _counted(rows_of(store), counts):
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return counts


def _write_parquet(store: Store, path: Path) -> dict[str, int]:
    """One file with the columns of all tables, in row groups, so that a large store needs little memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds: dict[str, Any] = {"table": pa.string()}
    types = {str: pa.string(), float: pa.float64(), bool: pa.bool_()}
    for name in EXPORTED:
        for column in _table(name).columns:
            kinds[column.name] = types.get(column.type.python_type, pa.int64())
    layout, counts = pa.schema(list(kinds.items())), {}
    with pq.ParquetWriter(path, layout) as writer:
        batch: list[Row] = []
        for row in _counted(rows_of(store), counts):
            batch.append(row)
            if len(batch) == CHUNK:
                writer.write_table(pa.Table.from_pylist(batch, layout))
                batch = []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, layout))
    return counts


def import_store(store: Store, path: str | Path) -> dict[str, int]:
    """Adds what an export holds and the store does not; rows that were new, by table.

    Answers, failures and results that the store has already are left as they are. What the imported calls cost was paid
    elsewhere: it is kept as `imported` and counts against no budget here.

    Raises:
      DataError: the file cannot be read. StoreError: it is no export.
    """
    counts: dict[str, int] = dict.fromkeys(EXPORTED, 0)
    answered: set[str] = set()  # got their answer from this file: only then its cost is taken over
    batch: list[Row] = []
    table = ""
    for number, row in enumerate(read_rows(path), 1):
        if row.get("table") not in EXPORTED:
            raise StoreError(
                f"{path}, row {number}: no row of a store's export (`table` is {row.get('table')!r})"
            )
        if batch and (row["table"] != table or len(batch) == CHUNK):
            _add(store, table, batch, counts, answered)
            batch = []
        table = row["table"]
        batch.append(row)
    if batch:
        _add(store, table, batch, counts, answered)
    return counts


def _add(store: Store, name: str, rows: Sequence[Row], counts: dict[str, int], answered: set[str]) -> None:
    table = _table(name)
    names = [column.name for column in table.columns if column.name not in _LOCAL or name == "jobs"]

    def operation(connection: Connection) -> set[str]:
        values = [{key: row.get(key) for key in names if row.get(key) is not None} for row in rows]
        new: set[str] = set()
        if name == "responses":
            keys = [str(row["key"]) for row in values]
            found = sa.select(table.c.key).where(table.c.key.in_(keys))
            new = set(keys) - set(connection.execute(found).scalars())
        if name == "usage":
            values = [row | {"kind": "imported"} for row in values if row["key"] in answered]
        for row in values if name in ("requests", "jobs") else ():
            if row["state"] in ("in_flight", "running", "out_of_budget"):
                row["state"] = "pending" if name == "requests" else "interrupted"
            # An answer follows in this file, or is here already: `responses` below says so.
            if name == "requests" and row["state"] == "ok":
                row["state"] = "pending"
        if name in TABLES:
            table.create(connection, checkfirst=True)
        before = _count(connection, table)
        insert: Any = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
        for row in values:  # rows may have different columns
            connection.execute(insert(table).on_conflict_do_nothing(), row)
        if new:
            requests = schema.requests
            connection.execute(
                sa.update(requests)
                .where(requests.c.key.in_(new), requests.c.state != "in_flight")
                .values(state="ok", reason="")
            )
        counts[name] += _count(connection, table) - before
        return new

    answered |= store.do(operation).result()


def _count(connection: Connection, table: sa.Table) -> int:
    return connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
