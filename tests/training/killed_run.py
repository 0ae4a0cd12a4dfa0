"""Trains the toy under SIGKILL: every attempt is a forked process that is killed at a random moment, until one ends.

    python -m tests.training.killed_run OUT KILLS SEED

writes OUT/calm/params.npz, of an undisturbed run, and OUT/killed/params.npz.

The forks share the imports but not the JAX backend, which must not be initialised before a fork.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from laif_jax.config.schema import OptimizerSpec, TrainSpec

STEPS = 20


def attempt(out: Path, started: int) -> None:
    """One process's life; writes a byte to `started` when training goes."""
    import jax

    from laif_jax.training.loop import train
    from laif_jax.training.optim import make_optimizer
    from laif_jax.training.state import create_state
    from tests.training import toys

    spec = TrainSpec(
        steps=STEPS, save_every=1, log_every=3, optimizer=OptimizerSpec(learning_rate=0.01, schedule="linear")
    )
    # Some weight, so that saves take time and kills fall into them.
    params = toys.params() | {"c": {"kernel": np.ones((256, 256), np.float32)}}
    state = create_state(params, make_optimizer(spec.optimizer), mesh=toys.mesh())
    batches = toys.Batches(STEPS)

    def callback(step: int, _) -> None:
        del step
        os.write(started, b"x")

    result = train(
        toys.loss_fn,
        batches,
        state,
        spec,
        out,
        mesh=toys.mesh(),
        callback=callback,
        callback_every=1,
        progress=False,
    )
    flat = [np.asarray(x) for x in jax.tree.leaves((result.state.params, result.state.opt_state))]
    np.savez(out / "params.npz", *flat)
    (out / "resumed_from").write_text(str(result.resumed_from))


def main(out: Path, kills: int, seed: int) -> None:
    import laif_jax.training.loop  # noqa: F401  imported before the forks, which then start fast

    for name, count in (("calm", 0), ("killed", kills)):
        (out / name).mkdir()
        run(out / name, count, random.Random(seed))


def run(out: Path, kills: int, rng: random.Random, life: Callable[[Path, int], None] = attempt) -> None:
    """Attempts until one ends, the first `kills` of them killed."""
    while not (out / "params.npz").exists():
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                life(out, writer)
                code = 0
            finally:
                os._exit(code)
        os.close(writer)
        if kills > 0 and os.read(reader, 1):  # a first step is done; or it failed, and the pipe is closed
            kills -= 1
            time.sleep(rng.uniform(0.0, 0.4))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(reader)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
            raise SystemExit("an attempt failed by itself")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
