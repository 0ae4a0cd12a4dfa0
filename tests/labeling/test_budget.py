"""Money: amounts, bounds, and a cap that nothing can pass, however many workers spend at once."""

import asyncio
import random
import threading

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from laif_jax.labeling import budget, schema
from laif_jax.labeling.budget import (
    BudgetError,
    affordable,
    most_completion,
    most_tokens,
    parse_money,
    show_money,
)
from laif_jax.labeling.calls import Call, Endpoint
from laif_jax.labeling.errors import EndpointError
from laif_jax.labeling.jobs import JudgeJob
from laif_jax.labeling.runner import Runner
from laif_jax.labeling.store import Settle, Store, now
from tests.labeling.helpers import Reply, at, chat, fake_endpoint, planted, simulated
from tests.labeling.test_leases import want


def test_amounts_are_whole_nano_dollars() -> None:
    assert parse_money("25USD") == 25 * 10**9
    assert parse_money(" $0.10 ") == 10**8
    assert parse_money("1_000 dollars") == 10**12
    assert parse_money("0.000000001") == 1
    for wrong in ("", "USD", "-1", "1e3", "25EUR", "1,000", "nan"):
        with pytest.raises(BudgetError, match="25USD"):
            parse_money(wrong)
    assert [show_money(n) for n in (0, 10**9, 1234 * 10**9, 5 * 10**6, 17)] == [
        *("$0.00", "$1.00", "$1,234.00", "$0.0050", "$0.000000017")
    ]


@given(st.lists(st.integers(0, 50)), st.lists(st.one_of(st.none(), st.integers(-5, 200)), max_size=3))
def test_what_is_granted_fits_into_every_room(costs: list[int], rooms: list[int | None]) -> None:
    granted = affordable(rooms, costs)
    total = sum(cost for cost, fits in zip(costs, granted, strict=True) if fits)
    limits = [room for room in rooms if room is not None]
    assert not limits or total <= max(0, min(limits))
    if not limits:
        assert all(granted)


@given(st.text(max_size=200))
def test_the_bound_of_a_prompts_tokens_is_above_any_tokenisers_count(text: str) -> None:
    bound = most_tokens([{"role": "user", "content": text}])
    assert bound > len(text.encode("utf-8", "surrogatepass"))


def test_the_bound_of_a_completion_is_the_requests_own_limit() -> None:
    def bound(options: dict, **params: int) -> int:
        endpoint = Endpoint(provider="openai", base_url="http://host/v1", options=options)
        return most_completion(Call(endpoint, ({"role": "user", "content": "x"},), params))

    assert bound({}, max_tokens=7) == 7
    assert bound({"max_completion_tokens": 900, "max_tokens": None}, max_tokens=7) == 900
    assert bound({}) == budget.UNLIMITED


