"""A whole study in seconds: a model of a few thousand weights in the synthetic world, simulated endpoints."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from laif_jax.config import StudyConfig, load_config

TRAIN = {"batch_size": 8, "max_length": 48, "max_prompt_length": 24}
TREE: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "source": "scratch",
        "tokenizer": "symbols",
        "dtype": "float32",
        "save_dtype": "float32",
        "remat": "none",
        "logprob_chunk": 64,
        "scratch": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_layers": 1,
            "num_heads": 2,
            "max_position": 64,
        },
    },
    "data": {
        "train": {"kind": "symbols", "limit": 40},
        "eval": {"kind": "symbols", "limit": 16, "split": "eval"},
        "symbols": {"symbols": 5, "min_length": 2, "max_length": 4, "max_steps": 1},
    },
    "labeling": {"poll": 0.05},
    "endpoints": {
        "weak": {"provider": "simulated", "simulated": {"world": "symbols", "skill": 0.5, "seed": 1}},
        "strong": {
            "provider": "simulated",
            "simulated": {"world": "symbols", "skill": 0.9, "accuracy": 0.9, "sharpness": 2.0, "seed": 2},
        },
    },
    "teachers": {"weak": {"endpoint": "weak"}, "strong": {"endpoint": "strong"}},
    "critics": {"strong": {"endpoint": "strong", "critic": "ab_logprob", "order": "both"}},
    "pretrain": {**TRAIN, "examples": 64, "steps": 4, "optimizer": {"learning_rate": 3.0e-3}},
    "sft": {**TRAIN, "steps": 4, "save_every": 2, "log_every": 2, "optimizer": {"learning_rate": 1.0e-3}},
    "sampling": {"max_new_tokens": 8, "batch_size": 64},
    "dpo": {**TRAIN, "epochs": 1, "save_every": 2, "log_every": 1, "optimizer": {"learning_rate": 1.0e-3}},
    "evaluation": {
        "judge": {"endpoint": "strong", "critic": "laif_basic", "order": "both"},
        "reference": "strong",
        "sampling": {"temperature": 0.7, "max_new_tokens": 8, "batch_size": 64},
        "bootstrap": 200,
    },
    "arms": [
        {"name": "SFT weak", "teacher": "weak", "share": 0.25},
        {"name": "SFT strong", "teacher": "strong", "share": 1.0},
        {"name": "LAIF weak", "teacher": "weak", "share": 0.25, "optimize": "dpo", "critic": "strong"},
    ],
    "questions": [{"laif": "LAIF weak", "sft": "SFT strong"}],
}


def tree(**changes: Any) -> dict[str, Any]:
    """The study's tree with some values changed; `a__b=1` is the key a.b."""
    made = copy.deepcopy(TREE)
    for key, value in changes.items():
        *path, last = key.split("__")
        node = made
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return made


def write(folder: Path, **changes: Any) -> Path:
    """`folder/tiny.yaml`, whose runs go to `folder/runs`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree(out=str(folder / "runs"), **changes), sort_keys=False))
    return path


def config(folder: Path, **changes: Any) -> StudyConfig:
    return load_config(str(write(folder, **changes)))


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs" / "tiny" / "results.json").read_text())


def numbers(found: Mapping[str, Any]) -> dict[str, Any]:
    """What of `results.json` is the study's outcome: no times, no dates."""
    labels = {
        arm: {k: v for k, v in counts.items() if k != "latency"} for arm, counts in found["labels"].items()
    }
    stages = [
        (row["stage"], row["arm"], row["seed"], row.get("key"), row["status"]) for row in found["stages"]
    ]
    kept = {key: found[key] for key in ("arms", "comparisons", "answer", "warnings", "judge")}
    return {**kept, "labels": labels, "stages": stages}
