"""Published models by their sizes alone: `config.json` without what does not change a shape. No weight is ever made."""

import dataclasses
from collections.abc import Iterator

from jax.sharding import AbstractMesh

from laif_jax.config.schema import LoraSpec
from laif_jax.models.config import ARCHITECTURES, ModelConfig, from_hf
from laif_jax.models.reward import reward_specs
from laif_jax.models.specs import Specs, param_specs
from laif_jax.parallel import AXES

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
# model_type, then the sizes in this order; published by the models' authors.
_PUBLISHED = {
    "llama2_7b": ("llama", 32000, 4096, 11008, 32, 32, 32, 128),
    "llama2_70b": ("llama", 32000, 8192, 28672, 80, 64, 8, 128),
    "mistral_7b": ("mistral", 32000, 4096, 14336, 32, 32, 8, 128),
    "mixtral_8x7b": ("mixtral", 32000, 4096, 14336, 32, 32, 8, 128),
    "qwen2_7b": ("qwen2", 152064, 3584, 18944, 28, 28, 4, 128),
    "qwen3_8b": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128),
    "gemma2_9b": ("gemma2", 256000, 3584, 14336, 42, 16, 8, 256),
    "gemma3_12b": ("gemma3_text", 262208, 3840, 15360, 48, 16, 8, 256),
    "pythia_6.9b": ("gpt_neox", 50432, 4096, 16384, 32, 32, 32, 128),
}
MODELS = tuple(_PUBLISHED)
LORA = LoraSpec(rank=16)

MESHES: dict[str, dict[str, int]] = {
    "fsdp=16": {"fsdp": 16},
    "tensor=4": {"tensor": 4},
    "fsdp=4 tensor=4": {"fsdp": 4, "tensor": 4},
    "data=2 fsdp=2 expert=2 tensor=2": {"data": 2, "fsdp": 2, "expert": 2, "tensor": 2},
}


def published(name: str) -> ModelConfig:
    family, *sizes = _PUBLISHED[name]
    fields = dict(zip(_SIZES, sizes))
    tied = {"tie_word_embeddings": True} if family.startswith("gemma") else {}
    if family == "gpt_neox":
        fields = {k: v for k, v in fields.items() if k not in ("num_key_value_heads", "head_dim")}
    return from_hf(
        {
            "model_type": family,
            "architectures": [ARCHITECTURES[family]],  # type: ignore[index]
            "max_position_embeddings": 4096,
            **fields,
            **tied,
        }
    )


def variants(name: str) -> Iterator[tuple[str, Specs]]:
    """(what it is, specs) of a language model, a policy with a value head and adapters, and an ensemble of reward
    models, once trained whole and once by adapters."""
    cfg = published(name)
    yield "language model", param_specs(cfg)
    yield (
        "policy with a value head and adapters",
        param_specs(dataclasses.replace(cfg, head="both", lora=LORA)),
    )
    score = dataclasses.replace(cfg, head="score")
    yield "four reward models", reward_specs(score, 4)
    yield "four reward models by adapters", reward_specs(dataclasses.replace(score, lora=LORA), 4)


def abstract_mesh(name: str) -> AbstractMesh:
    """The mesh without devices."""
    return AbstractMesh(tuple(MESHES[name].get(axis, 1) for axis in AXES), AXES)
