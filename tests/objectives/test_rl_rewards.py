"""Scores, rewards per token, advantages and whitening, against plain loops; float32 whatever comes in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.objectives.rl import (
    clip_scores,
    explained_variance,
    gae,
    grpo_advantages,
    last_token,
    reinforce_advantages,
    rloo_advantages,
    scores_with_eos,
    token_rewards,
    whiten,
)
from tests.objectives import rl_reference

B, N, PAD = 4, 6, 3
f = {
    "token_rewards": jax.jit(token_rewards),
    "gae": jax.jit(gae),
    "reinforce": jax.jit(reinforce_advantages),
    "whiten": jax.jit(whiten, static_argnums=2),
    "rloo": jax.jit(rloo_advantages),
    "grpo": jax.jit(grpo_advantages, static_argnums=2),
    "explained": jax.jit(explained_variance),
}


def lengths_to_mask(lengths, columns=N):
    return (np.arange(columns) < np.array(lengths)[:, None]).astype(np.float32)


responses = st.lists(st.integers(0, N), min_size=B, max_size=B).map(
    lengths_to_mask
)  # 0: a row that is left out
with_gaps = st.lists(
    st.lists(st.sampled_from([0.0, 1.0]), min_size=N, max_size=N), min_size=B, max_size=B
).map(lambda rows: np.array(rows, np.float32))
masks = st.one_of(responses, with_gaps)
seeds = st.integers(0, 2**16)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dirty(x, mask):
    """NaN wherever the mask is 0."""
    return np.where(mask > 0, x, np.nan).astype(np.float32)


# ---- rewards ---------------------------------------------------------------------------------------------------


@given(mask=masks, seed=seeds, coef=st.floats(0, 1, width=32))
@settings(max_examples=40, deadline=None)
def test_rewards_per_token_equal_a_loop(mask, seed, coef):
    scores, kl = normal(seed, B), normal(seed + 1, B, N)
    found = f["token_rewards"](scores, dirty(kl, mask), coef, mask)
    np.testing.assert_allclose(
        found, rl_reference.token_rewards(scores, kl, coef, mask), rtol=1e-5, atol=1e-6
    )
    there = mask.any(1)
    non_score = -coef * (kl * mask).sum(1)
    np.testing.assert_allclose(
        found.sum(1), np.where(there, scores + non_score, 0), rtol=1e-4, atol=1e-5
    )  # rlhf_reward = score + non_score_reward


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16, jnp.float32])
def test_fractional_scores_stay_fractional(dtype):
    """A reward buffer of the type of the token ids, or of the model, would turn 0.7 into 0 and -1.6 into -1."""
    mask = jnp.array([[1, 1, 0], [1, 1, 1]], dtype)
    rewards = token_rewards(jnp.array([0.7, -1.6]), jnp.zeros((2, 3), dtype), jnp.asarray(0, dtype), mask)
    assert rewards.dtype == jnp.float32
    np.testing.assert_array_equal(rewards, np.array([[0, 0.7, 0], [0, 0, -1.6]], np.float32))
    assert whiten(rewards.astype(dtype), mask).dtype == jnp.float32
    for advantages in gae(rewards, jnp.zeros((2, 3), dtype), mask, 1, 1):
        assert advantages.dtype == jnp.float32
        np.testing.assert_array_equal(advantages, np.array([[0.7, 0.7, 0], [-1.6] * 3], np.float32))
    for shaped in (
        clip_scores(jnp.array([3], dtype), 0.7),
        scores_with_eos(jnp.array([3], dtype), False, penalty=2.3),
    ):
        assert shaped.dtype == jnp.float32
        assert shaped == pytest.approx(0.7)


def test_integer_scores_come_out_as_floats():
    mask = jnp.ones((1, 2), jnp.int32)
    rewards = token_rewards(jnp.array([3]), jnp.full((1, 2), 0.5), 0.1, mask)
    np.testing.assert_allclose(rewards, [[-0.05, 2.95]])
    np.testing.assert_allclose(rloo_advantages(jnp.array([[1, 2, 4]])), [[-2.0, -0.5, 2.5]])


def test_the_score_is_on_the_last_generated_token_whatever_its_id():
    np.testing.assert_array_equal(
        last_token(jnp.array([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]])),
        [[0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]],
    )
    rewards = token_rewards(jnp.array([jnp.nan, 1.0]), jnp.zeros((2, 2)), 0.1, jnp.array([[0, 0], [1, 0]]))
    np.testing.assert_array_equal(rewards, [[0, 0], [1, 0]])  # a row that is left out has no score


def test_missing_end_and_clipping():
    scores, ended = jnp.array([2.0, 2.0, -9.0]), jnp.array([True, False, False])
    np.testing.assert_array_equal(scores_with_eos(scores, ended), scores)
    np.testing.assert_array_equal(scores_with_eos(scores, ended, penalty=1.5), [2, 0.5, -10.5])
    np.testing.assert_array_equal(scores_with_eos(scores, ended, penalty=0.0), scores)
    np.testing.assert_array_equal(scores_with_eos(scores, ended, replacement=-1.0), [2, -1, -1])
    np.testing.assert_array_equal(scores_with_eos(scores, ended, replacement=0.0), [2, 0, 0])
    np.testing.assert_array_equal(clip_scores(scores, 1.5), [1.5, 1.5, -1.5])
    np.testing.assert_array_equal(clip_scores(scores, None), scores)
    with pytest.raises(ValueError, match="give one of"):
        scores_with_eos(scores, ended, 1.0, 1.0)


# ---- advantages ------------------------------------------------------------------------------------------------


@given(mask=masks, seed=seeds, gamma=st.floats(0, 1, width=32), lam=st.floats(0, 1, width=32))
@settings(max_examples=60, deadline=None)
def test_gae_equals_its_definition(mask, seed, gamma, lam):
    rewards, values = normal(seed, B, N), normal(seed + 1, B, N)
    found = f["gae"](dirty(rewards, mask), dirty(values, mask), mask, gamma, lam)
    for ours, loop in zip(found, rl_reference.gae(rewards, values, mask, gamma, lam), strict=True):
        np.testing.assert_allclose(ours, loop, rtol=1e-4, atol=1e-5)


@given(mask=masks, seed=seeds)
@settings(max_examples=40, deadline=None)
def test_without_discount_the_advantage_is_return_minus_value(mask, seed):
    rewards, values = normal(seed, B, N), normal(seed + 1, B, N)
    advantages, returns = f["gae"](rewards, values, mask, 1.0, 1.0)
    z_minus_v, z = f["reinforce"](dirty(rewards, mask), dirty(values, mask), mask)
    loop = rl_reference.reinforce(rewards, values, mask)
    for ours, theirs, plain in zip((advantages, returns), (z_minus_v, z), loop, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(theirs, plain, rtol=1e-4, atol=1e-5)


def test_gae_by_hand():
    """gamma 0.5, lambda 0.5, rewards 0, 0, 1, values 1, 2, 3, then padding."""
    advantages, returns = gae(
        jnp.array([[0, 0, 1, 9.0]]), jnp.array([[1, 2, 3, 9.0]]), jnp.array([[1, 1, 1, 0]]), 0.5, 0.5
    )
    a3 = 1 - 3.0
    a2 = 0 + 0.5 * 3 - 2 + 0.25 * a3
    a1 = 0 + 0.5 * 2 - 1 + 0.25 * a2
    np.testing.assert_allclose(advantages, [[a1, a2, a3, 0]])
    np.testing.assert_allclose(returns, [[a1 + 1, a2 + 2, a3 + 3, 0]])


@given(mask=responses, seed=seeds)
@settings(max_examples=25, deadline=None)
def test_padding_changes_nothing(mask, seed):
    """More columns of padding, with anything in them: the same rewards, advantages, whitened values."""
    scores, kl, values = normal(seed, B), normal(seed + 1, B, N), normal(seed + 2, B, N)

    def run(kl, values, mask):
        rewards = f["token_rewards"](scores, kl, 0.3, mask)
        advantages, returns = f["gae"](rewards, values, mask, 0.9, 0.8)
        return (
            rewards,
            advantages,
            returns,
            f["whiten"](advantages, mask, True),
            f["whiten"](rewards, mask, False),
        )

    wider = [
        np.concatenate([x, np.full((B, PAD), fill)], 1)
        for x, fill in ((kl, 7.0), (values, -5.0), (mask, 0.0))
    ]
    for narrow, wide in zip(run(kl, values, mask), run(*wider), strict=True):
        np.testing.assert_allclose(wide[:, :N], narrow, rtol=1e-5, atol=1e-6)
        assert not np.asarray(wide)[:, N:].any()


@given(mask=masks, seed=seeds, shift=st.booleans())
@settings(max_examples=40, deadline=None)
def test_whitening_is_over_real_tokens_alone(mask, seed, shift):
    x = 3 * normal(seed, B, N) + 5
    white = np.asarray(f["whiten"](dirty(x, mask), mask, shift))
    np.testing.assert_allclose(white, rl_reference.whiten(x, mask, shift), rtol=1e-3, atol=1e-4)
    tokens = white[mask > 0]
    assert not white[mask == 0].any()
    if len(tokens) > 1:
        np.testing.assert_allclose(tokens.mean(), 0 if shift else x[mask > 0].mean(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(tokens.var(), 1, rtol=1e-3)


def test_whitening_equal_values_gives_zeros():
    np.testing.assert_allclose(whiten(jnp.full((2, 2), 3.0), jnp.ones((2, 2))), 0, atol=1e-4)
    np.testing.assert_allclose(
        whiten(jnp.full((2, 2), 3.0), jnp.ones((2, 2)), shift_mean=False), 3, rtol=1e-5
    )


@given(
    seed=seeds,
    valid=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=3, max_size=3).map(np.array),
    scale=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_group_advantages_equal_loops(seed, valid, scale):
    scores = normal(seed, 3, 4)
    given_scores = np.where(valid, scores, np.nan)
    loo = f["rloo"](given_scores, valid)
    np.testing.assert_allclose(loo, rl_reference.rloo(scores, valid), rtol=1e-4, atol=1e-5)
    group = f["grpo"](given_scores, valid, scale)
    np.testing.assert_allclose(group, rl_reference.grpo(scores, valid, scale), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.asarray(group).sum(1), 0, atol=1e-4)


def test_equal_scores_of_a_prompt_teach_nothing():
    assert not grpo_advantages(jnp.full((1, 4), 0.7)).any()
    np.testing.assert_allclose(rloo_advantages(jnp.full((1, 4), 0.7)), 0, atol=1e-6)
    np.testing.assert_allclose(grpo_advantages(jnp.array([[1.0, 3.0]])), [[-0.7070568, 0.7070568]], rtol=1e-5)


@given(mask=masks, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_explained_variance_equals_a_loop(mask, seed):
    values, returns = normal(seed, B, N), normal(seed + 1, B, N)
    found = f["explained"](dirty(values, mask), dirty(returns, mask), mask)
    if mask.sum() < 2:
        assert found == 0
    else:
        np.testing.assert_allclose(
            found, rl_reference.explained_variance(values, returns, mask), rtol=1e-3, atol=1e-3
        )


def test_explained_variance_of_known_critics():
    returns, mask = jnp.array([[1.0, 2, 3, 4]]), jnp.ones((1, 4))
    assert explained_variance(returns + 7, returns, mask) == pytest.approx(
        1
    )  # a constant error explains all variance
    assert explained_variance(jnp.zeros((1, 4)), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)
    assert explained_variance(returns, jnp.ones((1, 4)), mask) == 0  # nothing to explain


def test_advantages_carry_no_gradient():
    mask = jnp.ones((2, 3))

    def through(x):
        advantages, returns = gae(token_rewards(x[:, 0], x, 0.1, mask), x, mask, 0.9, 0.9)
        return (
            jnp.sum(whiten(advantages, mask) + returns) + rloo_advantages(x)[0, 0] + grpo_advantages(x)[0, 0]
        )

    assert not jax.grad(through)(normal(0, 2, 3)).any()
