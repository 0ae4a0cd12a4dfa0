"""Generation of many rows in a few slots: a finished row's slot is given to the next prompt.

A batch that runs until its longest row is done computes for finished rows, too: with limits of 8 to 256 tokens and 8
rows, 4 of 10 decoded tokens. Here the decode loop stops (on the device, without a look from the host at every token)
when enough slots are free; the host takes out what they drew, prefills the next prompts in a group, writes their keys
and values into the free slots, and goes on.

* A prompt is prefilled once for all of its samples: a sample that finds its prompt in some slot, running or finished,
  gets a copy of that part of the cache.
* The cache is as long as the living rows need, and grows in the steps of `length_bucket`.
* Programs per shape: prefill by prompt length, insertion by prompt and cache length, start and decode by cache length.

A row's tokens are those that `Engine.run` gives: they depend on its own key and its own prompt, up to the float
rounding of differently shaped products. What the host decides follows from the rows and from which of them are done, so
it is the same on every process; rows that lie over several processes are left to `Engine.run` all the same (see
`generate`), for an insertion there would send caches between hosts.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from laif_jax.models.cache import Cache, Kind, copy_rows, init_cache, lengthened, put_rows
from laif_jax.models.config import ModelConfig
from laif_jax.models.decoder import logits
from laif_jax.models.decoder import prefill as prefill_model
from laif_jax.rollout.buckets import batch_bucket, length_bucket
from laif_jax.rollout.engine import (
    TRACES,
    DecodeState,
    Engine,
    Row,
    RowOutput,
    RowSettings,
    compiled,
    emit,
    empty_settings,
    empty_state,
    outputs,
    set_row,
    state_sharding,
)
from laif_jax.rollout.placement import row_sharding, to_host, using

ROOM = 128  # new tokens that the first cache has room for
SHARE = 8  # slots are refilled when one in so many is free: a prefill of few rows costs about as much as a decode step


class SlotFunctions(NamedTuple):
    """Jitted, for P prompts and B slots; `hidden` is that of each slot's last prompt token, [B, D].

    `prefill(params, tokens [P, W], lengths [P]) -> (cache of length W, hidden [P, D])`;
    `insert(state, hidden, cache, new_hidden, slots [P]) -> (state, hidden)`, which takes over the first two;
    `start(params, state, hidden, settings, eos_ids, lengths [B], fresh [B], source [B], copied) -> (state, hidden)`,
    which takes over the state: `fresh` slots first get the first `copied` (static; 0: none) positions of the slots
    `source`, and draw their first token;
    `empty(size, length) -> (state, hidden)`; `grow(state, length) -> state`.
    """

    prefill: Callable[..., tuple[Cache, jax.Array]]
    insert: Callable[..., tuple[DecodeState, jax.Array]]
    start: Callable[..., tuple[DecodeState, jax.Array]]
    empty: Callable[..., tuple[DecodeState, jax.Array]]
    grow: Callable[..., DecodeState]


@functools.lru_cache(maxsize=64)
def slot_functions(
    cfg: ModelConfig, dtype: Any, capacity: int, top: int | None, mesh: Mesh | None, kv_cache: Kind
) -> SlotFunctions:
    """What surrounds `engine.compiled`'s decode loop, with the same arguments; memoised like it."""

    def prefill(params: Any, tokens: jax.Array, lengths: jax.Array) -> tuple[Cache, jax.Array]:
        TRACES["slots/prefill"] += 1
        cache = init_cache(cfg, *tokens.shape, dtype, kv_cache)
        hidden, filled = prefill_model(params, cfg, tokens, lengths, cache, dtype=dtype)[:2]
        return cast(Cache, filled), hidden

    def insert(
        state: DecodeState, hidden: jax.Array, cache: Cache, new_hidden: jax.Array, slots: jax.Array
    ) -> tuple[DecodeState, jax.Array]:
        TRACES["slots/insert"] += 1
        state = state._replace(cache=put_rows(state.cache, cache, slots))
        return state, hidden.at[slots].set(new_hidden, mode="drop")

    def start(
        params: Any,
        state: DecodeState,
        hidden: jax.Array,
        settings: RowSettings,
        eos_ids: jax.Array,
        lengths: jax.Array,
        fresh: jax.Array,
        source: jax.Array,
        copied: int,
    ) -> tuple[DecodeState, jax.Array]:
        TRACES["slots/start"] += 1
        if copied:
            state = state._replace(cache=copy_rows(state.cache, source, copied))
            hidden = hidden[source]
        others = state.alive & ~fresh
        state = state._replace(
            index=jnp.where(fresh, lengths - 1, state.index),
            count=jnp.where(fresh, 0, state.count),
            stopped=state.stopped & ~fresh,
            alive=fresh & (jnp.asarray(settings.limit) > 0),
        )
        state = emit(logits(params, cfg, hidden), state, settings, eos_ids, top)
        return state._replace(alive=state.alive | others), hidden

    def empty(size: int, length: int) -> tuple[DecodeState, jax.Array]:
        cache = init_cache(cfg, size, length, dtype, kv_cache)
        return empty_state(cache, size, capacity, top), jnp.zeros((size, cfg.hidden_size), dtype)

    def grow(state: DecodeState, length: int) -> DecodeState:
        return state._replace(cache=lengthened(state.cache, length))

    ins: dict[str, Any] = {}
    outs: dict[str, Any] = dict.fromkeys(("prefill", "insert", "start", "empty", "grow"))
    if mesh is not None:
        rows, whole, state = row_sharding(mesh), NamedSharding(mesh, PartitionSpec()), state_sharding(mesh)
        slots: Any = (state, rows)
        ins = {
            "prefill": (None, rows, rows),
            "insert": (state, rows, None, rows, whole),
            "start": (None, state, rows, rows, whole, rows, rows, whole),
        }
        outs = {"prefill": (None, rows), "insert": slots, "start": slots, "empty": slots, "grow": state}

    def jitted(name: str, function: Callable[..., Any], **options: Any) -> Any:
        if name in ins:
            options["in_shardings"] = ins[name]
        return jax.jit(function, out_shardings=outs[name], **options)

    return SlotFunctions(
        jitted("prefill", prefill),
        jitted("insert", insert, donate_argnames=("state", "hidden")),
        jitted("start", start, donate_argnames=("state", "hidden"), static_argnames="copied"),
        jitted("empty", empty, static_argnames=("size", "length")),
        jitted("grow", grow, static_argnames="length"),
    )


