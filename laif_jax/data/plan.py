"""What a run's batches are made of, before any array exists: static sizes, epochs, steps, hosts, dropped rows."""

import functools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import grain
import numpy as np

from laif_jax.data.chat import Encoded
from laif_jax.data.packing import Rows

MAX_SEGMENTS = 64


class Layout(NamedTuple):
    """Static sizes of a run's batches, over all hosts.

    Attributes:
      micro_batches: A. rows: R, rows of a micro-batch, padding rows included. used_rows: those that hold examples.
      row_length: T. max_segments: S. pairs: N = R / 2 x S, pair slots of a micro-batch (0 for dialogues).
      group_rows: rows that a pair lies in: 2, or 1 where its sides share their prompt.
    """

    micro_batches: int
    rows: int
    used_rows: int
    row_length: int
    max_segments: int
    pairs: int
    group_rows: int = 2

    @property
    def groups(self) -> int:
        """Groups of rows that hold the pairs of a micro-batch."""
        return self.used_rows // self.group_rows

    @property
    def group_slots(self) -> int:
        """Pairs that a group has room for."""
        return self.max_segments * self.group_rows // 2


@dataclass(frozen=True)
class Report:
    """What happened to the examples given (dialogues, or pairs: a pair counts once).

    Attributes:
      used: examples in each epoch. no_target: dropped, because no token (of a side) is supervised. special_text:
        dropped, because a message holds the text of a special token, which would end a turn that has not ended.
      prompt_truncated, response_truncated: of those used. unended: used, but an answer has no end of turn.
      tokens, supervised_tokens: per epoch, a shared prompt counted with both answers. pad_fraction: of the first
        epoch's rows.
    """

    given: int
    used: int
    no_target: int
    special_text: int
    prompt_truncated: int
    response_truncated: int
    unended: int
    tokens: int
    supervised_tokens: int
    pad_fraction: float = 0.0


PROMPT_CUT, RESPONSE_CUT, ENDED = 1, 2, 4


def flags(examples: Sequence[Sequence[Encoded]]) -> np.ndarray:
    """uint8 [examples, sides]: what the arrays of a batch do not say; PROMPT_CUT, RESPONSE_CUT and ENDED as bits."""
    bits = [
        [
            PROMPT_CUT * side.prompt_truncated + RESPONSE_CUT * side.response_truncated + ENDED * side.ended
            for side in sides
        ]
        for sides in examples
    ]
    return np.asarray(bits, np.uint8)


def usable(examples: Sequence[Sequence[Encoded]]) -> tuple[list[int], Report]:
    """Which examples (each a dialogue, or the two sides of a pair) can be trained on, and the count of the rest.

    Raises:
      ValueError: none can.
    """
    no_target = [any(not side.supervised for side in sides) for sides in examples]
    special = [any(side.special_text for side in sides) for sides in examples]
    keep = [i for i in range(len(examples)) if not (no_target[i] or special[i])]
    kept = [examples[i] for i in keep]
    report = Report(
        given=len(examples),
        used=len(keep),
        no_target=sum(no_target),
        special_text=sum(s and not n for s, n in zip(special, no_target)),
        prompt_truncated=sum(any(side.prompt_truncated for side in sides) for sides in kept),
        response_truncated=sum(any(side.response_truncated for side in sides) for sides in kept),
        unended=sum(any(not side.ended for side in sides) for sides in kept),
        tokens=sum(len(side.tokens) for sides in kept for side in sides),
        supervised_tokens=sum(side.supervised for sides in kept for side in sides),
    )
    if not keep:
        raise ValueError(
            f"no example can be trained on: of {report.given}, {report.no_target} have no supervised token and "
            f"{report.special_text} hold the text of a special token. Check the completions and `max_length`."
        )
    return keep, report


