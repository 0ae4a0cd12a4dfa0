"""The preference losses written out once more, in float64 NumPy, straight from the papers' formulas."""

import numpy as np


def neg_log_sigmoid(x):
    return np.logaddexp(0.0, -x)


def hard_loss(kind, pi_w, pi_l, ref_w, ref_l, len_w, len_l, hyper):
    """The loss of (winner, loser) pairs with a hard label, each formula by itself."""
    beta, eps, gamma = hyper["beta"], hyper["label_smoothing"], hyper["gamma"]
    if hyper["reference_free"]:
        ref_w, ref_l = np.zeros_like(ref_w), np.zeros_like(ref_l)
    h = (pi_w - ref_w) - (pi_l - ref_l)
    h_mean = (pi_w - ref_w) / len_w - (pi_l - ref_l) / len_l
    if kind == "sigmoid":
        return neg_log_sigmoid(beta * h)
    if kind == "conservative":
        return (1 - eps) * neg_log_sigmoid(beta * h) + eps * neg_log_sigmoid(-beta * h)
    if kind == "robust":
        clean, flipped = neg_log_sigmoid(beta * h), neg_log_sigmoid(-beta * h)
        return ((1 - eps) * clean - eps * flipped) / (1 - 2 * eps)
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if kind == "ipo_averaged":
        return (h_mean - 1 / (2 * beta)) ** 2
    if kind == "hinge":
        return np.maximum(0.0, 1 - beta * h)
    if kind == "simpo":
        return neg_log_sigmoid(beta / len_w * pi_w - beta / len_l * pi_l - gamma)
    if kind == "length_normalised":
        return neg_log_sigmoid(beta * h_mean)
    raise AssertionError(kind)


def soft_loss(kind, pairs, hyper):
    """p times the loss of (chosen, rejected) plus 1 - p times that of (rejected, chosen), plus the SFT term; [N]."""
    a = {name: np.asarray(value, np.float64) for name, value in pairs.items()}
    chosen_wins = hard_loss(kind, a["pi_c"], a["pi_r"], a["ref_c"], a["ref_r"], a["len_c"], a["len_r"], hyper)
    rejected_wins = hard_loss(
        kind, a["pi_r"], a["pi_c"], a["ref_r"], a["ref_c"], a["len_r"], a["len_c"], hyper
    )
    p = a["p"]
    return p * chosen_wins + (1 - p) * rejected_wins + hyper["sft_weight"] * -a["pi_c"] / a["len_c"]
