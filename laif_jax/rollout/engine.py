"""The decoding machinery: one compiled prefill and one compiled decode loop over an explicit state.

`prefill` fills the cache of a batch of prompts and draws each row's first token; `decode` takes up to `steps` more
steps in one dispatch and stops early when enough rows are done; `emit` draws from logits and records. All that a row is
lives in `DecodeState` (its cache, position, count) and `RowSettings` (its key, temperature, limit), both indexed by
row, none by batch: so `laif_jax.rollout.slots` can give a finished row's place to another prompt. `Engine.run` is the
plain loop: one batch, from its first token to its last.

A row's random numbers come from its own key and its own count of drawn tokens. So a row's result does not depend on the
other rows, on the batch size or on padding, beyond the float rounding of differently shaped matrix products.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from laif_jax.models.cache import Cache, Kind, init_cache
from laif_jax.models.config import ModelConfig
from laif_jax.models.decoder import decode_step, logits, unstack_layers
from laif_jax.models.decoder import prefill as prefill_model
from laif_jax.rollout.buckets import length_bucket
from laif_jax.rollout.placement import place, row_sharding, row_shards, spread, to_host, using
from laif_jax.rollout.sampling import SamplingParams, sample, token_logps, top_logps

TRACES: Counter[str] = Counter()  # how often each function was traced; tests hold compilation down with it


class RowSettings(NamedTuple):
    """What a row was asked for. `keys`: PRNG key data [B, W] uint32; `limit`: tokens to draw at most, [B] int32."""

    keys: jax.Array | np.ndarray
    sampling: SamplingParams
    limit: jax.Array | np.ndarray


class DecodeState(NamedTuple):
    """Where every row stands. N: capacity of the output, K: number of top log-probs.

    `token` [B] is the last drawn token and `index` [B] the position it will be fed at; `count` [B] tokens were drawn,
    an EOS included; `alive` [B] rows go on; `stopped` [B] rows drew an EOS. `raw_logps`, `top_ids` and `top_values`
    hold log-probs at temperature 1 and are None unless asked for.
    """

    cache: Any
    token: jax.Array
    index: jax.Array
    count: jax.Array
    alive: jax.Array
    stopped: jax.Array
    tokens: jax.Array  # [B, N] int32
    logps: jax.Array  # [B, N] float32
    raw_logps: jax.Array | None  # [B, N] float32
    top_ids: jax.Array | None  # [B, N, K] int32
    top_values: jax.Array | None  # [B, N, K] float32


@dataclass(frozen=True)
class Row:
    """One request: a prompt and how to continue it. `key`: PRNG key data, uint32 [W]."""

    tokens: Sequence[int]
    key: np.ndarray
    limit: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class RowOutput:
    """What a row drew. `tokens` [n] leaves out the EOS; `logps` and the arrays at temperature 1 keep its entry."""

    tokens: list[int]
    logps: list[float]
    stopped: bool
    drawn: list[int] = field(default_factory=list)  # tokens, with the EOS where one was drawn
    raw_logps: list[float] | None = None
    top_ids: np.ndarray | None = None
    top_values: np.ndarray | None = None


# ---- compiled functions ----------------------------------------------------------------------------------------


def emit(
    out: jax.Array, state: DecodeState, settings: RowSettings, eos_ids: jax.Array, top: int | None
) -> DecodeState:
    """Draws a token per living row from logits `out` [B, V] float32 and records it."""
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(jnp.asarray(settings.keys)), state.count)
    draw = sample(out, keys, settings.sampling)
    rows = jnp.arange(out.shape[0])
    column = jnp.where(state.alive, state.count, state.tokens.shape[1])  # beyond the end: dropped

    def record(buffer: jax.Array, value: jax.Array) -> jax.Array:
        return buffer.at[rows, column].set(value, mode="drop")

    ended = (draw.tokens[:, None] == eos_ids[None, :]).any(axis=-1)
    count = state.count + state.alive
    state = state._replace(
        token=jnp.where(state.alive, draw.tokens, state.token),
        index=state.index + state.alive,
        count=count,
        alive=state.alive & ~ended & (count < settings.limit),
        stopped=state.stopped | (state.alive & ended),
        tokens=record(state.tokens, draw.tokens),
        logps=record(state.logps, draw.logps),
    )
    if state.raw_logps is not None:
        state = state._replace(raw_logps=record(state.raw_logps, token_logps(out, draw.tokens)))
    if top and state.top_ids is not None and state.top_values is not None:
        ids, values = top_logps(out, top)
        state = state._replace(
            top_ids=record(state.top_ids, ids), top_values=record(state.top_values, values)
        )
    return state


def empty_state(cache: Cache, rows: int, capacity: int, top: int | None) -> DecodeState:
    """Rows that draw nothing, yet; `capacity` and `top` as for `compiled`."""

    def record(*more: int, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.zeros((rows, capacity, *more), dtype)

    return DecodeState(
        cache=cache,
        token=jnp.zeros((rows,), jnp.int32),
        index=jnp.zeros((rows,), jnp.int32),
        count=jnp.zeros((rows,), jnp.int32),
        alive=jnp.zeros((rows,), bool),
        stopped=jnp.zeros((rows,), bool),
        tokens=record(dtype=jnp.int32),
        logps=record(),
        raw_logps=None if top is None else record(),
        top_ids=record(top, dtype=jnp.int32) if top else None,
        top_values=record(top) if top else None,
    )


def state_sharding(mesh: Mesh) -> DecodeState:
    """Rows over the mesh; the cache's sharding follows the parameters' and the rows'."""
    return DecodeState(None, *cast(Any, [row_sharding(mesh)] * 10))


