"""The decoder on simulated meshes: the same numbers with automatic and with explicit axes, and shardings that stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from laif_jax.config.schema import ScratchSpec
from laif_jax.models.cache import init_cache
from laif_jax.models.config import param_specs, scratch
from laif_jax.models.decoder import (
    decode_step,
    hidden_states,
    init_params,
    logits,
    prefill,
    unstack_layers,
)
from laif_jax.models.heads import token_logps
from laif_jax.parallel.rules import batch_sharding, param_shardings
from tests.models.goldens import quick_jit

SPEC = ScratchSpec(
    hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, tie_embeddings=False
)
CFG = scratch(SPEC, 96)
ROWS, LENGTH = 8, 12
TOKENS = np.random.default_rng(0).integers(0, 96, (ROWS, LENGTH)).astype(np.int32)
POSITIONS = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
SEGMENTS = np.greater(np.arange(5, 5 + ROWS)[:, None], POSITIONS).astype(np.int32)
BATCH = (TOKENS, POSITIONS, SEGMENTS)


def loss(params, tokens, positions, segments):
    hidden = hidden_states(params, CFG, tokens, positions, segments, remat="full")
    return token_logps(params, CFG, hidden, tokens, segments, chunk=32).sum()


def generate(params, tokens, lengths, cache):
    decode_params = unstack_layers(params, CFG)
    hidden, cache = prefill(decode_params, CFG, tokens[:, :5], lengths, cache)
    hidden, _ = decode_step(decode_params, CFG, tokens[:, 5], lengths, cache)
    return logits(decode_params, CFG, hidden)


@pytest.fixture(scope="module")
def single():
    params = init_params(CFG, jax.random.key(0))
    value, grads = quick_jit(jax.value_and_grad(loss))(params, *BATCH)
    lengths = np.full(ROWS, 5, np.int32)
    return params, value, grads, quick_jit(generate)(params, TOKENS, lengths, init_cache(CFG, ROWS, LENGTH))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("ambient", [True, False])
def test_sharded_values_gradients_and_decoding_equal_one_device(kind, ambient, single):
    params, value, grads, generated = single
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
    shardings, rows = param_shardings(param_specs(CFG), mesh), batch_sharding(mesh)
    sharded = init_params(CFG, jax.random.key(0), shardings=shardings)
    assert sharded["layers"]["mlp"]["up"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), sharded, params)
    batch = jax.device_put(BATCH, rows)

    def check():
        step = quick_jit(jax.value_and_grad(loss), in_shardings=(shardings, rows, rows, rows))
        ours, our_grads = step(sharded, *batch)
        np.testing.assert_allclose(ours, value, rtol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()), our_grads, grads
        )
        if kind == AxisType.Explicit:
            assert our_grads["layers"]["mlp"]["up"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")
        lengths = jax.device_put(np.full(ROWS, 5, np.int32), rows)
        cache = jax.device_put(init_cache(CFG, ROWS, LENGTH), NamedSharding(mesh, P(rows.spec[0], "tensor")))
        np.testing.assert_allclose(
            quick_jit(generate)(sharded, batch[0], lengths, cache), generated, atol=1e-5
        )

    if ambient:
        with jax.set_mesh(mesh):
            check()
    else:
        check()


def test_explicit_types_say_that_hidden_states_keep_their_rows(single):
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    types = []

    def forward(params, tokens, positions, segments):
        hidden = hidden_states(params, CFG, tokens, positions, segments)
        types.append(
            (jax.typeof(hidden).sharding.spec, jax.typeof(logits(params, CFG, hidden)).sharding.spec)
        )
        return jnp.sum(hidden)

    params = jax.device_put(single[0], NamedSharding(mesh, P()))
    jax.eval_shape(forward, params, *jax.device_put(BATCH, rows))
    assert types == [(P(("data", "fsdp"), None, None), P(("data", "fsdp"), None, None))]
