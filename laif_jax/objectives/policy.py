"""Per-token losses of the policy and of the value function. Signs: every loss is minimised."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from laif_jax.objectives.masked import masked_sum, safe_divide

Hyper = Mapping[str, jax.Array | float]
MAX_LOG_RATIO = 20.0  # exp of more says nothing new, and its infinity times a gradient of 0 would be NaN


class PolicyLoss(NamedTuple):
    """`loss`, `ratio` (pi_new / pi_old), `clipped` (1 where a clip set the loss): float32 [B, N], 0 under the mask."""

    loss: jax.Array
    ratio: jax.Array
    clipped: jax.Array


class ValueLoss(NamedTuple):
    """`loss` and `clipped` (1 where the clip set the loss): float32 [B, N], 0 where the mask is."""

    loss: jax.Array
    clipped: jax.Array


def policy_loss(
    logps: jax.Array, old_logps: jax.Array, advantages: jax.Array, mask: jax.Array, hyper: Hyper
) -> PolicyLoss:
    """The clipped surrogate (Schulman et al. 2017, eq. 7), negated. With `r = exp(logp - old_logp)` and advantage A:

        L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))            clip_low != clip_high: DAPO (Yu et al. 2025)
        L = min(L, -A dual_clip)   where A < 0                            dual clip (Ye et al. 2020, eq. 5)

    Args:
      logps: [B, N], of the policy that is trained; gradients flow here alone. old_logps: [B, N], at the rollout.
      advantages, mask: [B, N]. What is under a mask of 0 counts nothing, even if it is NaN.
      hyper: scalars, which may be traced: `clip_low`, `clip_high`; `dual_clip` > 1 or infinite, or absent.

    Returns:
      PolicyLoss. `clipped` marks tokens whose gradient a clip removed.
    """
    real = jnp.asarray(mask) > 0
    advantages = jax.lax.stop_gradient(_clean(advantages, real))
    ratio = _ratio(logps, old_logps, real)
    free = -advantages * ratio
    bound = -advantages * jnp.clip(ratio, 1.0 - hyper["clip_low"], 1.0 + hyper["clip_high"])
    loss = jnp.maximum(free, bound)
    clipped = bound > free
    if "dual_clip" in hyper:
        ceiling = jnp.where(advantages < 0, -advantages, 0.0) * hyper["dual_clip"]
        dual = (advantages < 0) & (loss > ceiling)
        loss = jnp.where(dual, ceiling, loss)
        clipped = clipped | dual
    kept = lambda x: jnp.where(real, x, 0.0)  # noqa: E731
    return PolicyLoss(kept(loss), kept(ratio), jax.lax.stop_gradient(kept(clipped.astype(jnp.float32))))


def reinforce_loss(
    logps: jax.Array, old_logps: jax.Array, advantages: jax.Array, mask: jax.Array
) -> PolicyLoss:
    """`-A log pi`, the score function estimator (Williams 1992); REINFORCE and RLOO, one update per rollout.

    Args:
      logps: [B, N]; gradients flow here alone. old_logps: for the ratio, which is looked at and not used.
      advantages, mask: [B, N].
    """
    real = jnp.asarray(mask) > 0
    advantages = jax.lax.stop_gradient(_clean(advantages, real))
    ratio = jax.lax.stop_gradient(jnp.where(real, _ratio(logps, old_logps, real), 0.0))
    return PolicyLoss(-advantages * _clean(logps, real), ratio, jnp.zeros_like(ratio))


def value_loss(
    values: jax.Array,
    old_values: jax.Array | None,
    returns: jax.Array,
    mask: jax.Array,
    value_clip: jax.Array | float | None = None,
) -> ValueLoss:
    """`0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)`; without a clip, `0.5 (V - R)^2`.

    Args:
      values: [B, N]; gradients flow here alone. old_values: at the rollout; not read without a clip.
      returns, mask: [B, N]. value_clip: c, or None.

    Returns:
      ValueLoss.
    """
    real = jnp.asarray(mask) > 0
    values = _clean(values, real)
    returns = jax.lax.stop_gradient(_clean(returns, real))
    free = jnp.square(values - returns)
    if value_clip is None:
        return ValueLoss(0.5 * free, jnp.zeros_like(free))
    if old_values is None:
        raise ValueError("the clipped value loss needs `old_values`, the values at the rollout")
    old = jax.lax.stop_gradient(_clean(old_values, real))
    moved = values - old
    # Within the range it is the value itself: old + (value - old) would differ by a rounding.
    cut = jnp.where(jnp.abs(moved) <= value_clip, values, old + jnp.clip(moved, -value_clip, value_clip))
    bound = jnp.square(cut - returns)
    clipped = jax.lax.stop_gradient((bound > free).astype(jnp.float32))
    return ValueLoss(0.5 * jnp.maximum(free, bound), clipped)


def sum_by(per_token: jax.Array, mask: jax.Array, how: str) -> tuple[jax.Array, jax.Array]:
    """(sum, weight) of per-token values, such that sums of any split of the batch add up to the whole batch's.

    Args:
      per_token, mask: [B, N], a row being a response.
      how: static. "token": the sum over real tokens, and their number. "sequence": the sum over responses of the mean
        over their tokens, and the number of responses that have any.

    Raises:
      ValueError: for another `how`.
    """
    mask = jnp.asarray(mask, jnp.float32)
    tokens = jnp.sum(mask, axis=-1)  # [B]
    if how == "token":
        return masked_sum(per_token, mask), jnp.sum(tokens)
    if how == "sequence":
        means = safe_divide(masked_sum(per_token, mask, axis=-1), tokens)
        return jnp.sum(means), jnp.sum((tokens > 0).astype(jnp.float32))
    raise ValueError(f"unknown normalisation `{how}` of the RL loss; use `token` or `sequence`")


def _ratio(logps: jax.Array, old_logps: jax.Array, real: jax.Array) -> jax.Array:
    """exp(logps - old_logps), 1 under the mask; the log-ratio is held within +-20, where its gradient ends."""
    difference = _clean(logps, real) - jax.lax.stop_gradient(_clean(old_logps, real))
    return jnp.exp(jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def _clean(x: jax.Array, real: jax.Array) -> jax.Array:
    """Float32, with 0 under the mask, before any arithmetic, so that gradients are clean too."""
    return jnp.where(real, jnp.asarray(x, jnp.float32), 0.0)
