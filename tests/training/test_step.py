"""The train step: sums, one division, clipping, refusal of bad updates, memoised compilation, frozen leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.config.schema import OptimizerSpec
from laif_jax.objectives import LossOut
from laif_jax.training.optim import make_optimizer
from laif_jax.training.state import create_state, merge, partition, state_shardings
from laif_jax.training.step import make_train_step
from tests.training import toys


def run(batch, *, spec=None, devices=1, loss_fn=toys.loss_fn, hyper=None, steps=1, trainable=None):
    """Trains the toy on one batch; returns (state, metrics of the last step)."""
    mesh = toys.mesh(devices)
    optimizer = make_optimizer(spec or OptimizerSpec(name="adamw", learning_rate=0.01))
    state = create_state(toys.params(), optimizer, mesh=mesh, trainable=trainable)
    step = make_train_step(
        loss_fn,
        optimizer,
        mesh=mesh,
        state_shardings=state_shardings(state),
        batch_shardings=toys.batch_shardings(batch, mesh),
    )
    for _ in range(steps):
        state, metrics = step(state, batch, {**toys.HYPER, **(hyper or {})})
    return state, metrics


def assert_same(a, b, rtol=1e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=rtol, atol=1e-7), a, b
    )


def test_loss_and_gradient_are_the_weighted_mean_over_the_whole_batch():
    batch = toys.batch(rows=8, micro=4)
    flat = {k: v.reshape(-1, *v.shape[2:]) for k, v in batch.items()}

    def mean(p):
        out = toys.loss_fn(p, flat, {})
        return out.total / out.weight

    value, grads = jax.value_and_grad(mean)(toys.params())
    _, metrics = run(batch)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert float(metrics["healthy"]) == 1.0


@settings(max_examples=8, deadline=None)
@given(micro=st.sampled_from([1, 2, 4, 8]), padding=st.sampled_from([0, 8, 16]), seed=st.integers(0, 3))
def test_update_is_the_same_for_every_split_and_any_padding(micro, padding, seed):
    whole, whole_metrics = run(toys.batch(seed, rows=8), steps=2)
    split, split_metrics = run(toys.batch(seed, rows=8, micro=micro, padding=padding), steps=2)
    assert_same(whole.params, split.params)
    for name in ("loss", "grad_norm", "absolute_error"):
        np.testing.assert_allclose(whole_metrics[name], split_metrics[name], rtol=1e-5)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_update_is_the_same_for_every_device_count(devices):
    one, _ = run(toys.batch(rows=16, micro=2), steps=2)
    many, _ = run(toys.batch(rows=16, micro=2), devices=devices, steps=2)
    assert_same(one.params, many.params)


def test_clipping_bounds_the_gradient_and_infinity_turns_it_off():
    spec = OptimizerSpec(name="rmsprop", momentum=0.0)
    _, free = run(toys.batch(), spec=spec, hyper={"clip_norm": np.float32(np.inf)})
    _, clipped = run(toys.batch(), spec=spec, hyper={"clip_norm": np.float32(1e-3)})
    np.testing.assert_allclose(free["grad_norm"], clipped["grad_norm"])  # reported before clipping
    assert float(free["grad_norm"]) > 1e-3
    # One RMSprop step from v = 0 moves by lr g / (sqrt(0.01) |g| + eps): clipping shows only through eps, so look at v.
    free_state, _ = run(toys.batch(), spec=spec, hyper={"clip_norm": np.float32(np.inf)})
    clipped_state, _ = run(toys.batch(), spec=spec, hyper={"clip_norm": np.float32(1e-3)})
    ratio = [
        np.asarray(c / f).mean()
        for f, c in zip(jax.tree.leaves(free_state.opt_state), jax.tree.leaves(clipped_state.opt_state))
    ]
    np.testing.assert_allclose(ratio, (1e-3 / float(free["grad_norm"])) ** 2, rtol=1e-4)


@pytest.mark.parametrize("bad", ["weight", "nan", "inf"])
def test_bad_step_changes_nothing_and_halts(bad):
    batch = toys.batch()
    if bad == "weight":
        batch["weight"][:] = 0.0
    else:
        batch["y"][0, 0] = np.nan if bad == "nan" else np.inf
    mesh = toys.mesh()
    optimizer = make_optimizer(OptimizerSpec())
    state = create_state(toys.params(), optimizer, mesh=mesh)
    step = make_train_step(
        toys.loss_fn,
        optimizer,
        mesh=mesh,
        state_shardings=state_shardings(state),
        batch_shardings=toys.batch_shardings(batch, mesh),
    )
    state, _ = step(state, toys.batch(1), toys.HYPER)
    before = jax.tree.map(np.asarray, (state.step, state.params, state.opt_state))
    state, metrics = step(state, batch, toys.HYPER)
    state, _ = step(state, toys.batch(2), toys.HYPER)  # a good batch after the bad one
    assert float(metrics["healthy"]) == 0.0
    assert not bool(state.healthy)
    jax.tree.map(np.testing.assert_array_equal, before, (state.step, state.params, state.opt_state))


def test_arms_with_other_numbers_share_one_program():
    traces = []

    def counting(p, b, hyper) -> LossOut:
        traces.append(1)
        return toys.loss_fn(p, b, hyper)

    def arm(lr, wd, seed):
        spec = OptimizerSpec(name="adamw", learning_rate=lr, weight_decay=wd)
        hyper = {"learning_rate": np.float32(lr), "weight_decay": np.float32(wd), "clip_norm": np.float32(lr)}
        return run(toys.batch(seed), spec=spec, loss_fn=counting, hyper=hyper, steps=2)

    first, _ = arm(0.01, 0.0, 0)
    count = len(traces)
    second, _ = arm(0.05, 0.1, 1)
    assert len(traces) == count
    assert not np.allclose(first.params["a"]["kernel"], second.params["a"]["kernel"])


def test_frozen_leaves_stay_and_have_no_optimizer_state():
    mask = {"a": {"kernel": False}, "b": {"kernel": True, "bias": True}}
    state, _ = run(toys.batch(), trainable=mask, steps=3)
    np.testing.assert_array_equal(state.params["a"]["kernel"], toys.params()["a"]["kernel"])
    assert not np.allclose(state.params["b"]["kernel"], toys.params()["b"]["kernel"])
    shapes = {x.shape for x in jax.tree.leaves(state.opt_state)}
    assert (toys.WIDTH, 8) not in shapes
    assert (8, 1) in shapes


def test_frozen_leaves_may_stay_in_bfloat16():
    mask = {"a": {"kernel": False}, "b": {"kernel": True, "bias": True}}
    mesh = toys.mesh()
    state = create_state(
        toys.params(), make_optimizer(OptimizerSpec()), mesh=mesh, trainable=mask, frozen_dtype=jnp.bfloat16
    )
    assert state.params["a"]["kernel"].dtype == jnp.bfloat16
    assert state.params["b"]["kernel"].dtype == jnp.float32


def test_partition_and_merge_are_inverse():
    params = toys.params()
    mask = {"a": {"kernel": False}, "b": {"kernel": True, "bias": False}}
    trainable, frozen = partition(params, mask)
    assert set(trainable) == {"b"}
    assert set(trainable["b"]) == {"kernel"}
    jax.tree.map(np.testing.assert_array_equal, merge(trainable, frozen), params)
    with pytest.raises(ValueError, match="both trainable and frozen"):
        merge(params, frozen)


def test_the_callers_arrays_survive_donation():
    params = toys.params()
    mesh = toys.mesh()
    optimizer = make_optimizer(OptimizerSpec())
    state = create_state(params, optimizer, mesh=mesh)
    batch = toys.batch()
    step = make_train_step(
        toys.loss_fn,
        optimizer,
        mesh=mesh,
        state_shardings=state_shardings(state),
        batch_shardings=toys.batch_shardings(batch, mesh),
    )
    new, _ = step(state, batch, toys.HYPER)
    assert state.trainable["a"]["kernel"].is_deleted()  # donated
    jax.tree.map(np.testing.assert_array_equal, params, toys.params())
    assert int(new.step) == 1
