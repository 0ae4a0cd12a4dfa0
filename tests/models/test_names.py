"""The name table: both directions, every family, and states that do not fit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.models import names
from laif_jax.models.names import WeightsError
from laif_jax.models.specs import param_specs
from tests.models import states
from tests.models.states import D, H


@pytest.mark.parametrize("dtype", states.DTYPES)
@pytest.mark.parametrize("family", states.FAMILIES)
def test_round_trip_is_byte_identical(family, dtype):
    cfg = states.tiny_config(family)
    state = states.random_state(cfg, dtype=dtype)
    params = names.from_hf_state(cfg, state)
    states.same_bytes(names.to_hf_state(cfg, params), state)


@pytest.mark.parametrize("family", states.FAMILIES)
def test_tree_has_the_layout_of_the_specs(family):
    cfg = states.tiny_config(family, layers=3)
    params = names.flatten(names.from_hf_state(cfg, states.random_state(cfg)))
    specs = names.flatten(param_specs(cfg))
    assert {path: leaf.shape for path, leaf in params.items()} == {p: s.shape for p, s in specs.items()}


@pytest.mark.parametrize("family", [f for f in states.FAMILIES if f not in ("gpt_neox", "mixtral")])
def test_leaves_compute_what_the_tensors_compute(family):
    """A tensor applies as y = W x (torch); the leaves apply by named axes."""
    cfg = states.tiny_config(family)
    state = states.random_state(cfg)
    layer1 = "model.layers.1."
    params = names.from_hf_state(cfg, state)["layers"]
    x = np.random.default_rng(1).normal(size=D).astype(np.float32)
    kv, heads_q = cfg.num_kv_heads, cfg.num_heads
    for name, heads in (("q", heads_q), ("k", kv), ("v", kv)):
        want = (state[f"{layer1}self_attn.{name}_proj.weight"] @ x).reshape(heads, H)
        got = np.einsum("d,dnh->nh", x, params["attn"][name]["kernel"][1])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    per_head = np.random.default_rng(2).normal(size=(heads_q, H)).astype(np.float32)
    want = state[f"{layer1}self_attn.o_proj.weight"] @ per_head.reshape(-1)
    got = np.einsum("nh,nhd->d", per_head, params["attn"]["o"]["kernel"][1])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    want = state[f"{layer1}mlp.up_proj.weight"] @ x
    np.testing.assert_allclose(x @ params["mlp"]["up"]["kernel"][1], want, rtol=1e-5, atol=1e-5)
    second = "pre_feedforward_layernorm" if cfg.post_norms else "post_attention_layernorm"
    np.testing.assert_array_equal(params["mlp_norm"]["scale"][1], state[f"{layer1}{second}.weight"])


def test_leaves_of_experts_compute_what_their_tensors_compute():
    cfg = states.tiny_config("mixtral")
    state = states.random_state(cfg)
    mlp = names.from_hf_state(cfg, state)["layers"]["mlp"]
    x, y = (np.random.default_rng(1).normal(size=n).astype(np.float32) for n in (D, states.F))
    np.testing.assert_allclose(
        x @ mlp["router"]["kernel"][1],
        state["model.layers.1.block_sparse_moe.gate.weight"] @ x,
        rtol=1e-5,
        atol=1e-5,
    )
    for expert in range(states.E):
        for leaf, tensor, vector in (("gate", "w1", x), ("up", "w3", x), ("down", "w2", y)):
            want = state[f"model.layers.1.block_sparse_moe.experts.{expert}.{tensor}.weight"] @ vector
            np.testing.assert_allclose(vector @ mlp[leaf]["kernel"][1, expert], want, rtol=1e-5, atol=1e-5)


def test_neox_fused_projection_is_split_per_head():
    """transformers: qkv.view(heads, 3 * head_dim).chunk(3, dim=-1)."""
    cfg = states.tiny_config("gpt_neox")
    state = states.random_state(cfg)
    params = names.from_hf_state(cfg, state)["layers"]["attn"]
    x = np.random.default_rng(1).normal(size=D).astype(np.float32)
    fused = "gpt_neox.layers.1.attention.query_key_value."
    qkv = (state[f"{fused}weight"] @ x + state[f"{fused}bias"]).reshape(cfg.num_heads, 3 * H)
    for name, want in zip("qkv", np.split(qkv, 3, axis=-1)):
        got = np.einsum("d,dnh->nh", x, params[name]["kernel"][1]) + params[name]["bias"][1]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(family=st.sampled_from(states.FAMILIES), data=st.data())
def test_a_slice_of_a_leaf_reads_only_its_part(family, data):
    cfg = states.tiny_config(family, layers=3)
    state = states.random_state(cfg)
    whole = names.flatten(names.from_hf_state(cfg, state))
    path = data.draw(st.sampled_from(sorted(whole)))
    plan, read = names.plans(cfg)[path], []
    bounds = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in plan.shape]
    index = tuple(
        slice(low, max(high, low + 1)) if low < n else slice(n - 1, n)
        for (low, high), n in zip(bounds, plan.shape)
    )

    def reader(name, factored, part):
        block = state[name].reshape(factored)[part]
        read.append(block.size)
        return block

    got = plan.read(reader, index)
    np.testing.assert_array_equal(got, whole[path][index])
    assert sum(read) == got.size


@pytest.mark.parametrize("family", states.FAMILIES)
def test_bare_decoder_and_buffers_are_accepted(family):
    """`AutoModel` checkpoints leave out the prefix; old ones carry buffers."""
    cfg = states.tiny_config(family)
    state = states.random_state(cfg)
    want = names.flatten(names.from_hf_state(cfg, state))
    bare = {name.removeprefix("model.").removeprefix("gpt_neox."): value for name, value in state.items()}
    for name in ("rotary_emb.inv_freq", "attention.masked_bias", "attention.bias"):
        bare[f"layers.0.{name}" if name.startswith("attention") else f"layers.0.self_attn.{name}"] = np.ones(
            3
        )
    got = names.flatten(names.from_hf_state(cfg, bare))
    assert all(np.array_equal(got[path], want[path]) for path in want)


def test_second_copy_of_tied_embeddings_is_ignored():
    cfg = states.tiny_config("llama", tie_word_embeddings=True)
    state = states.random_state(cfg)
    names.from_hf_state(cfg, {**state, "lm_head.weight": state["model.embed_tokens.weight"]})


def test_missing_extra_and_misshapen_tensors_are_named():
    cfg = states.tiny_config("llama")
    state = states.random_state(cfg)
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.0.self_attn.q_proj.bias"] = np.zeros(cfg.num_heads * H, np.float32)
    state["model.norm.weight"] = np.zeros(D + 1, np.float32)
    with pytest.raises(WeightsError) as caught:
        names.from_hf_state(cfg, state)
    message = str(caught.value)
    assert "1 of the model's tensors are missing: model.layers.1.mlp.up_proj.weight" in message
    assert "belong to no part of the model: model.layers.0.self_attn.q_proj.bias" in message
    assert f"model.norm.weight has shape ({D + 1},), the config asks for ({D},)" in message


def test_layers_of_unlike_dtypes_are_promoted():
    cfg = states.tiny_config("llama")
    state = states.random_state(cfg, dtype="bfloat16")
    name = "model.layers.1.mlp.up_proj.weight"
    state[name] = state[name].astype(np.float32) + 1e-4
    leaf = names.from_hf_state(cfg, state)["layers"]["mlp"]["up"]["kernel"]
    assert leaf.dtype == np.float32
    np.testing.assert_array_equal(leaf[1], state[name].T)
