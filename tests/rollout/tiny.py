"""A tiny decoder with peaked, prompt-dependent predictions."""

import functools

import jax
import numpy as np

from laif_jax.config.schema import ScratchSpec
from laif_jax.models.config import ModelConfig, scratch
from laif_jax.models.decoder import init_params

EOS = 1
VOCAB = 41


@functools.cache
def tiny(seed: int = 0, max_position: int = 64) -> tuple[ModelConfig, dict]:
    """(cfg, params). The head is scaled up, for a fresh model predicts almost uniformly."""
    spec = ScratchSpec(
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_position=max_position,
        tie_embeddings=False,  # with tied ones, a model of random weights repeats its last token
    )
    cfg = scratch(spec, VOCAB, eos_ids=(EOS,), pad_id=0)
    params = init_params(cfg, jax.random.key(seed))
    return cfg, {**params, "lm_head": {"kernel": params["lm_head"]["kernel"] * 2.0}}


def prompts(n: int, longest: int = 16, seed: int = 0) -> list[list[int]]:
    """`n` random prompts of 1 .. `longest` tokens, EOS among them (a prompt may hold anything)."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, rng.integers(1, longest + 1)).tolist() for _ in range(n)]
