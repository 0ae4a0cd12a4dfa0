"""The mixture of experts: against a loop over experts and `transformers`, on meshes, and what it keeps in memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.config.schema import LoraSpec, MeshSpec
from laif_jax.models import moe
from laif_jax.models.cache import init_cache
from laif_jax.models.config import from_hf, param_specs
from laif_jax.models.decoder import (
    decode_step,
    hidden_and_load,
    hidden_states,
    init_params,
    logits,
    prefill,
    unstack_layers,
)
from laif_jax.models.heads import token_logps
from laif_jax.models.lora import add_lora
from laif_jax.parallel import batch_sharding, make_mesh, param_shardings
from tests.models import states
from tests.models.goldens import golden_router_loss, model, quick_jit, rows

CFG = from_hf(
    states.hf_config(
        "mixtral",
        hidden_size=16,
        intermediate_size=24,
        num_local_experts=4,
        vocab_size=32,
        head_dim=8,
    )
)
ROWS, LENGTH = 8, 12
TOKENS = np.random.default_rng(0).integers(0, 32, (ROWS, LENGTH)).astype(np.int32)
POSITIONS = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
SEGMENTS = np.greater(np.arange(5, 5 + ROWS)[:, None], POSITIONS).astype(np.int32)
AXES = {
    name: {"kernel": ("expert", "mlp", "embed") if name == "down" else ("expert", "embed", "mlp")}
    for name in ("gate", "up", "down")
}


@pytest.mark.parametrize("name", ["mixtral", "mixtral_of_six"])
def test_the_load_balancing_loss_is_that_of_transformers(name):
    cfg, params = model(name)
    _, load = quick_jit(hidden_and_load, static_argnums=1)(params, cfg, *rows(cfg))
    assert load.tokens == cfg.num_layers * np.sum(rows(cfg)[2] > 0)
    np.testing.assert_allclose(moe.balance_loss(load), golden_router_loss(name), rtol=1e-5)


# ---- one layer -------------------------------------------------------------------------------------------------


def layer(experts, k, tokens, seed, scale=1.0):
    """Random x [1, tokens, 6], router and kernels; `scale` sharpens the routing."""
    random = np.random.default_rng(seed)
    cfg = dataclasses.replace(CFG, num_experts=experts, experts_per_token=k)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    kernels = {name: {"kernel": draw(experts, 6, 10)} for name in ("gate", "up")}
    return (
        cfg,
        draw(1, tokens, 6),
        scale * draw(6, experts),
        kernels | {"down": {"kernel": draw(experts, 10, 6)}},
    )


def ours(x, router, kernels, cfg):
    return moe.mixture(x, None, kernels | {"router": {"kernel": router}}, AXES, cfg, jax.nn.silu)[0]


def loops(x, router, kernels, cfg):
    """Every expert on every token, weighted by its share or 0."""
    probs = jax.nn.softmax(x @ router, axis=-1)
    kept = jnp.where(probs >= jax.lax.top_k(probs, cfg.experts_per_token)[0][..., -1:], probs, 0.0)
    shares = kept / kept.sum(axis=-1, keepdims=True)
    out = 0.0
    for e in range(cfg.num_experts):
        gate, up, down = (kernels[name]["kernel"][e] for name in ("gate", "up", "down"))
        out = out + shares[..., e : e + 1] * ((jax.nn.silu(x @ gate) * (x @ up)) @ down)
    return out


@settings(max_examples=5, deadline=None)
@given(
    st.sampled_from([(1, 1), (4, 1), (4, 2), (5, 5)]),
    st.sampled_from([1, 7]),
    st.integers(0, 100),
    st.sampled_from([0.1, 100.0]),  # tokens spread out, or crowd on few experts while others have none
)
def test_equals_every_expert_on_every_token_in_value_and_gradient(sizes, tokens, seed, scale):
    cfg, *arrays = layer(*sizes, tokens, seed, scale)
    weight = jnp.arange(tokens * 6.0).reshape(1, tokens, 6)
    both = [
        jax.jit(jax.value_and_grad(lambda *a, f=f: jnp.sum(weight * f(*a, cfg)), argnums=(0, 1, 2)))(*arrays)
        for f in (ours, loops)
    ]
    # By the largest number of all: where one expert takes all, the router's gradient is 0 up to what sums of such
    # numbers round.
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(both[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5 * largest), *both)


def shapes_in(jaxpr):
    """The shapes of all arrays that a jaxpr makes, those of inner ones included."""
    for eqn in jaxpr.eqns:
        yield from (var.aval.shape for var in eqn.outvars)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)
            elif hasattr(inner, "jaxpr"):
                yield from shapes_in(inner.jaxpr)


def test_no_array_of_tokens_times_experts_times_columns_exists():
    cfg, *arrays = layer(8, 2, 64, 0)
    loss = lambda f: lambda *a: jnp.sum(f(*a, cfg) ** 2)  # noqa: E731
    sizes = {
        f: max(
            np.prod(s) for s in shapes_in(jax.make_jaxpr(jax.grad(loss(f), argnums=(0, 1, 2)))(*arrays).jaxpr)
        )
        for f in (ours, loops)
    }
    assert sizes[ours] <= 64 * 2 * 10  # pairs of token and expert, times columns


# ---- the model on meshes ---------------------------------------------------------------------------------------


def mesh(axis_type="auto", **sizes):
    spec = MeshSpec(**{"fsdp": 1, **sizes}, axis_type=axis_type)
    return make_mesh(spec, jax.devices()[: int(np.prod(list(sizes.values())))])


def loss(params, cfg, tokens, positions, segments):
    hidden, load = hidden_and_load(params, cfg, tokens, positions, segments, remat="full")
    return token_logps(params, cfg, hidden, tokens, segments, chunk=32).sum() - moe.balance_loss(load)


def generate(params, cfg, tokens, lengths, cache):
    decode_params = unstack_layers(params, cfg)
    hidden, cache = prefill(decode_params, cfg, tokens[:, :5], lengths, cache)
    hidden, _ = decode_step(decode_params, cfg, tokens[:, 5], lengths, cache)
    return logits(decode_params, cfg, hidden)


@pytest.fixture(scope="module")
def single():
    params = init_params(CFG, jax.random.key(0))
    value, grads = quick_jit(jax.value_and_grad(loss), static_argnums=1)(
        params, CFG, TOKENS, POSITIONS, SEGMENTS
    )
    lengths = np.full(ROWS, 5, np.int32)
    cache = init_cache(CFG, ROWS, LENGTH)
    return params, value, grads, quick_jit(generate, static_argnums=1)(params, CFG, TOKENS, lengths, cache)


@pytest.mark.parametrize(
    ("axis_type", "sizes"),
    [
        pytest.param("auto", {"expert": 4}, marks=pytest.mark.slow),
        ("auto", {"fsdp": 2, "expert": 2, "tensor": 2}),
        pytest.param("explicit", {"fsdp": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param(
            "auto", {"data": 2, "tensor": 4}, marks=pytest.mark.slow
        ),  # more than key and value heads
        pytest.param(
            "auto", {"expert": 8}, marks=pytest.mark.slow
        ),  # more than experts: rows alone are split
    ],
)
def test_every_mesh_gives_the_values_gradients_and_samples_of_one_device(axis_type, sizes, single):
    _, value, grads, generated = single
    on = mesh(axis_type, **sizes)
    rows_on = batch_sharding(on)
    shardings = param_shardings(param_specs(CFG), on)
    sharded = init_params(CFG, jax.random.key(0), shardings=shardings)
    batch = jax.device_put((TOKENS, POSITIONS, SEGMENTS), rows_on)
    with jax.set_mesh(on):
        step = quick_jit(jax.value_and_grad(loss), static_argnums=1, out_shardings=(None, shardings))
        here, here_grads = step(sharded, CFG, *batch)
        lengths = jax.device_put(np.full(ROWS, 5, np.int32), rows_on)
        cache = jax.device_put(init_cache(CFG, ROWS, LENGTH), rows_on)
        samples = quick_jit(generate, static_argnums=1)(sharded, CFG, batch[0], lengths, cache)
    np.testing.assert_allclose(here, value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(np.abs(b).max(), 1e-3)),
        here_grads,
        grads,
    )
    np.testing.assert_allclose(samples, generated, atol=2e-5)


def test_a_device_holds_its_own_experts_and_the_weights_never_meet():
    """Of four experts over four devices, one each; no collective of the layer is as large as all experts' weights."""
    on = mesh(expert=4)
    shardings = param_shardings(param_specs(CFG), on)
    params = init_params(CFG, jax.random.key(0), shardings=shardings)
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 1, 16, 24)
    batch = jax.device_put((TOKENS, POSITIONS, SEGMENTS), batch_sharding(on))
    with jax.set_mesh(on):
        text = jax.jit(hidden_states, static_argnums=1).lower(params, CFG, *batch).compile().as_text()
    assert "4,16,24" not in text  # all experts' weights of a layer, anywhere
    assert "1,16,24" in text


