"""Batches in the verbs that look after a store: counts, garbage, and stores as files. Over both kinds of store."""

import asyncio
import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from laif_jax.cli.main import main
from laif_jax.labeling.collect import collect
from laif_jax.labeling.errors import StoreError
from laif_jax.labeling.jobs import JudgeJob
from laif_jax.labeling.open_batches import SETTLED, open_batches
from laif_jax.labeling.providers import SqlLedger
from laif_jax.labeling.providers.ledger import batches
from laif_jax.labeling.runner import Runner
from laif_jax.labeling.store import Store
from laif_jax.labeling.transfer import export_store, import_store
from laif_jax.records import read_rows
from tests.labeling.batch_server import OpenAIBatchApi
from tests.labeling.helpers import planted, run_job
from tests.labeling.test_batches import ended, endpoint
from tests.labeling.wire_server import serve


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-test-0123456789abcdef")
    for name, seconds in (("LINGER", 0.02), ("POLL", 0.02), ("SETTLE", 0.2)):
        monkeypatch.setattr(f"laif_jax.labeling.providers.batch.{name}", seconds)


def job(server: Any, count: int = 5) -> JudgeJob:
    at = endpoint("openai", server).model_copy(update={"prompt_price": 1.0, "completion_price": 1.0})
    return JudgeJob(endpoint=at, critic="laif_basic", comparisons=tuple(planted(count)))


def interrupted(place: Any, asked: JudgeJob, api: OpenAIBatchApi) -> None:
    """A service that ends while the provider works on its batch."""

    async def life() -> None:
        store = Store(place)
        runner = Runner(store)
        runner.submit(asked.work())
        async with asyncio.timeout(30):
            while not api.polls:
                await asyncio.sleep(0.01)
        await runner.close(grace=0.1)
        store.close()

    asyncio.run(life())


def finish(place: Any, asked: JudgeJob) -> dict[str, int]:
    async def life() -> dict[str, int]:
        store = Store(place)
        runner = Runner(store)
        try:
            return (await ended(runner, runner.submit(asked.work()).id)).counts
        finally:
            await runner.close()
            store.close()

    return asyncio.run(life())


def aged(store: Store, by: datetime.timedelta = 2 * SETTLED) -> None:
    """Makes all batches of a store older."""
    with store.engine.begin() as connection:
        for tag, created in connection.execute(sa.select(batches.c.tag, batches.c.created)).all():
            earlier = (datetime.datetime.fromisoformat(created) - by).isoformat()
            connection.execute(sa.update(batches).where(batches.c.tag == tag).values(created=earlier))


def of(store: Store) -> list[Any]:
    with store.engine.connect() as connection:
        return open_batches(connection)


def test_an_open_batch_keeps_what_it_needs_and_goes_when_it_is_settled(place) -> None:
    api = OpenAIBatchApi()
    api.done = False
    with serve(api) as server:
        asked = job(server)
        interrupted(place, asked, api)
        store = Store(place)
        (batch,) = of(store)
        assert (batch.rows, batch.state, batch.remote_id) == (10, "sent", "batch_0")
        assert "fake" in batch.endpoint
        aged(store)
        found = collect(store, jobs=[asked.work().id], dry_run=False)
        assert (found.requests, found.batches) == (0, 0)  # its job was given up: what was sent stays
        assert store.left() == {"pending": 10}
        store.close()
        api.done = True
        assert finish(place, asked) == {"tie": 5}
        store = Store(place)
        assert of(store) == []
        assert collect(store).batches == 1
        assert collect(store, dry_run=False).batches == 1
        assert collect(store).batches == 0
        # Paid answers that are removed by name do not make it look open again.
        gone = collect(store, jobs=[asked.work().id], answers=True, dry_run=False)
        assert (gone.answers, of(store)) == (10, [])
        store.close()
    assert set(api.asked.values()) == {1}


def test_a_batch_that_is_given_up_may_be_sent_again(place) -> None:
    api = OpenAIBatchApi()
    api.done = False
    with serve(api) as server:
        asked = job(server)
        interrupted(place, asked, api)
        store = Store(place)
        (batch,) = of(store)
        with pytest.raises(StoreError, match=f"there are {batch.tag}"):
            collect(store, batches=["laif-other"])
        collect(store, batches=[batch.tag])  # only looked
        assert len(of(store)) == 1
        found = collect(store, batches=[batch.tag], dry_run=False)
        assert (found.requests, of(store)) == (10, [])
        store.close()
        api.done = True
        assert finish(place, asked) == {"tie": 5}
    assert set(api.asked.values()) == {2}


