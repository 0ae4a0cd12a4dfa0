"""Losses of reward models against float64 NumPy, against TRL's own code, and by their invariants."""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.objectives import REWARD_LOSSES, reward_loss

GOLDEN = json.loads((Path(__file__).parent / "trl_reward.json").read_text())
HYPER = {"margin": 0.0, "label_smoothing": 0.0, "centering": 0.0, "tie_threshold": 0.5, "drop_ties": 0.0}
NAMES = ("chosen", "rejected", "p", "weight", "margin")
PAIRS = {
    "chosen": [1.25, -0.5, 0.0, 3.0, -7.5],
    "rejected": [0.5, 0.25, 0.0, -2.0, 6.0],
    "p": [1.0, 0.8, 0.5, 0.3, 0.0],
    "weight": [1.0, 2.0, 1.0, 0.5, 1.0],
    "margin": [0.0, 0.5, 1.0, 2.0, 0.25],
}


@cache
def compiled(kind):
    return jax.jit(lambda pairs, hyper: reward_loss(kind, *(pairs[name] for name in NAMES), hyper))


@cache
def gradient(kind):
    def total(chosen, rejected, pairs, hyper):
        values = pairs | {"chosen": chosen, "rejected": rejected}
        return reward_loss(kind, *(values[name] for name in NAMES), hyper).total

    return jax.jit(jax.grad(total, argnums=(0, 1)))


def arrays(pairs):
    return {name: jnp.asarray(pairs[name], jnp.float32) for name in NAMES}


def loss(kind, pairs, **hyper):
    return compiled(kind)(arrays(pairs), HYPER | hyper)


def grads(kind, pairs, **hyper):
    pairs = arrays(pairs)
    return gradient(kind)(pairs["chosen"], pairs["rejected"], pairs, HYPER | hyper)


def mean(out, name):
    total, weight = out.metrics[name]
    return float(total / weight)


# ---- references --------------------------------------------------------------------------------------------------


def outcomes(kind, c, r, m, t):
    """Minus log probability of (win, loss, tie) of one pair, in float64, from the strengths exp(score) themselves."""
    a, b = np.exp(np.float64(c)), np.exp(np.float64(r))
    e = np.exp(m)
    if kind == "bradley_terry":
        return -np.log(a / (a + b * e)), -np.log(b / (b + a * e)), None
    theta = np.exp(t)
    win, lose = a / (a + theta * b * e), b / (b + theta * a * e)
    tie = a * b * (theta**2 - 1) / ((a + theta * b) * (theta * a + b))  # Rao & Kupper 1967
    return -np.log(win), -np.log(lose), -np.log(tie)


def reference(kind, pairs, **hyper):
    """The loss's sum over the pairs, one by one."""
    h = HYPER | hyper
    total = 0.0
    for c, r, p, w, own in zip(*(pairs[name] for name in NAMES)):
        if h["drop_ties"] and p == 0.5:
            continue
        win, lose, tie = outcomes(kind, c, r, h["margin"] * own, h["tie_threshold"])
        eps = h["label_smoothing"]
        if kind == "bradley_terry":
            q = (1 - eps) * p + eps * (1 - p)
            value = q * win + (1 - q) * lose
        else:
            decided = abs(2 * p - 1)
            for_win = decided * ((1 - eps) if p > 0.5 else eps)
            value = for_win * win + (decided - for_win) * lose + (1 - decided) * tie
        total += w * (value + h["centering"] * (c + r) ** 2)
    return total


