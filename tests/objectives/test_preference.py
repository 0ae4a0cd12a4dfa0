"""The DPO family against float64 NumPy, against TRL's own code, and by its invariants."""

import json
from functools import cache
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.config.schema import PreferenceLoss
from laif_jax.objectives import PREFERENCE_LOSSES, preference_loss
from tests.objectives.reference import soft_loss

N = 4
GOLDEN = json.loads((Path(__file__).parent / "trl_losses.json").read_text())
ORDER = ("pi_c", "pi_r", "ref_c", "ref_r", "len_c", "len_r", "p", "weight")
HYPER = {"beta": 0.1, "label_smoothing": 0.1, "gamma": 0.5, "sft_weight": 0.0, "reference_free": 0.0}


@cache
def compiled(kind):
    """One compiled function per loss for all tests and settings: the scalars of `hyper` are traced."""
    return jax.jit(lambda pairs, hyper: preference_loss(kind, *(pairs[name] for name in ORDER), hyper=hyper))


@cache
def gradient(kind):
    def total(pi_c, pi_r, pairs, hyper):
        pairs = pairs | {"pi_c": pi_c, "pi_r": pi_r}
        return preference_loss(kind, *(pairs[name] for name in ORDER), hyper=hyper).total

    return jax.jit(jax.grad(total, argnums=(0, 1)))


def loss(kind, pairs, **hyper):
    arrays = {name: jnp.asarray(pairs[name], jnp.float32) for name in ORDER}
    return compiled(kind)(arrays, {**HYPER, **hyper})


def swapped(pairs):
    names = {
        "pi_c": "pi_r",
        "pi_r": "pi_c",
        "ref_c": "ref_r",
        "ref_r": "ref_c",
        "len_c": "len_r",
        "len_r": "len_c",
    }
    return {
        name: 1 - np.asarray(pairs["p"]) if name == "p" else pairs[names.get(name, name)] for name in ORDER
    }


def example_pairs():
    return {
        "pi_c": np.array([-7.25, -12.0, -1.5, -30.0]),
        "pi_r": np.array([-9.0, -6.5, -2.0, -41.0]),
        "ref_c": np.array([-8.5, -10.0, -1.5, -28.0]),
        "ref_r": np.array([-8.75, -9.25, -2.0, -33.5]),
        "len_c": np.array([5.0, 3, 1, 11]),
        "len_r": np.array([7.0, 2, 4, 9]),
        "p": np.array([1.0, 0.75, 0.5, 0.875]),
        "weight": np.ones(N),
    }


def floats(low, high):
    return st.lists(st.floats(low, high, width=32, allow_subnormal=False), min_size=N, max_size=N)


pair_sets = st.fixed_dictionaries(
    {name: floats(-60, 0) for name in ORDER[:4]}
    | {name: st.lists(st.integers(1, 20), min_size=N, max_size=N) for name in ORDER[4:6]}
    | {"p": floats(0, 1), "weight": st.just([1.0] * N)}
)
hypers = st.fixed_dictionaries(
    {
        "beta": st.floats(0.0625, 5, width=32, allow_subnormal=False),
        "label_smoothing": st.floats(0, 0.375, width=32, allow_subnormal=False),
        "gamma": st.floats(0, 2, width=32, allow_subnormal=False),
        "sft_weight": st.floats(0, 1, width=32, allow_subnormal=False),
        "reference_free": st.sampled_from([0.0, 1.0]),
    }
)
kinds = pytest.mark.parametrize("kind", PREFERENCE_LOSSES)


def test_the_configuration_names_the_same_losses():
    assert set(get_args(PreferenceLoss)) == set(PREFERENCE_LOSSES)


@kinds
@given(pairs=pair_sets, hyper=hypers)
@settings(max_examples=40, deadline=None)
def test_equals_the_formula_in_float64(kind, pairs, hyper):
    out = loss(kind, pairs, **hyper)
    expected = soft_loss(kind, pairs, hyper)
    # float32 rounds margins that cancel; ipo squares them.
    tolerance = 1e-5 * max(1.0, np.abs(expected).max()) + 2e-5 * hyper["beta"] * 60
    np.testing.assert_allclose(out.total, expected.sum(), rtol=2e-5, atol=N * tolerance)
    assert out.weight == N


