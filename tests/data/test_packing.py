"""Packing: everything once, nothing overlaps, little is wasted."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from laif_jax.data.packing import one_per_row, pack_pairs, pack_rows, two_rows_per_pair

lengths_strategy = st.lists(st.integers(1, 16), min_size=1, max_size=120).map(np.asarray)


def check_rows(rows, lengths, row_length, max_segments):
    """Each example once, inside its row, rows contiguous from the left, segments numbered from 1."""
    assert sorted(rows.example.tolist()) == list(range(len(lengths)))
    for row in np.unique(rows.row):
        inside = rows.row == row
        size = lengths[rows.example[inside]]
        assert rows.column[inside].tolist() == (np.cumsum(size) - size).tolist()
        assert rows.segment[inside].tolist() == list(range(1, inside.sum() + 1))
        assert inside.sum() <= max_segments
        assert size.sum() <= row_length


@given(lengths_strategy, st.integers(16, 40), st.integers(1, 5), st.randoms())
def test_rows_hold_every_example_once(lengths, row_length, max_segments, random):
    order = np.asarray(random.sample(range(len(lengths)), len(lengths)))
    rows = pack_rows(order, lengths, row_length, max_segments)
    check_rows(rows, lengths, row_length, max_segments)
    assert np.unique(rows.row).tolist() == list(range(rows.row[-1] + 1))  # no row is empty
    again = pack_rows(order, lengths, row_length, max_segments)
    assert all(np.array_equal(a, b) for a, b in zip(rows, again, strict=True))


@given(lengths_strategy, st.integers(16, 40))
def test_first_fit_leaves_at_most_one_row_less_than_half_full(lengths, row_length):
    """As long as all rows fit into the window of open rows: two half-empty rows would have become one."""
    lengths = lengths[:32]
    rows = pack_rows(np.arange(len(lengths)), lengths, row_length, 1000)
    filled = np.bincount(rows.row, lengths[rows.example])
    assert (2 * filled <= row_length).sum() <= 1


def test_first_fit_in_order():
    rows = pack_rows(np.asarray([2, 0, 1, 3]), np.asarray([5, 3, 6, 4]), 10, 9)
    # 6 opens row 0; 5 does not fit: row 1; 3 goes to row 0; 4 to row 1.
    assert [tuple(map(int, r)) for r in zip(*rows, strict=True)] == [
        (2, 0, 0, 1),
        (1, 0, 6, 2),
        (0, 1, 0, 1),
        (3, 1, 5, 2),
    ]


@given(lengths_strategy, st.integers(16, 40), st.integers(1, 5), st.randoms())
def test_both_sides_of_a_pair_lie_in_the_same_two_rows(lengths, row_length, max_segments, random):
    lengths = np.resize(lengths, 2 * len(lengths))
    n = len(lengths) // 2
    order = np.asarray(random.sample(range(n), n))
    pairs = pack_pairs(order, lengths, row_length, max_segments)
    check_rows(pairs.rows, lengths, row_length, max_segments)
    assert sorted(pairs.pair.tolist()) == list(range(n))
    assert (np.diff(pairs.group) >= 0).all()
    row_of = dict(zip(pairs.rows.example.tolist(), pairs.rows.row.tolist(), strict=True))
    for pair, group, slot in zip(pairs.pair.tolist(), pairs.group.tolist(), pairs.slot.tolist(), strict=True):
        assert row_of[2 * pair] // 2 == row_of[2 * pair + 1] // 2 == group
        assert 0 <= slot < max_segments
    assert len({*zip(pairs.group.tolist(), pairs.slot.tolist(), strict=True)}) == n


@given(lengths_strategy, st.integers(32, 60), st.sampled_from([2, 4, 6]), st.randoms())
def test_a_pair_lies_side_by_side_where_a_group_is_one_row(lengths, row_length, max_segments, random):
    lengths = np.resize(lengths, 2 * len(lengths))
    n = len(lengths) // 2
    order = np.asarray(random.sample(range(n), n))
    pairs = pack_pairs(order, lengths, row_length, max_segments, 1)
    check_rows(pairs.rows, lengths, row_length, max_segments)
    place = {e: (r, s) for e, r, s in zip(pairs.rows.example, pairs.rows.row, pairs.rows.segment)}
    for pair, group in zip(pairs.pair, pairs.group, strict=True):
        assert place[2 * pair] == (group, place[2 * pair][1])
        assert place[2 * pair + 1] == (group, place[2 * pair][1] + 1)
    assert len({*zip(pairs.group.tolist(), pairs.slot.tolist(), strict=True)}) == n
    assert pairs.slot.max() < max_segments // 2


def test_without_packing_everything_has_its_own_row():
    order = np.asarray([3, 1, 2])
    rows = one_per_row(order)
    assert rows.example.tolist() == [3, 1, 2]
    assert rows.row.tolist() == [0, 1, 2]
    pairs = two_rows_per_pair(order)
    assert pairs.rows.example.tolist() == [6, 7, 2, 3, 4, 5]
    assert pairs.group.tolist() == [0, 1, 2]