def test_a_mesh_that_does_not_divide_the_experts_is_an_error_with_the_numbers():
    big = dataclasses.replace(CFG, hidden_size=1024, intermediate_size=1024, num_experts=8)
    with pytest.raises(ValueError, match=r"mlp/down/kernel of shape .* `expert` dimension of 8 .* expert=3"):
        param_shardings(param_specs(big), mesh(expert=3))


# ---- adapters --------------------------------------------------------------------------------------------------


def test_adapters_of_attention_and_of_every_expert_are_trained_and_sharded():
    cfg = dataclasses.replace(CFG, lora=LoraSpec(rank=2, targets=("q", "v", "up", "down")))
    base = init_params(CFG, jax.random.key(0))
    params = add_lora(base, cfg, jax.random.key(1))
    assert params["layers"]["mlp"]["up"]["lora_a"].shape == (2, 4, 16, 2)
    assert params["layers"]["mlp"]["down"]["lora_b"].shape == (2, 4, 2, 16)
    trained = jax.tree.map(lambda x: x + 0.01, params)  # a fresh `lora_b` is zero, and would hide `lora_a`
    grads = quick_jit(jax.grad(loss), static_argnums=1)(trained, cfg, TOKENS, POSITIONS, SEGMENTS)
    for part, name in (("attn", "q"), ("mlp", "up"), ("mlp", "down")):
        for factor in ("lora_a", "lora_b"):
            assert np.abs(grads["layers"][part][name][factor]).max() > 1e-4
    on = mesh(expert=2, tensor=2)
    sharded = jax.device_put(trained, param_shardings(param_specs(cfg), on))
    with jax.set_mesh(on):
        there = quick_jit(jax.grad(loss), static_argnums=1)(sharded, cfg, TOKENS, POSITIONS, SEGMENTS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(np.abs(b).max(), 1e-3)), there, grads
    )
