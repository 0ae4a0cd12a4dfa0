"""A reward model in seconds: a few thousand weights, and pairs whose better response is told by its letters."""

import copy
import random
from pathlib import Path
from typing import Any

import jax
import yaml

from laif_jax.config import RewardConfig, load_config
from laif_jax.config.schema import ScratchSpec
from laif_jax.models.config import scratch
from laif_jax.models.decoder import init_params
from laif_jax.models.model import Model, save_model
from laif_jax.models.tokenizer import load_tokenizer
from laif_jax.records import write_jsonl

SPEC = ScratchSpec(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, max_position=64)
TREE: dict[str, Any] = {
    "name": "tiny",
    "model": {"dtype": "float32", "remat": "none", "logprob_chunk": 64},
    "mesh": {"data": 2, "fsdp": 2, "tensor": 2},  # the simulated devices of `tests/conftest.py`
    "pairs": {
        "train": {"path": "train.jsonl", "group": "length"},
        "tests": {
            "short": {"path": "short.jsonl", "group": "length"},
            "human": {"path": "human.jsonl", "label": "human", "label_kind": "winner"},
        },
    },
    "reward": {
        "steps": 24,
        "batch_size": 16,
        "max_length": 32,
        "max_prompt_length": 16,
        "packing": True,
        "eval_every": 12,
        "save_every": 8,
        "log_every": 4,
        "held_out": 0.2,
        "optimizer": {"learning_rate": 3.0e-2, "clip_norm": 1.0},
    },
}


def base(folder: Path) -> Path:
    """A model of random weights, saved."""
    tokenizer = load_tokenizer("symbols")
    cfg = scratch(SPEC, len(tokenizer), eos_ids=(tokenizer.eos_token_id,), pad_id=tokenizer.pad_token_id)
    save_model(folder / "base", Model(cfg, init_params(cfg, jax.random.key(0)), tokenizer))
    return folder / "base"


def make_pairs(prefix: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in which the response with the letter "a" is the better one; two rows per prompt."""
    rng = random.Random(f"{prefix}{seed}")
    rows: list[dict[str, Any]] = []
    for i in range(count):
        prompt = rows[-1]["prompt"] if i % 2 else f"copy:{prefix}{''.join(rng.choices('defgh', k=6))}"
        good, bad = ("".join(rng.choices(letters, k=rng.randint(2, 6))) for letters in ("aab", "ccb"))
        a, b, p_b = (good, bad, 0.0) if rng.random() < 0.5 else (bad, good, 1.0)
        rows.append({"prompt": prompt, "a": a, "b": b, "p_b": p_b, "length": str(len(good))})
    return rows


def write(folder: Path, **changes: Any) -> Path:
    """`folder/tiny.yaml`, its data and its base model; `a__b=1` is the key a.b."""
    folder.mkdir(parents=True, exist_ok=True)
    made = copy.deepcopy(TREE)
    made["model"]["source"] = str(base(folder) if not (folder / "base").exists() else folder / "base")
    made |= {"out": str(folder / "runs")}
    made["pairs"]["root"] = str(folder)
    write_jsonl(folder / "train.jsonl", make_pairs("e", 80))
    write_jsonl(folder / "short.jsonl", make_pairs("f", 20))
    human = [
        {"prompt": row["prompt"], "a": row["a"], "b": row["b"], "human": [1 + int(row["p_b"])] * 2 + [0]}
        for row in make_pairs("g", 12)
    ]
    human[0]["human"] = [1, 2]  # they do not agree: a tie
    write_jsonl(folder / "human.jsonl", human)
    for key, value in changes.items():
        *path, last = key.split("__")
        node = made
        for part in path:
            node = node.setdefault(part, {})
        if value is ...:
            node.pop(last, None)
        else:
            node[last] = value
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(made, sort_keys=False))
    return path


def config(folder: Path, **changes: Any) -> RewardConfig:
    return load_config(str(write(folder, **changes)), (), RewardConfig)
