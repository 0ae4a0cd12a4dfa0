"""What the heads say about responses: arrays [R, N] aligned with the N places of a response, for rows [R, T] that hold
prompt and response without a gap. Nothing is computed for the prompt: its hidden states never meet the vocabulary.

These run on meshes of automatic axes (`laif_jax.rollout.placement.place` makes one of any mesh).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from laif_jax.models.arch import ModelConfig
from laif_jax.models.decoder import hidden_and_load, vocab_logits
from laif_jax.models.heads import TokenStats, token_scores, token_stats
from laif_jax.models.moe import RouterLoad
from laif_jax.objectives.kl import full_kl
from laif_jax.parallel import constrain

Array = jax.Array


def row_hidden(
    params: Any, cfg: ModelConfig, tokens: Array, totals: Array, *, dtype: Any, remat: Any = "none"
) -> Array:
    """Hidden states [R, T, D] of right-padded rows; tokens int32 [R, T], totals int32 [R] their lengths."""
    return row_hidden_and_load(params, cfg, tokens, totals, dtype=dtype, remat=remat)[0]


def row_hidden_and_load(
    params: Any, cfg: ModelConfig, tokens: Array, totals: Array, *, dtype: Any, remat: Any = "none"
) -> tuple[Array, RouterLoad | None]:
    """`row_hidden`, and the load of the experts (None without experts)."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    segments = (positions < totals[:, None]).astype(jnp.int32)
    return hidden_and_load(params, cfg, tokens, positions, segments, dtype=dtype, remat=remat)


def predicting(hidden: Array, lengths: Array, places: int) -> Array:
    """The hidden states [R, N, D] that response tokens are drawn from: place j's is at position lengths + j - 1.

    Args:
      hidden: [R, T, D]. lengths: int32 [R], tokens of each prompt. places: N.
    """
    index = lengths[:, None] - 1 + jnp.arange(places, dtype=jnp.int32)
    index = jnp.clip(index, 0, hidden.shape[1] - 1)
    return jnp.take_along_axis(hidden, index[..., None], axis=1)


def response_stats(
    params: Any,
    cfg: ModelConfig,
    states: Array,
    responses: Array,
    mask: Array,
    *,
    temperature: Array | float,
    chunk: int,
    logps_only: bool = False,
) -> TokenStats:
    """Log-probs and entropies [R, N] float32 of response tokens under logits / temperature; 0 where the mask is 0.

    Args:
      states: [R, N, D] of `predicting`. responses: int32 [R, N].
      mask: [R, N], nonzero on the first tokens of each row and on no others.
      chunk: tokens whose logits exist at a time.
    """
    # `token_stats` predicts a row's token t + 1 from state t: one place is added before the first token.
    tokens = jnp.pad(responses, ((0, 0), (1, 0)))
    real = (mask != 0).astype(jnp.int32)
    segments = jnp.concatenate([jnp.ones_like(real[:, :1]), real], axis=1)
    states = jnp.pad(states, ((0, 0), (0, 1), (0, 0)))
    stats = token_stats(
        params, cfg, states, tokens, segments, chunk=chunk, logps_only=logps_only, temperature=temperature
    )
    return jax.tree.map(lambda x: x[:, 1:], stats)


def response_values(params: Any, cfg: ModelConfig, states: Array, mask: Array) -> Array:
    """The scalar head [R, N] float32 before each response token is drawn; 0 where the mask is 0."""
    return jnp.where(mask != 0, token_scores(params, cfg, states), 0.0)


def last_score(params: Any, cfg: ModelConfig, hidden: Array, totals: Array) -> Array:
    """The scalar head [R] float32 at the last of `totals` tokens of each row; hidden [R, T, D]."""
    index = jnp.maximum(totals - 1, 0)[:, None, None]
    return token_scores(params, cfg, jnp.take_along_axis(hidden, index, axis=1))[:, 0]


def response_kl(
    params: Any,
    cfg: ModelConfig,
    states: Array,
    ref_params: Any,
    ref_states: Array,
    mask: Array,
    *,
    temperature: Array | float,
    chunk: int,
) -> Array:
    """KL(policy || reference) over the whole vocabulary [R, N] float32, in chunks that the backward pass recomputes.

    Args:
      states, ref_states: [R, N, D]. ref_params: holds the reference's vocabulary head; no gradient goes into it.
    """

    @jax.checkpoint
    def one(head: Any, part: tuple[Array, Array]) -> Array:
        mine, theirs = (
            vocab_logits(p, cfg, h) / temperature for p, h in zip((head, ref_params), part, strict=True)
        )
        return full_kl(mine, jax.lax.stop_gradient(theirs))

    rows, places, _ = states.shape
    steps = max(1, min(places, chunk // max(rows, 1)))
    count = -(-places // steps)

    def split(x: Array) -> Array:
        """[R, N, D] -> [chunks, R, steps, D]"""
        padded = jnp.pad(x, ((0, 0), (0, count * steps - places), (0, 0)))
        return jnp.moveaxis(padded.reshape(rows, count, steps, -1), 1, 0)

    head = vocabulary_head(params, cfg)
    kl = jax.lax.map(lambda part: one(head, part), (split(states), split(ref_states)))
    kl = jnp.moveaxis(kl, 0, 1).reshape(rows, count * steps)[:, :places]
    return jnp.where(mask != 0, kl, 0.0)


def vocabulary_head(params: Mapping[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """The part of the parameters that makes logits of hidden states."""
    name = "embed" if cfg.tie_embeddings else "lm_head"
    return {name: params[name]}


def in_groups(fn: Callable[[Any], Any], tree: Any, group: int) -> Any:
    """`fn` over groups of `group` rows, one after the other, so that only one group's activations exist.

    Args:
      fn: takes and gives trees of arrays with leading rows. tree: arrays [B, ...], B a multiple of `group`.
    """
    rows = jax.tree.leaves(tree)[0].shape[0]
    if rows == group:
        return fn(tree)

    def split(x: Array) -> Array:
        x = x.reshape(rows // group, group, *x.shape[1:])
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    def join(x: Array) -> Array:
        return by_rows(x.reshape(rows, *x.shape[2:]))

    return jax.tree.map(join, jax.lax.map(fn, jax.tree.map(split, tree)))


def by_rows(x: Array) -> Array:
    """Keeps an array [B, ...] sharded by rows."""
    return constrain(x, "batch", *[None] * (x.ndim - 1))