class Compiled(NamedTuple):
    """`prefill(params, tokens, lengths, settings, eos_ids, cache_length) -> state`;
    `decode(params, state, settings, eos_ids, keep, steps, enough) -> state`, which takes over (donates) the state."""

    prefill: Callable[..., DecodeState]
    decode: Callable[..., DecodeState]


@functools.lru_cache(maxsize=64)
def compiled(
    cfg: ModelConfig,
    dtype: Any,
    capacity: int,
    top: int | None,
    mesh: Mesh | None = None,
    kv_cache: Kind = "compute",
) -> Compiled:
    """The two jitted functions for a model; memoised, so that stages, arms and seeds of a process share them.

    Args:
      dtype: of compute. capacity: N, tokens that a row can draw at most.
      top: None: no log-probs at temperature 1; 0: the drawn token's; k > 0: also those of the k best tokens.
      mesh: rows are spread over its axes data and fsdp; None: the default device.
      kv_cache: how keys and values are kept, see `models.cache`.
    """

    def prefill(
        params: Any,
        tokens: jax.Array,
        lengths: jax.Array,
        settings: RowSettings,
        eos_ids: jax.Array,
        cache_length: int,
    ) -> DecodeState:
        TRACES["prefill"] += 1
        cache = init_cache(cfg, tokens.shape[0], cache_length, dtype, kv_cache)
        hidden, filled = prefill_model(params, cfg, tokens, lengths, cache, dtype=dtype)[:2]
        state = empty_state(cast(Cache, filled), tokens.shape[0], capacity, top)
        state = state._replace(index=lengths - 1, alive=jnp.asarray(settings.limit) > 0)
        return emit(logits(params, cfg, hidden), state, settings, eos_ids, top)

    def decode(
        params: Any,
        state: DecodeState,
        settings: RowSettings,
        eos_ids: jax.Array,
        keep: jax.Array,
        steps: jax.Array,
        enough: jax.Array,
    ) -> DecodeState:
        TRACES["decode"] += 1

        def go_on(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
            done, now = carry
            return (done < steps) & now.alive.any() & ((~now.alive).sum() < enough)

        def step(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
            done, now = carry
            hidden, cache = decode_step(params, cfg, now.token, now.index, now.cache, dtype=dtype)
            now = emit(logits(params, cfg, hidden), now._replace(cache=cache), settings, eos_ids, top)
            return done + 1, now

        state = state._replace(alive=state.alive & keep)
        return lax.while_loop(go_on, step, (jnp.int32(0), state))[1]

    if mesh is None:
        return Compiled(
            jax.jit(prefill, static_argnames="cache_length"), jax.jit(decode, donate_argnames="state")
        )
    rows, everywhere, state = row_sharding(mesh), NamedSharding(mesh, PartitionSpec()), state_sharding(mesh)
    return Compiled(
        jax.jit(
            prefill,
            static_argnames="cache_length",
            in_shardings=(None, rows, rows, rows, everywhere),
            out_shardings=state,
        ),
        jax.jit(
            decode,
            donate_argnames="state",
            in_shardings=(None, state, rows, everywhere, rows, everywhere, everywhere),
            out_shardings=state,
        ),
    )


# ---- engine ----------------------------------------------------------------------------------------------------


class Engine:
    """A model ready to generate: layer weights unstacked once, compiled functions shared through `compiled`.

    Unstacking once matters: a scan over stacked layer weights inside the decode loop copies them for every token
    (measured 1.25 times slower on a CPU, 135M parameters, batch 8).
    """

    def __init__(
        self,
        params: Any,
        cfg: ModelConfig,
        *,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
        pad_id: int | None = None,
        eos_ids: Sequence[int] | None = None,
        max_length: int | None = None,
        kv_cache: Kind = "compute",
    ) -> None:
        """`max_length`: tokens of prompt and output together; None: the model's context. `kv_cache`: "int8" keeps keys
        and values in 8 bits, with a scale per token and head (`models.cache`)."""
        self.cfg = cfg
        self.kv_cache: Kind = kv_cache
        self.dtype = jnp.dtype(dtype)
        self.pad_id = pad_id or 0  # any token will do: padding is masked by length
        ends = list(cfg.eos_ids if eos_ids is None else eos_ids)
        # Padded with an id that no token has, so that models and templates with few ends share a compiled shape.
        self.eos_ids = np.asarray(ends + [-1] * (-len(ends) % 8 or 8 * (not ends)), np.int32)
        self.max_length = min(max_length or cfg.max_position, cfg.max_position)
        params, self.mesh = place(params, mesh)
        with using(self.mesh):
            self.params = unstack(params, cfg, self.dtype)
        self._key_width = jax.random.key_data(jax.random.key(0)).shape[-1]

    def seeded_key(self, seed: int, index: int) -> np.ndarray:
        """PRNG key data for sample `index` of a request with `seed`, without a device computation."""
        digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
        return np.frombuffer(digest, np.uint32)[: self._key_width]

    @property
    def row_multiple(self) -> int:
        """Rows of a batch are a multiple of this: the devices that they are spread over."""
        return row_shards(self.mesh)

    def run(
        self,
        rows: Sequence[Row],
        *,
        capacity: int,
        batch_size: int,
        top: int | None = None,
        chunk: int | None = None,
        halt: Callable[[list[RowOutput]], Sequence[bool]] | None = None,
    ) -> list[RowOutput]:
        """Generates for one batch of at most `batch_size` rows, padded to exactly that (and to whole devices); it is
        done when its longest row is. For more rows than a batch see `slots.generate_rows`.

        Args:
          capacity: tokens that any row may draw; a row's own `limit` may be lower. One compilation per value.
          top: see `compiled`.
          chunk: decode steps per dispatch; None: all of them in one.
          halt: called between dispatches with what every row drew so far; True stops that row.

        Raises:
          ValueError: a row has no tokens, too many, or asks for more than the capacity.
          FloatingPointError: the model's logits are not finite.
        """
        if not 0 < len(rows) <= batch_size:
            raise ValueError(f"{len(rows)} rows for a batch of {batch_size}: give 1 to {batch_size}")
        self.check(rows, capacity)
        size = -(-batch_size // self.row_multiple) * self.row_multiple
        width = length_bucket(max(len(row.tokens) for row in rows), self.max_length)
        tokens, lengths, settings = spread(self._arrays(rows, size, width), self.mesh)
        run = compiled(self.cfg, self.dtype, capacity, top, self.mesh, self.kv_cache)
        cache_length = min(width + capacity, self.max_length)
        keep = np.ones((size,), bool)
        step = np.int32(capacity if chunk is None else chunk)
        with using(self.mesh):
            state = run.prefill(self.params, tokens, lengths, settings, self.eos_ids, cache_length)
            while to_host(state.alive).any():
                going = spread(keep, self.mesh)
                state = run.decode(self.params, state, settings, self.eos_ids, going, step, np.int32(size))
                if halt is not None:
                    keep[: len(rows)] &= ~np.asarray(halt(outputs(state, range(len(rows)))), bool)
        return outputs(state, range(len(rows)))

    def check(self, rows: Sequence[Row], capacity: int) -> None:
        """Raises ValueError for a row that cannot be generated."""
        for i, row in enumerate(rows):
            if not row.tokens:
                raise ValueError(f"row {i} has an empty prompt: give at least one token, such as BOS")
            if len(row.tokens) + row.limit > self.max_length or row.limit > capacity:
                raise ValueError(
                    f"row {i}: {len(row.tokens)} prompt tokens and a limit of {row.limit} new ones do not fit the "
                    f"context of {self.max_length} (capacity {capacity}); lower the limit or shorten the prompt"
                )

    def _arrays(
        self, rows: Sequence[Row], size: int, width: int
    ) -> tuple[np.ndarray, np.ndarray, RowSettings]:
        """Right-padded tokens [size, width], lengths [size], settings. Padding rows have length 1 and limit 0."""
        settings = empty_settings(size, len(rows[0].key))
        for i, row in enumerate(rows):
            set_row(settings, i, row)
        return *self.padded([row.tokens for row in rows], size, width), settings

    def padded(
        self, prompts: Sequence[Sequence[int]], size: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Right-padded tokens [size, width] and lengths [size], those of padding rows being 1."""
        tokens = np.full((size, width), self.pad_id, np.int32)
        lengths = np.ones((size,), np.int32)
        for i, prompt in enumerate(prompts):
            tokens[i, : len(prompt)], lengths[i] = prompt, len(prompt)
        return tokens, lengths


def empty_settings(rows: int, key_width: int) -> RowSettings:
    """Settings of rows that draw nothing."""
    numbers = np.zeros((rows,), np.float32), np.ones((rows,), np.float32), np.zeros((rows,), np.int32)
    keys, limit = np.zeros((rows, key_width), np.uint32), np.zeros((rows,), np.int32)
    return RowSettings(keys, SamplingParams(*numbers), limit)


def set_row(settings: RowSettings, i: int, row: Row) -> None:
    """Writes what a row asks for into place `i` of settings made by `empty_settings`."""
    places: Any = (settings.keys, *settings.sampling, settings.limit)
    values = (row.key, row.temperature, row.top_p, row.top_k, row.limit)
    for place_of, value in zip(places, values, strict=True):
        place_of[i] = value


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"))
def unstack(params: Any, cfg: ModelConfig, dtype: Any) -> Any:
    """Weights per layer, cast once to the compute dtype, which each use would cast them to. Norms compute in float32
    from the weights as they are, here as in training, so they are left alone."""

    def convert(path: Any, leaf: jax.Array) -> jax.Array:
        in_norm = any(str(getattr(entry, "key", "")).endswith("norm") for entry in path)
        return leaf if in_norm else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(convert, unstack_layers(params, cfg))


def outputs(state: DecodeState, places: Sequence[int], names: Sequence[int] | None = None) -> list[RowOutput]:
    """What the rows at these places drew, as plain values.

    Args:
      names: what an error calls the rows; None: their places.

    Raises:
      FloatingPointError: the model's logits were not finite.
    """
    count, stopped, tokens, logps = map(to_host, (state.count, state.stopped, state.tokens, state.logps))
    raw = None if state.raw_logps is None else to_host(state.raw_logps)
    ids = None if state.top_ids is None else to_host(state.top_ids)
    values = None if state.top_values is None else to_host(state.top_values)
    found = []
    for i, name in zip(places, places if names is None else names, strict=True):
        n = int(count[i])
        finite = np.isfinite(logps[i, :n])
        if not finite.all():
            raise FloatingPointError(
                f"the model's logits are not finite (row {name}, new token {int(np.argmin(finite))}): the weights or "
                "the compute dtype are at fault; try dtype float32, and check the checkpoint's training"
            )
        drawn = tokens[i, :n].tolist()
        found.append(
            RowOutput(
                tokens=drawn[:-1] if stopped[i] else drawn,
                logps=logps[i, :n].tolist(),
                stopped=bool(stopped[i]),
                drawn=drawn,
                raw_logps=None if raw is None else raw[i, :n].tolist(),
                top_ids=None if ids is None else ids[i, :n],
                top_values=None if values is None else values[i, :n],
            )
        )
    return found
