"""What is read off the hidden states: log-probabilities of tokens in rematerialised chunks, and scalar scores.

The vocabulary head's logits are the largest array of a language model. Here they exist for one block of the vocabulary
at a time, in the forward and in the backward pass: no [R, T, V] array is ever made.

On a mesh every device takes the tokens of its rows and its part of the vocabulary (axis `tensor`): the maximum, the sum
of exponentials and the target's logit are added up over the parts, and logits never leave their device. A block of the
head's weights is gathered over `fsdp` when its turn comes, and its gradient is summed over the mesh at once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from laif_jax.models.arch import ModelConfig
from laif_jax.models.decoder import Params, vocab_logits
from laif_jax.models.sharding import back_together, compiler_partitioned, spec_of
from laif_jax.parallel.mesh import row_parts
from laif_jax.parallel.rules import mesh_in_force, partition_spec

Array = jax.Array
_NEVER = -1e30  # a logit whose exponential is 0, and that is a number when multiplied by it


class TokenStats(NamedTuple):
    """Per token, float32 [R, T]: log-probability, entropy of the distribution it came from, and whether it was the
    most likely token (1.0 or 0.0). All are 0 at the first token of a segment and at padding."""

    logps: Array
    entropy: Array
    correct: Array


def token_logps(
    params: Params,
    cfg: ModelConfig,
    hidden: Array,
    tokens: Array,
    segment_ids: Array,
    *,
    chunk: int = 1024,
    temperature: Array | float = 1.0,
) -> Array:
    """log p(tokens[r, t] | earlier tokens of its segment), float32 [R, T]; 0.0 at first tokens and padding.

    Args:
      hidden: [R, T, D] from `hidden_states`. tokens, segment_ids: int32 [R, T].
      chunk: tokens whose logits exist at a time, on each device.
      temperature: > 0, may be traced; the logits are divided by it, as in sampling.
    """
    options: dict[str, Any] = {"chunk": chunk, "temperature": temperature}
    return token_stats(params, cfg, hidden, tokens, segment_ids, **options, logps_only=True).logps


def token_stats(
    params: Params,
    cfg: ModelConfig,
    hidden: Array,
    tokens: Array,
    segment_ids: Array,
    *,
    chunk: int = 1024,
    temperature: Array | float = 1.0,
    logps_only: bool = False,
) -> TokenStats:
    """`token_logps` with entropy and accuracy from the same pass; with `logps_only` these two are zeros.

    Entropy and accuracy carry no gradient of their own use unless a loss uses them. A tie for the most likely token
    counts as correct.
    """

    def run(
        params: Params, hidden: Array, tokens: Array, segment_ids: Array, temperature: Array
    ) -> TokenStats:
        params, hidden = back_together(params, hidden)
        return _token_stats(params, cfg, hidden, tokens, segment_ids, temperature, chunk, logps_only)

    head = {name: params[name] for name in (("embed",) if cfg.tie_embeddings else ("lm_head",))}
    temperature = jnp.asarray(temperature, jnp.float32)
    args = (head, hidden, tokens, segment_ids, temperature)
    return compiler_partitioned(run, args, lambda: spec_of(tokens))


def _token_stats(
    params: Params,
    cfg: ModelConfig,
    hidden: Array,
    tokens: Array,
    segment_ids: Array,
    temperature: Array,
    chunk: int,
    logps_only: bool,
) -> TokenStats:
    # The hidden state at t predicts token t + 1: targets move left, results move right.
    targets = jnp.roll(tokens, -1, axis=1)
    same = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    valid = jnp.pad(same, ((0, 0), (0, 1)))
    options: dict[str, Any] = {"chunk": chunk, "logps_only": logps_only}
    layout = _layout(params, hidden)
    if layout is None:
        stats = _in_chunks(params, cfg, temperature, hidden, targets, valid, **options)
    else:

        def run(
            params: Params, temperature: Array, hidden: Array, targets: Array, valid: Array
        ) -> TokenStats:
            if layout.gathered:
                hidden = jax.lax.all_gather(hidden, "tensor", axis=1, tiled=True)
            bring = functools.partial(_whole_width, specs=layout.head, dtype=hidden.dtype)
            return _in_chunks(
                params, cfg, temperature, hidden, targets, valid, axis=layout.axis, bring=bring, **options
            )

        ids = P(*layout.hidden[:2]) if not layout.gathered else P(layout.hidden[0], None)
        specs = (layout.head, P(), layout.hidden, ids, ids)
        sharded = jax.shard_map(run, mesh=layout.mesh, in_specs=specs, out_specs=ids)
        stats = sharded(params, temperature, hidden, targets, valid)
    return jax.tree.map(lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0))), stats)


class _Layout(NamedTuple):
    """How the head runs on a mesh. `axis`: what splits the vocabulary, or None; `gathered`: the rows' length is split,
    and comes together first."""

    mesh: Any
    head: Any
    hidden: P
    axis: str | None
    gathered: bool


def _layout(params: Params, hidden: Array) -> _Layout | None:
    """None without a mesh, or where the rows do not divide over it: then the compiler places what is computed."""
    mesh = mesh_in_force(hidden)
    if mesh is None or mesh.size == 1 or hidden.shape[0] % row_parts(mesh):
        return None
    axes = {"embedding": ("vocab", "embed"), "kernel": ("embed", "vocab")}
    head = jax.tree_util.tree_map_with_path(
        lambda path, leaf: partition_spec(axes[path[-1].key], leaf.shape, mesh), params
    )
    spec = partition_spec(("batch", "length", "embed"), hidden.shape, mesh)
    split = any("tensor" in leaf for leaf in jax.tree.leaves(head, is_leaf=lambda leaf: isinstance(leaf, P)))
    return _Layout(mesh, head, spec, "tensor" if split else None, split and spec[1] == "tensor")


def _whole_width(block: Params, *, specs: Any, dtype: Any) -> Params:
    """A block of this device's part of the vocabulary over the whole width, inside a `shard_map`. It travels in the
    compute dtype, and so does its gradient on the way back."""

    def one(part: Array, spec: P) -> Array:
        part = part.astype(dtype)
        for dim, entry in enumerate(spec):
            if entry is not None and entry != "tensor":
                part = jax.lax.all_gather(part, entry, axis=dim, tiled=True)
        return part

    return jax.tree.map(one, block, specs)


def _in_chunks(
    params: Params,
    cfg: ModelConfig,
    temperature: Array,
    hidden: Array,
    targets: Array,
    valid: Array,
    *,
    chunk: int,
    logps_only: bool,
    axis: str | None = None,
    bring: Callable[[Params], Params] = lambda block: block,
) -> TokenStats:
    """Stats [R, T] of hidden states [R, T, D].

    At most `chunk` times V logits exist at a time. They are of a block of the vocabulary and of all tokens, if those
    are no more than the vocabulary has entries: every block's gradient is then complete at once, and what is summed
    over blocks, the gradient of `hidden`, is smaller than the head's weights. More tokens are cut along the time axis
    first, so that rows stay sharded as they are.

    Args:
      axis: the devices of this mesh axis hold parts of the vocabulary. bring: makes a block of the weights ready.
    """
    rows, length, _ = hidden.shape
    leaf = jax.tree.leaves(params)[0]
    vocab = leaf.shape[0] if cfg.tie_embeddings else leaf.shape[1]
    count = max(1, -(-rows * length // max(chunk, vocab)))
    steps = -(-length // count)
    count = -(-length // steps)
    blocks = _blocks(params, cfg, min(vocab, -(-rows * steps // chunk)))

    def one(part: tuple[Array, Array, Array]) -> TokenStats:
        return _stats(blocks, cfg, temperature, *part, logps_only, axis, vocab, bring)

    if count == 1:
        return one((hidden, targets, valid))
    padding = count * steps - length

    def split(x: Array) -> Array:
        """[R, T, ...] -> [chunks, R, steps, ...]"""
        padded = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(rows, count, steps, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(rows, count * steps)[:, :length]

    parts = (split(hidden), split(targets), split(valid))
    return jax.tree.map(join, jax.lax.map(jax.checkpoint(one), parts))


def _blocks(params: Params, cfg: ModelConfig, count: int) -> Params:
    """The head's weights in `count` blocks of the vocabulary on a new leading axis; zeros behind the last entry."""
    axis = 0 if cfg.tie_embeddings else 1

    def cut(leaf: Array) -> Array:
        size = -(-leaf.shape[axis] // count)
        padding = [(0, 0), (0, 0)]
        padding[axis] = (0, count * size - leaf.shape[axis])
        shape = list(leaf.shape)
        shape[axis : axis + 1] = [count, size]
        return jnp.moveaxis(jnp.pad(leaf, padding).reshape(shape), axis, 0)

    return jax.tree.map(cut, params)


class _Sums(NamedTuple):
    """Of each token and block of logits, [B, R, t]: the largest, and with that as the unit of exp the sum of
    exponentials and of exponentials times logits; and the target's logit, 0 where it is in another block."""

    top: Array
    total: Array
    weighted: Array
    target: Array


def _stats(
    blocks: Params,
    cfg: ModelConfig,
    temperature: Array,
    hidden: Array,
    targets: Array,
    valid: Array,
    logps_only: bool,
    axis: str | None,
    vocab: int,
    bring: Callable[[Params], Params],
) -> TokenStats:
    """Stats of hidden states [R, t, D], targets and valid [R, t], from the blocks of the `vocab` entries that are here;
    the devices of `axis` hold other entries."""
    leaf = jax.tree.leaves(blocks)[0]
    count, size = leaf.shape[0], leaf.shape[1 if cfg.tie_embeddings else 2]
    start = 0 if axis is None else jax.lax.axis_index(axis) * vocab
    precise = hidden.astype(jnp.float32) if count > 1 else hidden  # its gradient is summed over the blocks

    @jax.checkpoint
    def one(block: Params, first: Array) -> _Sums:
        scores = (
            vocab_logits(bring(block), cfg, precise.astype(hidden.dtype)) / temperature
        )  # float32 [R, t, V / B]
        entry = first + jnp.arange(size)
        if count * size > vocab:
            scores = jnp.where(entry < vocab, scores, _NEVER)
        top = jax.lax.stop_gradient(scores.max(axis=-1))
        weights = jnp.exp(scores - top[..., None])
        # Comparing instead of indexing: its gradient is no scatter, and it works on a part of the vocabulary.
        target = jnp.sum(jnp.where(start + entry == targets[..., None], scores, 0.0), axis=-1)
        weighted = jnp.zeros_like(top) if logps_only else jnp.sum(weights * scores, axis=-1)
        return _Sums(top, weights.sum(axis=-1), weighted, target)

    firsts = size * jnp.arange(count)
    if count == 1:
        whole = one(jax.tree.map(lambda leaf: leaf[0], blocks), firsts[0])
        sums = _Sums(*(x[None] for x in whole))
    else:
        sums = jax.lax.map(lambda block: one(*block), (blocks, firsts))

    def over_parts(x: Array) -> Array:
        return x if axis is None else jax.lax.psum(x, axis)

    top = sums.top.max(axis=0)
    if axis is not None:
        top = jax.lax.pmax(top, axis)
    unit = jnp.exp(sums.top - top)
    total = over_parts(jnp.sum(sums.total * unit, axis=0))
    target = over_parts(jnp.sum(sums.target, axis=0))
    log_total = jnp.log(total) + top
    logps = jnp.where(valid, target - log_total, 0.0)
    if logps_only:
        return TokenStats(logps, jnp.zeros_like(logps), jnp.zeros_like(logps))
    entropy = log_total - over_parts(jnp.sum(sums.weighted * unit, axis=0)) / total
    correct = (target >= top).astype(jnp.float32)
    return TokenStats(logps, jnp.where(valid, entropy, 0.0), jnp.where(valid, correct, 0.0))


# ---- scalars ---------------------------------------------------------------------------------------------------


def token_scores(params: Params, cfg: ModelConfig, hidden: Array) -> Array:
    """The scalar head at every position, float32 [R, T]; computed in float32 whatever the dtype of `hidden`.

    Args:
      params: of a model with `cfg.head` "score" or "both". hidden: [R, T, D] from `hidden_states`.
    """
    del cfg  # every family's scalar head is one linear map without bias

    def run(kernel: Array, hidden: Array) -> Array:
        product = jnp.matmul(
            hidden.astype(jnp.float32), kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        return product[..., 0]

    args = (params["score"]["kernel"], hidden)
    return compiler_partitioned(run, args, lambda: P(*spec_of(hidden)[:-1]))


def segment_scores(
    params: Params, cfg: ModelConfig, hidden: Array, segment_ids: Array, max_segments: int
) -> Array:
    """The scalar at the last real token of each segment, found by the segment ids and never by a pad id.

    Args:
      hidden: [R, T, D]. segment_ids: int32 [R, T], 0 = padding, segments count from 1 and are contiguous.
      max_segments: S, static, a bound on the segments of a row.

    Returns:
      float32 [R, S]; column s - 1 holds segment s, 0 where the row has no such segment.
    """
    scores = token_scores(params, cfg, hidden)

    def run(scores: Array, segment_ids: Array) -> Array:
        following = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
        last = segment_ids != following  # at the end of a segment; of padding, too, which no column has
        at = last[..., None] & (segment_ids[..., None] == jnp.arange(1, max_segments + 1))  # [R, T, S], fused
        return jnp.sum(jnp.where(at, scores[..., None], 0.0), axis=1)

    return compiler_partitioned(run, (scores, segment_ids), lambda: P(spec_of(scores)[0], None))