@pytest.mark.parametrize(
    "case", GOLDEN["cases"], ids=lambda case: f"{case['source']}-{case['hyper']['beta']}"
)
def test_equals_trl(case):
    sides = {side: np.array([pair[side] for pair in GOLDEN["pairs"]]) for side in ("chosen", "rejected")}
    pairs = {
        "pi_c": sides["chosen"][:, 0],
        "ref_c": sides["chosen"][:, 1],
        "len_c": sides["chosen"][:, 2],
        "pi_r": sides["rejected"][:, 0],
        "ref_r": sides["rejected"][:, 1],
        "len_r": sides["rejected"][:, 2],
    }
    pairs = {name: jnp.asarray(value, jnp.float32) for name, value in pairs.items()}
    pairs |= {"p": jnp.ones(5), "weight": jnp.ones(5)}
    hyper = HYPER | case["hyper"]
    one = [{name: value[i : i + 1] for name, value in pairs.items()} for i in range(5)]
    losses = [compiled(case["kind"])(pair, hyper).total for pair in one]
    np.testing.assert_allclose(losses, case["loss"], rtol=1e-5, atol=1e-6)
    grads = gradient(case["kind"])(pairs["pi_c"], pairs["pi_r"], pairs, hyper)
    np.testing.assert_allclose(grads[0], case["grad_chosen"], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(grads[1], case["grad_rejected"], rtol=1e-4, atol=1e-7)
    out = compiled(case["kind"])(pairs, hyper)
    ours = {name: float(total / weight) for name, (total, weight) in out.metrics.items()}
    for name, value in case["metrics"].items():
        # The third pair is an exact tie, which TRL counts 0 and we count 0.5.
        expected = value + 0.5 / 5 if name == "rewards/accuracies" else value
        assert ours[name] == pytest.approx(expected, rel=1e-5), name


@kinds
@given(pairs=pair_sets, hyper=hypers)
@settings(max_examples=25, deadline=None)
def test_swapping_the_pair_and_the_label_changes_nothing(kind, pairs, hyper):
    hyper = hyper | {"sft_weight": 0.0}
    there, back = loss(kind, pairs, **hyper), loss(kind, swapped(pairs), **hyper)
    np.testing.assert_allclose(there.total, back.total, rtol=1e-4, atol=1e-4)


@given(pairs=pair_sets, hyper=hypers)
@settings(max_examples=25, deadline=None)
def test_conservative_is_sigmoid_with_a_smoothed_label(pairs, hyper):
    eps, p = hyper["label_smoothing"], np.asarray(pairs["p"])
    smoothed = pairs | {"p": (1 - eps) * p + eps * (1 - p)}
    np.testing.assert_allclose(
        loss("conservative", pairs, **hyper).total,
        loss("sigmoid", smoothed, **hyper).total,
        rtol=1e-4,
        atol=1e-4,
    )


@given(pairs=pair_sets, hyper=hypers)
@settings(max_examples=25, deadline=None)
def test_robust_is_unbiased_under_flips(pairs, hyper):
    """Its expectation over labels flipped with chance eps is the sigmoid loss of the true labels (rDPO's Lemma)."""
    eps = hyper["label_smoothing"]
    true = pairs | {"p": np.round(pairs["p"])}
    flipped = true | {"p": 1 - true["p"]}
    hyper = hyper | {"sft_weight": 0.0}
    expectation = (1 - eps) * loss("robust", true, **hyper).total + eps * loss(
        "robust", flipped, **hyper
    ).total
    np.testing.assert_allclose(expectation, loss("sigmoid", true, **hyper).total, rtol=2e-3, atol=2e-3)


@kinds
def test_an_undecided_label_is_least_at_margin_zero(kind):
    margins = np.linspace(-3, 3, 61)

    def at(margin):
        pairs = example_pairs() | {"p": np.full(N, 0.5), "ref_c": np.zeros(N), "ref_r": np.zeros(N)}
        pairs |= {"len_c": np.full(N, 4.0), "len_r": np.full(N, 4.0)}
        pairs |= {"pi_c": np.full(N, -20 + margin), "pi_r": np.full(N, -20.0)}
        return float(loss(kind, pairs, beta=0.7).total)

    totals = np.array([at(margin) for margin in margins])
    assert totals[30] == totals.min()
    assert totals[0] > totals[30]
    assert totals[-1] > totals[30]
    np.testing.assert_allclose(totals, totals[::-1], rtol=1e-5)


@kinds
@given(pairs=pair_sets, hyper=hypers, keep=st.lists(st.booleans(), min_size=N, max_size=N))
@settings(max_examples=25, deadline=None)
def test_sums_add_over_splits_of_the_batch(kind, pairs, hyper, keep):
    keep = np.array(keep)
    whole = loss(kind, pairs, **hyper)
    left = loss(kind, pairs | {"weight": keep * 1.0}, **hyper)
    right = loss(kind, pairs | {"weight": (~keep) * 1.0}, **hyper)
    np.testing.assert_allclose(left.total + right.total, whole.total, rtol=1e-5, atol=1e-4)
    assert left.weight + right.weight == whole.weight
    for name, (total, weight) in whole.metrics.items():
        np.testing.assert_allclose(
            left.metrics[name][0] + right.metrics[name][0], total, rtol=1e-5, atol=1e-4
        )
        assert left.metrics[name][1] + right.metrics[name][1] == weight


@kinds
@pytest.mark.parametrize("rubbish", [np.nan, np.inf, 0.0, 123.0])
def test_padding_pairs_change_nothing(kind, rubbish):
    real = example_pairs()
    weight = np.array([1.0, 1, 1, 0])
    padded = {name: np.where(weight > 0, value, rubbish) for name, value in real.items()} | {"weight": weight}
    a, b = loss(kind, real | {"weight": weight}, sft_weight=0.5), loss(kind, padded, sft_weight=0.5)
    assert a.total == b.total
    assert a.weight == b.weight == 3
    jax.tree.map(np.testing.assert_array_equal, a.metrics, b.metrics)
    arrays = {name: jnp.asarray(padded[name], jnp.float32) for name in ORDER}
    grads = gradient(kind)(arrays["pi_c"], arrays["pi_r"], arrays, HYPER | {"sft_weight": 0.5})
    assert np.isfinite(grads).all()
    assert grads[0][3] == grads[1][3] == 0


@kinds
def test_a_weight_of_two_is_the_pair_twice(kind):
    pairs = example_pairs()
    doubled = loss(kind, pairs | {"weight": np.array([1.0, 2, 0, 0])}, sft_weight=0.5)
    index = np.array([0, 1, 1, 3])
    twice = loss(
        kind,
        {name: value[index] for name, value in pairs.items()} | {"weight": np.array([1.0, 1, 1, 0])},
        sft_weight=0.5,
    )
    np.testing.assert_allclose(doubled.total, twice.total, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), doubled.metrics, twice.metrics)


