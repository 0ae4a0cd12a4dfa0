"""Objectives of reinforcement learning: the one door to the maths, the loss of a minibatch, the metrics of a rollout.

Arrays [B, N] are aligned to the response: column t is the t-th generated token, `mask` is 1 on generated tokens (the
EOS included) and 0 on padding and in rows that are left out. Everything is float32. The signs, once and for all:

    non_score_reward = -coef (sum over the response's tokens of the KL estimate)    a penalty, so at most 0 as KL >= 0
    rlhf_reward      = score + non_score_reward                                     maximised
    loss             = policy + value_coef value - entropy_coef entropy + kl_coef kl      minimised
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from laif_jax.objectives.advantages import (
    explained_variance,
    gae,
    grpo_advantages,
    reinforce_advantages,
    rloo_advantages,
    whiten,
)
from laif_jax.objectives.kl import KL_ESTIMATORS, adaptive_kl, full_kl, kl_estimate
from laif_jax.objectives.masked import masked_mean, masked_sum
from laif_jax.objectives.policy import (
    Hyper,
    PolicyLoss,
    ValueLoss,
    policy_loss,
    reinforce_loss,
    sum_by,
    value_loss,
)
from laif_jax.objectives.scores import clip_scores, last_token, scores_with_eos, token_rewards
from laif_jax.objectives.types import LossOut, Metrics

__all__ = [
    "ALGORITHMS",
    "KL_ESTIMATORS",
    "PolicyLoss",
    "ValueLoss",
    "adaptive_kl",
    "clip_scores",
    "explained_variance",
    "full_kl",
    "gae",
    "grpo_advantages",
    "kl_estimate",
    "last_token",
    "policy_loss",
    "reinforce_advantages",
    "reinforce_loss",
    "rl_loss",
    "rloo_advantages",
    "rollout_metrics",
    "scores_with_eos",
    "sum_by",
    "token_rewards",
    "value_loss",
    "whiten",
]
ALGORITHMS = ("ppo", "reinforce", "rloo", "grpo")
_CLIPPED = ("ppo", "grpo")


def rl_loss(
    algorithm: str,
    *,
    logps: jax.Array,
    old_logps: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    hyper: Hyper,
    normalize: str = "token",
    entropy: jax.Array | None = None,
    kl: jax.Array | None = None,
    values: jax.Array | None = None,
    old_values: jax.Array | None = None,
    returns: jax.Array | None = None,
) -> LossOut:
    """The loss of a micro-batch, as sums: those of all micro-batches are added and divided once by the summed weight.

    `loss = policy_coef (policy - entropy_coef entropy + kl_coef kl) + value_coef value`, each a per-token array reduced
    in the same way (`sum_by`), so that all share one weight.

    Args:
      algorithm: static: "ppo", "grpo": clipped surrogate (`policy_loss`); "reinforce", "rloo": `reinforce_loss`.
      logps: [B, N], differentiable. old_logps, advantages, mask: [B, N].
      hyper: scalars, which may be traced. `clip_low`, `clip_high` and, if wanted, `dual_clip` (ppo, grpo);
        `value_coef` with values, and `value_clip` for the clipped value loss; `entropy_coef` (0 where absent);
        `kl_coef` with kl; `policy_coef` (1 where absent): 0 trains the values alone, also without entropy and KL.
      normalize: static, "token" or "sequence".
      entropy: [B, N] of the policy's whole distributions, differentiable if `entropy_coef` is to act.
      kl: [B, N], a differentiable KL term of the loss (`kl_estimate` or `full_kl`), or None: no such term.
      values: [B, N], differentiable, or None: no value function. old_values: for the clip. returns: [B, N].

    Returns:
      LossOut with weight = real tokens or responses, and TRL's metric names; `loss/*` are reduced as the loss, all
      others over real tokens.

    Raises:
      ValueError: for an unknown algorithm or normalisation, or values without returns.
      KeyError: for a scalar that is not in `hyper`.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm `{algorithm}`; use one of {', '.join(ALGORITHMS)}")
    if algorithm in _CLIPPED:
        policy = policy_loss(logps, old_logps, advantages, mask, hyper)
    else:
        policy = reinforce_loss(logps, old_logps, advantages, mask)
    reduced = {"loss/policy_avg": sum_by(policy.loss, mask, normalize)}
    tokens = _policy_metrics(policy, logps, old_logps, mask)

    total, weight = reduced["loss/policy_avg"]
    if entropy is not None:
        tokens["policy/entropy_avg"] = entropy
        if "entropy_coef" in hyper:
            total -= hyper["entropy_coef"] * sum_by(entropy, mask, normalize)[0]
    if kl is not None:
        reduced["loss/kl_avg"] = sum_by(kl, mask, normalize)
        total += hyper["kl_coef"] * reduced["loss/kl_avg"][0]
    total *= hyper.get("policy_coef", 1.0)
    if values is not None:
        if returns is None:
            raise ValueError("the value loss needs `returns`")
        value = value_loss(values, old_values, returns, mask, hyper.get("value_clip"))
        reduced["loss/value_avg"] = sum_by(value.loss, mask, normalize)
        total += hyper["value_coef"] * reduced["loss/value_avg"][0]
        tokens["val/clipfrac_avg"] = value.clipped
    metrics: Metrics = reduced | {name: sum_by(x, mask, "token") for name, x in tokens.items()}
    return LossOut(total, weight, jax.lax.stop_gradient(metrics))


