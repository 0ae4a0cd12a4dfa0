"""From a rollout and its scores to what the losses of PPO read: rewards per token, advantages, returns; all float32."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from laif_jax.models.arch import ModelConfig
from laif_jax.objectives.rl import (
    clip_scores,
    gae,
    grpo_advantages,
    kl_estimate,
    reinforce_advantages,
    rloo_advantages,
    rollout_metrics,
    scores_with_eos,
    token_rewards,
    whiten,
)
from laif_jax.rollout.ppo import Rollout
from laif_jax.rollout.ppo_heads import by_rows

Array = jax.Array


@dataclass(frozen=True)
class UpdateConfig:
    """All that an update compiles to; the options are those of `PpoSpec`.

    Attributes:
      policy: its architecture. value: of a separate value model, or None. shared: values from the policy's trunk.
      replace_eos: a response without an end has its score replaced, by `hyper["missing_eos_reward"]`.
      samples: responses per prompt; row p * samples + s holds sample s of prompt p.
    """

    policy: ModelConfig
    value: ModelConfig | None = None
    shared: bool = False
    algorithm: Literal["ppo", "reinforce", "rloo", "grpo"] = "ppo"
    normalize: Literal["token", "sequence"] = "token"
    kl_estimator: Literal["k1", "k2", "k3", "full"] = "k1"
    kl_place: Literal["reward", "loss"] = "reward"
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    replace_eos: bool = False
    samples: int = 1
    dtype: str = "float32"
    remat: Literal["none", "full", "dots"] = "none"
    chunk: int = 1024

    @property
    def has_values(self) -> bool:
        return self.shared or self.value is not None


class Experience(NamedTuple):
    """What the losses of an iteration read, constants all: float32 [B, N] but for `scores`, float32 [B].

    `mask` is 1 on drawn tokens of rows that count. `kl`: per token, by the configured estimator. `rewards`: before they
    are whitened. `scores`: as they entered the rewards.
    """

    mask: Array
    kl: Array
    scores: Array
    rewards: Array
    advantages: Array
    returns: Array


def experience(
    config: UpdateConfig, rollout: Rollout, scores: Mapping[str, Array], weight: Array, hyper: Any
) -> Experience:
    """Rewards per token, advantages and returns, over the global batch."""
    mask = rollout.mask * (weight > 0)[:, None]
    if config.kl_estimator == "full":
        if rollout.full_kl is None:
            raise ValueError("a full KL needs a rollout that computes it")
        kl = rollout.full_kl
    else:
        kl = kl_estimate(config.kl_estimator, rollout.logps, rollout.ref_logps)
    total = sum((hyper["weights"][name] * jnp.asarray(x, jnp.float32) for name, x in sorted(scores.items())))
    total = clip_scores(jnp.where(weight > 0, total, 0.0), hyper["reward_clip"])
    if config.replace_eos:
        total = scores_with_eos(total, rollout.ended, replacement=hyper["missing_eos_reward"])
    else:
        total = scores_with_eos(total, rollout.ended, penalty=hyper["missing_eos_penalty"])
    coef = hyper["kl_coef"] if config.kl_place == "reward" else 0.0
    rewards = token_rewards(total, kl, coef, mask)
    advantages, returns = _advantages(config, rewards, rollout.values, mask, hyper)
    return Experience(mask, kl, total, rewards, by_rows(advantages), by_rows(returns))


def _advantages(
    config: UpdateConfig, rewards: Array, values: Array, mask: Array, hyper: Any
) -> tuple[Array, Array]:
    """(advantages, returns), [B, N] each; returns are zeros for algorithms without values."""
    if config.algorithm == "ppo":
        rewards = whiten(rewards, mask, shift_mean=False) if config.whiten_rewards else rewards
        advantages, returns = gae(rewards, values, mask, hyper["gamma"], hyper["lam"])
    elif config.algorithm == "reinforce":
        advantages, returns = reinforce_advantages(rewards, values, mask)
    else:
        grouped = rloo_advantages if config.algorithm == "rloo" else grpo_advantages
        rows = rewards.shape[0] - rewards.shape[0] % config.samples  # rows beyond are padding
        whole, valid = rewards.sum(axis=1)[:rows], (mask.sum(axis=1) > 0)[:rows]
        each = grouped(whole.reshape(-1, config.samples), valid.reshape(-1, config.samples)).reshape(-1)
        advantages = jnp.pad(each, (0, rewards.shape[0] - rows))[:, None] * mask
        returns = jnp.zeros_like(rewards)
    if config.whiten_advantages and config.algorithm != "grpo":
        advantages = whiten(advantages, mask)
    return advantages, returns


def finite_rows(rollout: Rollout, found: Experience) -> Array:
    """Which rows, bool [B], are finite in all that their rewards are made of; rows that do not count are."""
    tokens = [rollout.logps, rollout.ref_logps, rollout.values, found.kl]
    good = [jnp.isfinite(jnp.where(found.mask > 0, x, 0.0)).all(axis=1) for x in tokens]
    return functools.reduce(jnp.logical_and, good) & jnp.isfinite(found.scores)


def rollout_side(
    config: UpdateConfig,
    rollout: Rollout,
    found: Experience,
    scores: Mapping[str, Array],
    weight: Array,
    hyper: Any,
) -> dict[str, Array]:
    """Metrics of the experience itself."""
    in_reward = config.kl_place == "reward"
    metrics = rollout_metrics(
        scores=found.scores,
        kl=found.kl,
        kl_coef=hyper["kl_coef"] if in_reward else 0.0,
        logps=rollout.logps,
        mask=found.mask,
        ended=rollout.ended,
        values=rollout.values if config.has_values else None,
        returns=found.returns if config.has_values else None,
    )
    return metrics | named_means(rollout, scores, weight) | logp_difference(rollout)


def named_means(rollout: Rollout, scores: Mapping[str, Array], weight: Array) -> dict[str, Array]:
    """`rewards/NAME/mean` and `/std` over the rows that count, and how many those are."""
    real = ((weight > 0) & (rollout.counts > 0)).astype(jnp.float32)
    count = jnp.maximum(real.sum(), 1.0)
    metrics = {"rewards/rows": real.sum()}
    for name, values in scores.items():
        values = jnp.where(real > 0, jnp.asarray(values, jnp.float32), 0.0)
        mean = values.sum() / count
        variance = jnp.sum(real * jnp.square(values - mean)) / count
        metrics |= {f"rewards/{name}/mean": mean, f"rewards/{name}/std": jnp.sqrt(variance)}
    return metrics


def logp_difference(rollout: Rollout) -> dict[str, Array]:
    """How far the sampler's log-probs are from those of the full forward pass: mean and maximum per token."""
    difference = jnp.where(rollout.mask > 0, jnp.abs(rollout.sampled_logps - rollout.logps), 0.0)
    return {
        "sampling/logp_diff": difference.sum() / jnp.maximum(rollout.mask.sum(), 1.0),
        "sampling/logp_diff_max": difference.max(),
    }
