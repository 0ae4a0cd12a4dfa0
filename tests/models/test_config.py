"""config.json of both generations in and out, and what is refused."""

import copy

import numpy as np
import pytest
from transformers import AutoConfig

from laif_jax.config.schema import LoraSpec, ScratchSpec
from laif_jax.models.config import UnsupportedModelError, from_hf, param_specs, scratch, to_hf
from laif_jax.models.rope import inverse_frequencies
from tests.models.goldens import CASES


def changed(name, **fields):
    return copy.deepcopy(CASES[name]["config"]) | fields


@pytest.mark.parametrize("name", CASES)
def test_both_generations_of_config_mean_the_same(name):
    old, new = CASES[name]["config"], CASES[name]["saved_config"]
    assert "rope_parameters" in new
    assert "rope_parameters" not in old
    # transformers 5 fills in token ids that the old file left out; they are not part of the maths.
    ids = {key: new.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")}
    assert from_hf(old | ids) == from_hf(new)


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_reads_back_and_transformers_reads_the_same(name):
    cfg = from_hf(CASES[name]["config"])
    written = to_hf(cfg)
    assert from_hf(written) == cfg
    theirs = AutoConfig.for_model(**written)
    assert theirs.model_type == cfg.family
    assert from_hf(theirs.to_dict() | {"architectures": written["architectures"]}) == cfg


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama1", {"model_type": "mamba"}, "model_type 'mamba'"),
        ("llama1", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ("llama1", {"num_experts": 8}, "num_experts: 8"),
        ("llama1", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama1", {"hidden_act": "relu2"}, "relu2"),
        ("llama1", {"rope_scaling": {"type": "longrope", "factor": 4.0}}, "longrope"),
        ("llama1", {"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ("llama1", {"rope_scaling": {"type": "linear", "factor": 2.0, "twist": 3}}, "twist"),
        ("llama1", {"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "factor"),
        ("llama1", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            "llama1",
            {"rope_parameters": {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}},
            "partial",
        ),
        ("llama1", {"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ("llama1", {"vocab_size": None}, "lacks vocab_size"),
        ("llama1", {"head_dim": 7}, "rotary"),
        (
            "mistral",
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "another architecture",
        ),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window"),
        ("qwen2_layer_types", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("qwen2_layer_types", {"layer_types": ["full_attention"] * 2}, "2 layer types"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"model_type": "gemma3", "vision_config": {"hidden_size": 8}}, "model_type 'gemma3'"),
        ("pythia", {"rotary_pct": 0.1}, "rotary"),
    ],
)
def test_what_would_change_the_maths_is_refused_by_name(name, fields, message):
    with pytest.raises(UnsupportedModelError, match=message):
        from_hf(changed(name, **fields))


def test_harmless_and_switched_off_fields_are_accepted():
    base = from_hf(CASES["llama1"]["config"])
    fields = {
        "torch_dtype": "float16",
        "attention_dropout": 0.1,
        "use_cache": False,
        "brand_new_switch": False,
    }
    assert from_hf(changed("llama1", **fields, quantization_config=None, _name_or_path="x/y")) == base


def test_windows_and_ropes_per_layer():
    assert from_hf(CASES["qwen2_sliding"]["config"]).windows == (0, 6, 6)
    assert from_hf(CASES["qwen2"]["config"]).windows == (0, 0, 0)
    assert from_hf(CASES["gemma2"]["config"]).windows == (6, 0, 6)
    gemma3 = from_hf(CASES["gemma3_default_pattern"]["config"])
    assert gemma3.windows == (6,) * 5 + (0, 6)
    assert gemma3.rope_index == (1,) * 5 + (0, 1)
    assert [rope.theta for rope in gemma3.ropes] == [10000.0, 10000.0]  # the case's own rope_theta
    assert [rope.theta for rope in from_hf(CASES["gemma3"]["config"]).ropes] == [1e6, 1e4]
    assert from_hf(CASES["mistral"]["config"]).uniform_window == 6


def test_several_eos_ids_survive():
    cfg = from_hf(changed("llama3", eos_token_id=[7, 9]))
    assert cfg.eos_ids == (7, 9)
    assert from_hf(to_hf(cfg)).eos_ids == (7, 9)


def test_published_llama3_frequencies():
    """The worked example of the rule: short waves kept, long ones divided by the factor."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
    scaling["original_max_position_embeddings"] = 8192
    cfg = from_hf(
        changed(
            "llama1", rope_scaling=scaling, rope_theta=500000.0, head_dim=128, max_position_embeddings=131072
        )
    )
    plain = from_hf(changed("llama1", rope_theta=500000.0, head_dim=128))
    ours = inverse_frequencies(cfg.ropes[0], 128, cfg.max_position)[0]
    base = inverse_frequencies(plain.ropes[0], 128, cfg.max_position)[0]
    np.testing.assert_allclose(ours[:20], base[:20])
    np.testing.assert_allclose(ours[-20:] * 8, base[-20:], rtol=1e-6)
    assert np.all(np.diff(ours) < 0)


def test_scratch_is_a_llama_and_checks_its_sizes():
    spec = ScratchSpec(
        hidden_size=24, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=2, max_position=64
    )
    cfg = scratch(spec, 50, eos_ids=(3,), pad_id=0)
    assert (cfg.family, cfg.head_dim, cfg.eos_ids, cfg.pad_id) == ("llama", 6, (3,), 0)
    assert from_hf(to_hf(cfg)) == cfg
    assert hash(cfg) == hash(from_hf(to_hf(cfg)))
    with pytest.raises(ValueError, match="not a multiple of num_heads"):
        scratch(ScratchSpec(hidden_size=30, num_heads=4), 50)


def test_lora_on_layers_that_the_model_lacks_is_refused():
    cfg = from_hf(CASES["pythia"]["config"], lora=LoraSpec(rank=2, targets=("gate",)))
    with pytest.raises(UnsupportedModelError, match="none of these linear layers"):
        param_specs(cfg)