@pytest.mark.parametrize("kind", ["sigmoid", "conservative", "robust", "length_normalised"])
def test_at_the_start_the_loss_is_log_two_and_margins_are_zero(kind):
    pairs = example_pairs()
    out = loss(kind, pairs | {"ref_c": pairs["pi_c"], "ref_r": pairs["pi_r"]})
    np.testing.assert_allclose(out.total / out.weight, np.log(2), rtol=1e-6)
    assert out.metrics["rewards/margins"][0] == 0
    assert out.metrics["rewards/accuracies"][0] / N == 0.5


@kinds
def test_extreme_margins_stay_finite(kind):
    pairs = example_pairs() | {"pi_c": np.array([-1e4, 0, -1e4, 0]), "pi_r": np.array([0, -1e4, 0, -1e4])}
    out = loss(kind, pairs, beta=5.0)
    arrays = {name: jnp.asarray(pairs[name], jnp.float32) for name in ORDER}
    grads = gradient(kind)(arrays["pi_c"], arrays["pi_r"], arrays, HYPER | {"beta": 5.0})
    assert np.isfinite(out.total)
    assert np.isfinite(grads).all()


@kinds
def test_no_gradient_reaches_the_reference_or_the_label(kind):
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in example_pairs().items()}

    def total(constants):
        pairs = arrays | constants
        return preference_loss(kind, *(pairs[name] for name in ORDER), hyper=HYPER).total

    constants = {name: arrays[name] for name in ("ref_c", "ref_r", "p")}
    assert all(not leaf.any() for leaf in jax.tree.leaves(jax.grad(total)(constants)))


def test_sft_term_is_the_mean_token_nll_of_the_chosen():
    pairs = example_pairs()
    plain, added = loss("sigmoid", pairs), loss("sigmoid", pairs, sft_weight=2.0)
    nll = (-pairs["pi_c"] / pairs["len_c"]).sum()
    np.testing.assert_allclose(added.total - plain.total, 2 * nll, rtol=1e-5)
    np.testing.assert_allclose(added.metrics["nll_loss"][0], nll, rtol=1e-6)
    np.testing.assert_allclose(added.metrics["preference_loss"][0], plain.total, rtol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in PREFERENCE_LOSSES if kind != "simpo"])
def test_reference_free_counts_the_reference_as_zero(kind):
    pairs = example_pairs()
    zero = pairs | {"ref_c": np.zeros(N), "ref_r": np.zeros(N)}
    assert loss(kind, pairs, reference_free=1.0).total == loss(kind, zero).total != loss(kind, pairs).total


def test_a_sweep_over_the_scalars_does_not_recompile():
    function = jax.jit(
        lambda pairs, hyper: preference_loss("simpo", *(pairs[n] for n in ORDER), hyper=hyper).total
    )
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in example_pairs().items()}
    totals = {
        float(function(arrays, HYPER | {"beta": b, "gamma": g})) for b in (0.1, 1.0) for g in (0.0, 1.0)
    }
    assert len(totals) == 4
    assert function._cache_size() == 1


def test_misuse_is_named():
    arrays = [jnp.ones(1)] * 8
    with pytest.raises(ValueError, match="unknown preference loss `dpo`; use one of sigmoid"):
        preference_loss("dpo", *arrays, hyper=HYPER)
    with pytest.raises(ValueError, match="`simpo` needs `gamma` in `hyper`; it has"):
        preference_loss("simpo", *arrays, hyper={"beta": 1.0})
    with pytest.raises(ValueError, match="`robust` needs `label_smoothing`"):
        preference_loss("robust", *arrays, hyper={"beta": 1.0})