def make_layout(
    *,
    batch_size: int,
    micro_batch: int | None,
    max_length: int,
    max_segments: int | None,
    packing: bool,
    row_multiple: int,
    process_count: int,
    of_pairs: bool,
    share_prompts: bool = False,
) -> Layout:
    """Sizes from settings alone, so that all runs with the same settings share compiled steps.

    With `share_prompts` (packed pairs) the two rows of a group become one of twice the length, in which any pair fits.

    Raises:
      ValueError: the sizes contradict each other.
    """
    micro = micro_batch or batch_size
    if batch_size % micro:
        raise ValueError(f"`batch_size` {batch_size} is not a multiple of `micro_batch` {micro}")
    length = round_up(max_length, 8)
    segments = (max_segments or min(max(length // 8, 2), MAX_SEGMENTS)) if packing else 1
    if not of_pairs:
        rows = round_up(micro, math.lcm(row_multiple, process_count))
        return Layout(batch_size // micro, rows, micro, length, segments, 0)
    if packing and micro % 2:
        raise ValueError(
            f"`micro_batch` (or `batch_size`) {micro}: packed pairs lie in two rows; give an even number of rows"
        )
    used = micro if packing else 2 * micro
    groups = round_up(used // 2, math.lcm(row_multiple, process_count))
    if not share_prompts:
        return Layout(batch_size // micro, 2 * groups, used, length, segments, groups * segments)
    if not packing:
        raise ValueError("`share_prompts` needs `packing`: a pair that shares its prompt lies in one row")
    segments = 2 * max_segments if max_segments else min(length // 4, MAX_SEGMENTS)
    return Layout(
        batch_size // micro, groups, used // 2, 2 * length, segments, groups * segments // 2, group_rows=1
    )


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """int64 [n]: the epoch's order of examples, a permutation by grain's seeded shuffle."""
    if not shuffle:
        return np.arange(n)
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])  # 32 bits, as grain wants
    shuffled = grain.MapDataset.range(n).shuffle(seed=mixed)
    return np.fromiter((shuffled[i] for i in range(n)), np.int64, n)


# ---- steps -----------------------------------------------------------------------------------------------------


class _Plan(Protocol):
    """An epoch's plan."""

    @property
    def steps(self) -> int: ...


P = TypeVar("P", bound=_Plan)


class Schedule(Generic[P]):
    """Which epoch a step lies in, and that epoch's plan. Plans are made when needed; the last few are kept.

    Args:
      plan: makes an epoch's plan. epochs / steps: the run's length, one of them. steps_per_epoch: if it is the same
        in every epoch; None: it follows from each plan.
    """

    def __init__(
        self, plan: Callable[[int], P], epochs: int | None, steps: int | None, steps_per_epoch: int | None
    ):
        if (epochs is None) == (steps is None) or (epochs or steps or 0) < 1:
            raise ValueError(f"give one of `epochs` ({epochs}) and `steps` ({steps}), at least 1")
        self._lock = threading.Lock()  # grain reads from a thread of its own
        self._plan = functools.lru_cache(maxsize=3)(plan)
        self._steps_per_epoch = steps_per_epoch
        self._starts = [0]
        if epochs is not None:
            for epoch in range(epochs):
                self._extend(epoch)
        self.total = steps if steps is not None else self._starts[-1]

    def _extend(self, epoch: int) -> None:
        self._starts.append(self._starts[-1] + (self._steps_per_epoch or self._plan(epoch).steps))

    def locate(self, step: int) -> tuple[P, int]:
        """The plan of the step's epoch, and the step's number within it."""
        with self._lock:
            while step >= self._starts[-1]:
                self._extend(len(self._starts) - 1)
            epoch = int(np.searchsorted(self._starts, step, side="right")) - 1
            return self._plan(epoch), step - self._starts[epoch]

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) that a step lies in."""
        with self._lock:
            while step >= self._starts[-1]:
                self._extend(len(self._starts) - 1)
            return int(np.searchsorted(self._starts, step, side="right")) - 1

    @property
    def first_epoch(self) -> int:
        """Steps in the first epoch, of which the run may take fewer."""
        with self._lock:
            if len(self._starts) == 1:
                self._extend(0)
            return self._starts[1]


@dataclass(frozen=True)
class Host:
    """Which part of each micro-batch this host makes.

    Raises:
      ValueError: no such host.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"`process_index` {self.index} of `process_count` {self.count}")

    def slice(self, size: int) -> slice:
        """This host's part of an axis of `size`, a multiple of `count`."""
        share = size // self.count
        return slice(self.index * share, (self.index + 1) * share)


def rows_of_step(rows: Rows, step: int, layout: Layout) -> Rows:
    """The rows of one step of an epoch, renumbered from 0."""
    size = layout.micro_batches * layout.used_rows
    start, stop = np.searchsorted(rows.row, [step * size, (step + 1) * size])
    part = Rows(*(column[start:stop] for column in rows))
    return part._replace(row=part.row - step * size)


def rows_of_host(rows: Rows, layout: Layout, host: Host) -> Rows:
    """This host's rows of a step, renumbered as rows of its own [A x R / hosts] block."""
    micro, row = np.divmod(rows.row, layout.used_rows)
    part = host.slice(layout.rows)
    mine = (row >= part.start) & (row < part.stop)
    share = part.stop - part.start
    return Rows(*(column[mine] for column in rows))._replace(row=(micro * share + row - part.start)[mine])
