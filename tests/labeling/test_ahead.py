"""How much is claimed in advance: enough for a busy endpoint, little for a slow one."""

from hypothesis import given
from hypothesis import strategies as st

from laif_jax.labeling.ahead import CLAIM, LEAST, Ahead


@given(st.integers(1, 20_000), st.lists(st.integers(0, 5000), max_size=40), st.integers(0, 20_000))
def test_it_stays_within_its_bounds(width: int, ended: list[int], idle: int) -> None:
    ahead = Ahead(width)
    for count in ended:
        ahead.ended(count)
        assert min(LEAST, 2 * width) <= ahead.low <= min(2 * width, 2 * CLAIM)
        for queued in (0, ahead.low):
            assert LEAST <= ahead.next(idle, queued) <= CLAIM


def test_a_slow_endpoint_has_little_claimed_for_it_and_a_fast_one_enough() -> None:
    slow, fast = Ahead(256), Ahead(256)
    for _ in range(40):
        slow.ended(2)
        fast.ended(150)
    assert slow.low == 16
    assert slow.next(idle=0, queued=16) == 16
    assert fast.low == 512
    assert fast.next(idle=0, queued=512) == CLAIM


def test_idle_workers_are_served_at_once() -> None:
    assert Ahead(100).next(idle=100, queued=0) >= 100
    assert Ahead(10_000).next(idle=10_000, queued=0) == CLAIM


def test_one_slow_claim_does_not_empty_the_queue_of_the_next() -> None:
    ahead = Ahead(256)
    for _ in range(20):
        ahead.ended(64)
    assert ahead.low == 512
    ahead.ended(0)
    assert ahead.low == 448
