"""Counted work against pencil and paper."""

import jax
import jax.numpy as jnp
import pytest

from laif_jax.aot.flops import flops_per_chip, model_flops
from laif_jax.config.schema import MeshSpec, ScratchSpec
from laif_jax.models.config import scratch
from laif_jax.models.specs import ParamSpec, param_specs
from laif_jax.parallel import make_mesh


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def count(fn, *args, chips=1, **options):
    return flops_per_chip(jax.jit(fn).trace(*args).jaxpr, chips, **options)


def test_products_scans_branches_and_recomputation():
    a, b = struct(8, 16), struct(16, 4)
    one = 2 * 8 * 16 * 4
    assert count(lambda a, b: a @ b, a, b) == one
    assert count(lambda a, b: a @ b, a, b, chips=4) == one / 4
    square = struct(16, 16)
    one = 2 * 8 * 16 * 16

    def layers(a, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), a, None, length=7)[0]

    assert count(layers, a, square) == 7 * one
    assert count(lambda a, w: jax.lax.cond(a.sum() > 0, lambda x: x @ w, lambda x: x, a), a, square) == one

    def loss(a, w):
        step = jax.checkpoint(lambda x, _: (jnp.tanh(x @ w), None))
        return jax.lax.scan(step, a, None, length=7)[0].sum()

    # Forward, again in the backward pass, and two products of gradients.
    assert count(jax.grad(loss, argnums=(0, 1)), a, square) == 7 * 4 * one

    def until(a, w):
        return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ w, a)

    assert count(until, a, square, unknown_trips=5) == 5 * one


def test_inside_a_shard_map_shapes_are_of_one_chip():
    mesh = make_mesh(MeshSpec(fsdp=4), jax.devices()[:4])
    spec = jax.P("fsdp", None)

    def run(a, b):
        return jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(spec, jax.P()), out_specs=spec)(a, b)

    assert count(run, struct(8, 16), struct(16, 4), chips=4) == 2 * 8 * 16 * 4 / 4


def test_model_flops_are_six_per_parameter_and_attention():
    cfg = scratch(
        ScratchSpec(hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4, tie_embeddings=False),
        100,
    )
    params = jax.tree.map(
        lambda s: struct(*s.shape), param_specs(cfg), is_leaf=lambda s: isinstance(s, ParamSpec)
    )
    matrices = 3 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64 + 64 * 100  # norms count, the table does not
    attention = 6 * 3 * 4 * 16 * 32
    assert model_flops(params, {}, cfg, 1, 32) == pytest.approx(6 * matrices + attention)
    assert model_flops({}, params, cfg, 10, 32, forward_only=True) == pytest.approx(
        10 * (2 * matrices + attention / 3)
    )
