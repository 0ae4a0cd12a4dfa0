"""The clipped losses and the loss of a micro-batch, against plain loops, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.objectives.rl import (
    policy_loss,
    reinforce_loss,
    rl_loss,
    rollout_metrics,
    sum_by,
    value_loss,
)
from tests.objectives import rl_reference
from tests.objectives.test_rl_rewards import B, N, dirty, masks, normal, seeds

HYPER = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0, "value_clip": 0.2}
HYPER |= {"value_coef": 0.1, "entropy_coef": 0.02, "kl_coef": 0.05}
NAMES = ("logps", "old_logps", "advantages", "values", "old_values", "returns", "entropy", "kl")


def some_batch(seed, mask):
    rng = np.random.default_rng(seed)
    draw = lambda scale=1.0: (scale * rng.normal(size=mask.shape)).astype(np.float32)  # noqa: E731
    batch = {"old_logps": draw(), "old_values": draw(), "advantages": draw(), "returns": draw(), "mask": mask}
    batch |= {"logps": batch["old_logps"] + draw(0.4), "values": batch["old_values"] + draw(0.3)}
    return batch | {"entropy": np.abs(draw()), "kl": draw()}


def sums(batch, hyper, how="token"):
    return rl_loss("ppo", hyper=hyper, normalize=how, **batch)


whole = jax.jit(sums, static_argnames="how")
policy = jax.jit(policy_loss)
value = jax.jit(value_loss)


@pytest.mark.parametrize("dual", [None, 3.0])
@given(mask=masks, seed=seeds, low=st.floats(0.05, 0.9), high=st.floats(0.05, 3))
@settings(max_examples=30, deadline=None)
def test_the_clipped_surrogate_and_its_gradient_equal_a_loop(dual, mask, seed, low, high):
    batch = some_batch(seed, mask)
    hyper = {"clip_low": low, "clip_high": high} | ({} if dual is None else {"dual_clip": dual})
    args = (batch["logps"], batch["old_logps"], batch["advantages"])
    out, slope = value_and_slope(*(dirty(x, mask) for x in args), mask, hyper)
    for b in range(B):
        for t in range(N):
            expected = (0.0, 0.0, 0.0)
            if mask[b, t]:
                expected = rl_reference.policy_token(*(float(x[b, t]) for x in args), low, high, dual)
            np.testing.assert_allclose(
                (out.loss[b, t], slope[b, t], out.clipped[b, t]), expected, rtol=1e-4, atol=1e-5
            )


@jax.jit
def value_and_slope(logps, old_logps, advantages, mask, hyper):
    def total(x):
        out = policy_loss(x, old_logps, advantages, mask, hyper)
        return out.loss.sum(), out

    (_, out), slope = jax.value_and_grad(total, has_aux=True)(logps)
    return out, slope


def test_the_clip_acts_on_the_right_side():
    ratios = jnp.array([0.5, 0.9, 1.0, 1.1, 1.5, 5.0])[:, None]
    ones = jnp.ones((6, 1))
    hyper = {"clip_low": 0.2, "clip_high": 0.4}
    good = policy_loss(jnp.log(ratios), ones * 0, ones, ones, hyper)
    np.testing.assert_allclose(good.loss[:, 0], [-0.5, -0.9, -1, -1.1, -1.4, -1.4], rtol=1e-6)
    np.testing.assert_array_equal(good.clipped[:, 0], [0, 0, 0, 0, 1, 1])
    bad = policy_loss(jnp.log(ratios), ones * 0, -ones, ones, hyper)
    np.testing.assert_allclose(bad.loss[:, 0], [0.8, 0.9, 1, 1.1, 1.5, 5], rtol=1e-6)
    np.testing.assert_array_equal(bad.clipped[:, 0], [1, 0, 0, 0, 0, 0])
    dual = policy_loss(jnp.log(ratios), ones * 0, -ones, ones, hyper | {"dual_clip": 3.0})
    np.testing.assert_allclose(dual.loss[:, 0], [0.8, 0.9, 1, 1.1, 1.5, 3], rtol=1e-6)  # bounded by c
    np.testing.assert_array_equal(dual.clipped[:, 0], [1, 0, 0, 0, 0, 1])
    off = policy_loss(jnp.log(ratios), ones * 0, -ones, ones, hyper | {"dual_clip": jnp.inf})
    np.testing.assert_array_equal(off.loss, bad.loss)


def test_an_enormous_ratio_has_finite_gradients():
    logps, old = jnp.array([[300.0, -300.0]]), jnp.zeros((1, 2))
    for advantage in (-1.0, 0.0, 1.0):
        for extra in ({}, {"dual_clip": jnp.inf}):
            slope = jax.grad(
                lambda x, a=advantage, e=extra: policy_loss(
                    x, old, jnp.full((1, 2), a), jnp.ones((1, 2)), {"clip_low": 0.2, "clip_high": 0.2} | e
                ).loss.sum()
            )(logps)
            assert jnp.isfinite(slope).all()


def test_the_score_function_loss_has_the_surrogates_gradient_at_the_start():
    """At ratio 1 the clipped surrogate, and -A log pi, have one gradient: the policy gradient -A."""
    logps, advantages, mask = normal(0, 2, 3), normal(1, 2, 3), jnp.array([[1, 1, 1], [1, 0, 0]])
    ours = jax.grad(lambda x: reinforce_loss(x, logps, advantages, mask).loss.sum())(logps)
    clipped = jax.grad(
        lambda x: policy_loss(x, logps, advantages, mask, {"clip_low": 0.2, "clip_high": 0.2}).loss.sum()
    )(logps)
    np.testing.assert_allclose(ours, -advantages * mask, rtol=1e-6)
    np.testing.assert_allclose(clipped, ours, rtol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.2])
@given(mask=masks, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_the_value_loss_and_its_gradient_equal_a_loop(clip, mask, seed):
    batch = some_batch(seed, mask)
    args = (batch["values"], batch["old_values"], batch["returns"])
    out = value(*(dirty(x, mask) for x in args), mask, clip)
    slope = jax.grad(lambda x: value(x, *(dirty(y, mask) for y in args[1:]), mask, clip).loss.sum())(
        dirty(args[0], mask)
    )
    for b in range(B):
        for t in range(N):
            expected = (0.0, 0.0, 0.0)
            if mask[b, t]:
                expected = rl_reference.value_token(*(float(x[b, t]) for x in args), clip)
            np.testing.assert_allclose(
                (out.loss[b, t], slope[b, t], out.clipped[b, t]), expected, rtol=1e-4, atol=1e-5
            )


def test_a_value_clip_needs_the_old_values():
    with pytest.raises(ValueError, match="old_values"):
        value_loss(jnp.zeros((1, 1)), None, jnp.zeros((1, 1)), jnp.ones((1, 1)), 0.2)
    plain = value_loss(jnp.ones((1, 1)), None, jnp.zeros((1, 1)), jnp.ones((1, 1)))
    assert plain.loss == 0.5
    assert plain.clipped == 0


# ---- reduction -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["token", "sequence"])
@given(mask=masks, seed=seeds)
@settings(max_examples=25, deadline=None)
def test_the_whole_loss_equals_a_loop(how, mask, seed):
    batch = some_batch(seed, mask)
    out = whole({k: dirty(v, mask) if k != "mask" else v for k, v in batch.items()}, HYPER, how=how)
    total, weight = rl_reference.rl_loss(batch, HYPER, how)
    np.testing.assert_allclose((out.total, out.weight), (total, weight), rtol=2e-4, atol=2e-5)
    for name, (_, of) in out.metrics.items():
        assert of == (weight if name.startswith("loss/") else mask.sum()), name


@pytest.mark.parametrize("how", ["token", "sequence"])
@given(mask=masks, seed=seeds, left=st.sets(st.integers(0, B - 1)))
@settings(max_examples=25, deadline=None)
def test_sums_of_any_split_add_up(how, mask, seed, left):
    """Loss, gradient and every metric of a batch are the sums over its micro-batches, whichever rows they have."""
    batch = some_batch(seed, mask)
    rows = np.isin(np.arange(B), list(left))[:, None]
    one = whole(batch, HYPER, how=how)
    parts = [whole(batch | {"mask": mask * keep}, HYPER, how=how) for keep in (rows, ~rows)]
    added = jax.tree.map(lambda a, b: a + b, *parts)
    for a, b in zip(jax.tree.leaves(added), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["token", "sequence"])
def test_the_gradient_of_the_whole_loss_by_differences(how):
    mask = np.array([[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6, [1] * 6], np.float32)
    batch = some_batch(3, mask)
    wanted = ("logps", "values", "entropy", "kl")
    grads = jax.grad(lambda x: sums(batch | x, HYPER, how).total)({k: batch[k] for k in wanted})
    for name in wanted:
        for b, t in ((0, 0), (0, 2), (1, 0), (3, 4), (0, 4), (2, 1)):
            up, down = (
                batch
                | {
                    name: batch[name].astype(np.float64)
                    + e * (np.indices(mask.shape) == [[[b]], [[t]]]).all(0)
                }
                for e in (1e-6, -1e-6)
            )
            slope = (
                rl_reference.rl_loss(up, HYPER, how)[0] - rl_reference.rl_loss(down, HYPER, how)[0]
            ) / 2e-6
            np.testing.assert_allclose(grads[name][b, t], slope, rtol=1e-3, atol=1e-4)


def test_sum_by():
    x, mask = jnp.array([[1.0, 3.0], [5.0, jnp.nan], [jnp.nan, jnp.nan]]), jnp.array([[1, 1], [1, 0], [0, 0]])
    assert tuple(map(float, sum_by(x, mask, "token"))) == (9, 3)
    assert tuple(map(float, sum_by(x, mask, "sequence"))) == (7, 2)
    with pytest.raises(ValueError, match="unknown normalisation `mean`"):
        sum_by(x, mask, "mean")


def test_algorithms_have_their_own_terms():
    mask = np.ones((B, N), np.float32)
    batch = some_batch(0, mask)
    base = {k: batch[k] for k in ("logps", "old_logps", "advantages", "mask")}
    clip = {"clip_low": 0.2, "clip_high": 0.3}
    grpo = rl_loss("grpo", hyper=clip, **base)
    assert "loss/value_avg" not in grpo.metrics
    assert (
        grpo.total == policy(*(batch[k] for k in ("logps", "old_logps", "advantages")), mask, clip).loss.sum()
    )
    rloo = rl_loss("rloo", hyper={}, **base)
    np.testing.assert_allclose(rloo.total, -np.sum(batch["advantages"] * batch["logps"]), rtol=1e-5)
    both = rl_loss(
        "reinforce", hyper={"value_coef": 0.5}, values=batch["values"], returns=batch["returns"], **base
    )
    gap = batch["values"] - batch["returns"]
    np.testing.assert_allclose(both.total, rloo.total + 0.5 * 0.5 * np.sum(gap**2), rtol=1e-5)
    assert both.metrics["val/clipfrac_avg"][0] == 0


def test_a_head_start_trains_the_values_alone():
    batch = some_batch(0, np.ones((B, N), np.float32))
    for coef, moves in ((0.0, False), (1.0, True)):
        grads = jax.grad(lambda x, c=coef: sums(batch | x, HYPER | {"policy_coef": c}).total)(
            {k: batch[k] for k in ("logps", "values", "entropy", "kl")}
        )
        assert grads["values"].any()
        assert all(bool(grads[k].any()) == moves for k in ("logps", "entropy", "kl"))


def test_bad_calls_are_named():
    batch = some_batch(0, np.ones((B, N), np.float32))
    base = {k: batch[k] for k in ("logps", "old_logps", "advantages", "mask")}
    with pytest.raises(ValueError, match="unknown algorithm `a2c`"):
        rl_loss("a2c", hyper=HYPER, **base)
    with pytest.raises(ValueError, match="needs `returns`"):
        rl_loss("ppo", hyper=HYPER, values=batch["values"], **base)


# ---- metrics ---------------------------------------------------------------------------------------------------


def test_metrics_of_the_loss_by_hand():
    old = jnp.zeros((2, 2))
    logps = jnp.log(jnp.array([[1.0, 1.5], [0.5, 99.0]]))
    mask, advantages = jnp.array([[1, 1], [1, 0]]), jnp.array([[1.0, 1.0], [1.0, 1.0]])
    out = rl_loss(
        "ppo",
        logps=logps,
        old_logps=old,
        advantages=advantages,
        mask=mask,
        hyper={"clip_low": 0.2, "clip_high": 0.2},
    )
    found = {name: float(total / weight) for name, (total, weight) in out.metrics.items()}
    assert found == pytest.approx(
        {
            "loss/policy_avg": -(1 + 1.2 + 0.5) / 3,
            "policy/approxkl_avg": (np.log(1.5) ** 2 + np.log(2) ** 2) / 6,
            "policy/clipfrac_avg": 1 / 3,
            "val/ratio": 1.0,
            "val/ratio_var": (0.25 + 0.25) / 3,
        },
        rel=1e-5,
    )


def test_metrics_of_rollouts_by_hand():
    """Three responses, "two tokens and an EOS", "cut at three tokens", and one that is left out."""
    mask = jnp.array([[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
    kl = jnp.array([[0.1, 0.2, 0.3, jnp.nan], [0.5, 0.5, 0.0, 9.0], [9.0, 9, 9, 9]])
    logps = jnp.array([[-1.0, -1, -1, 9], [-2.0, -2, -2, 9], [9.0, 9, 9, 9]])
    values = jnp.array([[1.0, 2, 3, 9], [4.0, 5, 6, 9], [9.0, 9, 9, 9]])
    found = rollout_metrics(
        scores=jnp.array([2.0, -1.0, jnp.nan]),
        kl=kl,
        kl_coef=0.5,
        logps=logps,
        mask=mask,
        ended=jnp.array([True, False, True]),
        values=values,
        returns=values,
    )
    assert {k: float(v) for k, v in found.items()} == pytest.approx(
        {
            "objective/kl": 0.8,
            "objective/entropy": 4.5,
            "objective/scores": 0.5,
            "objective/non_score_reward": -0.4,
            "objective/rlhf_reward": 0.1,
            "val/num_eos_tokens": 1,
            "response_length/mean": 2.5,
            "response_length/min": 2,
            "response_length/max": 3,
            "response_length/clip_ratio": 0.5,
            "critic/vf_explained_var": 1,
            "critic/values/mean": 3.5,
            "critic/returns/mean": 3.5,
        },
        rel=1e-5,
    )


def test_rollouts_that_were_all_left_out_have_finite_metrics():
    zero = jnp.zeros((2, 3))
    found = rollout_metrics(
        scores=jnp.zeros(2), kl=zero, kl_coef=0.1, logps=zero, mask=zero, ended=jnp.ones(2)
    )
    assert not any(float(v) for v in found.values())
