"""Model configurations: from a Hugging Face `config.json`, back to one, and from scratch.

Both generations of `config.json` are read: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters`
(transformers 5). The older form is written, because both generations load it.
"""

from collections.abc import Mapping
from typing import Any

from laif_jax.config.schema import LoraSpec, ScratchSpec
from laif_jax.models.arch import Family, Head, ModelConfig, RopeConfig, UnsupportedModelError
from laif_jax.models.rope_config import read_ropes, write_ropes
from laif_jax.models.specs import ParamSpec, param_specs

__all__ = [
    "LoraSpec",
    "ModelConfig",
    "ParamSpec",
    "RopeConfig",
    "UnsupportedModelError",
    "from_hf",
    "param_specs",
    "scratch",
    "to_hf",
]

# ---- what config.json may hold -----------------------------------------------------------------------------------

ARCHITECTURES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}
# With one scalar instead of a vocabulary head: `AutoModelForSequenceClassification` with one label.
SCORE_ARCHITECTURES: dict[Family, str] = {
    family: name.replace("ForCausalLM", "ForSequenceClassification") for family, name in ARCHITECTURES.items()
} | {"gemma3_text": "Gemma3TextForSequenceClassification"}

# What `transformers` assumes where config.json is silent (it leaves out values that equal its class's defaults).
_COMMON: dict[str, Any] = {
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "rope_theta": None,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
}
_RMS = {"rms_norm_eps": 1e-6, "num_key_value_heads": None, "head_dim": None}
_QWEN = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "num_key_value_heads": 32,
}
_GEMMA = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "tie_word_embeddings": True,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_SILU = {"hidden_act": "silu"}
DEFAULTS: dict[Family, dict[str, Any]] = {
    "llama": _COMMON | _RMS | _LLAMA_IDS | _SILU | {"attention_bias": False, "mlp_bias": False},
    "mistral": _COMMON
    | _RMS
    | _LLAMA_IDS
    | _SILU
    | {"sliding_window": 4096, "layer_types": None, "num_key_value_heads": 8},
    "mixtral": _COMMON
    | _RMS
    | _LLAMA_IDS
    | _SILU
    | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8, "sliding_window": None}
    | {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001},
    "qwen2": _COMMON | _RMS | _SILU | _QWEN,
    "qwen3": _COMMON | _RMS | _SILU | _QWEN | {"attention_bias": False, "head_dim": 128},
    "gemma2": _COMMON | _RMS | _GEMMA | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "gemma3_text": _COMMON
    | _RMS
    | _GEMMA
    | {"rope_local_base_freq": None, "sliding_window_pattern": None, "_sliding_window_pattern": None},
    "gpt_neox": _COMMON
    | {"layer_norm_eps": 1e-5, "hidden_act": "gelu", "use_parallel_residual": True, "attention_bias": True}
    | {"bos_token_id": 0, "eos_token_id": 2, "rotary_pct": None, "rotary_emb_base": None},
}

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)

# Fields that do not change the maths of a forward pass, whatever their value. Dropout is among them: it is off.
# fmt: off
HARMLESS = frozenset(
    {
        "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
        "architectures", "attention_dropout", "attn_implementation", "auto_map", "begin_suppress_tokens",
        "cache_implementation", "chunk_size_feed_forward", "classifier_dropout", "diversity_penalty",
        "dtype", "encoder_no_repeat_ngram_size", "finetuning_task", "hidden_dropout", "id2label",
        "is_decoder", "is_llama_config", "keys_to_ignore_at_inference", "label2id", "length_penalty",
        "max_length", "max_sequence_length", "min_length", "model_max_length", "model_type",
        "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels", "num_return_sequences",
        "output_attentions", "output_hidden_states", "prefix", "pretraining_tp", "problem_type",
        "repetition_penalty", "resid_pdrop", "return_dict", "return_dict_in_generate", "sep_token_id",
        "suppress_tokens", "task_specific_params", "temperature", "tokenizer_class", "top_k", "top_p",
        "torch_dtype", "transformers.js_config", "transformers_version", "typical_p", "unsloth_fixed",
        "unsloth_version", "use_bfloat16", "use_cache", "use_flash_attn",
    }
)
# fmt: on
# Fields that a family carries but `transformers` never computes with.
_IGNORED: dict[Family, frozenset[str]] = {
    "qwen2": frozenset({"attention_bias"}),
    # The router's jitter is noise in training, as dropout is; whether router scores are returned is no maths.
    "mixtral": frozenset({"router_jitter_noise", "output_router_logits"}),
    "gemma2": frozenset({"hidden_act", "sliding_window_size"}),
    "gemma3_text": frozenset({"hidden_act"}),
    "gpt_neox": frozenset({"rope_theta", "partial_rotary_factor"}),
}

