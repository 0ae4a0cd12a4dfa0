"""The SFT loss and the masked reductions, against plain loops over sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.objectives import (
    masked_mean,
    masked_sum,
    safe_divide,
    segment_sums,
    sft_loss,
    supervised_segments,
    weighted,
)

R, T, S = 3, 12, 5
jitted = {r: jax.jit(lambda *a, r=r: sft_loss(*a, reduction=r)) for r in ("token", "sequence")}


@st.composite
def packed_rows(draw):
    """Rows of up to S segments, then padding; masks with gaps, as multi-turn dialogues have, or empty."""
    ids, masks = np.zeros((R, T), np.int32), np.zeros((R, T), np.float32)
    for row in range(R):
        at = 0
        for segment in range(1, draw(st.integers(0, S)) + 1):
            length = draw(st.integers(1, 4))
            end = min(at + length, T)
            ids[row, at:end] = segment
            masks[row, at:end] = draw(
                st.lists(st.sampled_from([0.0, 1.0]), min_size=end - at, max_size=end - at)
            )
            at = end
    return ids, masks


def logps_of(shape=(R, T), seed=0):
    return -np.random.default_rng(seed).exponential(size=shape).astype(np.float32)


@given(rows=packed_rows())
@settings(max_examples=60, deadline=None)
def test_both_reductions_equal_a_loop_over_sequences(rows):
    ids, mask = rows
    logps = logps_of()
    sequences = [
        -(logps[row] * mask[row])[ids[row] == segment].sum()
        for row in range(R)
        for segment in range(1, S + 1)
        if mask[row][ids[row] == segment].any()
    ]
    token, sequence = (jitted[name](logps, mask, ids) for name in ("token", "sequence"))
    np.testing.assert_allclose(token.total, sum(sequences), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sequence.total, token.total)
    assert token.weight == mask.sum()
    assert sequence.weight == len(sequences)


@given(rows=packed_rows())
@settings(max_examples=40, deadline=None)
def test_segment_sums_equal_a_loop(rows):
    ids, mask = rows
    logps = logps_of()
    sums = np.asarray(jax.jit(segment_sums, static_argnums=3)(logps, mask, ids, S))
    assert sums.shape == (R, S)
    for row in range(R):
        for segment in range(1, S + 1):
            expected = (logps[row] * mask[row])[ids[row] == segment].sum()
            np.testing.assert_allclose(sums[row, segment - 1], expected, rtol=1e-5, atol=1e-6)


@given(rows=packed_rows(), order=st.permutations(range(R)), split=st.integers(0, R))
@settings(max_examples=40, deadline=None)
def test_sums_add_over_rows_in_any_order(rows, order, split):
    ids, mask = rows
    logps = logps_of()
    order = np.array(order)
    for name in ("token", "sequence"):
        whole = jitted[name](logps, mask, ids)
        left = np.isin(np.arange(R), order[:split])[:, None]
        parts = [jitted[name](logps, mask * keep, ids) for keep in (left, ~left)]
        np.testing.assert_allclose(sum(p.total for p in parts), whole.total, rtol=1e-5, atol=1e-6)
        assert sum(p.weight for p in parts) == whole.weight
        for metric, (total, weight) in whole.metrics.items():
            np.testing.assert_allclose(sum(p.metrics[metric][0] for p in parts), total, rtol=1e-5, atol=1e-6)
            assert sum(p.metrics[metric][1] for p in parts) == weight


def test_packing_and_padding_change_nothing():
    """Two sequences in two rows, packed into one, and packed with padding in front: one loss, one gradient."""
    logps = jnp.array([-1.0, -2.0, -3.0, -4.0, -5.0])
    layouts = {
        "apart": ([[0, 1, 2, -1], [3, 4, -1, -1]], [[1, 1, 1, 0], [1, 1, 0, 0]]),
        "packed": ([[0, 1, 2, 3, 4, -1]], [[1, 1, 1, 2, 2, 0]]),
        "left": ([[-1, -1, 0, 1, 2, 3, 4]], [[0, 0, 1, 1, 1, 2, 2]]),
    }
    supervised = jnp.array([0.0, 1, 1, 0, 1])

    def both(logps, layout, reduction):
        index, ids = (jnp.array(x) for x in layouts[layout])
        out = sft_loss(logps[index], jnp.where(index >= 0, supervised[index], 0.0), ids, reduction=reduction)
        return out.total / out.weight

    for reduction, expected in (("token", 10 / 3), ("sequence", 10 / 2)):
        for layout in layouts:
            value, grad = jax.value_and_grad(both)(logps, layout, reduction)
            assert value == pytest.approx(expected)
            np.testing.assert_allclose(grad, -supervised / (3 if reduction == "token" else 2))


def test_what_lies_under_a_zero_mask_never_counts():
    ids = jnp.array([[1, 1, 1, 0]])
    mask = jnp.array([[0.0, 1, 1, 0]])
    clean, dirty = jnp.array([[0.0, -1, -2, 0]]), jnp.array([[jnp.nan, -1, -2, jnp.inf]])
    extra = {"entropy": dirty, "correct": jnp.array([[True, True, False, True]])}
    out = sft_loss(dirty, mask, ids, reduction="token", **extra)
    assert out.total == 3.0
    assert {name: float(total) for name, (total, _) in out.metrics.items()} == {
        "nll_loss": 3.0,
        "response_length/mean": 2.0,
        "entropy": -3.0,
        "mean_token_accuracy": 1.0,
    }
    grad = jax.grad(lambda x: sft_loss(x, mask, ids, reduction="token").total)(dirty)
    np.testing.assert_array_equal(grad, [[0, -1, -1, 0]])
    np.testing.assert_array_equal(segment_sums(dirty, mask, ids, 2), segment_sums(clean, mask, ids, 2))


def test_a_batch_with_nothing_supervised_has_weight_zero():
    out = sft_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.ones((2, 3), jnp.int32), reduction="sequence")
    assert out.total == out.weight == 0


def test_metrics_carry_no_gradient():
    ids, mask = jnp.ones((1, 3), jnp.int32), jnp.ones((1, 3))
    grad = jax.grad(lambda x: sft_loss(x, mask, ids, reduction="token").metrics["nll_loss"][0])(
        jnp.ones((1, 3))
    )
    assert not grad.any()
    assert not jax.grad(lambda x: weighted(x, mask)[0])(jnp.ones((1, 3))).any()


def test_weighted_ignores_what_has_no_weight():
    total, weight = weighted(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([1.0, 0.0, 2.0]))
    assert (total, weight) == (7.0, 3.0)


def test_an_unknown_reduction_is_named():
    with pytest.raises(ValueError, match="unknown reduction `mean`"):
        sft_loss(jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.ones((1, 2), jnp.int32), reduction="mean")


def test_masked_reductions_are_safe():
    x, mask = jnp.array([[1.0, jnp.nan], [3.0, 4.0]]), jnp.array([[1, 0], [1, 1]])
    assert masked_sum(x, mask) == 8
    np.testing.assert_array_equal(masked_mean(x, mask, axis=1), [1.0, 3.5])
    assert masked_mean(x, jnp.zeros((2, 2))) == 0
    assert jax.grad(lambda d: safe_divide(jnp.float32(1), d))(0.0) == 0
    assert masked_sum(jnp.ones(4, jnp.bfloat16), jnp.ones(4, bool)).dtype == jnp.float32


def test_segments_with_gaps_in_their_mask_count_once():
    mask = jnp.array([[0, 1, 1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0, 0, 1]])
    ids = jnp.array([[1, 1, 1, 2, 2, 2, 3, 3], [1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]])
    assert supervised_segments(mask, ids) == 4  # the last 1 is under padding
