"""The store: what is committed stays, what cannot be written waits, what cannot be opened is explained."""

import asyncio
import sqlite3
import time

import pytest
import sqlalchemy as sa

from laif_jax.labeling import schema
from laif_jax.labeling.errors import StoreError
from laif_jax.labeling.jobs import JudgeJob
from laif_jax.labeling.runner import Runner
from laif_jax.labeling.store import Store
from tests.labeling.helpers import judge, planted, run_job, simulated


def response(key: str, body: str = "{}") -> dict:
    return {
        "key": key,
        "body": body,
        "model": "m",
        "system_fingerprint": "",
        "latency": 0.1,
        "attempt": 0,
        "date": "now",
    }


def test_a_future_that_is_done_means_the_row_is_in_the_file(tmp_path) -> None:
    store = Store(tmp_path)
    for number in range(5):
        store.write(responses=[response(f"k{number}")]).result(10)
        with sqlite3.connect(store.path) as other:
            assert other.execute("select count(*) from responses").fetchone() == (number + 1,)
    assert set(store.answered(["k1", "k4", "k9"])) == {"k1", "k4"}
    store.close()
    with pytest.raises(StoreError):
        store.write(responses=[response("late")]).result(10)


def test_commits_are_synchronous(tmp_path) -> None:
    store = Store(tmp_path)
    with store.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL: survives power loss
    store.close()


def test_what_is_queued_is_written_on_close(tmp_path) -> None:
    store = Store(tmp_path)
    for number in range(3000):
        store.write(responses=[response(f"k{number}")])
    store.close()
    store = Store(tmp_path)
    assert store.stats()["answers"] == 3000
    store.close()


def test_one_service_per_store(tmp_path) -> None:
    store = Store(tmp_path)
    with pytest.raises(StoreError, match="another labelling service"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()


def test_a_damaged_file_and_another_version_are_explained(tmp_path) -> None:
    (tmp_path / "labels.sqlite").write_bytes(b"this is no database at all, but long enough to look at" * 50)
    with pytest.raises(StoreError, match="damaged"):
        Store(tmp_path)
    with pytest.raises(StoreError, match="damaged"):  # not "another service": the lock was let go
        Store(tmp_path)
    (tmp_path / "labels.sqlite").unlink()
    store = Store(tmp_path)
    with store.engine.begin() as connection:
        connection.execute(sa.update(schema.meta).values(value="99"))
    store.close()
    with pytest.raises(StoreError, match="version 99"):
        Store(tmp_path)


def test_a_folder_that_cannot_be_written_is_explained(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Choose a folder"):
        Store(tmp_path / "file" / "store")


def test_a_full_disk_loses_no_answer_and_stops_further_calls(tmp_path) -> None:
    async def run() -> None:
        store = Store(tmp_path)
        runner = Runner(store)
        # SQLite says "database or disk is full" beyond this size.
        pages = 40

        def limit(connection: sa.Connection) -> None:
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

        sa.event.listen(store.engine, "begin", limit)
        endpoint = simulated(latency=0.001, concurrency=4)
        job = JudgeJob(endpoint=endpoint, critic="laif_basic", comparisons=tuple(planted(300)))
        status = runner.submit(job.work())
        limit_time = time.monotonic() + 30
        while not status.stalled:
            assert status.state == "running", status.reason
            assert time.monotonic() < limit_time
            await asyncio.sleep(0.02)
            status = await runner.status(status.id)
        assert "full" in status.stalled
        assert "Free space" in status.stalled
        assert str(tmp_path) in status.stalled
        await asyncio.sleep(0.1)
        calls = (await runner.status(status.id)).calls
        await asyncio.sleep(0.3)
        assert (await runner.status(status.id)).calls == calls  # nobody goes on paying
        assert status.done < 300
        pages = 100_000
        while status.state == "running":
            assert time.monotonic() < limit_time
            await asyncio.sleep(0.02)
            status = await runner.status(status.id)
        assert (status.state, status.counts) == ("done", {"ok": 300})
        stats = store.stats()
        assert stats["answers"] == 600
        assert stats["requests"] == {"ok": 600}
        await runner.close()
        store.close()

    asyncio.run(run())


def test_what_was_in_flight_is_pending_after_a_restart(tmp_path) -> None:
    job = JudgeJob(endpoint=simulated(), critic="laif_basic", comparisons=tuple(planted(3)))
    run_job(tmp_path, job)
    store = Store(tmp_path)
    with store.engine.begin() as connection:
        connection.execute(sa.update(schema.requests).values(state="in_flight"))
        connection.execute(sa.update(schema.jobs).values(state="running"))
    store.close()
    store = Store(tmp_path)
    stats = store.stats()
    assert (stats["requests"], stats["jobs"]) == ({"pending": 6}, {"interrupted": 1})
    store.close()


def test_a_critic_that_is_mended_reads_the_old_answers_again(tmp_path) -> None:
    from laif_jax.labeling.critic import load_critic

    items = planted(20)
    good = load_critic("pairwise_json")
    options = {**good.options, "key": "verdict"}  # looks for a field that the answers do not have
    wrong = good.model_copy(update={"options": options})
    with_wrong = simulated()
    first = judge(tmp_path, with_wrong, good, items)
    assert {j.status for j in first} == {"ok"}
    # Another critic with the same prompt: for a real endpoint it is the same request, so nothing is asked again.
    from tests.labeling.helpers import at, chat, fake_endpoint

    with fake_endpoint(chat('{"winner": "a"}')) as server:
        assert {j.status for j in judge(tmp_path, at(server), wrong, items)} == {"unparsable"}
        calls = sum(server.calls.values())
        assert {j.status for j in judge(tmp_path, at(server), good, items)} == {"tie"}
        assert sum(server.calls.values()) == calls == 40