_ACTIVATIONS: dict[str, Any] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


def _family(hf: Mapping[str, Any]) -> Family:
    model_type = hf.get("model_type")
    for family in ARCHITECTURES:
        if model_type == family:
            break
    else:
        raise UnsupportedModelError(
            f"model_type {model_type!r} (architectures {hf.get('architectures')}) is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    return family


def _head(hf: Mapping[str, Any], family: Family) -> Head:
    """What the architecture reads off the hidden states: a vocabulary, or one scalar."""
    names = hf.get("architectures") or [ARCHITECTURES[family]]
    if ARCHITECTURES[family] in names:
        return "lm"
    if SCORE_ARCHITECTURES[family] not in names:
        raise UnsupportedModelError(
            f"architectures {names} is not a language model of type {family!r}; expected {ARCHITECTURES[family]}, or "
            f"{SCORE_ARCHITECTURES[family]} of a reward model"
        )
    labels = hf.get("num_labels") or len(hf.get("id2label") or {}) or 2  # `transformers` assumes two
    if labels != 1:
        raise UnsupportedModelError(
            f"{SCORE_ARCHITECTURES[family]} with {labels} labels: a reward model has one (`num_labels: 1`)"
        )
    return "score"


def _fields(hf: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields that matter, with defaults filled in; refuses what is unknown and switched on."""
    known = DEFAULTS[family]
    ignored = HARMLESS | _IGNORED.get(family, frozenset())
    for name, value in hf.items():
        if name in known or name in _SIZES or name in ignored:
            continue
        if value is not None and value is not False and value != {} and value != [] and value != "":
            raise UnsupportedModelError(
                f"config field `{name}: {value!r}` of a {family} model is unknown here and may change its maths; "
                "if it does not, add it to HARMLESS in laif_jax/models/config.py"
            )
    missing = [name for name in _SIZES if hf.get(name) is None]
    if missing:
        raise UnsupportedModelError(f"config.json of a {family} model lacks {', '.join(missing)}")
    fields = dict(known)
    fields.update({name: value for name, value in hf.items() if name in known or name in _SIZES})
    return fields


def _activation(name: str) -> Any:
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"activation {name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (int(value),) if isinstance(value, int) else tuple(int(item) for item in value)


def _token_id(value: int | None) -> int | None:
    return None if value is None or value < 0 else int(value)


# ---- which layers see how far ------------------------------------------------------------------------------------


def _layer_types(fields: dict[str, Any], family: Family) -> tuple[str, ...]:
    """Per layer "full_attention" or "sliding_attention", as each family's class in `transformers` decides."""
    layers = fields["num_hidden_layers"]
    types = fields.get("layer_types")
    window = fields.get("sliding_window")
    if family == "mixtral":
        types = ["sliding_attention" if window else "full_attention"] * layers
    elif family == "mistral":
        kind = "sliding_attention" if window else "full_attention"
        if types is not None and set(types) != {kind}:
            raise UnsupportedModelError(
                f"mistral with `layer_types` {sorted(set(types))} and sliding_window {window}: "
                "layers of a Mistral model are all alike; mixed layers are another architecture"
            )
        return (kind,) * layers
    if family in ("qwen2", "qwen3"):
        sliding = fields["use_sliding_window"] and window
        if types is None:
            first = fields["max_window_layers"] if sliding else layers
            types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
        elif "sliding_attention" in types and not sliding:
            raise UnsupportedModelError(
                "`layer_types` has sliding_attention although `use_sliding_window` is false; set it to true"
            )
    elif family in ("gemma2", "gemma3_text") and types is None:
        pattern = 2
        if family == "gemma3_text":
            pattern = fields["sliding_window_pattern"] or fields["_sliding_window_pattern"] or 6
        types = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    types = types or ["full_attention"] * layers
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModelError(f"`layer_types` {sorted(unknown)} are not supported")
    if "sliding_attention" in types and not window:
        raise UnsupportedModelError("`layer_types` has sliding_attention but `sliding_window` is not set")
    return tuple(types)


# ---- in and out --------------------------------------------------------------------------------------------------


def from_hf(hf: Mapping[str, Any], *, lora: LoraSpec | None = None) -> ModelConfig:
    """Reads a Hugging Face `config.json`.

    Args:
      hf: the parsed JSON. lora: adapters to put on the model.

    Raises:
      UnsupportedModelError: an architecture that is not supported, or a field that is unknown and switched on.
    """
    family = _family(hf)
    fields = _fields(hf, family)
    heads = fields["num_attention_heads"]
    head_dim = fields.get("head_dim")
    if head_dim is None:
        if fields["hidden_size"] % heads:
            raise UnsupportedModelError(
                f"hidden_size {fields['hidden_size']} is not a multiple of num_attention_heads {heads}"
            )
        head_dim = fields["hidden_size"] // heads
    types = _layer_types(fields, family)
    ropes, rope_index = read_ropes(fields, family, types)
    window = fields.get("sliding_window") or 0
    return ModelConfig(
        family=family,
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        max_position=fields["max_position_embeddings"],
        norm_eps=fields["layer_norm_eps"] if family == "gpt_neox" else fields["rms_norm_eps"],
        windows=tuple(window if kind == "sliding_attention" else 0 for kind in types),
        ropes=ropes,
        rope_index=rope_index,
        tie_embeddings=bool(fields["tie_word_embeddings"]),
        initializer_range=fields["initializer_range"],
        eos_ids=_ids(fields["eos_token_id"]),
        bos_id=_token_id(fields["bos_token_id"]),
        pad_id=_token_id(fields["pad_token_id"]),
        head=_head(hf, family),
        lora=lora,
        **_family_traits(fields, family),
    )


def _family_traits(fields: dict[str, Any], family: Family) -> dict[str, Any]:
    """What tells the families apart: norms, biases, activation, soft caps."""
    if family == "gpt_neox":
        return {
            "norm": "layer",
            "activation": _activation(fields["hidden_act"]),
            "gated_mlp": False,
            "qkv_bias": bool(fields["attention_bias"]),
            "o_bias": bool(fields["attention_bias"]),
            "mlp_bias": True,
            "parallel_residual": bool(fields["use_parallel_residual"]),
        }
    if family in ("gemma2", "gemma3_text"):
        if family == "gemma3_text" and fields["attn_logit_softcapping"] is not None:
            raise UnsupportedModelError(
                "gemma3_text with `attn_logit_softcapping`: `transformers` does not apply it; set it to null"
            )
        return {
            "unit_offset": True,
            "activation": _activation(fields["hidden_activation"]),
            "qkv_bias": bool(fields["attention_bias"]),
            "o_bias": bool(fields["attention_bias"]),
            "qk_norm": family == "gemma3_text",
            "post_norms": True,
            "embed_scale": True,
            "attn_scale": fields["query_pre_attn_scalar"] ** -0.5,
            "attn_softcap": fields["attn_logit_softcapping"],
            "final_softcap": fields["final_logit_softcapping"],
        }
    bias = bool(fields.get("attention_bias"))
    experts = {}
    if family == "mixtral":
        experts = {
            "num_experts": fields["num_local_experts"],
            "experts_per_token": fields["num_experts_per_tok"],
            "router_loss": float(fields["router_aux_loss_coef"]),
        }
    return experts | {
        "activation": _activation(fields["hidden_act"]),
        "qkv_bias": bias or family == "qwen2",
        "o_bias": bias,
        "mlp_bias": bool(fields.get("mlp_bias")),
        "qk_norm": family == "qwen3",
    }


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The `config.json` that `transformers` loads; `from_hf` of it gives `cfg` back (without its LoRA).

    Raises:
      ValueError: a model with both heads, which `transformers` does not have.
    """
    family = cfg.family
    if cfg.head == "both":
        raise ValueError(
            "a model with a vocabulary and a scalar head has no config.json: save the two apart "
            "(laif_jax.models.reward.change_head)"
        )
    activation = _ACTIVATION_NAMES[cfg.activation]
    hf: dict[str, Any] = {
        "architectures": [(ARCHITECTURES if cfg.head == "lm" else SCORE_ARCHITECTURES)[family]],
        "model_type": family,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "max_position_embeddings": cfg.max_position,
        "initializer_range": cfg.initializer_range,
        "tie_word_embeddings": cfg.tie_embeddings,
        "eos_token_id": cfg.eos_ids[0] if len(cfg.eos_ids) == 1 else (list(cfg.eos_ids) or None),
        "bos_token_id": cfg.bos_id,
        "pad_token_id": cfg.pad_id,
        **write_ropes(cfg),
    }
    if cfg.head == "score":
        hf |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    if family == "gpt_neox":
        return hf | {
            "layer_norm_eps": cfg.norm_eps,
            "hidden_act": activation,
            "use_parallel_residual": cfg.parallel_residual,
            "attention_bias": cfg.qkv_bias,
        }
    hf |= {"rms_norm_eps": cfg.norm_eps, "num_key_value_heads": cfg.num_kv_heads, "head_dim": cfg.head_dim}
    window = max(cfg.windows) or None
    types = ["sliding_attention" if size else "full_attention" for size in cfg.windows]
    if family in ("gemma2", "gemma3_text"):
        return hf | {
            "hidden_activation": activation,
            "attention_bias": cfg.qkv_bias,
            # An integer in `transformers`; scores are scaled by its inverse square root.
            "query_pre_attn_scalar": round(cfg.attn_scale**-2),
            "sliding_window": window or 4096,
            "layer_types": types,
            "final_logit_softcapping": cfg.final_softcap,
            "attn_logit_softcapping": cfg.attn_softcap,
        }
    hf["hidden_act"] = activation
    if family in ("qwen2", "qwen3"):
        hf |= {"use_sliding_window": window is not None, "sliding_window": window, "layer_types": types}
    if family in ("mistral", "mixtral"):
        hf["sliding_window"] = window
    if family == "mixtral":
        hf |= {
            "num_local_experts": cfg.num_experts,
            "num_experts_per_tok": cfg.experts_per_token,
            "router_aux_loss_coef": cfg.router_loss,
        }
    if family in ("llama", "qwen3"):
        hf["attention_bias"] = cfg.qkv_bias
    if family == "llama":
        hf["mlp_bias"] = cfg.mlp_bias
    return hf


def scratch(
    spec: ScratchSpec,
    vocab_size: int,
    *,
    eos_ids: tuple[int, ...] = (),
    pad_id: int | None = None,
    bos_id: int | None = None,
    lora: LoraSpec | None = None,
) -> ModelConfig:
    """A Llama configuration of the given sizes, to be initialised at random.

    Raises:
      ValueError: the hidden size does not divide over the heads.
    """
    if spec.hidden_size % spec.num_heads:
        raise ValueError(
            f"scratch model: hidden_size {spec.hidden_size} is not a multiple of num_heads {spec.num_heads}"
        )
    return ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads or spec.num_heads,
        head_dim=spec.hidden_size // spec.num_heads,
        max_position=spec.max_position,
        tie_embeddings=spec.tie_embeddings,
        # SmolLM's: small models start too slowly from the usual 0.02.
        initializer_range=spec.hidden_size**-0.5,
        eos_ids=tuple(eos_ids),
        bos_id=bos_id,
        pad_id=pad_id,
        lora=lora,
    )
