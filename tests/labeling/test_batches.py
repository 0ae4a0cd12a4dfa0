"""Batches: half the price and a day's patience; nothing is sent twice, whatever happens in between."""

import asyncio
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from laif_jax.config.schema import EndpointSpec
from laif_jax.labeling import schema
from laif_jax.labeling.calls import Call, Endpoint
from laif_jax.labeling.errors import AuthFailed, BadRequest, CallError, EndpointError, Overloaded
from laif_jax.labeling.jobs import JobStatus, JudgeJob
from laif_jax.labeling.leases import LEASE
from laif_jax.labeling.providers import BatchProvider, Reply, SqlLedger, make_provider
from laif_jax.labeling.providers.ledger import batches
from laif_jax.labeling.runner import Runner
from laif_jax.labeling.store import Store
from laif_jax.records import Status
from tests.labeling.batch_server import APIS, AnthropicBatchApi, OpenAIBatchApi
from tests.labeling.helpers import judge, planted
from tests.labeling.wire_server import Response, WireServer, serve

KINDS = tuple(APIS)
PARAMS = {"temperature": 0.0, "max_tokens": 50}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-test-0123456789abcdef")
    for name, seconds in (("LINGER", 0.02), ("POLL", 0.02), ("SETTLE", 0.2)):
        monkeypatch.setattr(f"laif_jax.labeling.providers.batch.{name}", seconds)


@pytest.fixture
def ledger(tmp_path: Path) -> SqlLedger:
    return SqlLedger(sa.create_engine(f"sqlite:///{tmp_path}/labels.sqlite"))


def endpoint(kind: str, server: WireServer, **rest: Any) -> Endpoint:
    url = f"{server.url}/v1" if kind == "openai" else server.url
    values = {"provider": kind, "model": "fake", "base_url": url, "api_key_env": "TEST_KEY", "batch": True}
    return Endpoint.model_validate({**values, **rest})


def calls(at: Endpoint, count: int) -> list[Call]:
    return [Call(at, ({"role": "user", "content": f"row {n}"},), PARAMS) for n in range(count)]


async def gather(provider: Any, asked: Sequence[Call]) -> list[Reply | BaseException]:
    return await asyncio.gather(*(provider.call(call, 0) for call in asked), return_exceptions=True)


def run(ledger: SqlLedger, at: Endpoint, count: int) -> list[Reply | BaseException]:
    """One life of a service that asks `count` calls."""

    async def life() -> list[Reply | BaseException]:
        provider = make_provider(at, ledger)
        try:
            return await asyncio.wait_for(gather(provider, calls(at, count)), 60)
        finally:
            await provider.close()

    return asyncio.run(life())


def killed(ledger: SqlLedger, at: Endpoint, count: int, when: Any) -> None:
    """A life that ends without a word once `when()`."""

    async def life() -> None:
        provider = make_provider(at, ledger)
        task = asyncio.create_task(gather(provider, calls(at, count)))
        async with asyncio.timeout(20):
            while not when():
                await asyncio.sleep(0.01)
        task.cancel()
        await provider.close()

    asyncio.run(life())


