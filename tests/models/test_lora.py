"""Adapters: nothing at the start, mergeable, and alone trainable."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laif_jax.config.schema import LoraSpec
from laif_jax.models.decoder import hidden_states
from laif_jax.models.lora import add_lora, merge_lora, trainable_mask
from laif_jax.models.specs import param_specs
from tests.models.goldens import model, quick_jit, rows


def adapted(name, *targets):
    cfg, params = model(name)
    spec = LoraSpec(rank=3, alpha=5.0, targets=targets) if targets else LoraSpec(rank=3, alpha=5.0)
    with_lora = dataclasses.replace(cfg, lora=spec)
    return cfg, params, with_lora, add_lora(params, with_lora, jax.random.key(0))


def run(params, cfg):
    forward = quick_jit(hidden_states, static_argnums=1)
    return np.asarray(forward(params, cfg, *rows(cfg)))[rows(cfg)[2] > 0]


@pytest.mark.parametrize("name", ["llama_biases", "mixtral", "pythia"])
def test_new_adapters_change_nothing_and_merged_ones_compute_the_same(name):
    cfg, params, lora_cfg, lora = adapted(name)
    np.testing.assert_array_equal(run(lora, lora_cfg), run(params, cfg))
    random = np.random.default_rng(0)
    trained = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            jnp.asarray(random.normal(size=x.shape) * 0.1, x.dtype) if path[-1].key == "lora_b" else x
        ),
        lora,
    )
    with_adapters = run(trained, lora_cfg)
    assert np.abs(with_adapters - run(params, cfg)).max() > 0.05
    merged = merge_lora(trained, lora_cfg)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(run(merged, cfg), with_adapters, atol=2e-5)


def test_the_table_names_the_adapters_and_only_the_chosen_layers_have_them():
    _, _, cfg, params = adapted("qwen3", "q", "o", "down")
    specs = param_specs(cfg)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda spec: spec.shape, specs)
    with_adapters = {name for name, tree in specs["layers"]["attn"].items() if "lora_a" in tree}
    assert with_adapters == {"q", "o"}
    layer = specs["layers"]["attn"]["o"]
    assert layer["lora_a"].shape == (cfg.num_layers, cfg.num_heads, cfg.head_dim, 3)
    assert layer["lora_a"].logical_axes == ("layers", "heads", "head_dim", "lora")
    assert layer["lora_b"].logical_axes == ("layers", "lora", "embed")


def test_gradients_reach_both_factors_and_the_mask_selects_them():
    cfg, params, lora_cfg, lora = adapted("llama2_gqa", "q", "down")
    inputs = rows(lora_cfg)

    @quick_jit
    @jax.grad
    def gradient(params):
        return jnp.sum(
            jnp.where(inputs[2][..., None] > 0, hidden_states(params, lora_cfg, *inputs), 0.0) ** 3
        )

    grads = gradient(lora)
    assert np.abs(grads["layers"]["attn"]["q"]["lora_b"]).max() > 0
    assert np.abs(grads["layers"]["attn"]["q"]["lora_a"]).max() == 0.0  # B is zero at the start
    mask = trainable_mask(lora, lora_cfg)
    chosen = {jax.tree_util.keystr(p) for p, on in jax.tree_util.tree_leaves_with_path(mask) if on}
    assert len(chosen) == 4
    assert all("lora_" in path for path in chosen)
    assert all(jax.tree.leaves(trainable_mask(params, cfg)))


def test_adding_without_a_spec_is_an_error():
    cfg, params = model("llama1")
    with pytest.raises(ValueError, match="no `lora`"):
        add_lora(params, cfg, jax.random.key(0))
