"""First-fit packing: which example goes to which row, where. Deterministic; order in, order out (nearly)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_OPEN_ROWS = (
    32  # rows considered for an example; bounds the work, and keeps an epoch's shuffled order nearly intact
)


class Rows(NamedTuple):
    """Where examples lie. All arrays are int64 [n], sorted by row, then column.

    Attributes:
      example: index of the example. row: its row, from 0. column: its first token. segment: 1, 2, ... within the row.
    """

    example: np.ndarray
    row: np.ndarray
    column: np.ndarray
    segment: np.ndarray


class _Row:
    """A row being filled."""

    __slots__ = ("free", "items")

    def __init__(self, length: int):
        self.free = length
        self.items: list[tuple[int, int]] = []  # (example, column)

    def fits(self, size: int, max_segments: int) -> bool:
        return size <= self.free and len(self.items) < max_segments

    def put(self, example: int, size: int, length: int) -> None:
        self.items.append((example, length - self.free))
        self.free -= size


def one_per_row(order: np.ndarray) -> Rows:
    """No packing: example `order[i]` alone in row i."""
    n = len(order)
    return Rows(order, np.arange(n), np.zeros(n, np.int64), np.ones(n, np.int64))


def pack_rows(order: np.ndarray, lengths: np.ndarray, row_length: int, max_segments: int) -> Rows:
    """Puts examples, taken in `order`, each into the first open row that has room.

    Args:
      order: int [n], indices into `lengths`. lengths: tokens per example, all <= `row_length`.
      max_segments: examples per row at most.
    """
    done: list[_Row] = []
    open_rows: list[_Row] = []
    for example, size in zip(order.tolist(), lengths[order].tolist()):
        row = next((row for row in open_rows if row.fits(size, max_segments)), None)
        if row is None:
            if len(open_rows) == _OPEN_ROWS:
                done.append(open_rows.pop(0))
            row = _Row(row_length)
            open_rows.append(row)
        row.put(example, size, row_length)
    return _to_rows([*done, *open_rows])


def _to_rows(rows: Sequence[_Row]) -> Rows:
    table = [
        (example, number, column, segment)
        for number, row in enumerate(rows)
        for segment, (example, column) in enumerate(row.items, 1)
    ]
    columns = np.asarray(table, np.int64).reshape(-1, 4).T
    return Rows(*columns)


class Pairs(NamedTuple):
    """Where pairs lie: both sides in the same group of one or two rows, so that a pair stays on one host and in one
    micro-batch.

    Attributes:
      rows: the sides' places; example 2i is pair i's chosen side, 2i + 1 its rejected side. Row r is in group r // 2,
        or, where a group is one row, in group r.
      pair: int64 [n], pairs in the order of their groups. group: int64 [n]. slot: int64 [n], 0, 1, ... in the group.
    """

    rows: Rows
    pair: np.ndarray
    group: np.ndarray
    slot: np.ndarray


def two_rows_per_pair(order: np.ndarray) -> Pairs:
    """No packing: pair `order[i]` in rows 2i (chosen) and 2i + 1 (rejected)."""
    sides = np.stack([2 * order, 2 * order + 1], axis=1).reshape(-1)
    return Pairs(one_per_row(sides), order, np.arange(len(order)), np.zeros(len(order), np.int64))


class _Group:
    """Two rows being filled, or one, in which a pair's sides lie side by side."""

    __slots__ = ("pairs", "rows")

    def __init__(self, row_length: int, rows: int):
        self.rows = tuple(_Row(row_length) for _ in range(rows))
        self.pairs: list[int] = []

    def take(self, pair: int, chosen: int, rejected: int, row_length: int, max_segments: int) -> bool:
        """Places both sides, of `chosen` and `rejected` tokens, or neither."""
        if len(self.rows) == 1:
            first = second = self.rows[0]
            if not first.fits(chosen + rejected, max_segments - 1):
                return False
        else:
            for first, second in (self.rows, self.rows[::-1]):
                if first.fits(chosen, max_segments) and second.fits(rejected, max_segments):
                    break
            else:
                return False
        first.put(2 * pair, chosen, row_length)
        second.put(2 * pair + 1, rejected, row_length)
        self.pairs.append(pair)
        return True


def pack_pairs(
    order: np.ndarray, lengths: np.ndarray, row_length: int, max_segments: int, group_rows: int = 2
) -> Pairs:
    """Puts pairs, taken in `order`, each into the first open group of rows that has room for it.

    Args:
      order: int [n], pairs. lengths: int [2 x pairs], tokens of chosen and rejected sides, interleaved, all <=
        `row_length`. max_segments: sides per row at most.
      group_rows: 2: one side goes to either row of a group. 1: the rejected side follows the chosen one in one row;
        both together are <= `row_length`.
    """
    done: list[_Group] = []
    groups: list[_Group] = []
    sizes = lengths.reshape(-1, 2)[order].tolist()
    for pair, (chosen, rejected) in zip(order.tolist(), sizes):
        if not any(group.take(pair, chosen, rejected, row_length, max_segments) for group in groups):
            if len(groups) == _OPEN_ROWS // group_rows:
                done.append(groups.pop(0))
            groups.append(_Group(row_length, group_rows))
            groups[-1].take(pair, chosen, rejected, row_length, max_segments)
    done += groups
    table = [
        (pair, number, slot) for number, group in enumerate(done) for slot, pair in enumerate(group.pairs)
    ]
    pair, group, slot = np.asarray(table, np.int64).reshape(-1, 3).T
    return Pairs(_to_rows([row for group in done for row in group.rows]), pair, group, slot)
