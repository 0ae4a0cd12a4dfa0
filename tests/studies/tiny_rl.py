"""A tiny study with every way to learn from a critic's preferences, run once per test session."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from laif_jax.config.load import SECTIONS
from tests.studies import tiny

FROM: dict[str, Any] = {"teacher": "weak", "share": 0.25, "critic": "strong"}
ARMS = [
    {"name": "SFT", "teacher": "weak", "share": 0.25},
    {"name": "DPO", "optimize": "dpo", **FROM},
    {"name": "rounds", "optimize": "iterated_dpo", **FROM},
    {"name": "PPO", "optimize": "ppo", **FROM},
    {"name": "PPO rounds", "optimize": "iterated_ppo", **FROM},
    {"name": "best", "optimize": "best_of_n", **FROM},
    {"name": "own best", "optimize": "rejection_sampling", **FROM},
]
PPO: dict[str, Any] = {
    "iterations": 2,
    "batch_size": 8,
    "epochs": 1,
    "sampling": {"max_new_tokens": 8},
    "max_prompt_length": 24,
    "eval_every": 1,
    "eval_prompts": 8,
    "optimizer": {"learning_rate": 1.0e-3},
}
CHANGES: dict[str, Any] = {
    "mesh": {},
    # One shape for all that is sampled, compiled once.
    "sampling": {"max_new_tokens": 8, "batch_size": 16},
    "evaluation__sampling__batch_size": 16,
    "arms": ARMS,
    "questions": [{"laif": "rounds", "sft": "DPO"}],
    "reward": {
        **tiny.TRAIN,
        "steps": 4,
        "eval_every": 2,
        "held_out": 0.2,
        "log_every": 1,
        "learning_rates": [1e-3, 3e-3],
    },
    "ppo": {**PPO, "sweep": {"kl_coefs": [0.0, 0.05], "learning_rates": [1e-3]}},
    "best_of_n": {"n": 4},
    "rejection_sampling": {"n": 3, "top": 0.5, "train": {**tiny.TRAIN, "steps": 2}},
    "iterate": {"rounds": 2},
}


def run(
    folder: Path, *overrides: str, arms: list[str] | None = None, here: bool = False, **changes: Any
) -> int:
    """`laif run` of the study, or of some of its arms alone, with what they read; returns its exit status.

    In a process of its own with one device, unless `here`: compiling for the eight of this one takes several times as
    long, and sharded stages have tests of their own.
    """
    made = {**CHANGES, **changes}
    if arms is not None:
        made |= _only(arms)
    if here:
        return tiny.run(folder, *overrides, **made)
    environment = {**os.environ, "XLA_FLAGS": "", "LAIF_CACHE": str(tiny.cache())}
    command = [sys.executable, "-m", "laif_jax.cli", "run", str(tiny.write(folder, **made)), *overrides]
    return subprocess.run(command, env=environment, check=False).returncode


def _only(names: list[str]) -> dict[str, Any]:
    """Some arms, without the sections that no other arm reads."""
    arms = [arm for arm in ARMS if arm["name"] in names]
    used = {section for arm in arms for section in SECTIONS[arm.get("optimize", "none")]}
    return {"arms": arms} | without_sections(*used)


def without_sections(*kept: str) -> dict[str, Any]:
    """What takes away the questions, and all sections that only some arms read but `kept`."""
    every = {section for sections in SECTIONS.values() for section in sections}
    return {"questions": [], **dict.fromkeys(every - set(kept), ...)}


@functools.cache
def finished() -> Path:
    """The folder of the study as it is, run to its end. Not to be written to."""
    folder = tiny._home() / "rl"
    assert run(folder) == 0
    return folder
