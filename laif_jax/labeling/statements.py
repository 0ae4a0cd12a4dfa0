"""The SQL that writes rows, for the store's one writing thread.

What is written with every call takes many rows per statement in SQLite. Each step of a statement lets go of the
interpreter and has to ask for it back; with a row per step this thread and the event loop would hand it to one another
several times per call.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from laif_jax.labeling import schema

Row = dict[str, Any]
Write = Callable[[Connection, Sequence[Row]], None]
MOST_ROWS = 256  # of one statement: SQLite takes 32,766 values

# In the order in which a group is written: a request row exists before its state changes.
TABLES = (
    *("requests", "request_texts", "states", "failed_states", "responses", "failures", "results", "jobs"),
    "job_items",
)
# Written with every call, with all columns in every row.
BUSY = ("request_texts", "responses", "usage", "results", "job_items")
_STATE = ("state", "attempts", "reason", "updated")


def writes(dialect: str, worker: str) -> dict[str, Write]:
    """What writes the rows of each table, and of `states`, `failed_states` (changes of `requests`).

    Args:
      dialect: "sqlite" or "postgresql". worker: whose requests may fail.
    """
    insert: Any = sqlite.insert if dialect == "sqlite" else postgresql.insert

    def upsert(table: sa.Table, *keys: str) -> Any:
        statement = insert(table)
        values = {c.name: statement.excluded[c.name] for c in table.columns if c.name not in (*keys, "id")}
        return statement.on_conflict_do_update(index_elements=list(keys), set_=values)

    def once(table: sa.Table) -> Any:
        return insert(table).on_conflict_do_nothing(index_elements=["key"])

    requests = schema.requests.c
    changed = {name: sa.bindparam(name) for name in _STATE}
    ended = sa.update(schema.requests).values(owner="", reserved=0, **changed)
    statements = {
        "usage": sa.insert(schema.usage),
        "requests": once(schema.requests),
        "request_texts": once(schema.request_texts),
        # An answer counts whoever has the lease by now; a failure only if nobody else took the call over.
        "states": ended.where(requests.key == sa.bindparam("k")),
        "failed_states": ended.where(requests.key == sa.bindparam("k"), requests.owner == worker),
        "responses": upsert(schema.responses, "key"),
        "failures": upsert(schema.failures, "key", "attempt"),
        "results": upsert(schema.results, "key"),
        "jobs": upsert(schema.jobs, "id"),
        "job_items": upsert(schema.job_items, "job", "position", "part"),
    }
    done = {name: _executed(statement) for name, statement in statements.items()}
    if dialect == "sqlite":
        done |= {name: inserts(statements[name], schema.metadata.tables[name]) for name in BUSY}
        done["states"] = _states()
    return done


def having(connection: Connection, column: Any, keys: Sequence[str]) -> Iterator[Any]:
    """Conditions that together find the rows whose `column` is one of `keys`, which are plain words."""
    if connection.dialect.name == "sqlite":  # one value, whatever their number
        found = sa.func.json_each(json.dumps(keys)).table_valued("value")
        yield column.in_(sa.select(found.c.value))
        return
    for start in range(0, len(keys), 500):
        yield column.in_(keys[start : start + 500])


def _executed(statement: Any) -> Write:
    def run(connection: Connection, rows: Sequence[Row]) -> None:
        connection.execute(statement, list(rows))

    return run


def inserts(statement: Any, table: sa.Table) -> Write:
    """An INSERT of rows with all columns of `table` but a running number, in SQLite."""
    columns = [column.name for column in table.columns if column.name != "id"]
    compiled = statement.compile(dialect=sqlite.dialect(paramstyle="qmark"), column_keys=columns)
    names, one = list(compiled.positiontup or []), _places(len(columns))
    before, values, after = compiled.string.partition(f"VALUES {one}")
    assert values, compiled.string
    return _many(names, lambda count: f"{before}VALUES {', '.join([one] * count)}{after}")


def _states() -> Write:
    """Ends requests, in SQLite: one UPDATE joined with its rows."""
    one = _places(1 + len(_STATE))
    values = ", ".join(f"{name} = v.column{number}" for number, name in enumerate(_STATE, 2))
    write = _many(
        ["k", *_STATE],
        lambda count: (
            f"UPDATE requests SET owner = '', reserved = 0, {values} "
            f"FROM (VALUES {', '.join([one] * count)}) AS v WHERE requests.key = v.column1"
        ),
    )

    def run(connection: Connection, rows: Sequence[Row]) -> None:
        write(connection, list({row["k"]: row for row in rows}.values()))  # of several, the last counts

    return run


def _places(count: int) -> str:
    return f"({', '.join('?' * count)})"


def _many(names: Sequence[str], text: Callable[[int], str]) -> Write:
    """Runs `text(n)`, a statement for n rows, once for each 256 rows and once for the rest. (Preparing a statement for
    just as many costs less than running several that are prepared: it does not need the interpreter.)"""
    pick: Any = itemgetter(*names)

    def run(connection: Connection, rows: Sequence[Row]) -> None:
        for start in range(0, len(rows), MOST_ROWS):
            part = rows[start : start + MOST_ROWS]
            connection.exec_driver_sql(text(len(part)), tuple(chain.from_iterable(map(pick, part))))

    return run
