"""Claims and leases: one call has one owner, and what a dead worker held is taken up by another."""

import threading

import pytest
import sqlalchemy as sa

from laif_jax.labeling import budget, leases, schema
from laif_jax.labeling.leases import Want
from laif_jax.labeling.store import Settle, Store, now

LONG_AGO = "1970-01-01T00:00:00.000+00:00"


def want(key: str, most: int = 0, again: bool = False) -> Want:
    row = {"key": key, "endpoint_key": "e", "model": "m", "state": "pending", "attempts": 0, "reason": ""}
    times = {"created": now(), "updated": now()}
    return Want(key, {**row, "owner": "", "job": "", "reserved": 0, **times}, most, again)


def claim(store: Store, *wants: Want, job: str = "job", since: str = LONG_AGO) -> leases.Claimed:
    return store.claim(job, wants, since).result(30)


def answer(store: Store, key: str, nanos: int | None = None, most: int = 0, job: str = "job") -> None:
    body = {"key": key, "body": "{}", "model": "m", "system_fingerprint": "", "latency": 0.1, "attempt": 0}
    state = {"k": key, "state": "ok", "attempts": 1, "reason": "", "updated": now()}
    settle = Settle(key, job, 0, "answered", nanos, now(), most)
    store.write([settle], responses=[{**body, "date": now()}], states=[state]).result(30)


@pytest.fixture
def two(place):
    first, second = Store(place, shared=True), Store(place, shared=True)
    yield first, second
    first.close()
    second.close()


def test_a_claim_is_one_workers_alone(two) -> None:
    first, second = two
    assert claim(first, want("a"), want("b")).granted == {"a": 0, "b": 0}
    other = claim(second, want("b"), want("c"))
    assert (other.granted, other.busy) == ({"c": 0}, ["b"])
    assert claim(first, want("a")).busy == ["a"]  # not even its own again
    answer(first, "a")
    assert claim(second, want("a")).answered == ["a"]
    assert claim(second, want("a", again=True)).granted == {"a": 1}  # its answer cannot be read


def test_many_workers_get_each_request_once(place) -> None:
    stores = [Store(place, shared=True) for _ in range(4)]
    keys = [f"k{number}" for number in range(200)]
    got: list[str] = []

    def work(store: Store, shift: int) -> None:
        for start in range(0, 200, 20):
            wants = [want(keys[(shift + start + i) % 200]) for i in range(20)]
            got.extend(claim(store, *wants).granted)

    threads = [
        threading.Thread(target=work, args=(store, 37 * number)) for number, store in enumerate(stores)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(keys)
    for store in stores:
        store.close()


def test_failures_are_asked_again_by_the_next_run_only(two) -> None:
    first, second = two
    begun = now()
    claim(first, want("a"))
    state = {"k": "a", "state": "failed", "attempts": 3, "reason": "no luck", "updated": now()}
    first.write(failed_states=[state]).result(30)
    assert claim(second, want("a"), since=begun).failed == {"a": "no luck"}
    assert claim(second, want("a"), since="2999").granted == {"a": 3}


def test_what_a_closed_worker_held_is_pending_again(two) -> None:
    first, second = two
    claim(first, want("a"))
    first.close()
    assert claim(second, want("a")).granted == {"a": 0}


def test_an_expired_lease_is_taken_over_and_its_money_presumed_spent(two) -> None:
    first, second = two
    first.set_cap(100)
    claim(first, want("a", most=30))
    assert first.account().reserved == 30
    with second.engine.begin() as connection:
        workers = schema.workers
        connection.execute(sa.update(workers).where(workers.c.id == first.worker).values(expires=1.0))
    assert second.beat().result(30) == 1
    account = second.account()
    assert (account.reserved, account.presumed, account.spent) == (0, 30, 0)
    assert claim(second, want("a", most=30)).granted == {"a": 0}
    # The first was only slow: its answer counts, is not booked twice, and leaves the other's reservation alone.
    answer(first, "a", nanos=20, most=30)
    account = second.account()
    assert (account.reserved, account.presumed, account.spent) == (30, 30, 0)
    answer(second, "a", nanos=20, most=30)
    assert second.account().spent <= 20


def test_a_failure_of_a_worker_that_lost_its_lease_does_not_touch_the_new_owners_call(two) -> None:
    first, second = two
    claim(first, want("a"))
    second.do(lambda connection: leases.release(connection, [first.worker], now())).result(30)
    claim(second, want("a"))
    state = {"k": "a", "state": "failed", "attempts": 1, "reason": "late", "updated": now()}
    first.write(failed_states=[state]).result(30)
    assert claim(first, want("a")).busy == ["a"]


def test_what_is_left_is_counted_by_state(two) -> None:
    first, _ = two
    claim(first, want("a"), want("b"), want("c"))
    answer(first, "a")
    first.give_back("job", ["b"]).result(30)
    assert first.left() == {"in_flight": 1, "pending": 1}


def test_money_that_was_put_aside_comes_back_with_what_was_not_sent(two) -> None:
    first, second = two
    first.set_cap(50)
    assert set(claim(first, want("a", 20), want("b", 20), want("c", 20)).granted) == {"a", "b"}
    assert claim(second, want("c", 20)).denied == ["c"]
    first.give_back("job", ["b"]).result(30)
    assert second.account().reserved == 20
    assert set(claim(second, want("c", 20)).granted) == {"c"}
    assert second.left() == {"in_flight": 2, "pending": 1}
    assert second.account(budget.SERVICE).room == 10
