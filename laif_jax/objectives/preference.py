"""Preference optimisation without a reward model: DPO and its family.

Notation. For a pair (c, r) = (chosen, rejected) with log-probs summed over the supervised tokens,
`s(y) = log pi(y) - log ref(y)` is the log-ratio and `|y|` the number of supervised tokens. Each loss compares scores
`u(y)`, which are `s(y)`, `s(y) / |y|` or `log pi(y) / |y|`, through the margin `d = u(c) - u(r)`:

    kind               u(y)              l(d), the loss when c is preferred    source
    sigmoid            s(y)              -log sigmoid(beta d)                  Rafailov et al. 2023, eq. 7
    conservative       s(y)              the same, with a smoothed label       Mitchell 2023 (cDPO)
    robust             s(y)              the same, with a de-noised label      Chowdhury et al. 2024 (rDPO)
    ipo                s(y)              (d - 1 / (2 beta))^2                  Azar et al. 2023, eq. 17
    ipo_averaged       s(y) / |y|        (d - 1 / (2 beta))^2                  the same, as TRL has it
    hinge              s(y)              max(0, 1 - beta d)                    SLiC, RSO (Liu et al. 2023)
    simpo              log pi(y) / |y|   -log sigmoid(beta d - gamma)          Meng et al. 2024, eq. 6
    length_normalised  s(y) / |y|        -log sigmoid(beta d)                  Lambert et al. 2024 (Tulu 3)

`gamma` is SimPO's own, outside the beta: the ratio that its code calls `gamma_beta_ratio` is gamma / beta.

Soft labels. With `p = p_chosen`, the probability that c is the better one, every loss is

    L = q l(d) + (1 - q) l(-d),     q = p                            in general
                                    q = (1 - eps) p + eps (1 - p)    conservative: p seen through flips of chance eps
                                    q = (p - eps) / (1 - 2 eps)      robust: p with flips of chance eps undone

with `eps = label_smoothing`. For p = 1 the last is rDPO's unbiased estimator
`((1 - eps) l(d) - eps l(-d)) / (1 - 2 eps)`, and for a soft p it is p times that plus 1 - p times that of the swapped
pair. Where q is above 1 (p > 1 - eps) it has no lower bound in d, as in the paper. SimPO's swapped loss is
`-log sigmoid(-beta d - gamma)`: whichever response is preferred must win by gamma. All are symmetric: swapping the
pair and replacing p with 1 - p changes nothing.

SFT term. `sft_weight` adds `sft_weight * (-log pi(c) / |c|)`, the chosen response's mean negative log-likelihood per
token, one value per pair, so that it shares the loss's weight, the number of pairs. It is about the response named
chosen, whatever p is.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from laif_jax.objectives.masked import safe_divide
from laif_jax.objectives.types import LossOut, weighted

PREFERENCE_LOSSES = (
    "sigmoid",
    "conservative",
    "robust",
    "ipo",
    "ipo_averaged",
    "hinge",
    "simpo",
    "length_normalised",
)
_AVERAGED = ("ipo_averaged", "length_normalised")  # and simpo, without a reference
_SMOOTHED = ("conservative", "robust")

Hyper = Mapping[str, jax.Array | float]


def preference_loss(
    kind: str,
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    ref_chosen: jax.Array,
    ref_rejected: jax.Array,
    chosen_tokens: jax.Array,
    rejected_tokens: jax.Array,
    p_chosen: jax.Array,
    weight: jax.Array,
    hyper: Hyper,
) -> LossOut:
    """The loss of N pairs; the formulas are at the head of this module.

    Args:
      kind: static, one of `PREFERENCE_LOSSES`.
      policy_chosen, policy_rejected: float32 [N], log-probs summed over the supervised tokens. Gradients flow here.
      ref_chosen, ref_rejected: float32 [N], the reference's; constants, and not read by "simpo".
      chosen_tokens, rejected_tokens: [N], supervised tokens.
      p_chosen: float32 [N] in [0, 1], the probability that the chosen one is better; 1 is a hard label.
      weight: float32 [N], 1 for a pair, 0 for padding, whose other entries then count nothing, even if NaN.
      hyper: scalars, which may be traced: `beta`; `label_smoothing` (conservative, robust); `gamma` (simpo);
        `sft_weight` and `reference_free` (0 or 1: the reference's log-probs count as 0), both 0 where absent.

    Returns:
      LossOut with weight = sum of `weight` and TRL's metric names. As in TRL, `rewards/*` are beta s(y) for every loss
      with a reference, also where the loss averages over tokens, and beta u(y) for "simpo". An exact tie counts 0.5 in
      `rewards/accuracies`. `rewards/implicit_p` is sigmoid(beta d), of the margin that the loss itself compares.

    Raises:
      ValueError: for an unknown kind, or a missing scalar.
    """
    _check(kind, hyper)
    real = weight > 0
    clean = [
        jnp.where(
            real, jnp.asarray(x, jnp.float32), 0.0
        )  # before any arithmetic, so that gradients are clean too
        for x in (
            policy_chosen,
            policy_rejected,
            ref_chosen,
            ref_rejected,
            chosen_tokens,
            rejected_tokens,
            p_chosen,
        )
    ]
    pi_c, pi_r, ref_c, ref_r, len_c, len_r, p = clean
    weight = weight.astype(jnp.float32)
    p = jax.lax.stop_gradient(p)

    score_c, reward_c = _score(kind, pi_c, ref_c, len_c, hyper)
    score_r, reward_r = _score(kind, pi_r, ref_r, len_r, hyper)
    margin = score_c - score_r
    if_chosen, if_rejected = _pair_losses(kind, margin, hyper)
    label = _label(kind, p, hyper)
    per_pair = label * if_chosen + (1.0 - label) * if_rejected  # [N]
    nll = -safe_divide(pi_c, len_c)  # [N], per token
    total = jnp.sum(weight * per_pair)
    if "sft_weight" in hyper:
        total += hyper["sft_weight"] * jnp.sum(weight * nll)

    beta = hyper["beta"]
    difference = reward_c - reward_r
    values = {
        "rewards/chosen": beta * reward_c,
        "rewards/rejected": beta * reward_r,
        "rewards/margins": beta * difference,
        "rewards/accuracies": jnp.where(difference == 0, 0.5, difference > 0),
        "rewards/implicit_p": jax.nn.sigmoid(beta * margin),
        "labels/p_chosen": p,
        "logps/chosen": pi_c,
        "logps/rejected": pi_r,
        "logps/ref_chosen": ref_c,
        "logps/ref_rejected": ref_r,
        "preference_loss": per_pair,
        "nll_loss": nll,
        "response_length/chosen": len_c,
        "response_length/rejected": len_r,
    }
    return LossOut(total, jnp.sum(weight), {name: weighted(value, weight) for name, value in values.items()})


def _check(kind: str, hyper: Hyper) -> None:
    if kind not in PREFERENCE_LOSSES:
        raise ValueError(f"unknown preference loss `{kind}`; use one of {', '.join(PREFERENCE_LOSSES)}")
    needed = ["beta"]
    needed += ["label_smoothing"] if kind in _SMOOTHED else []
    needed += ["gamma"] if kind == "simpo" else []
    missing = [name for name in needed if name not in hyper]
    if missing:
        raise ValueError(
            f"preference loss `{kind}` needs `{'`, `'.join(missing)}` in `hyper`; it has {sorted(hyper)}"
        )


def _score(
    kind: str, policy: jax.Array, reference: jax.Array, tokens: jax.Array, hyper: Hyper
) -> tuple[jax.Array, jax.Array]:
    """(u(y), reward / beta) of each response; [N] each."""
    if kind == "simpo":
        score = safe_divide(policy, tokens)
        return score, score
    kept = 1.0 - hyper.get("reference_free", 0.0)
    ratio = policy - kept * jax.lax.stop_gradient(reference)
    return (safe_divide(ratio, tokens) if kind in _AVERAGED else ratio), ratio


def _pair_losses(kind: str, margin: jax.Array, hyper: Hyper) -> tuple[jax.Array, jax.Array]:
    """(l(d), l(-d)): the loss if the chosen one is preferred, and if the rejected one is; [N] each."""
    beta = hyper["beta"]
    if kind in ("ipo", "ipo_averaged"):
        target = 1.0 / (2.0 * beta)
        return jnp.square(margin - target), jnp.square(margin + target)
    if kind == "hinge":
        return jax.nn.relu(1.0 - beta * margin), jax.nn.relu(1.0 + beta * margin)
    gamma = hyper["gamma"] if kind == "simpo" else 0.0
    return -jax.nn.log_sigmoid(beta * margin - gamma), -jax.nn.log_sigmoid(-beta * margin - gamma)


def _label(kind: str, p: jax.Array, hyper: Hyper) -> jax.Array:
    """q: the weight of the loss for "chosen preferred"; [N]."""
    if kind not in _SMOOTHED:
        return p
    eps = hyper["label_smoothing"]
    if kind == "conservative":
        return (1.0 - eps) * p + eps * (1.0 - p)
    return (p - eps) / (1.0 - 2.0 * eps)
