"""Runs PPO under SIGKILL: every attempt is a forked process that is killed at a random moment, until one ends.

    python -m tests.training.killed_ppo OUT KILLS SEED

writes OUT/calm/state.npz and metrics, of an undisturbed run, and OUT/killed/..., as `killed_run` does.
"""

import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.training import killed_run

ITERATIONS = 8


def attempt(out: Path, started: int) -> None:
    """One process's life; writes a byte to `started` when it has an iteration behind it and begins another."""
    import jax

    from laif_jax.records import Completion, Prompt
    from laif_jax.training.ppo_loop import run_ppo
    from tests.training import ppo_small

    reward, calls = ppo_small.count_of(7), []

    def watched(prompts: Sequence[Prompt], completions: Sequence[Completion]):
        calls.append(len(prompts))
        if len(calls) > 2:
            os.write(started, b"x")
        return reward(prompts, completions)

    options = ppo_small.spec(
        iterations=ITERATIONS,
        optimizer={"learning_rate": 3e-3, "schedule": "linear"},
        kl={"coef": 0.1, "target": 0.05, "horizon": 20},
        save_every=1,
        eval_every=3,
        value="shared",
    )
    made = ppo_small.models(options)
    task = ppo_small.task(rewards={"sevens": watched})
    result = run_ppo(options, made, task, str(out), seed=5, progress=False)
    leaves = jax.tree.leaves((result.state.trainable, result.state.opt_state))
    np.savez(out / "params.npz", *[np.asarray(x) for x in leaves], kl_coef=result.kl_coef)
    (out / "resumed_from").write_text(str(result.resumed_from))


def main(out: Path, kills: int, seed: int) -> None:
    import laif_jax.training.ppo_loop  # noqa: F401  imported before the forks, which then start fast

    for name, count in (("calm", 0), ("killed", kills)):
        (out / name).mkdir()
        killed_run.run(out / name, count, random.Random(seed), attempt)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
