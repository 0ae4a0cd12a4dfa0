"""What is read off the hidden states: log-probabilities of tokens in rematerialised chunks, and scalar scores.

The vocabulary head's logits are the largest array of a language model. Here they exist for one chunk of time at a
time, in the forward and in the backward pass: no [R, T, V] array is ever made. Chunks cut the time axis, [R, t, V], so
that rows stay sharded as they are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from laif_jax.models.arch import ModelConfig
from laif_jax.models.decoder import Params, vocab_logits
from laif_jax.models.sharding import compiler_partitioned, spec_of

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
      chunk: tokens (over all rows and devices) whose logits exist at a time.
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
    rows, length, _ = hidden.shape
    # The hidden state at t predicts token t + 1: targets move left, results move right.
    targets = jnp.roll(tokens, -1, axis=1)
    same = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    valid = jnp.pad(same, ((0, 0), (0, 1)))

    @jax.checkpoint
    def one(params: Params, temperature: Array, part: tuple[Array, Array, Array]) -> TokenStats:
        return _stats(params, cfg, temperature, *part, logps_only)

    count = max(1, -(-rows * length // chunk))
    steps = -(-length // count)
    count = -(-length // steps)
    if count == 1:
        stats = one(params, temperature, (hidden, targets, valid))
    else:
        padding = count * steps - length

        def split(x: Array) -> Array:
            """[R, T, ...] -> [chunks, R, steps, ...]"""
            padded = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
            return jnp.moveaxis(padded.reshape(rows, count, steps, *x.shape[2:]), 1, 0)

        def join(x: Array) -> Array:
            return jnp.moveaxis(x, 0, 1).reshape(rows, count * steps)[:, :length]

        parts = (split(hidden), split(targets), split(valid))
        stats = jax.tree.map(join, jax.lax.map(lambda part: one(params, temperature, part), parts))
    return jax.tree.map(lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0))), stats)


def _stats(
    params: Params,
    cfg: ModelConfig,
    temperature: Array,
    hidden: Array,
    targets: Array,
    valid: Array,
    logps_only: bool,
) -> TokenStats:
    """Stats of one chunk; hidden [R, t, D], targets and valid [R, t]."""
    scores = vocab_logits(params, cfg, hidden) / temperature  # float32 [R, t, V]
    top = jax.lax.stop_gradient(scores.max(axis=-1))
    weights = jnp.exp(scores - top[..., None])
    total = weights.sum(axis=-1)
    log_total = jnp.log(total) + top
    # Comparing instead of indexing: its gradient is no scatter, and it works on a sharded vocabulary.
    hit = jnp.arange(scores.shape[-1]) == targets[..., None]
    target = jnp.sum(jnp.where(hit, scores, 0.0), axis=-1)
    logps = jnp.where(valid, target - log_total, 0.0)
    if logps_only:
        return TokenStats(logps, jnp.zeros_like(logps), jnp.zeros_like(logps))
    entropy = log_total - jnp.sum(weights * scores, axis=-1) / total
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
    return compiler_partitioned(run, args, lambda: PartitionSpec(*spec_of(hidden)[:-1]))


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

    return compiler_partitioned(run, (scores, segment_ids), lambda: PartitionSpec(spec_of(scores)[0], None))