@pytest.mark.parametrize("seed", [0, 1])
def test_many_workers_at_once_never_pass_the_cap(place, seed: int) -> None:
    """Four workers reserve, spend less or as much, lose calls and die; a fifth one watches the books."""
    cap, stores = 3_000, [Store(place, shared=True) for _ in range(4)]
    stores[0].set_cap(cap)
    billed: list[int] = []
    ended, bad = threading.Event(), []

    def watch() -> None:
        while not ended.is_set():
            account = stores[0].account()
            if account.spent + account.presumed + account.reserved > cap:
                bad.append(account)

    def work(store: Store, number: int) -> None:
        rng = random.Random(f"{seed}-{number}")
        for step in range(25):
            wants = [want(f"w{number}-{step}-{i}", most=rng.randint(1, 60)) for i in range(4)]
            bounds = {w.key: w.most for w in wants}
            for key in store.claim("job", wants, "0").result(30).granted:
                kind = rng.choice(["answered", "answered", "presumed", "free"])
                cost = rng.randint(0, bounds[key]) if kind == "answered" else bounds[key]
                if kind != "free":
                    billed.append(cost)  # at most: of a lost call nobody knows
                store.write(
                    [Settle(key, "job", 0, kind, 0 if kind == "free" else cost, now(), bounds[key])],
                    states=[{"k": key, "state": "ok", "attempts": 1, "reason": "", "updated": now()}],
                )
        store.write().result(30)

    watcher = threading.Thread(target=watch)
    watcher.start()
    threads = [threading.Thread(target=work, args=(s, n)) for n, s in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    watcher.join()
    assert not bad
    account = stores[0].account()
    assert account.reserved == 0
    assert account.spent + account.presumed == sum(billed) <= cap
    assert account.room < 60  # it was used
    with stores[0].engine.connect() as connection:
        ledger = connection.execute(sa.select(sa.func.sum(schema.usage.c.nanos))).scalar_one()
    assert ledger == sum(billed)
    assert stores[0].account("job").spent == account.spent
    for store in stores:
        store.close()


async def until(runner: Runner, job: str, *states: str):
    for _ in range(6000):
        status = await runner.status(job)
        if status.state in states:
            return status
        await asyncio.sleep(0.01)
    raise AssertionError(status)


def priced(concurrency: int = 4, **spec):
    # 1,000 dollars per million tokens: 1,000,000 nano-dollars per token.
    return simulated(concurrency=concurrency, **spec).model_copy(
        update={"prompt_price": 1000.0, "completion_price": 1000.0}
    )


@pytest.mark.parametrize("per_job", [False, True])
def test_a_job_out_of_budget_keeps_its_calls_and_goes_on_when_it_is_raised(place, per_job: bool) -> None:
    async def run() -> None:
        store = Store(place)
        cap = parse_money("6USD")
        job = JudgeJob(
            endpoint=priced(latency=0.001), critic="laif_basic", comparisons=tuple(planted(40)), budget="6USD"
        )
        if not per_job:
            store.set_cap(cap)
        runner = Runner(store)
        try:
            work = job.work()
            runner.submit(work, cap=job.cap if per_job else None)
            status = await until(runner, work.id, "out_of_budget")
            assert 0 < status.done < 40
            scope = work.id if per_job else budget.SERVICE
            account = store.account(scope)
            assert account.reserved == 0
            assert account.spent <= cap
            assert store.job(work.id)["state"] == "out_of_budget"
            assert store.left()["pending"] > 0
            await asyncio.to_thread(store.set_cap, None, scope)
            status = await until(runner, work.id, "done")
            assert status.counts == {"ok": 40}
            assert status.calls == 80  # none twice
            assert store.account(scope).spent > cap
        finally:
            await runner.close()
            store.close()

    asyncio.run(run())


def test_a_budget_needs_a_price(tmp_path) -> None:
    async def run() -> None:
        store = Store(tmp_path)
        runner = Runner(store)
        endpoint = Endpoint(provider="openai", base_url="http://127.0.0.1:1/v1", client="plain")
        work = JudgeJob(endpoint=endpoint, critic="laif_basic", comparisons=tuple(planted(1))).work()
        try:
            with pytest.raises(EndpointError, match="prompt_price"):
                runner.submit(work, cap=1)
            store.set_cap(10**9)
            with pytest.raises(EndpointError, match="prompt_price"):
                runner.submit(work)
        finally:
            await runner.close()
            store.close()

    asyncio.run(run())


def test_calls_that_may_be_on_the_bill_count_against_the_budget(tmp_path) -> None:
    """A call whose answer never came is presumed to be paid, one that was refused is not."""

    async def run(reply, timeout: float = 60.0) -> budget.Account:
        with fake_endpoint(reply) as server:
            endpoint = at(
                server,
                max_attempts=1,
                client="plain",
                prompt_price=1.0,
                completion_price=1.0,
                timeout=timeout,
            )
            store = Store(tmp_path / str(random.random()))
            runner = Runner(store)
            work = JudgeJob(endpoint=endpoint, critic="laif_basic", comparisons=tuple(planted(2))).work()
            runner.submit(work)
            await until(runner, work.id, "done")
            await runner.close()
            account = store.account()
            store.close()
            assert account.reserved == 0
            return account

    refused = asyncio.run(run(lambda number, request: Reply(429, {})))
    assert (refused.spent, refused.presumed) == (0, 0)
    lost = asyncio.run(run(lambda number, request: Reply(200, chat("x"), hang=1.0), timeout=0.2))
    assert lost.spent == 0
    assert lost.presumed > 0
    answered = asyncio.run(run(chat("Output (a)")))
    assert (answered.spent, answered.presumed) == (4 * (11 + 2) * 1000, 0)