def generate_rows(
    engine: Engine,
    rows: Sequence[Row],
    *,
    slots: int,
    capacity: int,
    top: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[RowOutput]:
    """Generates for any number of rows.

    Args:
      slots: rows decoded together (rounded up to whole devices; a power of two where there are fewer rows).
      capacity: tokens that any row may draw; a row's own `limit` may be lower. One compilation per value.
      top: see `engine.compiled`.
      progress: called with the number of rows that are done.

    Returns:
      What each row drew, in the order of `rows`.

    Raises:
      ValueError: a row has no tokens, too many, or asks for more than the capacity.
      FloatingPointError: the model's logits are not finite.
    """
    if not rows:
        return []
    engine.check(rows, capacity)
    with using(engine.mesh):
        return _Run(engine, rows, slots, capacity, top).all(progress)


def _groups(names: Sequence[int]) -> dict[int, list[int]]:
    """The places of each name."""
    found: dict[int, list[int]] = {}
    for i, name in enumerate(names):
        found.setdefault(name, []).append(i)
    return found


class _Run:
    """One call of `generate_rows`: which row is in which slot, and what comes next."""

    def __init__(self, engine: Engine, rows: Sequence[Row], slots: int, capacity: int, top: int | None):
        self.engine, self.rows = engine, rows
        size = batch_bucket(len(rows), slots, engine.row_multiple)
        self.group = batch_bucket(max(size // SHARE, 1), size, engine.row_multiple)
        static = (engine.cfg, engine.dtype, capacity, top, engine.mesh, engine.kv_cache)
        self.decode = compiled(*static).decode
        self.functions = slot_functions(*static)
        # The longest to draw first, so that none of them is left alone at the end; then like lengths together, and all
        # samples of a prompt.
        names = {tokens: i for i, tokens in reversed(list(enumerate(tuple(row.tokens) for row in rows)))}
        self.prompt = [names[tuple(row.tokens)] for row in rows]  # a prompt's name is its first row
        limits = {name: max(rows[i].limit for i in some) for name, some in _groups(self.prompt).items()}
        self.pending = sorted(
            range(len(rows)),
            key=lambda i: (-limits[self.prompt[i]], -len(rows[i].tokens), self.prompt[i], -rows[i].limit, i),
        )
        longest = max(len(row.tokens) for row in rows)
        width = length_bucket(longest, engine.max_length)
        self.full = min(width + capacity, engine.max_length)  # of the cache, at most
        first = max(len(rows[i].tokens) for i in self.pending[:size])
        first = max(length_bucket(first, engine.max_length), first + min(capacity, ROOM))
        self.state, self.hidden = self.functions.empty(size, length_bucket(first, self.full))
        self.settings = empty_settings(size, len(rows[0].key))
        self.occupant: list[int | None] = [None] * size  # slot -> row that draws in it
        self.holds: list[int | None] = [None] * size  # slot -> prompt whose keys and values it has
        self.position = np.zeros((size,), np.int64)  # of each slot's next token
        self.results: list[RowOutput | None] = [None] * len(rows)

    def all(self, progress: Callable[[int], None] | None) -> list[RowOutput]:
        """Runs to the end."""
        done = 0
        while done < len(self.rows):
            free = self.occupant.count(None)
            if self.pending and free >= min(self.group, len(self.pending)):
                self._admit()
            self._decode()
            finished = self._take_out()
            done += finished
            if finished and progress is not None:
                progress(done)
        return [result for result in self.results if result is not None]

    # ---- into the slots ----------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Puts the next rows into the free slots, and draws their first tokens."""
        size = len(self.occupant)
        fresh, source = np.zeros((size,), bool), np.arange(size, dtype=np.int32)
        prefilled: list[tuple[int, int]] = []  # (row, slot)
        copied = 0
        while self.pending and None in self.occupant:
            row = self.pending.pop(0)
            slot, origin = self._place(self.prompt[row])
            if origin is None:
                prefilled.append((row, slot))
            elif origin != slot:
                copied = max(copied, len(self.rows[row].tokens))
                source[slot] = source[
                    origin
                ]  # all copies are made at once: what `origin` is about to get is not there
            self.occupant[slot], self.holds[slot] = row, self.prompt[row]
            self.position[slot] = len(self.rows[row].tokens)
            set_row(self.settings, slot, self.rows[row])
            fresh[slot] = True
        for start in range(0, len(prefilled), self.group):
            self._prefill(prefilled[start : start + self.group])
        self.state, self.hidden = self.functions.start(
            self.engine.params,
            self.state,
            self.hidden,
            self.settings,
            self.engine.eos_ids,
            self.position.astype(np.int32),
            fresh,
            source,
            length_bucket(copied, self.state.cache.length) if copied else 0,
        )

    def _place(self, prompt: int) -> tuple[int, int | None]:
        """A free slot for a row of this prompt, and the slot that has the prompt (None: it must be prefilled).

        A free slot that has the prompt is taken itself: it would be given to another prompt next.
        """
        having = [slot for slot, held in enumerate(self.holds) if held == prompt]
        for slot in having:
            if self.occupant[slot] is None:
                return slot, slot
        return self.occupant.index(None), having[0] if having else None

    def _prefill(self, some: list[tuple[int, int]]) -> None:
        """Prompts of at most a group of rows, into their slots."""
        prompts = [self.rows[row].tokens for row, _ in some]
        width = length_bucket(max(map(len, prompts)), self.engine.max_length)
        self._reach(width)
        slots = np.full((self.group,), len(self.occupant), np.int32)  # of padding rows: none
        slots[: len(some)] = [slot for _, slot in some]
        tokens, lengths = self.engine.padded(prompts, self.group, width)
        cache, hidden = self.functions.prefill(self.engine.params, tokens, lengths)
        self.state, self.hidden = self.functions.insert(self.state, self.hidden, cache, hidden, slots)

    def _reach(self, length: int) -> None:
        """Makes the cache at least this long."""
        if self.state.cache.length < length:
            self.state = self.functions.grow(self.state, length=length_bucket(length, self.full))

    # ---- decoding, and out of the slots ------------------------------------------------------------------------

    def _decode(self) -> None:
        """Steps until enough slots are free for the next rows (all, where none is waiting), or the cache ends."""
        furthest = int(max(self.position[slot] for slot, row in enumerate(self.occupant) if row is not None))
        self._reach(furthest + 1)
        enough = min(self.group, len(self.pending)) if self.pending else len(self.occupant)
        steps = self.state.cache.length - furthest
        self.state = self.decode(
            self.engine.params,
            self.state,
            self.settings,
            self.engine.eos_ids,
            np.ones((len(self.occupant),), bool),
            np.int32(steps),
            np.int32(enough),
        )

    def _take_out(self) -> int:
        """Keeps what finished rows drew, and frees their slots; how many."""
        alive = to_host(self.state.alive)
        self.position = to_host(self.state.index).astype(np.int64)
        done = [slot for slot, row in enumerate(self.occupant) if row is not None and not alive[slot]]
        names = [row for slot in done if (row := self.occupant[slot]) is not None]
        if done:
            for row, result in zip(names, outputs(self.state, done, names), strict=True):
                self.results[row] = result
            for slot in done:
                self.occupant[slot] = None
        return len(done)
