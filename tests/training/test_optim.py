"""Optimisers against torch's numbers and papers' formulas; schedules against transformers'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laif_jax.config.schema import OptimizerSpec
from laif_jax.training.optim import make_optimizer, optimizer_hyper, schedule

START = [1.0, -2.0, 0.5]
GRADS = [[0.1, -0.2, 0.3], [0.5, 0.1, -0.4], [-0.3, 0.2, 0.0]]
# torch 2.13: torch.optim.RMSprop(lr=0.01, alpha=0.99, eps=1e-8, momentum=...) and AdamW(lr=0.01, weight_decay=0.1).
GOLDEN = {
    ("rmsprop", 0.0): [
        [0.9000000953674316, -1.9000000953674316, 0.40000003576278687],
        [0.8019232153892517, -1.9449013471603394, 0.4801444113254547],
        [0.852829098701477, -2.011902332305908, 0.4801444113254547],
    ],
    ("rmsprop", 0.9): [
        [0.9000000953674316, -1.9000000953674316, 0.40000003576278687],
        [0.7119233012199402, -1.8549014329910278, 0.3901444375514984],
        [0.5935600399971008, -1.881313681602478, 0.38127440214157104],
    ],
    ("adamw", 0.1): [
        [0.9890000224113464, -1.9880000352859497, 0.4895000159740448],
        [0.9794005751609802, -1.9833487272262573, 0.49094560742378235],
        [0.9759259223937988, -1.984092354774475, 0.49195051193237305],
    ],
}


@pytest.mark.parametrize("case", list(GOLDEN))
def test_three_updates_equal_torch(case):
    name, number = case
    option = {"momentum": number} if name == "rmsprop" else {"weight_decay": number}
    spec = OptimizerSpec(name=name, learning_rate=0.01, **option)
    optimizer = make_optimizer(spec)
    params = {"kernel": jnp.asarray(START)}
    state = optimizer.init(params)
    hyper = {"learning_rate": 0.01, "weight_decay": spec.weight_decay}
    for grad, expected in zip(GRADS, GOLDEN[case]):
        updates, state = optimizer.update({"kernel": jnp.asarray(grad)}, state, params, **hyper)
        params = jax.tree.map(jnp.add, params, updates)
        np.testing.assert_allclose(params["kernel"], expected, rtol=2e-6)


def test_lion_takes_signs_and_its_own_default_b2():
    spec = OptimizerSpec(name="lion")
    assert spec.resolved()["b2"] == 0.99  # what a saved configuration and a stage's key say is what is used
    assert make_optimizer(OptimizerSpec(**spec.resolved())) is make_optimizer(spec)
    assert OptimizerSpec(name="lion", b2=0.999).resolved() != spec.resolved()
    optimizer = make_optimizer(spec)
    params = {"kernel": jnp.asarray(START)}
    updates, state = optimizer.update(
        {"kernel": jnp.asarray(GRADS[0])},
        optimizer.init(params),
        params,
        learning_rate=0.01,
        weight_decay=0.0,
    )
    np.testing.assert_allclose(updates["kernel"], [-0.01, 0.01, -0.01], rtol=1e-6)
    momentum = next(x for x in jax.tree.leaves(state) if x.shape == (3,))
    np.testing.assert_allclose(momentum, 0.01 * np.asarray(GRADS[0]), rtol=1e-5)  # 1 - b2 = 0.01


def test_adafactor_keeps_factored_moments_and_moves_in_proportion_to_the_parameters():
    optimizer = make_optimizer(OptimizerSpec(name="adafactor"))
    params = {"kernel": jnp.full((130, 140), 2.0)}
    state = optimizer.init(params)
    assert sum(x.size for x in jax.tree.leaves(state)) < 400  # 130 + 140, not 130 * 140
    grads = {"kernel": jnp.full((130, 140), 0.3)}
    updates, _ = optimizer.update(grads, state, params, learning_rate=0.01, weight_decay=0.0)
    np.testing.assert_allclose(updates["kernel"], -0.01 * 2.0, rtol=1e-3)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_weight_decay_spares_scales_and_biases(name):
    optimizer = make_optimizer(OptimizerSpec(name=name))
    params = {
        "norm": {"scale": jnp.ones((4,))},
        "linear": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones((4,))},
    }
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params, learning_rate=0.1, weight_decay=0.5)
    np.testing.assert_allclose(updates["linear"]["kernel"], -0.05, rtol=1e-6)
    assert not updates["linear"]["bias"].any()
    assert not updates["norm"]["scale"].any()


def test_specs_that_differ_in_traced_numbers_share_the_optimizer():
    a = make_optimizer(OptimizerSpec(learning_rate=1e-3, weight_decay=0.1, clip_norm=None, schedule="cosine"))
    assert a is make_optimizer(OptimizerSpec(learning_rate=1e-5))
    assert a is not make_optimizer(OptimizerSpec(b2=0.95))
    assert optimizer_hyper(OptimizerSpec(clip_norm=None))["clip_norm"] == float("inf")


# transformers 5: get_scheduler(name, num_warmup_steps=3, num_training_steps=10) at steps 0..10, times 2.
SCHEDULES = {
    "constant": [0.0, 2 / 3, 4 / 3, 2, 2, 2, 2, 2, 2, 2, 2],
    "linear": [0.0, 2 / 3, 4 / 3, 2.0, *(2.0 * (10 - s) / 7 for s in range(4, 11))],
    "cosine": [0.0, 2 / 3, 4 / 3, 2.0, *(1.0 + np.cos(np.pi * (s - 3) / 7) for s in range(4, 11))],
}


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_schedules_equal_transformers(name):
    rate = schedule(OptimizerSpec(learning_rate=2.0, schedule=name, warmup=3), total_steps=10)
    np.testing.assert_allclose([rate(s) for s in range(11)], SCHEDULES[name], atol=1e-12)
    traced = jax.jit(jax.vmap(rate))(jnp.arange(11))
    np.testing.assert_allclose(traced, SCHEDULES[name], atol=1e-6)


def test_warmup_longer_than_the_run_is_an_error():
    with pytest.raises(ValueError, match="warmup` 10 leaves no steps: the run has 10"):
        schedule(OptimizerSpec(warmup=10), total_steps=10)
