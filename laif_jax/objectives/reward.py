"""Losses of reward models on pairs.

Notation. A pair has scores c (chosen) and r (rejected), d = c - r, the label p = `p_chosen`, the probability that c is
the better one (1/2: a tie), and the margin m = `hyper["margin"]` times the pair's own. With s = log sigmoid:

    kind            outcome          loss                                         source
    bradley_terry   c is better      -s(d - m)                                    Ouyang et al. 2022, eq. 1; Touvron et
                    r is better      -s(-d - m)                                   al. 2023 (margin)
    rao_kupper      c is better      -s(d - t - m)                                Rao & Kupper 1967, with t = log theta:
                    r is better      -s(-d - t - m)                               P(tie) = (theta^2 - 1) sigmoid(d - t)
                    tie              -s(d - t) - s(-d - t) - log(exp(2 t) - 1)           x sigmoid(-d - t)

A soft label is the distribution over outcomes that the loss is the cross-entropy with. Two outcomes: (p, 1 - p)
(RLAIF, Lee et al. 2023). Three: ties take what p leaves open, (max(2p - 1, 0), max(1 - 2p, 0), 1 - |2p - 1|), so that
p = 1/2 is a tie, p = 3/4 (one judgement for c and one tie, averaged) is half a win and half a tie, and win + tie / 2 is
p. Label smoothing eps: with this probability the label had win and loss the wrong way round.

Centring adds `centering` (c + r)^2 (Eisenstein et al. 2023), which a loss of differences leaves open. All are
symmetric: swapping the pair and replacing p with 1 - p changes nothing.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from laif_jax.objectives.types import LossOut, Metrics, weighted

REWARD_LOSSES = ("bradley_terry", "rao_kupper")

Hyper = Mapping[str, jax.Array | float]


def reward_loss(
    kind: str,
    chosen: jax.Array,
    rejected: jax.Array,
    p_chosen: jax.Array,
    weight: jax.Array,
    margin: jax.Array | None,
    hyper: Hyper,
) -> LossOut:
    """The loss of N pairs; the formulas are at the head of this module.

    Args:
      kind: static, one of `REWARD_LOSSES`.
      chosen, rejected: float32 [N], scores. Gradients flow here.
      p_chosen: float32 [N] in [0, 1]. weight: float32 [N]; 0 is padding, whose other entries count nothing, even NaN.
      margin: float32 [N], the pairs' own margins, factors of `hyper["margin"]`; None: 1.
      hyper: scalars, which may be traced: `tie_threshold` (log theta > 0, of "rao_kupper"); and, 0 where absent,
        `margin`, `label_smoothing`, `centering`, `drop_ties` (1: pairs with p exactly 1/2 count as padding).

    Returns:
      LossOut with weight = sum of the weights that count. Metrics under TRL's names: `accuracy` (chosen > rejected),
      `margin`, `mean_reward`, and `min_reward`, `max_reward`: the extremes of one micro-batch, averaged over
      micro-batches, as in TRL; also `rewards/chosen`, `rewards/rejected`, `rewards/accuracies` (does the better one by
      the label score higher; equal scores count 1/2; ties of the label do not count), `labels/p_chosen`,
      `labels/ties` and `reward_loss`, the loss without centring.

    Raises:
      ValueError: for an unknown kind, or a missing scalar.
    """
    if kind not in REWARD_LOSSES:
        raise ValueError(f"unknown reward loss `{kind}`; use one of {', '.join(REWARD_LOSSES)}")
    if kind == "rao_kupper" and "tie_threshold" not in hyper:
        raise ValueError(f"reward loss `rao_kupper` needs `tie_threshold` in `hyper`; it has {sorted(hyper)}")
    weight = weight.astype(jnp.float32)
    tie = p_chosen == 0.5
    ties = weighted(tie, weight)
    weight = jnp.where(tie & (hyper.get("drop_ties", 0.0) > 0), 0.0, weight)
    # Cleaned before any arithmetic, so that gradients are clean too.
    clean = [
        jnp.where(weight > 0, jnp.asarray(x, jnp.float32), 0.0)
        for x in (chosen, rejected, p_chosen, jnp.ones_like(chosen) if margin is None else margin)
    ]
    c, r, p, own = clean
    p, own = jax.lax.stop_gradient((p, own))

    per_pair = _cross_entropy(kind, c - r, p, own * hyper.get("margin", 0.0), hyper)
    total = jnp.sum(weight * per_pair)
    total += hyper.get("centering", 0.0) * jnp.sum(weight * jnp.square(c + r))

    values = {
        "reward_loss": per_pair,
        "accuracy": c > r,
        "margin": c - r,
        "mean_reward": (c + r) / 2,
        "rewards/chosen": c,
        "rewards/rejected": r,
        "labels/p_chosen": p,
    }
    metrics = {name: weighted(value, weight) for name, value in values.items()} | {"labels/ties": ties}
    right = jnp.where(c == r, 0.5, (c > r) == (p > 0.5))
    metrics["rewards/accuracies"] = weighted(right, jnp.where(p == 0.5, 0.0, weight))
    return LossOut(total, jnp.sum(weight), metrics | _extremes(c, r, weight))


def _cross_entropy(
    kind: str, difference: jax.Array, p: jax.Array, margin: jax.Array, hyper: Hyper
) -> jax.Array:
    """Cross-entropy of the label with the model's outcomes, [N]."""
    log_sigmoid, eps = jax.nn.log_sigmoid, hyper.get("label_smoothing", 0.0)
    if kind == "bradley_terry":
        win, loss, tied = p, 1.0 - p, None
        threshold = 0.0
    else:
        win, loss = jnp.maximum(2.0 * p - 1.0, 0.0), jnp.maximum(1.0 - 2.0 * p, 0.0)
        threshold = jnp.asarray(hyper["tie_threshold"], jnp.float32)
        tied = -log_sigmoid(difference - threshold) - log_sigmoid(-difference - threshold)
        tied -= jnp.log(jnp.expm1(2.0 * threshold))
    win, loss = (1.0 - eps) * win + eps * loss, (1.0 - eps) * loss + eps * win
    total = -win * log_sigmoid(difference - threshold - margin)
    total -= loss * log_sigmoid(-difference - threshold - margin)
    return total if tied is None else total + (1.0 - win - loss) * tied


def _extremes(chosen: jax.Array, rejected: jax.Array, weight: jax.Array) -> Metrics:
    """The least and the greatest score of the micro-batch, each of weight 1 (0 where it holds padding alone)."""
    chosen, rejected = jax.lax.stop_gradient((chosen, rejected))
    real = weight > 0
    some = jnp.any(real).astype(jnp.float32)
    low = jnp.min(jnp.where(real, jnp.minimum(chosen, rejected), jnp.inf))
    high = jnp.max(jnp.where(real, jnp.maximum(chosen, rejected), -jnp.inf))
    return {
        "min_reward": (jnp.where(some > 0, low, 0.0), some),
        "max_reward": (jnp.where(some > 0, high, 0.0), some),
    }
