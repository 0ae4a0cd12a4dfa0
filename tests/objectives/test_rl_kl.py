"""KL estimators and their controller: values against plain loops, expectations by exact enumeration of a vocabulary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.config.rl import KlSpec
from laif_jax.objectives.rl import adaptive_kl, full_kl, kl_estimate
from tests.objectives import rl_reference

V = 5
logits = st.lists(st.floats(-4, 4, width=32), min_size=V, max_size=V).map(lambda x: np.array(x, np.float32))


@functools.cache
def jitted(kind):
    return jax.jit(functools.partial(kl_estimate, kind))


def expectation(kind, theta, ref):
    """E over a ~ pi of the estimate, every a enumerated; the sampling weights are constants."""
    logp, ref = jax.nn.log_softmax(theta), jax.nn.log_softmax(ref)
    return jnp.sum(jnp.exp(jax.lax.stop_gradient(logp)) * kl_estimate(kind, logp, ref))


expected = {kind: jax.jit(functools.partial(expectation, kind)) for kind in ("k1", "k2", "k3")}
gradient = {kind: jax.jit(jax.grad(functools.partial(expectation, kind))) for kind in ("k1", "k2", "k3")}
full, full_gradient = jax.jit(full_kl), jax.jit(jax.grad(full_kl))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@given(seed=st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_estimators_equal_their_formulas(kind, seed):
    logps, ref = -np.random.default_rng(seed).exponential(2, (2, 3, 4)).astype(np.float32)
    loop = [
        [rl_reference.kl_term(kind, a, b) for a, b in zip(x, y, strict=True)]
        for x, y in zip(logps, ref, strict=True)
    ]
    np.testing.assert_allclose(jitted(kind)(logps, ref), loop, rtol=2e-5, atol=1e-5)


@given(theta=logits, ref=logits)
@settings(max_examples=40, deadline=None)
def test_k1_and_k3_are_unbiased_and_the_full_kl_is_right(theta, ref):
    exact = rl_reference.full_kl(theta, ref)
    np.testing.assert_allclose(full(theta, ref), exact, rtol=1e-5, atol=2e-6)
    assert full(theta, ref) >= -1e-6
    for kind in ("k1", "k3"):
        np.testing.assert_allclose(expected[kind](theta, ref), exact, rtol=2e-4, atol=1e-5)
    logp, ref_logp = (rl_reference.log_softmax(x) for x in (theta, ref))
    biased = sum(np.exp(p) * rl_reference.kl_term("k2", p, q) for p, q in zip(logp, ref_logp, strict=True))
    np.testing.assert_allclose(expected["k2"](theta, ref), biased, rtol=1e-5, atol=1e-6)


@given(theta=logits, ref=logits)
@settings(max_examples=40, deadline=None)
def test_expected_gradients_are_those_that_the_documentation_says(theta, ref):
    """In a loss, k2 and "full" lower KL(pi || ref), k3 lowers KL(ref || pi), and k1 lowers nothing."""
    p, q = (np.exp(rl_reference.log_softmax(x)) for x in (theta, ref))
    log_ratio = np.log(p) - np.log(q)
    of_the_kl = p * (log_ratio - np.sum(p * log_ratio))  # d KL(pi || ref) / d theta, by hand
    for exact in (full_gradient(theta, ref), gradient["k2"](theta, ref)):
        np.testing.assert_allclose(exact, of_the_kl, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient["k3"](theta, ref), p - q, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient["k1"](theta, ref), 0, atol=1e-6)


def test_k3_is_never_negative_and_all_are_zero_at_the_reference():
    logps = jnp.linspace(-8, 0, 9)
    assert (kl_estimate("k3", logps[:, None], logps[None]) >= 0).all()
    for kind in ("k1", "k2", "k3"):
        assert not kl_estimate(kind, logps, logps).any()
    assert full_kl(logps, logps + 3.0) == pytest.approx(0, abs=1e-6)  # logits are free up to a constant


def test_small_log_ratios_keep_their_digits():
    """exp(-d) - 1 + d by subtraction would be rounding noise here."""
    assert kl_estimate("k3", jnp.float32(-1e-4), jnp.float32(0)) == pytest.approx(5e-9, rel=0.05)


def test_tokens_that_cannot_be_drawn_add_nothing():
    theta, ref = jnp.array([1.0, 2.0, -jnp.inf]), jnp.array([0.0, 1.0, -jnp.inf])
    assert full_kl(theta, ref) == pytest.approx(rl_reference.full_kl([1, 2], [0, 1]), abs=1e-6)
    assert jnp.isfinite(jax.grad(full_kl)(theta, ref)).all()
    assert full_kl(theta, ref.at[0].set(-jnp.inf)) == jnp.inf


def test_what_lies_under_the_mask_has_no_estimate_and_no_gradient():
    logps, mask = jnp.array([-1.0, jnp.nan]), jnp.array([1, 0])
    for kind in ("k1", "k2", "k3"):
        value, slope = jax.value_and_grad(lambda x, k=kind: kl_estimate(k, x, jnp.zeros(2), mask).sum())(
            logps
        )
        assert jnp.isfinite(value)
        assert jnp.isfinite(slope).all()
        assert slope[1] == 0


def test_any_dtype_comes_out_float32():
    for kind in ("k1", "k2", "k3"):
        assert kl_estimate(kind, jnp.zeros(2, jnp.bfloat16), jnp.zeros(2, jnp.int32)).dtype == jnp.float32
    assert full_kl(jnp.zeros((2, 3), jnp.bfloat16), jnp.zeros((2, 3), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(("kind", "message"), [("k4", "use k1, k2 or k3"), ("full", "`full_kl`")])
def test_an_unknown_estimator_is_named(kind, message):
    with pytest.raises(ValueError, match=message):
        kl_estimate(kind, jnp.zeros(1), jnp.zeros(1))


def test_a_kl_in_the_loss_that_has_no_gradient_is_refused():
    with pytest.raises(ValueError, match="the gradient of k1 is 0 on average"):
        KlSpec(place="loss")
    assert KlSpec(place="loss", estimator="k2").coef > 0


@given(
    coef=st.floats(0.0, 2),
    kl=st.floats(-1, 100),
    target=st.floats(0.5, 20),
    horizon=st.integers(100, 20000),
    episodes=st.integers(1, 256),
)
@settings(max_examples=60, deadline=None)
def test_the_controller_equals_its_formula_and_pushes_the_right_way(coef, kl, target, horizon, episodes):
    new = jax.jit(adaptive_kl)(coef, kl, target, horizon, episodes)
    assert new.dtype == jnp.float32
    np.testing.assert_allclose(
        new, rl_reference.adaptive_kl(coef, kl, target, horizon, episodes), rtol=1e-4, atol=1e-6
    )
    assert new >= np.float32(coef) if kl > target else new <= np.float32(coef)


def test_the_controller_by_hand():
    assert adaptive_kl(0.1, 12.0, 6.0, 1000, 100) == pytest.approx(
        0.1 * (1 + 0.2 * 0.1)
    )  # twice the target: clipped
    assert adaptive_kl(0.1, 6.6, 6.0, 1000, 100) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert adaptive_kl(0.1, 6.0, 6.0, 1000, 100) == pytest.approx(0.1)
    assert adaptive_kl(0.1, 0.0, 6.0, 10, 1000) == 0.0  # a penalty never turns into a bonus
