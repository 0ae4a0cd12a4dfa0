"""A whole study in seconds: a model of a few thousand weights in the synthetic world, simulated endpoints."""

import atexit
import contextlib
import copy
import functools
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from laif_jax.cli.main import main
from laif_jax.config import StudyConfig, load_config
from laif_jax.records import read_jsonl

_CACHE_BEFORE = os.environ.get("LAIF_CACHE")
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
    "mesh": {"data": 2, "fsdp": 2, "tensor": 2},  # the simulated devices of `tests/conftest.py`
    "data": {
        "train": {"kind": "symbols", "limit": 40},
        "eval": {"kind": "symbols", "limit": 16, "split": "eval"},
        "symbols": {"symbols": 5, "min_length": 2, "max_length": 4, "max_steps": 1},
    },
    "labeling": {"poll": 0.05, "max_wait": 0.0},
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
    """`folder/tiny.yaml`, whose runs go to `folder/runs`. A change to `...` removes the key."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    made = {key: value for key, value in tree(**changes).items() if value is not ...}
    path.write_text(yaml.safe_dump({**made, "out": str(folder / "runs")}, sort_keys=False))
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


# ---- running it ------------------------------------------------------------------------------------------------


def run(folder: Path, *overrides: str, **changes: Any) -> int:
    """`laif run` in this process, with a compilation cache that all tests share; returns its exit status."""
    os.environ["LAIF_CACHE"] = str(cache())
    try:
        return main(["run", str(write(folder, **changes)), *overrides])
    finally:
        if _CACHE_BEFORE is None:
            del os.environ["LAIF_CACHE"]
        else:
            os.environ["LAIF_CACHE"] = _CACHE_BEFORE


@functools.cache
def _home() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="laif-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def cache() -> Path:
    """Of compiled programs."""
    return _home() / "cache"


@functools.cache
def finished() -> Path:
    """The folder of the study as it is, run to its end once per test session. Not to be written to."""
    folder = _home() / "finished"
    assert run(folder) == 0
    return folder


def copy_of_finished(folder: Path, *, without: Sequence[str] = ()) -> Path:
    """A finished study at `folder` to go on with, as if its stages of some kinds had never been run."""
    shutil.copytree(finished() / "runs", folder / "runs", dirs_exist_ok=True)
    for kind in without:
        for stage in (folder / "runs" / "tiny").glob(f"{kind}-*"):
            shutil.rmtree(stage)
    return folder / "runs" / "tiny"


def manifests(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifests of a study's stages by folder name."""
    paths = (folder / "runs" / "tiny").glob("*/manifest.json")
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def calls(folder: Path) -> int:
    """How many calls the study's labelling store has seen answered or failed."""
    with contextlib.closing(sqlite3.connect(folder / "runs" / "tiny" / "labels" / "labels.sqlite")) as store:
        return sum(
            store.execute(f"select count(*) from {t}").fetchone()[0] for t in ("responses", "failures")
        )


def rows(file: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(file))


def teacher_of(completions: Path) -> str:
    """Whose answers to training prompts a file of a stage `teach` holds."""
    return rows(completions)[0]["generator"]