def test_young_batches_and_those_beside_one_of_unknown_fate_stay(place) -> None:
    store = Store(place)
    ledger = SqlLedger(store.engine)
    for tag, fate in (("lost", "lost"), ("unknown", "")):
        ledger.begin(tag, "e1", [f"{tag:>064}"])
        if fate:
            ledger.lost(tag)
    ledger.begin("elsewhere", "e2", ["0" * 64])
    ledger.lost("elsewhere")
    assert collect(store).batches == 0  # young
    aged(store)
    assert collect(store, dry_run=False).batches == 1  # that of the other endpoint
    ledger.sent("unknown", "remote")
    assert [batch.remote_id for batch in of(store)] == ["remote"]
    assert collect(store, dry_run=False).batches == 1  # the lost one
    assert [batch.tag for batch in of(store)] == ["unknown"]
    store.close()


def test_a_batch_that_outlives_its_service_fits_its_budget_and_is_booked_once(place) -> None:
    """Each service that ends presumes the batch to be on the bill; it is, once."""
    api = OpenAIBatchApi()
    api.done = False
    with serve(api) as server:
        asked = job(server)
        store = Store(place)
        store.set_cap(13_000_000)  # room for the batch at its bound, and not for two
        store.close()
        for _ in range(3):
            api.polls = 0
            interrupted(place, asked, api)
            store = Store(place)
            account = store.account()
            store.close()
            assert account.presumed + account.reserved == 12_060_000  # while nobody waits for it, too
        api.done = True
        assert finish(place, asked) == {"tie": 5}
        store = Store(place)
        account = store.account()
        with store.engine.connect() as connection:
            kinds = connection.execute(sa.text("SELECT kind, count(*) FROM usage GROUP BY kind")).all()
        store.close()
    assert [tuple(row) for row in kinds] == [("answered", 10)]
    assert 0 < account.spent < 13_000_000
    assert (account.presumed, account.reserved) == (0, 0)
    assert set(api.asked.values()) == {1}


@pytest.mark.parametrize("name", ["all.jsonl.gz", "all.parquet"])
def test_an_open_batch_goes_along_and_is_read_where_its_job_goes_on(place, tmp_path: Path, name: str) -> None:
    api = OpenAIBatchApi()
    with serve(api) as server:
        done, asked = job(server, 2), job(server)
        finish(place, done)  # a settled batch, which stays behind
        api.done, api.polls = False, 0
        interrupted(place, asked, api)
        store = Store(place)
        counts = export_store(store, tmp_path / name)
        store.close()
        assert (counts["batches"], counts["batch_rows"]) == (1, 6)  # two of the five pairs are answered
        other = Store(tmp_path / "other")
        added = import_store(other, tmp_path / name)
        assert (added["batches"], added["batch_rows"]) == (1, 6)
        assert import_store(other, tmp_path / name) == dict.fromkeys(added, 0)
        assert [batch.rows for batch in of(other)] == [6]
        other.close()
        api.done = True
        assert finish(tmp_path / "other", asked) == {"tie": 5}
        other = Store(tmp_path / "other")
        assert of(other) == []
        booked = other.account()
        assert booked.spent > 0  # of the batch's answers alone
        assert (booked.presumed, booked.reserved) == (0, 0)
        other.close()
    assert set(api.asked.values()) == {1}


def test_a_store_that_never_held_a_batch_exports_as_before(tmp_path) -> None:
    from tests.labeling.test_transfer import JOB

    run_job(tmp_path / "store", JOB)
    store = Store(tmp_path / "store")
    assert of(store) == []
    counts = export_store(store, tmp_path / "all.jsonl")
    store.close()
    assert "batches" not in counts
    assert {row["table"] for row in read_rows(tmp_path / "all.jsonl")} >= {"requests", "jobs"}


def test_the_verbs_say_what_is_open(tmp_path, capsys) -> None:
    api = OpenAIBatchApi()
    api.done = False
    folder = str(tmp_path / "store")
    with serve(api) as server:
        interrupted(folder, job(server), api)
    assert main(["label", "stats", "--store", folder, "--json"]) == 0
    (batch,) = json.loads(capsys.readouterr().out)["batches"]
    assert (batch["rows"], batch["remote_id"]) == (10, "batch_0")
    assert main(["label", "stats", "--store", folder]) == 0
    said = capsys.readouterr().out
    assert "batches    1 open, 10 calls wait" in said
    assert batch["tag"] in said
    assert main(["label", "gc", "--store", folder, "--yes"]) == 0
    assert "kept: 1 open batches and the 10 requests" in capsys.readouterr().out
    assert main(["label", "export", "--store", folder, str(tmp_path / "all.jsonl")]) == 0
    assert "1 open batches go along, with 10 calls" in capsys.readouterr().out
    assert main(["label", "import", "--store", str(tmp_path / "new"), str(tmp_path / "all.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "1 new batches" in said
    assert "1 open batches go along" in said
    assert main(["label", "gc", "--store", folder, "--batch", batch["tag"], "--yes"]) == 0
    assert "kept" not in capsys.readouterr().out
