"""Writing many rows at once is writing them one after the other."""

import contextlib
import shutil
import sqlite3
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.labeling import schema, statements
from laif_jax.labeling.database import connect
from laif_jax.labeling.errors import LabelError
from laif_jax.labeling.store import Store

KEYS = st.sampled_from([f"k{number}" for number in range(6)])
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
WHEN = st.sampled_from(["2026-01-01", "2026-01-02"])
ROWS = {
    "request_texts": st.fixed_dictionaries({"key": KEYS, "request": TEXTS}),
    "responses": st.fixed_dictionaries(
        {"key": KEYS, "body": TEXTS, "model": TEXTS, "system_fingerprint": TEXTS}
        | {"latency": st.floats(0, 9), "attempt": st.integers(0, 3), "date": WHEN}
    ),
    "usage": st.fixed_dictionaries(
        {"key": KEYS, "attempt": st.integers(0, 3), "job": KEYS, "kind": st.just("answered")}
        | {"prompt_tokens": st.none() | st.integers(0, 9), "cached_tokens": st.none()}
        | {"completion_tokens": st.integers(0, 9), "nanos": st.integers(0, 2**60), "date": WHEN}
    ),
    "results": st.fixed_dictionaries(
        {"key": KEYS, "kind": st.just("judgement"), "item": TEXTS, "status": st.just("ok")}
        | {"endpoint_key": KEYS, "critic_hash": TEXTS, "record": TEXTS, "updated": WHEN}
    ),
    "job_items": st.fixed_dictionaries(
        {"job": KEYS, "position": st.integers(0, 3), "part": st.integers(0, 1), "result": KEYS}
        | {"status": st.just("ok"), "run": st.integers(1, 2)}
    ),
    "states": st.fixed_dictionaries(
        {"k": KEYS, "state": st.sampled_from(["ok", "failed"]), "attempts": st.integers(0, 9)}
        | {"reason": TEXTS, "updated": WHEN}
    ),
}


def request(key: str) -> dict[str, Any]:
    names = ("reason", "owner", "job", "created", "updated")
    words = dict.fromkeys(names, "w")
    return {
        "key": key,
        "endpoint_key": "e",
        "model": "m",
        "state": "in_flight",
        "attempts": 0,
        "reserved": 7,
    } | words


def table_after(groups: list[list[dict[str, Any]]], name: str, *, singly: bool) -> list[tuple]:
    """What a table holds after these groups of rows; `singly`: each row in a statement of its own."""
    engine = sa.create_engine("sqlite://")
    table = schema.requests if name == "states" else schema.metadata.tables[name]
    schema.metadata.create_all(engine, tables=[table])
    write = statements.writes("sqlite", "w")[name]
    if singly and name == "states":
        ended = sa.update(table).where(table.c.key == sa.bindparam("k")).values(owner="", reserved=0)
        write = statements._executed(ended.values({n: sa.bindparam(n) for n in statements._STATE}))
    with engine.begin() as connection:
        if name == "states":
            connection.execute(sa.insert(schema.requests), [request(f"k{number}") for number in range(4)])
        for group in groups:
            for rows in [[row] for row in group] if singly else [group]:
                write(connection, rows)
        columns = [column for column in table.columns if column.name != "id"]
        return sorted(map(repr, connection.execute(sa.select(*columns))))


@pytest.mark.parametrize("name", ROWS)
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_group_is_written_as_its_rows_one_by_one(name: str, data: st.DataObject) -> None:
    groups = data.draw(st.lists(st.lists(ROWS[name], max_size=11), max_size=3))
    assert table_after(groups, name, singly=False) == table_after(groups, name, singly=True)


def test_every_size_of_a_group_is_written_whole() -> None:
    for count in (1, 2, 255, 256, 257, 700):
        rows = [{"key": f"k{number}", "request": str(number)} for number in range(count)]
        assert len(table_after([rows], "request_texts", singly=False)) == count


def test_rows_are_found_by_any_number_of_keys(place) -> None:
    store = Store(place)
    keys = [f"{number:064x}" for number in range(1203)]
    store.write(requests=[request(key) | {"state": "ok"} for key in keys]).result(60)
    assert set(store.attempts([*keys, "unknown"])) == set(keys)
    assert store.attempts([]) == {}
    store.close()


def test_who_posted_is_told_once_per_commit_how_much_is_stored(place) -> None:
    store = Store(place)
    told: Counter[str] = Counter()
    threads: set[int] = set()

    def done(error: LabelError | None, count: int) -> None:
        threads.add(threading.get_ident())
        told["failed" if error else "stored"] += count

    for number in range(500):
        store.post({"request_texts": [{"key": f"k{number}", "request": "r"}]}, [], done)
    store.write().result(60)
    assert told == {"stored": 500}
    store.post({"request_texts": [{"key": "bad", "request": object()}]}, [], done)
    with pytest.raises(LabelError):  # it shares the fate of its group, or finds the store as it was
        store.write(request_texts=[{"key": "worse", "request": object()}]).result(60)
    store.close()
    store.post({"request_texts": [{"key": "late", "request": "r"}]}, [], done)
    assert told == {"stored": 500, "failed": 2}
    assert len(threads) == 2  # the writer's, and ours after the end


def test_the_log_is_copied_into_the_database_while_it_is_written_to(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    copy = tmp_path / "copy.sqlite"
    commits = 0
    while copied(store.path, copy) <= 10:  # more than the first commit
        assert commits < 600  # of some twenty pages: a commit copies the log itself when it has 16,000
        keys = [f"{commits * 10 + number:064x}" for number in range(10)]
        store.write(request_texts=[{"key": key, "request": "x" * 500} for key in keys]).result(60)
        commits += 1
        time.sleep(0.02)
    store.close()


def copied(path: Path, copy: Path) -> int:
    """Rows in the database without its log; 0 as well if it was being written to when it was looked at."""
    shutil.copy(path, copy)
    with contextlib.suppress(sqlite3.DatabaseError), sqlite3.connect(copy) as connection:
        return connection.execute("SELECT count(*) FROM request_texts").fetchone()[0]
    return 0


def test_who_reads_keeps_little_and_who_writes_keeps_its_pages(tmp_path: Path) -> None:
    engine, _ = connect(tmp_path)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA cache_size").scalar() == -4096
    engine.dispose()
    store = Store(tmp_path)
    size = store.do(lambda connection: connection.exec_driver_sql("PRAGMA cache_size").scalar()).result(30)
    assert size == -65536
    store.close()
