"""Batches for training: shuffled per epoch, packed if wanted, split over hosts, resumable at any step.

A run's batches are a pure function of (examples, settings, seed, step): each epoch is planned as a whole, on every host
alike, and a host then assembles its own rows of each step. So nothing is lost or repeated whatever the number of
hosts, the hosts' batches side by side are exactly the one-host batch, step counts are known at the start, and the
state to save is the number of the next step. Shuffling, prefetching and iteration are grain's.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grain
import numpy as np

from laif_jax.data.chat import Encoded, EncodedPair
from laif_jax.data.packing import Pairs, Rows, one_per_row, pack_pairs, pack_rows, two_rows_per_pair
from laif_jax.data.plan import (
    Host,
    Layout,
    Report,
    Schedule,
    epoch_order,
    flags,
    make_layout,
    rows_of_host,
    rows_of_step,
    usable,
)
from laif_jax.data.table import TokenTable, shared_starts
from laif_jax.records import fingerprint

Batch = dict[str, np.ndarray]


class Batches:
    """A checkpointable iterator over a run's batches, from step 0 to `total_steps` - 1.

    Attributes:
      total_steps: optimiser steps in the run. steps_per_epoch: in the first epoch (with packing, later epochs may
        differ by a few). layout: static sizes. report: what was dropped and cut. flags: uint8 [examples given, sides],
        what was cut and what ended, for `inspect.render`.
    """

    def __init__(self, steps: "_SftSteps | _PairSteps"):
        self._steps = steps
        self.total_steps = steps.schedule.total
        self.steps_per_epoch = steps.schedule.first_epoch
        self.layout: Layout = steps.layout
        self.flags: np.ndarray = steps.flags
        self.report: Report = replace(steps.report, pad_fraction=self._padding())
        # One thread prepares the next batches while a step computes.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        self._iterator = iter(grain.MapDataset.source(steps).to_iter_dataset(options))

    def __len__(self) -> int:
        return self.total_steps

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def at(self, step: int) -> Batch:
        """The batch of any step; leaves the iterator where it is."""
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of a run of {self.total_steps} steps")
        return self._steps[step]

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) that a step lies in."""
        return self._steps.schedule.epoch_of(step)

    def get_state(self) -> dict[str, Any]:
        """JSON-able state: which step comes next, and the fingerprint of the data and settings it belongs to."""
        return {"grain": self._iterator.get_state(), "fingerprint": self._steps.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. The number of hosts may have changed, the data may not.

        Raises:
          ValueError: the state belongs to other data or settings.
        """
        if state["fingerprint"] != self._steps.fingerprint:
            raise ValueError(
                "the saved position belongs to other data or batch settings (tokens, seed, batch size, packing or "
                "lengths changed since). Restore them, or start the stage anew in another folder."
            )
        self._iterator.set_state(state["grain"])

    def _padding(self) -> float:
        places = self.steps_per_epoch * self.layout.micro_batches * self.layout.rows * self.layout.row_length
        return 1.0 - int(self._steps.table.lengths.sum()) / places


# ---- dialogues -------------------------------------------------------------------------------------------------


def sft_batches(
    encoded: Sequence[Encoded],
    *,
    batch_size: int,
    micro_batch: int | None = None,
    max_length: int,
    pad_id: int,
    packing: bool = False,
    seed: int = 0,
    epochs: int | None = None,
    steps: int | None = None,
    shuffle: bool = True,
    max_segments: int | None = None,
    row_multiple: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Batches of dialogues: `tokens, segment_ids, positions` int32 and `loss_mask` float32 [A, R, T], and
    `example_index` int32 [A, R, S]: which of `encoded` is segment s + 1 of the row; -1: none.

    Rows are padded to T = `max_length` rounded up to a multiple of 8. The last batch of an epoch is filled up with
    empty rows (weight 0), never dropped.

    Args:
      batch_size: rows per update over all hosts (without packing, a row is a dialogue). micro_batch: rows per forward
        pass, over all hosts; None: all at once.
      epochs / steps: give one; a step is one update.
      max_segments: S with packing; default T / 8, at most 64. Without packing, S = 1.
      row_multiple: each micro-batch gets empty rows up to a multiple of it (and of `process_count`), so that it
        divides over devices.
      process_index: this host gets rows [index x R / count, (index + 1) x R / count) of each micro-batch.

    Raises:
      ValueError: nothing is supervised, an example is longer than T, or the sizes contradict each other.
    """
    sides = [(one,) for one in encoded]
    keep, report = usable(sides)
    layout = make_layout(
        batch_size=batch_size,
        micro_batch=micro_batch,
        max_length=max_length,
        max_segments=max_segments,
        packing=packing,
        row_multiple=row_multiple,
        process_count=process_count,
        of_pairs=False,
    )
    table = TokenTable([encoded[i] for i in keep])
    _check_lengths(table, layout, keep)

    def plan(epoch: int) -> _RowPlan:
        order = epoch_order(len(keep), seed, epoch, shuffle)
        if packing:
            rows = pack_rows(order, table.lengths, layout.row_length, layout.max_segments)
        else:
            rows = one_per_row(order)
        return _RowPlan(rows, math.ceil((int(rows.row[-1]) + 1) / batch_size))

    return Batches(
        _SftSteps(
            layout=layout,
            report=report,
            flags=flags(sides),
            fingerprint=_fingerprint(table, layout, batch_size, packing, seed, shuffle),
            table=table,
            schedule=Schedule(plan, epochs, steps, None if packing else math.ceil(len(keep) / batch_size)),
            host=Host(process_index, process_count),
            pad_id=pad_id,
            kept=np.asarray(keep, np.int32),
        )
    )


@dataclass(frozen=True)
class _RowPlan:
    rows: Rows
    steps: int


@dataclass(frozen=True)
class _SftSteps:
    """Random access to a run's batches of dialogues. kept: int32 [n], the examples' places in what was given."""

    layout: Layout
    report: Report
    flags: np.ndarray
    fingerprint: str
    table: TokenTable
    schedule: Schedule[_RowPlan]
    host: Host
    pad_id: int
    kept: np.ndarray

    def __len__(self) -> int:
        return self.schedule.total

    def __getitem__(self, index: int) -> Batch:
        plan, within = self.schedule.locate(index)
        rows = rows_of_host(rows_of_step(plan.rows, within, self.layout), self.layout, self.host)
        batch = _assemble(self, rows)
        shape = (*batch["tokens"].shape[:2], self.layout.max_segments)
        example_index = np.full(shape, -1, np.int32)
        example_index.reshape(-1, shape[2])[rows.row, rows.segment - 1] = self.kept[rows.example]
        return {**batch, "example_index": example_index}


# ---- pairs -----------------------------------------------------------------------------------------------------


def preference_batches(
    pairs: Sequence[EncodedPair],
    *,
    batch_size: int,
    micro_batch: int | None = None,
    max_length: int,
    pad_id: int,
    packing: bool = False,
    seed: int = 0,
    epochs: int | None = None,
    steps: int | None = None,
    shuffle: bool = True,
    ref_chosen: np.ndarray | None = None,
    ref_rejected: np.ndarray | None = None,
    columns: Mapping[str, np.ndarray] | None = None,
    max_segments: int | None = None,
    share_prompts: bool = False,
    row_multiple: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Batches of preference pairs: the arrays [A, R, T] of `sft_batches`, and pair tables [A, N]: `chosen`, `rejected`
    int32 (flat index row x S + segment - 1 into the [R, S] segments of the micro-batch over all hosts, as the step sees
    it), `p_chosen`, `weight` (0: padding), `ref_chosen`, `ref_rejected` float32, `pair_index` int32 (which of `pairs`;
    -1: padding).

    Both sides of a pair lie in the same two rows, so in one micro-batch and on one host. Without packing, a micro-batch
    has `micro_batch` pairs in twice as many rows (S = 1, N = `micro_batch`). With packing, `batch_size` and
    `micro_batch` count rows (an even number), and a batch holds as many pairs as fit. Hosts get slices of rows and of
    pair slots alike.

    With `share_prompts` (and packing) the two rows become one of 2 T, and what both sides begin with is computed once:
    the chosen segment is prompt and answer, the rejected one the prompt's last token and the other answer, with the
    positions that they have in their dialogue. The array `prefix` int32 [A, R, 2 T] says how many tokens of the
    segment before it a token's segment continues, that is sees as well; 0: none, as of pairs without a common start.

    Args:
      ref_chosen, ref_rejected: float [len(pairs)], the reference's summed log-probs; None: zeros.
      columns: further tables, one row per pair given: [len(pairs), ...] becomes float32 [A, N, ...], 0 at padding.
      others: as `sft_batches`. `shuffle=False, epochs=1` visits every usable pair once.

    Raises: as `sft_batches`.
    """
    sides = [(pair.chosen, pair.rejected) for pair in pairs]
    keep, report = usable(sides)
    layout = make_layout(
        batch_size=batch_size,
        micro_batch=micro_batch,
        max_length=max_length,
        max_segments=max_segments,
        packing=packing,
        row_multiple=row_multiple,
        process_count=process_count,
        of_pairs=True,
        share_prompts=share_prompts,
    )
    used = [sides[i] for i in keep]
    starts = shared_starts(used) if share_prompts else None
    table = TokenTable([side for pair in used for side in pair], starts)
    _check_lengths(table, layout, keep, sides=2)
    extra = {name: _column(name, values, len(pairs), keep) for name, values in (columns or {}).items()}
    table_columns = extra | {
        "p_chosen": np.asarray([pairs[i].p_chosen for i in keep], np.float32),
        "weight": np.asarray([pairs[i].weight for i in keep], np.float32),
        "ref_chosen": _reference(ref_chosen, len(pairs), keep),
        "ref_rejected": _reference(ref_rejected, len(pairs), keep),
        "pair_index": np.asarray(keep, np.int32),
    }

    def plan(epoch: int) -> _PairPlan:
        order = epoch_order(len(keep), seed, epoch, shuffle)
        if packing:
            size = (layout.row_length, layout.max_segments)
            placed = pack_pairs(order, table.lengths, *size, layout.group_rows)
        else:
            placed = two_rows_per_pair(order)
        return _PairPlan.of(placed, layout)

    return Batches(
        _PairSteps(
            layout=layout,
            report=report,
            flags=flags(sides),
            fingerprint=_fingerprint(
                table,
                layout,
                batch_size,
                packing,
                seed,
                shuffle,
                p=table_columns["p_chosen"].tolist(),
                **{name: values.tolist() for name, values in extra.items()},
            ),
            table=table,
            schedule=Schedule(plan, epochs, steps, None if packing else math.ceil(len(keep) / batch_size)),
            host=Host(process_index, process_count),
            pad_id=pad_id,
            columns=table_columns,
        )
    )


@dataclass(frozen=True)
class _PairPlan:
    """An epoch's pairs. flat: int64 [2n], each side's index into its micro-batch's [R, S] segments."""

    placed: Pairs
    flat: np.ndarray
    steps: int

    @classmethod
    def of(cls, placed: Pairs, layout: Layout) -> "_PairPlan":
        rows = placed.rows
        flat = np.empty(len(rows.example), np.int64)
        flat[rows.example] = rows.row % layout.used_rows * layout.max_segments + rows.segment - 1
        groups = layout.micro_batches * layout.groups
        return cls(placed, flat, math.ceil((int(placed.group[-1]) + 1) / groups))


@dataclass(frozen=True)
class _PairSteps:
    """Random access to a run's batches of pairs. columns: per pair of the table."""

    layout: Layout
    report: Report
    flags: np.ndarray
    fingerprint: str
    table: TokenTable
    schedule: Schedule[_PairPlan]
    host: Host
    pad_id: int
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return self.schedule.total

    def __getitem__(self, index: int) -> Batch:
        plan, within = self.schedule.locate(index)
        layout, placed = self.layout, plan.placed
        batch = _assemble(self, rows_of_host(rows_of_step(placed.rows, within, layout), layout, self.host))
        per_micro = layout.groups
        first = within * layout.micro_batches * per_micro
        start, stop = np.searchsorted(placed.group, [first, first + layout.micro_batches * per_micro])
        pair = placed.pair[start:stop]
        micro, group = np.divmod(placed.group[start:stop] - first, per_micro)
        slot = group * layout.group_slots + placed.slot[start:stop]
        columns = {name: values[pair] for name, values in self.columns.items()}
        columns["chosen"] = plan.flat[2 * pair].astype(np.int32)
        columns["rejected"] = plan.flat[2 * pair + 1].astype(np.int32)
        for name, values in columns.items():
            padding = -1 if name == "pair_index" else 0
            whole = np.full((layout.micro_batches, layout.pairs, *values.shape[1:]), padding, values.dtype)
            whole[micro, slot] = values
            batch[name] = whole[:, self.host.slice(layout.pairs)]
        return batch


# ---- both ------------------------------------------------------------------------------------------------------


def _assemble(steps: _SftSteps | _PairSteps, rows: Rows) -> Batch:
    layout = steps.layout
    micro, height, length = layout.micro_batches, layout.rows // steps.host.count, layout.row_length
    batch = steps.table.assemble(rows, micro * height, length, steps.pad_id)
    return {name: array.reshape(micro, height, length) for name, array in batch.items()}


def _check_lengths(table: TokenTable, layout: Layout, keep: Sequence[int], sides: int = 1) -> None:
    lengths = table.lengths if table.starts is None else table.lengths + table.starts
    room = layout.row_length * layout.group_rows // 2 if layout.pairs else layout.row_length
    worst = int(np.argmax(lengths))
    if lengths[worst] > room:
        raise ValueError(
            f"example {keep[worst // sides]} has {lengths[worst]} tokens, more than the row length "
            f"{room}; encode with the same `max_length`"
        )


def _reference(values: np.ndarray | None, n: int, keep: Sequence[int]) -> np.ndarray:
    if values is None:
        return np.zeros(len(keep), np.float32)
    if np.shape(values) != (n,):
        raise ValueError(
            f"reference log-probs have shape {np.shape(values)}, expected ({n},), one per pair given"
        )
    return np.asarray(values, np.float32)[np.asarray(keep)]


def _column(name: str, values: np.ndarray, n: int, keep: Sequence[int]) -> np.ndarray:
    if len(values) != n:
        raise ValueError(f"the column `{name}` has {len(values)} rows, expected {n}, one per pair given")
    return np.asarray(values, np.float32)[np.asarray(keep)]


def _fingerprint(
    table: TokenTable, layout: Layout, batch_size: int, packing: bool, seed: int, shuffle: bool, **more: Any
) -> str:
    """Of all that decides which example is in which step. Not: hosts, padding, and, without packing, micro-batches."""
    packed = [layout.max_segments, layout.used_rows] if packing else None
    return fingerprint(
        {
            "data": table.digest(),
            "batch_size": batch_size,
            "row_length": layout.row_length,
            "packed": packed,
            "seed": seed,
            "shuffle": shuffle,
            **more,
        }
    )