def texts(replies: Sequence[Reply | BaseException]) -> list[str]:
    return [reply.text if isinstance(reply, Reply) else type(reply).__name__ for reply in replies]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_answered_each_for_itself(kind: str, ledger: SqlLedger) -> None:
    api = APIS[kind]()
    fates = {"row 1": "bad", "row 3": "busy", "row 4": "expired"}
    api.fate = lambda text: fates.get(text, "ok")
    with serve(api) as server:
        at = endpoint(kind, server)
        replies = run(ledger, at, 6)
        assert texts(replies) == [
            "re row 0",
            "BadRequest",
            "re row 2",
            "Overloaded",
            "Overloaded",
            "re row 5",
        ]
        assert len(api.batches) == 1
        assert isinstance(replies[0], Reply)
        assert replies[0].usage is not None
        assert replies[0].usage.cached_tokens == 1024
        unanswered = replies[4]
        assert isinstance(unanswered, CallError)
        assert (unanswered.kind, unanswered.billed, unanswered.retryable) == ("batch_unanswered", "no", True)
        # Asked again, only what gave no answer is sent again; answers that nobody stored are read once more.
        fates.clear()
        assert texts(run(ledger, at, 6)) == [f"re row {number}" for number in range(6)]
    assert api.asked == {"row 0": 1, "row 1": 2, "row 2": 1, "row 3": 2, "row 4": 2, "row 5": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_polling_goes_on_after_a_crash(kind: str, ledger: SqlLedger) -> None:
    api = APIS[kind]()
    api.done = False
    with serve(api) as server:
        at = endpoint(kind, server)
        killed(ledger, at, 4, lambda: api.polls > 1)
        api.done = True
        assert texts(run(ledger, at, 5)) == [f"re row {number}" for number in range(5)]
    assert set(api.asked.values()) == {1}
    assert len(api.batches) == 2  # the fifth row was new


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_whose_answer_was_lost_is_found_on_the_list(
    kind: str, ledger: SqlLedger, monkeypatch
) -> None:
    """The provider took the batch, and we never heard of it: the connection broke, or we were killed."""
    monkeypatch.setattr("laif_jax.labeling.providers.batch.SETTLE", 60.0)
    api = APIS[kind]()
    api.before_answer = lambda: Response(drop=True)
    with serve(api) as server:
        assert texts(run(ledger, endpoint(kind, server), 3)) == ["re row 0", "re row 1", "re row 2"]
    assert set(api.asked.values()) == {1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_was_never_sent_is_sent_after_a_while(kind: str, ledger: SqlLedger) -> None:
    api = APIS[kind]()
    with serve(api) as server:
        at = endpoint(kind, server)
        # Killed between the note and the request.
        ledger.begin("laif-dead", at.key, [call.key for call in calls(at, 2)])
        first = run(ledger, at, 2)
        assert texts(first) == ["Overloaded", "Overloaded"]
        assert {error.kind for error in first if isinstance(error, CallError)} == {"batch_lost"}
        assert not api.asked
        assert texts(run(ledger, at, 2)) == ["re row 0", "re row 1"]
    assert set(api.asked.values()) == {1}


def test_a_batch_of_somebody_else_is_not_taken_for_ours(ledger: SqlLedger) -> None:
    """Anthropic's batches have no names: one made at the same time with as many rows may be another's."""
    api = AnthropicBatchApi()
    row = {"messages": [{"role": "user", "content": "theirs"}]}
    api.make(rows=[{"custom_id": f"theirs-{number}", "params": row} for number in range(2)])
    with serve(api) as server:
        at = endpoint("anthropic", server)
        ledger.begin("laif-dead", at.key, [call.key for call in calls(at, 2)])
        assert texts(run(ledger, at, 2)) == ["Overloaded", "Overloaded"]
        assert texts(run(ledger, at, 2)) == ["re row 0", "re row 1"]
    assert api.asked == {"row 0": 1, "row 1": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_the_provider_forgot_goes_back(kind: str, ledger: SqlLedger) -> None:
    api = APIS[kind]()
    api.done = False
    with serve(api) as server:
        at = endpoint(kind, server)
        killed(ledger, at, 2, lambda: api.polls > 0)
        api.batches.clear()
        api.done = True
        assert texts(run(ledger, at, 2)) == ["Overloaded", "Overloaded"]
        assert texts(run(ledger, at, 2)) == ["re row 0", "re row 1"]


def test_a_batch_that_is_refused_is_not_noted_as_sent(ledger: SqlLedger) -> None:
    api = OpenAIBatchApi()

    def answer(request: Any) -> Response:
        if request.path.endswith("/batches") and request.method == "POST":
            return Response(400, {"error": {"message": "billing limit"}})
        return api(request)

    with serve(answer) as server:
        at = endpoint("openai", server)
        (reply,) = run(ledger, at, 1)
        assert isinstance(reply, BadRequest)
        assert "billing limit" in reply.reason
        assert not ledger.find(at.key, [calls(at, 1)[0].key])


def test_a_key_that_goes_bad_meanwhile_keeps_the_batch(ledger: SqlLedger) -> None:
    api, good = OpenAIBatchApi(), True
    api.done = False

    def answer(request: Any) -> Response:
        return api(request) if good else Response(401, {"error": {"message": "expired"}})

    with serve(answer) as server:
        at = endpoint("openai", server)
        killed(ledger, at, 1, lambda: api.polls > 0)
        good = False
        (reply,) = run(ledger, at, 1)
        assert isinstance(reply, AuthFailed)
        good = api.done = True
        assert texts(run(ledger, at, 1)) == ["re row 0"]
    assert set(api.asked.values()) == {1}


def test_large_batches_are_divided_and_a_request_is_in_one(ledger: SqlLedger, monkeypatch) -> None:
    monkeypatch.setattr("laif_jax.labeling.providers.batch_apis.OpenAIBatches.max_rows", 4)
    api = OpenAIBatchApi()
    with serve(api) as server:
        at = endpoint("openai", server)

        async def life() -> list[Reply | BaseException]:
            provider = make_provider(at, ledger)
            try:
                return await gather(provider, calls(at, 10) + calls(at, 10))
            finally:
                await provider.close()

        assert texts(asyncio.run(life())) == [f"re row {number}" for number in range(10)] * 2
    assert len(api.batches) == 3
    assert set(api.asked.values()) == {1}


def test_cancelling_reaches_the_provider(ledger: SqlLedger) -> None:
    api = OpenAIBatchApi()
    api.done = False
    with serve(api) as server:
        at = endpoint("openai", server)

        async def life() -> None:
            provider = make_provider(at, ledger)
            assert isinstance(provider, BatchProvider)
            task = asyncio.create_task(gather(provider, calls(at, 1)))
            async with asyncio.timeout(20):
                while not api.polls:
                    await asyncio.sleep(0.01)
            await provider.cancel()
            task.cancel()
            await provider.close()

        asyncio.run(life())
        assert any(request.path.endswith("/cancel") for request in server.requests)


def test_a_ledger_that_fails_stops_everybody_who_waits(ledger: SqlLedger) -> None:
    with serve(OpenAIBatchApi()) as server:
        with ledger._engine.begin() as connection:
            connection.execute(sa.text("DROP TABLE batch_rows"))
        (reply,) = run(ledger, endpoint("openai", server), 1)
    assert isinstance(reply, EndpointError)
    assert "batch_rows" in str(reply)


def test_vertex_puts_its_batches_into_a_folder(tmp_path: Path, ledger: SqlLedger) -> None:
    """A local folder stands for the bucket; the answers come back with the request that they answer."""
    import json

    from tests.labeling.wire_server import google_body

    made: dict[str, Any] = {}

    def answer(request: Any) -> Response:
        if request.method == "POST":
            made.update(request.json)
            source = Path(made["inputConfig"]["gcsSource"]["uris"][0])
            target = Path(made["outputConfig"]["gcsDestination"]["outputUriPrefix"]) / "prediction-1"
            target.mkdir(parents=True)
            rows = []
            for number, line in enumerate(source.read_text().splitlines()):
                sent = json.loads(line)
                text = sent["request"]["contents"][0]["parts"][0]["text"]
                if number == 1:
                    rows.append({**sent, "status": "INTERNAL: oops", "response": {}})
                else:
                    rows.append({**sent, "status": "", "response": google_body(f"re {text}")})
            (target / "predictions.jsonl").write_text("\n".join(map(json.dumps, reversed(rows))))
        job = {"name": "projects/p/locations/l/batchPredictionJobs/7", "displayName": made["displayName"]}
        return Response(body={**job, "state": "JOB_STATE_SUCCEEDED", "outputConfig": made["outputConfig"]})

    with serve(answer) as server:
        folder = tmp_path / "bucket"
        at = endpoint("google", server, api_key_env=None, project="p", location="l", batch_folder=str(folder))
        assert texts(run(ledger, at, 3)) == ["re row 0", "Overloaded", "re row 2"]


def test_batches_need_a_ledger_and_a_sensible_configuration() -> None:
    at = Endpoint(provider="openai", base_url="http://127.0.0.1:1/v1", batch=True)
    with pytest.raises(EndpointError, match="notes of batches"):
        make_provider(at)
    with pytest.raises(ValueError, match="batch_folder"):
        EndpointSpec(provider="google", model="m", project="p", batch=True)
    with pytest.raises(ValueError, match="no effect"):
        EndpointSpec(provider="llama_cpp", gguf="x.gguf", batch=True)


def test_the_ledger_knows_open_rows_only(ledger: SqlLedger) -> None:
    keys = [f"{number:064d}" for number in range(1200)]
    before = datetime.datetime.now(datetime.UTC)
    ledger.begin("t1", "e1", keys)
    assert set(ledger.find("e1", keys)) == set(keys)
    assert not ledger.find("e2", keys)
    ledger.sent("t1", "remote")
    ledger.release("t1", keys[:700])
    found = ledger.find("e1", keys)
    assert set(found) == set(keys[700:])
    batch = found[keys[-1]]
    assert (batch.tag, batch.remote_id, batch.rows) == ("t1", "remote", 1200)
    assert batch.created >= before
    assert ledger.known("e1") == {"remote"}
    ledger.lost("t1")
    assert not ledger.find("e1", keys)
    with ledger._engine.connect() as connection:
        assert connection.execute(sa.select(batches.c.state)).scalar() == "lost"


def test_overloaded_is_what_an_unanswered_row_is() -> None:
    assert Overloaded("batch_unanswered", "x").retryable


def test_a_job_runs_as_one_batch_and_its_answers_are_stored(tmp_path: Path) -> None:
    api = AnthropicBatchApi()
    items = planted(20)
    with serve(api) as server:
        at = endpoint("anthropic", server, concurrency=2)
        first = judge(tmp_path, at, "laif_basic", items)
        again = judge(tmp_path, at, "laif_basic", items)
    # The fake critic answers with the question, which holds an example: the same place in both orders.
    assert {row.status for row in first} == {Status.TIE}
    assert [row.comparison_id for row in first] == [row.comparison_id for row in again]
    assert len(api.batches) == 1
    assert sum(api.asked.values()) == 40


def test_what_holds_live_calls_back_does_not_cut_a_batch_up(tmp_path: Path) -> None:
    """Both go to one model; only the live ones were refused as too many."""
    api = AnthropicBatchApi()
    items = planted(60)

    async def life(at: Endpoint, live: Endpoint) -> None:
        store = Store(tmp_path)
        runner = Runner(store)
        lane = runner.scheduler.party("live", live).lane
        for time in range(1, 20):
            lane.admission.throttled(float(time), time - 0.5, retry_after=600.0)
        assert lane.admission.limit == 1
        job = JudgeJob(endpoint=at, critic="laif_basic", comparisons=tuple(items))
        assert (await ended(runner, runner.submit(job.work()).id)).counts == {"tie": 60}
        await runner.close()
        store.close()

    with serve(api) as server:
        at = endpoint("anthropic", server, concurrency=2)
        asyncio.run(life(at, at.model_copy(update={"batch": False})))
    assert [len(batch["rows"]) for batch in api.batches.values()] == [120]


def test_a_batch_that_outlives_its_lease_many_times_stays_with_its_worker(place, monkeypatch) -> None:
    """Another worker on the same store, who would take over calls whose lease has expired, finds the lease renewed."""
    api = AnthropicBatchApi()
    api.done = False
    now = 1e9  # by the store's clock
    monkeypatch.setattr("laif_jax.labeling.leases.clock", lambda connection: now)

    def expires(store: Store) -> dict[str, float]:
        workers = schema.workers.c
        with store.engine.connect() as connection:
            return {row.id: row.expires for row in connection.execute(sa.select(workers.id, workers.expires))}

    async def life(at: Endpoint) -> None:
        nonlocal now
        one, two = Store(place), Store(place, shared=True)
        first, second = Runner(one, join=True), Runner(two, join=True)
        job = JudgeJob(endpoint=at, critic="laif_basic", comparisons=tuple(planted(10)))
        work = job.work()
        first.submit(work, job.model_dump_json().encode())
        async with asyncio.timeout(120):
            while not (api.polls and second.running):
                await asyncio.sleep(0.01)
            for _ in range(6):  # four leases
                now += 2 / 3 * LEASE
                while expires(one) != dict.fromkeys((one.worker, two.worker), now + LEASE):
                    await asyncio.sleep(0.01)
                assert one.left() == {"in_flight": 20}
        with one.engine.connect() as connection:
            owners = connection.execute(sa.select(schema.requests.c.owner).distinct()).scalars().all()
        assert owners == [one.worker]
        api.done = True
        assert (await ended(first, work.id)).counts == {"tie": 10}
        await second.close()
        await first.close()
        with one.engine.connect() as connection:
            booked = connection.execute(
                sa.select(schema.usage.c.kind, sa.func.count()).group_by("kind")
            ).all()
        assert [tuple(row) for row in booked] == [("answered", 20)]  # none presumed lost
        two.close()
        one.close()

    with serve(api) as server:
        asyncio.run(life(endpoint("anthropic", server)))
    assert len(api.batches) == 1
    assert set(api.asked.values()) == {1}


async def ended(runner: Runner, job: str) -> JobStatus:
    async with asyncio.timeout(60):
        while (status := await runner.status(job)) is None or status.state == "running":
            await asyncio.sleep(0.02)
    assert status.state == "done", status.reason
    return status
