"""Small Hugging Face state dicts of every family, written out by hand: names and shapes as `transformers` has them."""

import ml_dtypes
import numpy as np

from laif_jax.models.arch import Family, ModelConfig

FAMILIES: tuple[Family, ...] = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
)
D, F, V, N, K, H = 12, 20, 22, 4, 2, 6
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def tiny_config(family: Family, layers: int = 2, **changes) -> ModelConfig:
    """The family's structure at the smallest size where no two axes agree."""
    options = {
        "llama": {},
        "mistral": {},
        "qwen2": {"qkv_bias": True},
        "qwen3": {"qk_norm": True},
        "gemma2": {"post_norms": True, "unit_offset": True, "tie_embeddings": True},
        "gemma3_text": {"post_norms": True, "unit_offset": True, "qk_norm": True, "tie_embeddings": True},
        "gpt_neox": {
            "norm": "layer",
            "gated_mlp": False,
            "parallel_residual": True,
            "qkv_bias": True,
            "o_bias": True,
            "mlp_bias": True,
            "num_kv_heads": N,
        },
    }[family]
    sizes = {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_layers": layers,
        "num_heads": N,
        "num_kv_heads": K,
        "head_dim": H,
        "max_position": 64,
    }
    return ModelConfig(family=family, **{**sizes, **options, **changes})


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
        for name, heads in (("q", N), ("k", K), ("v", K)):
            out[f"{block}self_attn.{name}_proj.weight"] = (heads * H, D)
            if cfg.family == "qwen2":
                out[f"{block}self_attn.{name}_proj.bias"] = (heads * H,)
        out[f"{block}self_attn.o_proj.weight"] = (D, N * H)
        if cfg.family in ("qwen3", "gemma3_text"):
            out |= {f"{block}self_attn.{name}_norm.weight": (H,) for name in "qk"}
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
            "attention.query_key_value": (3 * N * H, D),
            "attention.dense": (D, N * H),
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
