"""From a score per response to a reward per token. Always float32, whatever the type of what comes in.

The order is: `clip_scores`, `scores_with_eos`, `token_rewards`, and, if asked, `whiten(rewards, mask,
shift_mean=False)`.
"""

import jax
import jax.numpy as jnp


def clip_scores(scores: jax.Array, limit: jax.Array | float | None) -> jax.Array:
    """Scores cut to [-limit, limit]; None: as they are. Float32, the shape of `scores`."""
    scores = jnp.asarray(scores, jnp.float32)
    return scores if limit is None else jnp.clip(scores, -limit, limit)


def scores_with_eos(
    scores: jax.Array,
    ended: jax.Array,
    penalty: jax.Array | float | None = None,
    replacement: jax.Array | float | None = None,
) -> jax.Array:
    """Scores of responses that never ended, lowered by `penalty` or replaced by `replacement`.

    Args:
      scores: [B]. ended: bool [B], True where the response ended by itself. It is the flag that sampling set, not
        a search for an EOS id, which could be in the prompt or be the padding.
      penalty: >= 0, subtracted. replacement: the new score. At most one of the two; both None: nothing changes.

    Returns:
      float32 [B].

    Raises:
      ValueError: if both are given.
    """
    if penalty is not None and replacement is not None:
        raise ValueError("give one of `penalty` (subtracted) and `replacement` of responses without an end")
    scores = jnp.asarray(scores, jnp.float32)
    if penalty is not None:
        return scores - jnp.where(ended, 0.0, jnp.asarray(penalty, jnp.float32))
    if replacement is not None:
        return jnp.where(ended, scores, jnp.asarray(replacement, jnp.float32))
    return scores


def last_token(mask: jax.Array) -> jax.Array:
    """float32 [B, N]: 1 on each row's last token of mask 1 (its EOS, if it has one), nothing in a row without any."""
    real = jnp.asarray(mask) > 0
    after = jnp.cumsum(real[..., ::-1], axis=-1)[..., ::-1]  # real tokens from here to the end of the row
    return (real & (after == 1)).astype(jnp.float32)


def token_rewards(scores: jax.Array, kl: jax.Array, coef: jax.Array | float, mask: jax.Array) -> jax.Array:
    """The reward of every generated token: `-coef kl`, and the score on the last one.

    The sum over a response is score + non_score_reward, with non_score_reward = -coef (sum of kl), a penalty.

    Args:
      scores: [B], any dtype. kl: [B, N], per-token estimates; constants. coef: >= 0; 0 where the KL is in the loss.
      mask: [B, N], 1 on generated tokens, the EOS included. A row without any (left out of this iteration) gets no
        reward, whatever its score is, even NaN.

    Returns:
      float32 [B, N], 0 where the mask is 0; without gradients.
    """
    mask = jnp.asarray(mask, jnp.float32)
    kl = jnp.where(mask > 0, jnp.asarray(kl, jnp.float32), 0.0)
    penalty = -jnp.asarray(coef, jnp.float32) * kl
    score = jnp.where(last_token(mask) > 0, jnp.asarray(scores, jnp.float32)[:, None], 0.0)
    return jax.lax.stop_gradient(penalty + score)
