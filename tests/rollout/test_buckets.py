"""Batches: nothing lost, few shapes, little padding."""

from hypothesis import given
from hypothesis import strategies as st

from laif_jax.rollout.buckets import batch_bucket, length_bucket, plan


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 9))
def test_every_request_is_planned_once_and_batches_hold_neighbours(lengths, batch_size):
    batches = list(plan(lengths, batch_size))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(lengths, reverse=True)


@given(st.integers(1, 5000), st.integers(0, 3000))
def test_length_bucket_holds_the_length_and_stays_below_the_limit(length, room):
    size = length_bucket(length, length + room)
    assert length <= size <= length + room
    assert size <= max(16, 2 * length)


def test_a_thousand_lengths_need_eleven_shapes_and_long_ones_pad_by_a_half_at_most():
    sizes = {length_bucket(n, 1000) for n in range(1, 1001)}
    assert sizes == {16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1000}
    assert all(length_bucket(n, 1000) <= 1.5 * n for n in range(65, 1001))


@given(st.integers(1, 100), st.integers(1, 64), st.sampled_from([1, 2, 4, 8]))
def test_batch_bucket_holds_the_rows_and_divides_by_the_devices(rows, largest, multiple):
    size = batch_bucket(rows, largest, multiple)
    assert size >= min(rows, largest)
    assert size % multiple == 0
    assert size < min(2 * rows, largest + 1) + multiple
