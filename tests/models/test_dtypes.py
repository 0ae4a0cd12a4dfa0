"""Weights that are cast layer by layer: the values and gradients of a copy in the compute dtype, without the copy."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from laif_jax.models.decoder import hidden_states
from laif_jax.models.dtypes import Master, bound, gradient_places, in_compute_dtype, in_use
from laif_jax.models.heads import token_logps
from tests.models.goldens import model, quick_jit, rows


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_in_use_is_the_cast(values):
    weight = np.asarray(values, np.float32)
    used = in_use(weight, jnp.zeros(weight.shape, jnp.bfloat16))
    assert used.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(used, np.float32), np.asarray(weight.astype(jnp.bfloat16), np.float32)
    )


def test_the_gradient_is_of_the_place_and_in_its_dtype():
    weight, place = jnp.arange(4.0), jnp.full(4, 7.0, jnp.bfloat16)  # what is in the place counts for nothing
    of_weight, of_place = jax.grad(lambda w, p: (in_use(w, p) * jnp.bfloat16(3)).sum(), argnums=(0, 1))(
        weight, place
    )
    np.testing.assert_array_equal(of_weight, np.zeros(4))
    assert of_place.dtype == jnp.bfloat16
    np.testing.assert_array_equal(of_place.astype(jnp.float32), np.full(4, 3.0))


def test_values_and_gradients_are_those_of_a_copy_in_the_compute_dtype():
    cfg, params = model("qwen3")  # norms inside the attention, which stay in float32
    tokens, positions, segments = rows(cfg)

    def loss(params):
        hidden = hidden_states(params, cfg, tokens, positions, segments, dtype=jnp.bfloat16, remat="full")
        return token_logps(params, cfg, hidden, tokens, segments).sum()

    copy = in_compute_dtype(params, jnp.bfloat16)
    places = gradient_places(params, jnp.bfloat16)
    masters = [x for x in jax.tree.leaves(bound(params, places), is_leaf=_is_master) if _is_master(x)]
    assert len(masters) == 7  # q, k, v, o, gate, up, down
    expected = quick_jit(jax.value_and_grad(loss))(copy)
    found = quick_jit(jax.value_and_grad(lambda places: loss(bound(params, places))))(places)
    assert found[0] == expected[0]
    assert jax.tree.map(jnp.dtype, found[1]) == jax.tree.map(jnp.dtype, expected[1])
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32)),
        found[1],
        expected[1],
    )


def _is_master(x):
    return isinstance(x, Master)


def test_in_the_compute_dtype_already_nothing_is_bound():
    _, params = model("llama2_gqa")
    places = gradient_places(params, jnp.float32)
    trees = (jax.tree.leaves(tree) for tree in (bound(params, places), params, places))
    assert all(a is b is c for a, b, c in zip(*trees))