@pytest.mark.parametrize("kind", REWARD_LOSSES)
@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"margin": 1.5},
        {"label_smoothing": 0.1},
        {"centering": 0.01, "margin": 0.5, "label_smoothing": 0.2},
        {"drop_ties": 1.0},
        {"tie_threshold": 0.05},
    ],
)
def test_value_and_gradient_are_the_float64_reference(kind, hyper):
    out = loss(kind, PAIRS, **hyper)
    np.testing.assert_allclose(out.total, reference(kind, PAIRS, **hyper), rtol=2e-6)
    for side, got in zip(("chosen", "rejected"), grads(kind, PAIRS, **hyper)):
        for i in range(len(PAIRS["p"])):
            step = 1e-5
            ends = []
            for sign in (1, -1):
                moved = list(PAIRS[side])
                moved[i] += sign * step
                ends.append(reference(kind, PAIRS | {side: moved}, **hyper))
            np.testing.assert_allclose(got[i], (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "case", GOLDEN["cases"], ids=lambda c: f"margin={c['margin'] is not None} {c['centering']}"
)
def test_bradley_terry_is_trls(case):
    n = len(GOLDEN["chosen"])
    pairs = {name: GOLDEN[name] for name in ("chosen", "rejected")}
    pairs |= {"p": [1.0] * n, "weight": [1.0] * n, "margin": case["margin"] or [0.0] * n}
    hyper = {"margin": 1.0, "centering": case["centering"] or 0.0}
    out = loss("bradley_terry", pairs, **hyper)
    np.testing.assert_allclose(out.total / out.weight, case["loss"], rtol=1e-6)
    for side, got in zip(("chosen", "rejected"), grads("bradley_terry", pairs, **hyper)):
        np.testing.assert_allclose(got / n, case[f"grad_{side}"], rtol=1e-5, atol=1e-7)
    for name, value in case["metrics"].items():
        np.testing.assert_allclose(mean(out, name), value, rtol=1e-6, err_msg=name)


# ---- invariants --------------------------------------------------------------------------------------------------

scores = st.lists(st.floats(-30, 30, width=32), min_size=5, max_size=5)
labels = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]), min_size=5, max_size=5)
numbers = st.fixed_dictionaries(
    {
        "margin": st.sampled_from([0.0, 1.0]),
        "label_smoothing": st.sampled_from([0.0, 0.2]),
        "centering": st.sampled_from([0.0, 0.1]),
        "drop_ties": st.sampled_from([0.0, 1.0]),
    }
)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(REWARD_LOSSES), chosen=scores, rejected=scores, p=labels, hyper=numbers)
def test_swapping_the_pair_and_its_label_changes_nothing(kind, chosen, rejected, p, hyper):
    pairs = PAIRS | {"chosen": chosen, "rejected": rejected, "p": p}
    swapped = PAIRS | {"chosen": rejected, "rejected": chosen, "p": [1 - x for x in p]}
    one, other = loss(kind, pairs, **hyper), loss(kind, swapped, **hyper)
    np.testing.assert_allclose(one.total, other.total, rtol=1e-5, atol=1e-5)
    for name in ("rewards/accuracies", "min_reward", "max_reward", "mean_reward", "reward_loss"):
        np.testing.assert_allclose(one.metrics[name], other.metrics[name], rtol=1e-5, atol=1e-5)
    for a, b in zip(grads(kind, pairs, **hyper), reversed(grads(kind, swapped, **hyper))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert np.isfinite(one.total)


@settings(max_examples=20, deadline=None)
@given(kind=st.sampled_from(REWARD_LOSSES), shift=st.floats(-5, 5), p=labels)
def test_only_centring_sees_a_shift_of_all_scores(kind, shift, p):
    pairs = PAIRS | {"p": p}
    moved = pairs | {side: [x + shift for x in PAIRS[side]] for side in ("chosen", "rejected")}
    np.testing.assert_allclose(loss(kind, pairs).total, loss(kind, moved).total, rtol=1e-4, atol=1e-4)
    if abs(shift) > 0.1:
        assert abs(loss(kind, pairs, centering=1.0).total - loss(kind, moved, centering=1.0).total) > 1e-4


@pytest.mark.parametrize("kind", REWARD_LOSSES)
def test_pairs_of_weight_0_count_nothing_not_even_nan(kind):
    grown = {name: [*values, np.nan] for name, values in PAIRS.items()} | {"weight": [*PAIRS["weight"], 0.0]}
    hyper = {"margin": 1.0, "centering": 0.1}
    one, other = loss(kind, PAIRS, **hyper), loss(kind, grown, **hyper)
    np.testing.assert_allclose(one.total, other.total, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one.metrics, other.metrics)
    for a, b in zip(grads(kind, PAIRS, **hyper), grads(kind, grown, **hyper)):
        np.testing.assert_allclose(a, b[:-1], rtol=1e-5)
        assert b[-1] == 0.0
    empty = loss(kind, PAIRS | {"weight": [0.0] * 5})
    assert float(empty.total) == float(empty.weight) == 0.0
    assert all(float(total) == float(weight) == 0.0 for total, weight in empty.metrics.values())


def test_the_probabilities_of_rao_kupper_sum_to_one_and_ties_are_likely_only_when_scores_are_close():
    out = {}
    for p in (1.0, 0.0, 0.5):
        pairs = PAIRS | {"p": [p] * 5, "weight": [0.0, 0.0, 0.0, 1.0, 0.0]}
        out[p] = np.exp(-float(loss("rao_kupper", pairs).total))
    np.testing.assert_allclose(sum(out.values()), 1.0, rtol=1e-5)
    near = PAIRS | {"p": [0.5] * 5, "weight": [0.0, 0.0, 1.0, 0.0, 0.0]}
    assert np.exp(-float(loss("rao_kupper", near).total)) > 10 * out[0.5]


def test_a_tied_label_pulls_the_scores_together_and_a_dropped_one_does_not():
    pairs = PAIRS | {"p": [0.5] * 5}
    for kind in REWARD_LOSSES:
        chosen, rejected = grads(kind, pairs)
        assert np.all(np.sign(chosen) == np.sign(np.subtract(PAIRS["chosen"], PAIRS["rejected"])))
        np.testing.assert_allclose(chosen, -rejected, rtol=1e-5)
        assert not np.any(grads(kind, pairs, drop_ties=1.0)[0])
    kept = loss("bradley_terry", PAIRS, drop_ties=1.0)
    assert float(kept.weight) == 4.5
    assert mean(kept, "labels/ties") == pytest.approx(1 / 5.5)


def test_accuracies_are_about_the_label_and_equal_scores_count_half():
    pairs = {
        "chosen": [1.0, 1.0, 0.0, 2.0, 0.0],
        "rejected": [0.0, 0.0, 0.0, 1.0, 1.0],
        "p": [0.9, 0.1, 0.8, 0.5, 1.0],
        "weight": [1.0] * 5,
        "margin": [1.0] * 5,
    }
    out = loss("bradley_terry", pairs)
    assert mean(out, "rewards/accuracies") == pytest.approx(
        (1 + 0 + 0.5 + 0) / 4
    )  # the label's tie is left out
    assert mean(out, "accuracy") == pytest.approx(3 / 5)  # TRL's: chosen > rejected
    assert (mean(out, "min_reward"), mean(out, "max_reward")) == (0.0, 2.0)


def test_an_unknown_loss_and_a_missing_number_are_told():
    n = jnp.zeros(2)
    with pytest.raises(ValueError, match="bradley_terry, rao_kupper"):
        reward_loss("elo", n, n, n, n, None, {})
    with pytest.raises(ValueError, match="tie_threshold"):
        reward_loss("rao_kupper", n, n, n, n, None, {})
