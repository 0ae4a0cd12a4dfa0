"""Causal attention within segments: one entry point, several equal implementations.

Who sees whom: query t sees key s iff s <= t, both are of the same nonzero segment and, with a sliding window w,
t - s < w. Positions within a segment are contiguous, so array indices serve as distances. A segment may continue the
start of the one before it (two answers to one prompt): it then sees that start too, and distances are those of
positions. Grouped queries (GQA) are contracted with their shared key/value head directly; repeated keys are never made.
What padding queries get is finite and otherwise unspecified.
"""

import contextlib
import contextvars
from collections.abc import Generator
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp

from laif_jax.models.cache import LayerCache
from laif_jax.models.splash import splash_applies, splash_attention, target_platform

Array = jax.Array
Window = int | Array | None  # int32 scalar: how many last tokens are seen; 0 or None: all

BLOCKWISE_ABOVE = 1024  # longer rows are done in blocks of queries and keys: no [T, T] array
BLOCK = 512
CHUNK = 64  # rows of at least two of these are done in at most CHUNKS chunks of queries
CHUNKS = 8
_NOT_FUSED = contextvars.ContextVar("not_fused", default=False)
_FUSED: Literal["cudnn", "xla"] = "cudnn"
_HIDDEN = -1e30  # finite, so that a query that sees nothing gives no NaN


class Continued(NamedTuple):
    """For rows in which segments continue the start of the segment before them, int32 [R, T].

    `positions`: of each token in its dialogue. `prefix`: how many tokens of the segment before it a token's segment
    continues; 0: none.
    """

    positions: Array
    prefix: Array


class Visibility(NamedTuple):
    """What the layers of one forward pass share: segments int32 [R, T], for short rows the mask bool [R, T, T], and
    what continued segments need."""

    segment_ids: Array
    mask: Array | None
    continued: Continued | None = None


def visibility(
    segment_ids: Array,
    window: int = 0,
    *,
    fused: bool = False,
    kernel: bool = False,
    continued: Continued | None = None,
) -> Visibility:
    """Built once per forward pass, outside the loop over layers.

    `window`: the one that all layers share, or 0. `fused`: what `fused_applies` says; it needs the mask at any length.
    `kernel`: what `kernel_applies` says; it needs none, and cannot express continued segments.
    """
    length = segment_ids.shape[1]
    if kernel and continued is None:
        return Visibility(segment_ids, None)
    if length > BLOCKWISE_ABOVE and not fused:
        return Visibility(segment_ids, None, continued)
    all_places = _Places(segment_ids, jnp.arange(length), continued)
    return Visibility(segment_ids, _visible(all_places, all_places, window), continued)


class _Places(NamedTuple):
    """Some columns of the rows: segments [R, t], indices in the row [t], and what continued segments need."""

    segments: Array
    index: Array
    continued: Continued | None


def _visible(q: _Places, k: _Places, window: Window) -> Array:
    """bool [R, Tq, Tk]."""
    ours, theirs = q.segments[:, :, None], k.segments[:, None, :]
    same = ours == theirs
    distance = (q.index[:, None] - k.index[None, :])[None]
    earlier = distance >= 0
    if q.continued is not None and k.continued is not None:
        start = k.continued.positions[:, None, :] < q.continued.prefix[:, :, None]
        same |= (ours == theirs + 1) & start
        distance = _distance(q.continued, k.continued)
    return same & (theirs != 0) & earlier & _in_window(distance, window)


def _distance(q: Continued, k: Continued) -> Array:
    """How far apart tokens are in their dialogue, int32 [R, Tq, Tk]."""
    return q.positions[:, :, None] - k.positions[:, None, :]


def _in_window(distance: Array, window: Window) -> Array:
    seen = distance >= 0
    if window is None or (isinstance(window, int) and window == 0):
        return seen
    if isinstance(window, int):
        return seen & (distance < window)
    return seen & ((distance < window) | (window == 0))


