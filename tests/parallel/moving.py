"""SFT of a small model, on whatever processes there are; `test_moving.py` moves it about and kills it.

    python -m tests.parallel.moving OUT MESH [--stop STEP] [--die STEP PROCESS]

MESH is data,fsdp,tensor. `--stop` sends this process SIGTERM after that step, `--die` kills PROCESS then.
"""

import argparse
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from laif_jax import parallel
from laif_jax.config.schema import OptimizerSpec, SftSpec
from laif_jax.data.chat import Encoded
from laif_jax.data.pipeline import sft_batches
from laif_jax.parallel import preemption
from laif_jax.training.loop import TrainResult, train
from laif_jax.training.tasks import sft_task
from tests.training import small

STEPS = 16
OPTIMIZER = OptimizerSpec(name="adamw", learning_rate=0.01, schedule="linear")
SPEC = SftSpec(
    steps=STEPS,
    save_every=2,
    log_every=1,
    batch_size=8,
    optimizer=OPTIMIZER,
    max_length=16,
    max_prompt_length=8,
)


def encoded(document: small.Document) -> Encoded:
    tokens, prompt = document.tokens.tolist(), int(document.prompt)
    return Encoded(tokens, [0] * prompt + [1] * (len(tokens) - prompt), prompt)


def run(out: Path, sizes: str, stop: int | None = None, die: tuple[int, int] | None = None) -> TrainResult:
    """To the end, or to a `Preempted` where `stop` says so."""
    mesh = small.mesh(*map(int, sizes.split(",")))
    index, count = parallel.row_shard(mesh)
    batches = sft_batches(
        [encoded(document) for document in small.documents(40)],
        batch_size=SPEC.batch_size,
        max_length=SPEC.max_length,
        pad_id=0,
        steps=STEPS,
        row_multiple=8,
        process_index=index,
        process_count=count,
    )
    task = sft_task(small.config(), SPEC, **small.F32)

    def callback(step: int, state: Any) -> None:
        if stop is not None and parallel.process_count() > 1:
            time.sleep(0.4)  # a notice takes a second or two to reach all processes
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        if (step, parallel.process_index()) == die:
            os.kill(os.getpid(), signal.SIGKILL)

    return train(
        task,
        batches,
        small.fresh_state(task, mesh, OPTIMIZER),
        SPEC,
        out,
        mesh=mesh,
        callback=callback,
        callback_every=1,
        progress=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("mesh")
    parser.add_argument("--stop", type=int)
    parser.add_argument("--die", type=int, nargs=2, default=())
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, force=True)
    try:
        with preemption.listening():
            parallel.initialize(timeout=60, heartbeat=10)
            run(Path(options.out), options.mesh, options.stop, tuple(options.die))
    except preemption.Preempted as notice:
        sys.stderr.write(f"{notice}\n")
        raise


if __name__ == "__main__":
    main()
