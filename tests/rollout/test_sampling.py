"""The sampler against a NumPy reference: the kept set, the distribution, the log-probs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.rollout.sampling import SamplingParams, first_best, sample, top_logps, truncate


def reference_probs(logits: np.ndarray, temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """The distribution that a draw must follow, by sorting in float64 (no ties in the test data)."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled)
    probs = np.exp(scaled - scaled.max())
    keep = np.zeros(len(logits), bool)
    kept = order[: top_k or len(order)]
    mass = probs[kept] / probs[kept].sum()
    count = len(kept) if top_p >= 1 else int(np.searchsorted(np.cumsum(mass), top_p) + 1)
    keep[kept[:count]] = True
    probs = np.where(keep, probs, 0.0)
    return probs / probs.sum()


def draws(logits: np.ndarray, n: int, params: SamplingParams, seed: int = 0):
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, len(logits)))
    return jax.jit(sample)(rows, jax.random.split(jax.random.key(seed), n), params)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.5, 1.0, 0), (2.0, 1.0, 0), (1.0, 0.7, 0), (1.0, 1.0, 4), (0.8, 0.9, 6), (1.5, 0.5, 3)],
)
def test_draws_follow_the_reference_distribution(temperature, top_p, top_k):
    """Chi-square over the kept tokens; tokens outside the reference's kept set are never drawn."""
    logits = np.random.default_rng(3).normal(size=17).astype(np.float32) * 1.5
    n = 20000
    tokens = np.asarray(draws(logits, n, SamplingParams(temperature, top_p, top_k)).tokens)
    expected = reference_probs(logits, temperature, top_p, top_k) * n
    counts = np.bincount(tokens, minlength=len(logits))
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi2 = float((((counts - expected) ** 2)[kept] / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    # Mean `freedom`, variance 2 * freedom: 6 standard deviations is a false alarm in about 1e-5 of seeds.
    assert chi2 < freedom + 6 * np.sqrt(2 * max(freedom, 1))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31), scale=st.floats(0.1, 8), top_p=st.floats(0.01, 0.99), top_k=st.integers(0, 40)
)
def test_truncation_keeps_the_reference_set(seed, scale, top_p, top_k):
    logits = (np.random.default_rng(seed).normal(size=33) * scale).astype(np.float32)
    kept = jax.jit(truncate)(jnp.asarray(logits)[None], jnp.array([top_p]), jnp.array([top_k]))
    mine = np.isfinite(np.asarray(kept[0]))
    expected = reference_probs(logits, 1.0, top_p, top_k)
    cumulative = np.cumsum(-np.sort(-reference_probs(logits, 1.0, 1.0, top_k)))
    if np.abs(cumulative - top_p).min() > 1e-5:  # else rounding may move the boundary by one token
        np.testing.assert_array_equal(mine, expected > 0)
    np.testing.assert_array_equal(np.asarray(kept[0])[mine], logits[mine])
    assert mine[np.argmax(logits)]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.2, 3), top_p=st.floats(0.1, 1.0))
def test_logps_are_those_of_the_untruncated_tempered_distribution(seed, temperature, top_p):
    logits = np.random.default_rng(seed).normal(size=11).astype(np.float32) * 3
    out = draws(logits, 8, SamplingParams(temperature, top_p, 0), seed=seed % 1000)
    expected = np.log(reference_probs(logits, temperature, 1.0, 0))[np.asarray(out.tokens)]
    np.testing.assert_allclose(out.logps, expected, atol=1e-5, rtol=1e-5)


def test_greedy_is_argmax_with_log_prob_at_temperature_one():
    logits = np.random.default_rng(0).normal(size=29).astype(np.float32)
    out = draws(logits, 5, SamplingParams(0.0, 0.3, 2))
    assert set(np.asarray(out.tokens).tolist()) == {int(logits.argmax())}
    np.testing.assert_allclose(out.logps, np.log(reference_probs(logits, 1, 1, 0)).max(), atol=1e-6)


@pytest.mark.parametrize("top_p", [0.0, 1e-30, 1e-3])
def test_a_vanishing_top_p_leaves_the_best_token(top_p):
    logits = np.random.default_rng(0).normal(size=29).astype(np.float32)
    assert set(np.asarray(draws(logits, 50, SamplingParams(1.0, top_p, 0)).tokens).tolist()) == {
        logits.argmax()
    }


def test_a_row_ignores_the_rows_beside_it():
    """A row's draw depends on its own logits, key and settings; greedy and sampled rows mix."""
    logits = jax.random.normal(jax.random.key(1), (6, 50))
    keys = jax.random.split(jax.random.key(2), 6)
    params = SamplingParams(
        jnp.array([0.0, 1.0, 0.7, 1.3, 0.0, 2.0]), jnp.array([1, 0.9, 1, 0.5, 1, 1.0]), jnp.arange(6)
    )
    run = jax.jit(sample)
    together = run(logits, keys, params)
    for row in range(6):
        one = slice(row, row + 1)
        alone = run(logits[one], keys[one], jax.tree.map(lambda x, one=one: x[one], params))
        assert int(alone.tokens[0]) == int(together.tokens[row])
        np.testing.assert_allclose(alone.logps[0], together.logps[row], rtol=1e-6)


def test_settings_are_traced_numbers():
    traces = []

    @jax.jit
    def run(logits, keys, params):
        traces.append(1)
        return sample(logits, keys, params)

    logits, keys = jnp.zeros((2, 9)), jax.random.split(jax.random.key(0), 2)
    for temperature, top_p, top_k in [(0.0, 1.0, 0), (1.0, 0.5, 3), (0.3, 1.0, 7)]:
        run(logits, keys, SamplingParams(jnp.float32(temperature), jnp.float32(top_p), jnp.int32(top_k)))
    assert len(traces) == 1


def test_ties_at_the_threshold_are_all_kept_and_top_k_beyond_the_vocabulary_is_off():
    tied = jnp.array([[1.0, 1.0, 1.0, -5.0]])
    kept = np.isfinite(np.asarray(truncate(tied, jnp.array([1.0]), jnp.array([2]))))
    assert kept.tolist() == [[True, True, True, False]]
    assert np.isfinite(np.asarray(truncate(tied, jnp.array([1.0]), jnp.array([99])))).all()


def test_top_logps_are_sorted_log_probs():
    logits = np.random.default_rng(0).normal(size=(2, 13)).astype(np.float32)
    ids, values = top_logps(jnp.asarray(logits), 5)
    for row in range(2):
        expected = np.log(reference_probs(logits[row], 1, 1, 0))
        assert ids[row].tolist() == np.argsort(-expected)[:5].tolist()
        np.testing.assert_allclose(values[row], expected[np.asarray(ids[row])], atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), temperature=st.sampled_from([0.5, 1.0, 3.0]))
def test_draws_are_those_of_jax_random_categorical(seed, temperature):
    logits = np.random.default_rng(seed).normal(size=(5, 300)).astype(np.float32) * 2
    keys = jax.random.split(jax.random.key(seed), 5)
    expected = jax.vmap(jax.random.categorical)(keys, logits / np.float32(temperature))
    assert np.array_equal(sample(jnp.asarray(logits), keys, SamplingParams(temperature)).tokens, expected)


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 2.0]), min_size=4, max_size=4), min_size=1)
)
def test_the_first_best_is_the_argmax(rows):
    x = np.asarray(rows, np.float32)
    assert np.array_equal(first_best(jnp.asarray(x)), x.argmax(axis=-1))
    assert int(first_best(jnp.full((1, 4), jnp.nan))[0]) == 3
