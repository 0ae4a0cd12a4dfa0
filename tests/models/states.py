"""Small Hugging Face state dicts of every family, written out by hand: names and shapes as `transformers` has them."""

from typing import Any

import ml_dtypes
import numpy as np

from laif_jax.models.arch import Family, ModelConfig
from laif_jax.models.config import ARCHITECTURES, from_hf

FAMILIES: tuple[Family, ...] = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
)
D, F, V, N, K, H, E = 12, 20, 22, 4, 2, 6, 3
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


_FIELDS = {
    "qwen3": {"head_dim": H},
    "llama": {"head_dim": H},
    "mistral": {"head_dim": H, "sliding_window": 8},
    "mixtral": {"head_dim": H, "num_local_experts": E},
    # Heads of size hidden_size / num_attention_heads.
    "qwen2": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "gemma2": {"head_dim": H, "sliding_window": 8, "query_pre_attn_scalar": 6},
    "gemma3_text": {"head_dim": H, "sliding_window": 8, "query_pre_attn_scalar": 6},
    "gpt_neox": {"num_attention_heads": 2, "rotary_pct": 0.35, "hidden_act": "gelu"},
}


def hf_config(family: Family, layers: int = 2, **changes) -> dict[str, Any]:
    """A config.json of the family at the smallest size where (almost) no two axes agree."""
    fields = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": layers,
        "num_attention_heads": N,
        "max_position_embeddings": 64,
        "tie_word_embeddings": family.startswith("gemma"),
        "eos_token_id": 2,
        **({} if family == "gpt_neox" else {"num_key_value_heads": K}),
    }
    return {**fields, **_FIELDS[family], **changes}


def tiny_config(family: Family, layers: int = 2, **changes) -> ModelConfig:
    """The same as a `ModelConfig`; `changes` are fields of config.json."""
    return from_hf(hf_config(family, layers, **changes))


def shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{tensor name: shape} of the family's state dict."""
    if cfg.family == "gpt_neox":
        return _neox_shapes(cfg)
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(cfg.num_layers):
        block = f"model.layers.{layer}."
        norms = ["input_layernorm", "post_attention_layernorm"]
        if cfg.family in ("gemma2", "gemma3_text"):
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        out |= {f"{block}{norm}.weight": (D,) for norm in norms}
        kv = cfg.num_kv_heads
        for name, heads in (("q", cfg.num_heads), ("k", kv), ("v", kv)):
            out[f"{block}self_attn.{name}_proj.weight"] = (heads * H, D)
            if cfg.family == "qwen2":
                out[f"{block}self_attn.{name}_proj.bias"] = (heads * H,)
        out[f"{block}self_attn.o_proj.weight"] = (D, cfg.num_heads * H)
        if cfg.family in ("qwen3", "gemma3_text"):
            out |= {f"{block}self_attn.{name}_norm.weight": (H,) for name in "qk"}
        if cfg.family == "mixtral":
            mixture = f"{block}block_sparse_moe."
            out[f"{mixture}gate.weight"] = (E, D)
            for expert in range(E):
                parts = {"w1": (F, D), "w2": (D, F), "w3": (F, D)}
                out |= {f"{mixture}experts.{expert}.{name}.weight": shape for name, shape in parts.items()}
            continue
        out |= {f"{block}mlp.{name}_proj.weight": (F, D) for name in ("gate", "up")}
        out[f"{block}mlp.down_proj.weight"] = (D, F)
    out["model.norm.weight"] = (D,)
    if not cfg.tie_embeddings:
        out["lm_head.weight"] = (V, D)
    return out


def _neox_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {"gpt_neox.embed_in.weight": (V, D)}
    for layer in range(cfg.num_layers):
        block = f"gpt_neox.layers.{layer}."
        for name, shape in {
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
            "attention.query_key_value": (3 * D, D),
            "attention.dense": (D, D),
            "mlp.dense_h_to_4h": (F, D),
            "mlp.dense_4h_to_h": (D, F),
        }.items():
            out[f"{block}{name}.weight"] = shape
            out[f"{block}{name}.bias"] = shape[:1]
    out |= {"gpt_neox.final_layer_norm.weight": (D,), "gpt_neox.final_layer_norm.bias": (D,)}
    if not cfg.tie_embeddings:
        out["embed_out.weight"] = (V, D)
    return out


def random_state(cfg: ModelConfig, seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Random values under those names."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=shape).astype(np.float32).astype(DTYPES[dtype])
        for name, shape in shapes(cfg).items()
    }


def same_bytes(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Fails unless both hold the same names, types, shapes and bytes."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert value.shape == b[name].shape, name
        assert value.tobytes() == b[name].tobytes(), name