def attention(
    q: Array, k: Array, v: Array, vis: Visibility, *, window: Window, softcap: float | None, scale: float
) -> Array:
    """Attention of a row with itself.

    Args:
      q: [R, T, N, H]. k, v: [R, T, K, H] with N a multiple of K.
      vis: from `visibility`.
      window: an int is the window that all layers share, which `vis.mask` has already; an array is this layer's own.
      softcap: c in c tanh(score / c), or None. scale: factor of the scores.

    Returns:
      [R, T, N, H] in q's dtype; the softmax is computed in float32.
    """
    kernel = vis.continued is None and kernel_applies(q.shape[1], q.shape[3], 0 if window is None else window)
    if vis.mask is None and kernel:
        return splash_attention(
            q, k, v, vis.segment_ids, window=cast(Any, window), softcap=softcap, scale=scale
        )
    if vis.mask is None:
        options: dict[str, Any] = {"window": window, "softcap": softcap, "scale": scale}
        return blockwise_attention(q, k, v, vis.segment_ids, vis.continued, **options)
    mask = vis.mask
    if window is not None and not isinstance(window, int):
        index = jnp.arange(q.shape[1])
        distance = (index[:, None] - index[None, :])[None]
        if vis.continued is not None:
            distance = _distance(vis.continued, vis.continued)
        mask = mask & _in_window(distance, window)
    if fused_applies(q.shape[1], q.shape[3], softcap, q.dtype):
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, implementation=_FUSED)
    form = chunked_attention if q.shape[1] >= 2 * CHUNK else naive_attention
    return form(q, k, v, mask, softcap=softcap, scale=scale)


# ---- naive: all scores at once -----------------------------------------------------------------------------------


def _scores(q: Array, k: Array, softcap: float | None, scale: float) -> Array:
    """float32 [R, K, G, Tq, Tk] from q [R, Tq, K, G, H] and k [R, Tk, K, H]."""
    q = jnp.moveaxis(
        q, 1, 3
    )  # else the product has another order of axes, and the scores are copied, not the queries
    scores = jnp.einsum("rkgth,rskh->rkgts", q, k, preferred_element_type=jnp.float32) * scale
    return scores if softcap is None else jnp.tanh(scores / softcap) * softcap


