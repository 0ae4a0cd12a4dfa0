"""Advantages and returns of sampled responses, and whitening.

Arrays [B, N] are aligned to the response; `mask` is 1 on generated tokens. Arrays are global under jit, so a mean
over the mask is a mean over the real tokens of all devices. Nothing here carries gradients.
"""

import jax
import jax.numpy as jnp

from laif_jax.objectives.masked import masked_mean, masked_sum, safe_divide

_WHITEN_EPSILON = 1e-8
_GRPO_EPSILON = 1e-4  # as TRL; far below the spread of scores, and what keeps equal scores at 0


def whiten(x: jax.Array, mask: jax.Array, shift_mean: bool = True) -> jax.Array:
    """`(x - mean) / sqrt(var + 1e-8)` over the real tokens of the global batch; variance by their number n, not n - 1.

    Args:
      x, mask: [B, N]. shift_mean: False: the mean is added again, so that only the scale changes.

    Returns:
      float32 [B, N], 0 where the mask is 0.
    """
    x, mask = jax.lax.stop_gradient((_f32(x), _f32(mask)))
    mean = masked_mean(x, mask)
    centred = jnp.where(mask > 0, x - mean, 0.0)
    white = centred * jax.lax.rsqrt(masked_mean(jnp.square(centred), mask) + _WHITEN_EPSILON)
    return white if shift_mean else jnp.where(mask > 0, white + mean, 0.0)


def gae(
    rewards: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    gamma: jax.Array | float,
    lam: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), by one scan from the end:

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}        R_t = A_t + V_t

    t + 1 is the next *real* token. After a row's last one V and A are 0: the response is over, also where the token
    limit cut it, because its score has been given.

    Args:
      rewards, values: [B, N]; `values[b, t]` is of the state before token t is drawn. mask: [B, N].
      gamma, lam: scalars, which may be traced.

    Returns:
      (advantages, returns), float32 [B, N] each, 0 where the mask is 0.
    """
    rewards, values, mask = jax.lax.stop_gradient((_f32(rewards), _f32(values), _f32(mask)))
    gamma, lam = jnp.asarray(gamma, jnp.float32), jnp.asarray(lam, jnp.float32)
    real = mask > 0
    rewards, values = jnp.where(real, rewards, 0.0), jnp.where(real, values, 0.0)

    def step(carry: tuple[jax.Array, jax.Array], now: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
        next_value, next_advantage = carry
        reward, value, is_real = now
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = (jnp.where(is_real, value, next_value), jnp.where(is_real, advantage, next_advantage))
        return carry, jnp.where(is_real, advantage, 0.0)

    start = jnp.zeros_like(rewards[:, 0])
    _, advantages = jax.lax.scan(step, (start, start), (rewards.T, values.T, real.T), reverse=True)
    advantages = advantages.T
    return advantages, advantages + values


def reinforce_advantages(
    rewards: jax.Array, values: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """REINFORCE with a learned baseline (Lee et al. 2023, RLAIF): advantage Z_t - V_t, with the undiscounted reward to
    go `Z_t = r_t + ... + r_T`.

    Args:
      rewards, values, mask: [B, N].

    Returns:
      (advantages, returns = Z), float32 [B, N] each, 0 where the mask is 0. It is `gae` with gamma = lam = 1.
    """
    rewards, values, mask = jax.lax.stop_gradient((_f32(rewards), _f32(values), _f32(mask)))
    real = mask > 0
    rewards, values = jnp.where(real, rewards, 0.0), jnp.where(real, values, 0.0)
    to_go = jnp.where(real, jnp.cumsum(rewards[:, ::-1], axis=1)[:, ::-1], 0.0)
    return to_go - values, to_go


def rloo_advantages(scores: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """REINFORCE leave-one-out (Ahmadian et al. 2024, section 3.2): a score minus the mean of the *other* samples'.

    Args:
      scores: [P, k], of the k samples of each prompt. With the KL in the reward these are whole rewards: the sum of
        `token_rewards` over the response. valid: bool [P, k], False where a score is missing; None: all are there.

    Returns:
      float32 [P, k]; 0 for a missing score, and where no other sample of the prompt has one.
    """
    scores, ok, count, total = _group(scores, valid)
    others = jnp.maximum(count - 1.0, 1.0)
    baseline = (total - scores) / others
    return jnp.where(ok & (count > 1), scores - baseline, 0.0)


def grpo_advantages(scores: jax.Array, valid: jax.Array | None = None, scale: bool = True) -> jax.Array:
    """Group-relative advantages (Shao et al. 2024, section 4.1.2): `(s - mean) / (std + 1e-4)` over a prompt's samples.

    Args:
      scores: [P, k], as in `rloo_advantages`. valid: bool [P, k] or None.
      scale: False: not divided (Liu et al. 2025, Dr. GRPO). The standard deviation divides by n - 1, as TRL's does.

    Returns:
      float32 [P, k]; 0 for a missing score, and for all samples of a prompt whose scores are equal or fewer than two.
    """
    scores, ok, count, total = _group(scores, valid)
    centred = jnp.where(ok, scores - safe_divide(total, count), 0.0)
    if not scale:
        return jnp.where(count > 1, centred, 0.0)
    variance = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / jnp.maximum(count - 1.0, 1.0)
    return jnp.where(count > 1, centred / (jnp.sqrt(variance) + _GRPO_EPSILON), 0.0)


def explained_variance(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """`1 - Var(returns - values) / Var(returns)` over real tokens: 1 is a perfect critic, 0 a constant one, below 0 one
    that does harm. 0 where the returns do not vary. Float32 scalar.

    Args:
      values: [B, N], as they were at the rollout. returns, mask: [B, N].
    """
    values, returns, mask = jax.lax.stop_gradient((_f32(values), _f32(returns), _f32(mask)))
    spread = _variance(returns, mask)
    return jnp.where(spread > 0, 1.0 - safe_divide(_variance(returns - values, mask), spread), 0.0)


def _variance(x: jax.Array, mask: jax.Array) -> jax.Array:
    return masked_mean(jnp.square(jnp.where(mask > 0, x - masked_mean(x, mask), 0.0)), mask)


def _group(scores: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, ...]:
    """(scores with 0 where missing, valid, number [P, 1], sum [P, 1])."""
    scores = jax.lax.stop_gradient(_f32(scores))
    ok = jnp.ones(scores.shape, bool) if valid is None else jnp.asarray(valid, bool)
    scores = jnp.where(ok, scores, 0.0)
    count = jnp.sum(ok, axis=1, keepdims=True).astype(jnp.float32)
    return scores, ok, count, masked_sum(scores, ok, axis=1)[:, None]


def _f32(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, jnp.float32)