def _policy_metrics(
    policy: PolicyLoss, logps: jax.Array, old_logps: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
    """Per-token values of the metrics that every algorithm has; [B, N] each."""
    real = jnp.asarray(mask) > 0
    difference = jnp.where(real, jnp.asarray(logps, jnp.float32) - jnp.asarray(old_logps, jnp.float32), 0.0)
    return {
        "policy/approxkl_avg": 0.5 * jnp.square(difference),
        "policy/clipfrac_avg": policy.clipped,
        "val/ratio": policy.ratio,
        # The ratio's expectation is 1 under the old policy, so this is its variance, and a sum over tokens adds up.
        "val/ratio_var": jnp.square(policy.ratio - 1.0),
    }


def rollout_metrics(
    *,
    scores: jax.Array,
    kl: jax.Array,
    kl_coef: jax.Array | float,
    logps: jax.Array,
    mask: jax.Array,
    ended: jax.Array,
    values: jax.Array | None = None,
    returns: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """What an iteration's rollouts were like, over the whole (global) batch; rows without tokens are left out.

    Args:
      scores: [B], as they entered the reward (clipped, with the missing-EOS rule applied). kl: [B, N], per token.
      kl_coef: of the reward; 0 where the KL is in the loss. logps: [B, N], of the policy that sampled.
      mask: [B, N]. ended: bool [B], whether the response ended by itself.
      values, returns: [B, N] at the rollout (before any whitening of advantages), or None: no value function.

    Returns:
      float32 scalars under the names of TRL and verl: `objective/kl`, `objective/entropy`, `objective/scores`,
      `objective/non_score_reward`, `objective/rlhf_reward`, `val/num_eos_tokens`, `response_length/mean`, `/min`,
      `/max`, `/clip_ratio`, and with values `critic/vf_explained_var`, `critic/values/mean`, `critic/returns/mean`. See
      docs/reference/rl.md.
    """
    mask = jnp.asarray(mask, jnp.float32)
    tokens = jnp.sum(mask, axis=1)  # [B]
    real = tokens > 0
    ended = jnp.asarray(ended, bool) & real
    kl_sums = masked_sum(kl, mask, axis=1)
    penalty = -jnp.asarray(kl_coef, jnp.float32) * kl_sums
    scores = jnp.where(real, jnp.asarray(scores, jnp.float32), 0.0)
    lengths = tokens - ended  # the EOS is no part of the response's length
    out = {
        "objective/kl": masked_mean(kl_sums, real),
        "objective/entropy": masked_mean(-masked_sum(logps, mask, axis=1), real),
        "objective/scores": masked_mean(scores, real),
        "objective/non_score_reward": masked_mean(penalty, real),
        "objective/rlhf_reward": masked_mean(scores + penalty, real),
        "val/num_eos_tokens": jnp.sum(ended.astype(jnp.float32)),
        "response_length/mean": masked_mean(lengths, real),
        "response_length/min": _over_real(jnp.min, lengths, real, jnp.inf),
        "response_length/max": _over_real(jnp.max, lengths, real, -jnp.inf),
        "response_length/clip_ratio": masked_mean(~ended, real),
    }
    if values is not None and returns is not None:
        out["critic/vf_explained_var"] = explained_variance(values, returns, mask)
        out["critic/values/mean"] = masked_mean(values, mask)
        out["critic/returns/mean"] = masked_mean(returns, mask)
    return jax.lax.stop_gradient(out)


def _over_real(reduce: Callable[..., jax.Array], x: jax.Array, real: jax.Array, fill: float) -> jax.Array:
    """Minimum or maximum over the rows that have tokens; 0 where none has."""
    return jnp.where(jnp.any(real), reduce(jnp.where(real, x, fill)), 0.0)