def naive_attention(
    q: Array, k: Array, v: Array, mask: Array, *, softcap: float | None, scale: float
) -> Array:
    """The reference, and what very short rows get. q: [R, Tq, N, H]. k, v: [R, Tk, K, H]. mask: bool [R, Tq, Tk]."""
    rows, length, heads, head_dim = q.shape
    grouped = q.reshape(rows, length, k.shape[2], heads // k.shape[2], head_dim)
    scores = jnp.where(mask[:, None, None], _scores(grouped, k, softcap, scale), _HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("rkgts,rskh->rtkgh", weights, v).reshape(q.shape)


def chunked_attention(
    q: Array, k: Array, v: Array, mask: Array, *, softcap: float | None, scale: float, chunk: int = CHUNK
) -> Array:
    """`naive_attention` of a row with itself, one chunk of queries after the other against the keys up to its end.

    So nearly half of the scores, those of the future, are never computed, and no weights are kept for the backward
    pass, which recomputes them.

    Args:
      mask: bool [R, T, T], false for all keys behind the query. chunk: queries at a time; more, if there would be more
        than `CHUNKS` of them.
    """
    length = q.shape[1]
    size = max(chunk, -(-length // CHUNKS))
    # Inside a scan over layers there is no common subexpression to guard against.
    run = jax.checkpoint(partial(naive_attention, softcap=softcap, scale=scale), prevent_cse=False)
    parts = []
    for start in range(0, length, size):
        end = min(start + size, length)
        parts.append(run(q[:, start:end], k[:, :end], v[:, :end], mask[:, start:end, :end]))
    return jnp.concatenate(parts, axis=1)


# ---- blockwise: long rows in plain JAX ---------------------------------------------------------------------------


def blockwise_attention(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    continued: Continued | None = None,
    *,
    window: Window,
    softcap: float | None,
    scale: float,
    block: int = BLOCK,
) -> Array:
    """Attention with an online softmax over blocks of keys (Dao et al. 2022, algorithm 1): memory O(T block).

    Blocks of keys that no query of a block can see (future, or left of the window) are skipped. The backward pass
    recomputes each block of queries.
    """
    rows, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    count = -(-length // block)
    padding = count * block - length

    def split(x: Array) -> Array:
        """[R, T, ...] -> [blocks, R, block, ...]"""
        padded = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(rows, count, block, *x.shape[2:]), 1, 0)

    keys, values, segments = split(k), split(v), split(segment_ids)
    parts = jax.tree.map(split, continued)
    queries = split(q.reshape(rows, length, kv_heads, heads // kv_heads, head_dim))
    offsets = jnp.arange(block)

    def places(i: Array) -> _Places:
        return _Places(segments[i], i * block + offsets, jax.tree.map(lambda x: x[i], parts))

    def one_query_block(i: Array, q_block: Array) -> Array:
        """[R, block, K, G, H]"""

        def step(carry: tuple[Array, Array, Array], j: Array) -> tuple[tuple[Array, Array, Array], None]:
            def seen(carry):
                return _online_softmax_step(
                    carry,
                    _scores(q_block, keys[j], softcap, scale),
                    _visible(places(i), places(j), window),
                    values[j],
                )

            nearest = i * block - (
                j * block + block - 1
            )  # distance of the closest pair of tokens in two blocks
            needed = j <= i
            if window is not None and continued is None:
                needed &= (nearest < window) | (jnp.asarray(window) == 0)
            return jax.lax.cond(needed, seen, lambda carry: carry, carry), None

        shape = (rows, kv_heads, heads // kv_heads, block)
        start = (
            jnp.full(shape, _HIDDEN, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, head_dim), jnp.float32),
        )
        (_, total, weighted), _ = jax.lax.scan(jax.checkpoint(step), start, jnp.arange(count))
        out = weighted / jnp.maximum(total, 1e-30)[..., None]
        return jnp.einsum("rkgth->rtkgh", out).astype(q.dtype)

    run = jax.checkpoint(one_query_block)
    blocks = jax.lax.map(lambda x: run(*x), (jnp.arange(count), queries))
    return jnp.moveaxis(blocks, 0, 1).reshape(rows, count * block, heads, head_dim)[:, :length]


def _online_softmax_step(
    carry: tuple[Array, Array, Array], scores: Array, mask: Array, values: Array
) -> tuple[Array, Array, Array]:
    """Adds one block of keys. carry: running maximum and sum [R, K, G, Tq], weighted values [R, K, G, Tq, H]."""
    top, total, weighted = carry
    scores = jnp.where(mask[:, None, None], scores, _HIDDEN)
    new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
    shrink = jnp.exp(top - new_top)
    weights = jnp.where(mask[:, None, None], jnp.exp(scores - new_top[..., None]), 0.0)
    added = jnp.einsum(
        "rkgts,rskh->rkgth", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    return new_top, total * shrink + weights.sum(axis=-1), weighted * shrink[..., None] + added


# ---- decoding: one query per row against the cache ---------------------------------------------------------------


def decode_attention(
    q: Array, cache: LayerCache, index: Array, *, window: int, softcap: float | None, scale: float
) -> Array:
    """One new token per row.

    Args:
      q: [B, 1, N, H]. cache: of the layer; its slot s holds position s. index: int32 [B], the position of the new
        token, already written to the cache.

    Returns:
      [B, 1, N, H].
    """
    batch, _, heads, head_dim = q.shape
    kv_heads = cache.values.shape[1]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    keys, values = cache.keys.astype(q.dtype), cache.values.astype(q.dtype)
    scores = jnp.einsum("bkgh,bkhs->bkgs", grouped, keys, preferred_element_type=jnp.float32) * scale
    if cache.key_scales is not None:
        scores = scores * cache.key_scales[:, :, None]
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    mask = _in_window(index[:, None] - jnp.arange(cache.length)[None, :], window)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, _HIDDEN), axis=-1)
    if cache.value_scales is not None:
        weights = weights * cache.value_scales[:, :, None]
    return jnp.einsum("bkgs,bksh->bkgh", weights.astype(q.dtype), values).reshape(q.shape)


# ---- cuDNN -------------------------------------------------------------------------------------------------------


def fused_applies(length: int, head_dim: int, softcap: float | None, dtype: Any) -> bool:
    """Whether cuDNN's fused attention can run this: its own conditions, on a GPU that has it."""
    shape_fits = length % 2 == 0 and head_dim % 8 == 0 and head_dim <= 128
    fits = softcap is None and shape_fits and dtype in (jnp.bfloat16, jnp.float16)
    return fits and not _NOT_FUSED.get() and _gpu_has_fused()


# ---- TPU ---------------------------------------------------------------------------------------------------------


def kernel_applies(length: int, head_dim: int, window: Window) -> bool:
    """Whether the TPU kernel can run this, see `laif_jax.models.splash`."""
    return not _NOT_FUSED.get() and splash_applies(length, head_dim, window)


@contextlib.contextmanager
def not_fused() -> Generator[None]:
    """Keeps to plain JAX what is traced inside a `vmap` over models: JAX's rule for the fused call reshapes a mask that
    is not itself mapped over as if it were, and the TPU kernel sits in a `shard_map` of its own."""
    token = _NOT_FUSED.set(True)
    try:
        yield
    finally:
        _NOT_FUSED.reset(token)


def _gpu_has_fused() -> bool:
    if target_platform() != "gpu":
        return False
    # An NVIDIA GPU from Ampere on; AMD GPUs name no such number.
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    return capability.replace(".", "", 1).isdigit() and float(capability) >= 8.0
