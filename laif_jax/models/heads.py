"""What is read off the hidden states: log-probabilities of tokens in rematerialised chunks, and scalar scores.

The vocabulary head's logits are the largest array of a language model. Here they exist for one chunk of time at a
time, in the forward and in the backward pass: no [R, T, V] array is ever made.

On a mesh every device takes the tokens of its rows and its part of the vocabulary (axis `tensor`): the maximum, the sum
of exponentials and the target's logit are added up over the parts, and logits never leave their device. The head's
weights are gathered over `fsdp` once, before the chunks, and their gradient is summed over the mesh once, after them.
"""

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
        stats = _in_chunks(params, cfg, temperature, hidden, targets, valid, axis=None, **options)
    else:

        def run(
            params: Params, temperature: Array, hidden: Array, targets: Array, valid: Array
        ) -> TokenStats:
            params = jax.tree.map(
                lambda leaf, spec: _vocabulary_part(leaf, spec, hidden.dtype), params, layout.head
            )
            if layout.gathered:
                hidden = jax.lax.all_gather(hidden, "tensor", axis=1, tiled=True)
            return _in_chunks(params, cfg, temperature, hidden, targets, valid, axis=layout.axis, **options)

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


def _vocabulary_part(table: Array, spec: P, dtype: Any) -> Array:
    """This device's part of the vocabulary, over the whole width, inside a `shard_map`.

    It travels in the compute dtype, and is kept in float32: so the gradients of the chunks are summed in it.
    """
    part = table.astype(dtype)
    for dim, entry in enumerate(spec):
        if entry is not None and entry != "tensor":
            part = jax.lax.all_gather(part, entry, axis=dim, tiled=True)
    return part.astype(jnp.float32)


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
    axis: str | None,
) -> TokenStats:
    """Stats [R, T] of hidden states [R, T, D]; chunks cut the time axis, so that rows stay sharded as they are."""
    rows, length, _ = hidden.shape

    @jax.checkpoint
    def one(params: Params, temperature: Array, part: tuple[Array, Array, Array]) -> TokenStats:
        return _stats(params, cfg, temperature, *part, logps_only, axis)

    count = max(1, -(-rows * length // chunk))
    steps = -(-length // count)
    count = -(-length // steps)
    if count == 1:
        return one(params, temperature, (hidden, targets, valid))
    padding = count * steps - length

    def split(x: Array) -> Array:
        """[R, T, ...] -> [chunks, R, steps, ...]"""
        padded = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(rows, count, steps, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(rows, count * steps)[:, :length]

    parts = (split(hidden), split(targets), split(valid))
    return jax.tree.map(join, jax.lax.map(lambda part: one(params, temperature, part), parts))


def _stats(
    params: Params,
    cfg: ModelConfig,
    temperature: Array,
    hidden: Array,
    targets: Array,
    valid: Array,
    logps_only: bool,
    axis: str | None,
) -> TokenStats:
    """Stats of one chunk; hidden [R, t, D], targets and valid [R, t]. The devices of `axis` hold parts of the
    vocabulary."""
    scores = vocab_logits(params, cfg, hidden) / temperature  # float32 [R, t, V], or a part of V
    top = jax.lax.stop_gradient(scores.max(axis=-1))
    first: Array | int = 0

    if axis is not None:
        top, first = jax.lax.pmax(top, axis), jax.lax.axis_index(axis) * scores.shape[-1]

    def over_parts(x: Array) -> Array:
        return x if axis is None else jax.lax.psum(x, axis)

    weights = jnp.exp(scores - top[..., None])
    total = over_parts(weights.sum(axis=-1))
    log_total = jnp.log(total) + top
    # Comparing instead of indexing: its gradient is no scatter, and it works on a part of the vocabulary.
    hit = first + jnp.arange(scores.shape[-1]) == targets[..., None]
    target = over_parts(jnp.sum(jnp.where(hit, scores, 0.0), axis=-1))
    logps = jnp.where(valid, target - log_total, 0.0)
    if logps_only:
        return TokenStats(logps, jnp.zeros_like(logps), jnp.zeros_like(logps))
    entropy = log_total - over_parts(jnp.sum(weights * scores, axis=-1)) / total
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
