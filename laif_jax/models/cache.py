"""Keys and values of decoding: one layout, in the compute dtype or in int8, and what is done to it row by row.

Keys lie as [B, K, H, S] and values as [B, K, S, H]: in both products of attention the row that is read in one piece is
then the long one. Read the other way round, scores took 5 times as long as the weighted sum of values on a CPU (135M
parameters, batch 8, 448 slots).

In int8 each token's key and each token's value has one scale per head: x is kept as round(x / s), s = max |x| / 127. A
scale is a factor of a score, or of a weight, so the products read int8 and the scales are applied to their results.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp

from laif_jax.models.arch import ModelConfig

Array = jax.Array
Kind = Literal["compute", "int8"]
_TINY = 1e-30  # a key of zeros has a scale, too


class LayerCache(NamedTuple):
    """One layer's keys [B, K, H, S] and values [B, K, S, H]; slot s holds position s. In int8 also float32 scales
    [B, K, S] of both, else None."""

    keys: Array
    values: Array
    key_scales: Array | None = None
    value_scales: Array | None = None

    @property
    def length(self) -> int:
        return self.keys.shape[-1]


class Cache(NamedTuple):
    """The caches of all layers. A pytree: the decode loop's carry."""

    layers: tuple[LayerCache, ...]

    @property
    def length(self) -> int:
        return self.layers[0].length


_TIME = (-1, -2, -1, -1)  # the axis of positions in each array of a layer


def init_cache(
    cfg: ModelConfig, batch: int, length: int, dtype: Any = jnp.float32, kind: Kind = "compute"
) -> Cache:
    """An empty cache for `batch` rows of at most `length` tokens. `kind`: "compute": in `dtype`; "int8"."""
    shape = (batch, cfg.num_kv_heads, cfg.head_dim, length)
    kept = jnp.int8 if kind == "int8" else dtype

    def layer() -> LayerCache:
        scales = [jnp.zeros((*shape[:2], length), jnp.float32) if kind == "int8" else None for _ in range(2)]
        return LayerCache(jnp.zeros(shape, kept), jnp.zeros((*shape[:2], length, shape[2]), kept), *scales)

    return Cache(tuple(layer() for _ in range(cfg.num_layers)))


def quantize(x: Array) -> tuple[Array, Array]:
    """int8 of x [..., H] and its float32 scales [...]."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis=-1), _TINY) / 127.0
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def _kept(like: LayerCache, keys: Array, values: Array) -> LayerCache:
    """Keys and values [B, T, K, H] of T positions, laid and rounded as `like` keeps them."""
    keys, values = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
    if like.key_scales is None:
        return LayerCache(jnp.swapaxes(keys, 2, 3).astype(like.keys.dtype), values.astype(like.values.dtype))
    (keys, key_scales), (values, value_scales) = quantize(keys), quantize(values)
    return LayerCache(jnp.swapaxes(keys, 2, 3), values, key_scales, value_scales)


def with_prompts(layer: LayerCache, keys: Array, values: Array) -> LayerCache:
    """The cache with the prompts' keys and values [B, T, K, H] from position 0 on."""
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim),
        layer,
        _kept(layer, keys, values),
    )


def with_token(layer: LayerCache, key: Array, value: Array, index: Array) -> LayerCache:
    """The cache with one more token per row: key and value [B, 1, K, H] at position `index` int32 [B]."""
    rows = jnp.arange(key.shape[0])

    def write(old: Array | None, new: Array | None, time: int) -> Array | None:
        if old is None or new is None:
            return None
        if time == -2:
            return old.at[rows, :, index].set(new[:, :, 0])
        return old.at[rows, ..., index].set(new[..., 0])

    return LayerCache(*cast(Any, map(write, layer, _kept(layer, key, value), _TIME)))


# ---- rows --------------------------------------------------------------------------------------------------------


def _each(layers: Sequence[LayerCache], function: Any, *others: Sequence[LayerCache]) -> Cache:
    """`function(array, the same array of each of `others`, its time axis)` on every array."""

    def one(*same: LayerCache) -> LayerCache:
        made = [arrays[0] if arrays[0] is None else function(*arrays) for arrays in zip(*same, _TIME)]
        return LayerCache(*cast(Any, made))

    return Cache(tuple(one(*same) for same in zip(layers, *others)))


def put_rows(cache: Cache, new: Cache, slots: Array) -> Cache:
    """Row i of `new`, a cache of at most this length, becomes row `slots[i]`; a slot beyond the rows is left out. What
    a row held behind the new one's length stays, and is seen by nobody: attention goes by position."""

    def put(old: Array, part: Array, time: int) -> Array:
        if time == -2:
            return old.at[slots, :, : part.shape[time]].set(part, mode="drop")
        return old.at[slots, ..., : part.shape[time]].set(part, mode="drop")

    return _each(cache.layers, put, new.layers)


def copy_rows(cache: Cache, source: Array, length: int) -> Cache:
    """The first `length` positions of row i become a copy of those of row `source[i]`; int32 [B]."""

    def copy(x: Array, time: int) -> Array:
        part = jax.lax.slice_in_dim(x, 0, length, axis=time)[source]
        return jax.lax.dynamic_update_slice(x, part, (0,) * x.ndim)

    return _each(cache.layers, copy)


def lengthened(cache: Cache, length: int) -> Cache:
    """The cache with room for `length` tokens."""

    def pad(x: Array, time: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[time] = (0, length - x.shape[time])
        return jnp.pad(x, widths)

    return _each(cache.layers, pad)
