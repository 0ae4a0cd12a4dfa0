"""When the next call may start: AIMD, buckets, Retry-After and the circuit, by a clock that only the test moves."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laif_jax.labeling.admission import RETRY_AFTER_MOST, SHRINK, Admission, Bucket, Circuit
from laif_jax.labeling.wires import RateLimits, Window

# ---- calls in flight ---------------------------------------------------------------------------------------------


def test_a_refusal_shrinks_the_limit_by_a_quarter_and_a_round_of_successes_adds_one() -> None:
    admission = Admission(16)
    assert admission.limit == 16
    admission.throttled(time=10.0, started=9.0, retry_after=None)
    assert admission.limit == 16 * SHRINK == 12
    for _ in range(12):
        admission.succeeded()
    assert 12.9 < admission.limit <= 13
    for _ in range(1000):
        admission.succeeded()
    assert admission.limit == 16  # never more than configured


def test_refusals_of_calls_sent_before_the_last_shrinking_say_nothing_new() -> None:
    admission = Admission(16)
    for started in (5.0, 6.0, 9.99):
        admission.throttled(time=10.0, started=started, retry_after=None)
    assert admission.limit == 12
    admission.throttled(time=11.0, started=10.5, retry_after=None)
    assert admission.limit == 9


def test_one_call_may_always_be_in_flight() -> None:
    admission = Admission(2)
    for time in range(1, 50):
        admission.throttled(time=float(time), started=time - 0.5, retry_after=None)
    assert admission.limit == 1


def test_a_wider_job_widens_what_was_never_held_back_only() -> None:
    free, held = Admission(4), Admission(4)
    held.throttled(time=1.0, started=0.0, retry_after=None)
    for admission in (free, held):
        admission.widen(8)
        admission.widen(2)
    assert (free.limit, free.most) == (8, 8)
    assert (held.limit, held.most) == (3, 8)


@given(st.lists(st.one_of(st.none(), st.floats(0, 5)), max_size=200), st.integers(1, 64))
def test_the_limit_stays_between_one_and_the_configured_one(events: list[float | None], most: int) -> None:
    admission, time = Admission(most), 0.0
    for event in events:
        if event is None:
            admission.succeeded()
        else:
            time += event
            admission.throttled(time, time, None)
        assert 1 <= admission.limit <= most


def test_a_refused_batch_stays_large_and_is_soon_as_large_as_before() -> None:
    admission = Admission(10_000, step=500)
    for time in range(1, 50):
        admission.throttled(time=float(time), started=time - 0.5, retry_after=None)
    assert admission.limit == 500
    for _ in range(500):
        admission.succeeded()
    assert 850 < admission.limit <= 1000  # one more step after a round
    narrow = Admission(8, step=500)
    narrow.throttled(time=1.0, started=0.5, retry_after=None)
    assert narrow.limit == 8


# ---- Retry-After -------------------------------------------------------------------------------------------------


def test_nobody_calls_before_the_time_that_the_endpoint_named() -> None:
    admission = Admission(4)
    admission.throttled(time=100.0, started=99.0, retry_after=30.0)
    assert admission.delay(100.0) == 30.0
    assert admission.delay(129.0) == 1.0
    assert admission.delay(130.0) == 0.0
    # A later, shorter wish does not shorten it; one beyond all reason is cut.
    admission.throttled(time=101.0, started=100.5, retry_after=1.0)
    assert admission.delay(101.0) == 29.0
    admission.throttled(time=102.0, started=101.5, retry_after=1e9)
    assert admission.delay(102.0) == RETRY_AFTER_MOST


# ---- buckets -----------------------------------------------------------------------------------------------------


def test_a_bucket_that_nobody_told_of_holds_nothing_back() -> None:
    admission = Admission(4)
    for _ in range(1000):
        assert admission.delay(0.0, 10**9) == 0.0
        admission.started(10**9)


def test_requests_per_minute_flow_back_evenly() -> None:
    admission = Admission(100)
    admission.told(0.0, RateLimits(requests=Window(limit=60, remaining=2, reset=None)))
    for _ in range(2):
        assert admission.delay(0.0) == 0.0
        admission.started()
    assert admission.delay(0.0) == pytest.approx(1.0)
    assert admission.delay(0.75) == pytest.approx(0.25)
    assert admission.delay(1.0) == 0.0


def test_tokens_per_minute_hold_back_what_is_large() -> None:
    admission = Admission(100)
    admission.told(0.0, RateLimits(tokens=Window(limit=6000, remaining=500, reset=None)))
    assert admission.delay(0.0, tokens=500) == 0.0
    assert admission.delay(0.0, tokens=700) == pytest.approx(2.0)
    # More than the whole capacity goes out of a full bucket: it could never go otherwise.
    assert admission.delay(0.0, tokens=10**6) == pytest.approx(55.0)
    assert admission.delay(55.0, tokens=10**6) == 0.0


def test_an_empty_bucket_is_full_again_at_its_reset() -> None:
    bucket = Bucket()
    bucket.told(0.0, 60, 0, 6.0)
    bucket.delay(6.0, 1)
    assert bucket.level == pytest.approx(60)


def test_only_the_rest_is_told() -> None:
    bucket = Bucket()
    bucket.told(0.0, None, 10, 5.0)
    bucket.take(10)
    assert bucket.delay(0.0, 1) == pytest.approx(0.5)  # ten in five seconds


def test_what_the_endpoint_says_is_left_never_raises_our_own_count() -> None:
    bucket = Bucket()
    bucket.told(0.0, 60, 60, None)
    bucket.take(50)  # calls under way, which the header of an earlier one does not know of
    bucket.told(0.0, 60, 59, None)
    assert bucket.level == 10


@given(
    rate=st.integers(1, 10_000),
    steps=st.lists(st.tuples(st.floats(0, 10), st.integers(1, 100)), max_size=100),
)
def test_no_more_goes_through_than_the_rate_allows(rate: int, steps: list[tuple[float, int]]) -> None:
    bucket, time, taken = Bucket(), 0.0, 0
    bucket.told(0.0, rate, rate, None)
    for pause, amount in steps:
        time += pause
        if bucket.delay(time, amount) == 0.0:
            bucket.take(amount)
            taken += amount
        # A full bucket lets one amount above its capacity through.
        assert taken <= rate + rate / 60 * time + 100 + 1e-6


def test_waiting_for_the_delay_is_enough() -> None:
    bucket = Bucket()
    bucket.told(0.0, 30, 0, None)
    delay = bucket.delay(0.0, 3)
    assert delay == pytest.approx(6.0)
    assert bucket.delay(delay, 3) == 0.0


# ---- the circuit -------------------------------------------------------------------------------------------------


def test_the_circuit_opens_after_its_limit_of_failures_in_a_row() -> None:
    circuit = Circuit(limit=3)
    assert [circuit.failure(0.0, "timeout", "slow", fatal=False) for _ in range(2)] == [False, False]
    circuit.success()
    assert [circuit.failure(0.0, "timeout", "slow", fatal=False) for _ in range(3)] == [False, False, True]
    assert "3 calls in a row failed, the last: slow" in circuit.closed_to(0.0)
    assert circuit.passing


def test_a_refused_key_opens_it_at_once() -> None:
    circuit = Circuit(limit=100)
    assert circuit.failure(0.0, "auth", "the key is refused", fatal=True)
    assert circuit.closed_to(1.0) == "not asked: the key is refused"
    assert not circuit.passing


def test_requests_refused_for_what_they_are_never_open_it() -> None:
    circuit = Circuit(limit=3)
    assert not any(circuit.failure(0.0, "bad_request", "too long", fatal=False) for _ in range(100))
    assert circuit.closed_to(0.0) == ""


def test_one_probe_is_let_through_after_the_pause() -> None:
    circuit = Circuit(limit=1, pause=30.0)
    assert circuit.failure(100.0, "timeout", "slow", fatal=False)
    assert circuit.closed_to(129.9)
    assert circuit.closed_to(130.0) == ""  # the probe
    assert circuit.closed_to(130.0)  # and nobody beside it
    assert not circuit.failure(131.0, "timeout", "slow", fatal=False)  # open already: told once
    assert circuit.closed_to(160.0)
    assert circuit.closed_to(161.0) == ""
    circuit.success()
    assert circuit.closed_to(161.0) == ""
    assert circuit.closed_to(math.inf) == ""
