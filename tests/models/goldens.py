"""The golden models: configurations and parameters drawn as tests/tools/make_model_goldens.py drew them."""

import json
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from laif_jax.models import names
from laif_jax.models.config import ModelConfig, from_hf
from tests.models.golden_state import draw, draw_tokens

#: For checks of one way of running against another: compiles in half the time. The golden logits do without.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

FOLDER = Path(__file__).parent / "goldens"
_FILE = json.loads((FOLDER / "cases.json").read_text())
CASES: dict[str, dict[str, Any]] = _FILE["cases"]
LENGTHS: tuple[int, ...] = tuple(_FILE["lengths"])


@lru_cache
def model(name: str) -> tuple[ModelConfig, Any]:
    """Configuration and parameters (float32) of a case."""
    case = CASES[name]
    cfg = from_hf(case["config"])
    state = {key: draw(key, tuple(shape), cfg.unit_offset) for key, shape in case["shapes"].items()}
    return cfg, jax.tree.map(jnp.asarray, names.from_hf_state(cfg, state))


def golden_logits(name: str) -> list[np.ndarray]:
    """What `transformers` computes: per row [length, vocab]."""
    with np.load(FOLDER / "logits.npz") as arrays:
        return np.split(arrays[name], np.cumsum(LENGTHS)[:-1])


def golden_steps(name: str) -> np.ndarray:
    """What `transformers` computes for the first row, generating after a prompt of 9 tokens: [steps, vocab]."""
    with np.load(FOLDER / "logits.npz") as arrays:
        return arrays[f"{name}/steps"]


def golden_router_loss(name: str) -> float:
    """What `transformers` computes for the padded rows."""
    with np.load(FOLDER / "logits.npz") as arrays:
        return float(arrays[f"{name}/router_loss"])


def rows(cfg: ModelConfig, pad: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The golden rows right-padded with `pad`: tokens, positions, segment_ids, int32 [rows, longest]."""
    tokens = np.full((len(LENGTHS), max(LENGTHS)), pad, np.int32)
    positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
    for i, row in enumerate(draw_tokens(LENGTHS, cfg.vocab_size)):
        tokens[i, : len(row)], positions[i, : len(row)], segments[i, : len(row)] = row, np.arange(len(row)), 1
    return tokens, positions, segments


def packed(cfg: ModelConfig, padding: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same sequences in one row, one segment each, then padding."""
    parts = draw_tokens(LENGTHS, cfg.vocab_size)
    tokens = np.concatenate([*parts, np.full(padding, 3, np.int32)])
    positions = np.concatenate([np.arange(n) for n in (*LENGTHS, padding)])
    segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(LENGTHS)] + [np.zeros(padding)])
    return tokens[None], positions[None].astype(np.int32), segments[None].astype(np.int32)
