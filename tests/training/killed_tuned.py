"""SFT or DPO of a small model, from the real data pipeline, under SIGKILL; as `killed_run` does it with a toy.

python -m tests.training.killed_tuned OUT KILLS SEED sft|dpo
"""

import functools
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np

from laif_jax.config.schema import DpoSpec, OptimizerSpec, SftSpec
from tests.training import killed_run

STEPS = 20
SHARED: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 8,
    "max_length": 32,
    "max_prompt_length": 8,
    "packing": True,
    "save_every": 1,
    "log_every": 3,
    "optimizer": OptimizerSpec(name="adamw", learning_rate=0.01, schedule="linear"),
}


def attempt(kind: str, out: Path, started: int) -> None:
    """One process's life; writes a byte to `started` after each step."""
    import jax

    from laif_jax.data.chat import Encoded, EncodedPair
    from laif_jax.data.pipeline import preference_batches, sft_batches
    from laif_jax.training.loop import train
    from laif_jax.training.tasks import preference_task, sft_task
    from tests.training import small

    def encoded(document: small.Document) -> Encoded:
        tokens, prompt = document.tokens.tolist(), int(document.prompt)
        return Encoded(tokens, [0] * prompt + [1] * (len(tokens) - prompt), prompt)

    examples = [encoded(document) for document in small.documents(200)]
    options = {name: SHARED[name] for name in ("steps", "batch_size", "max_length", "packing")} | {
        "pad_id": 0
    }
    if kind == "sft":
        spec, batches = SftSpec(**SHARED), sft_batches(examples, **options)
        task = sft_task(small.config(), spec, **small.F32)
    else:
        spec = DpoSpec(**SHARED, reference_free=True)
        pairs = [EncodedPair(*sides) for sides in zip(examples[::2], examples[1::2])]
        batches = preference_batches(pairs, **options)
        task = preference_task(small.config(), spec, **small.F32, max_segments=batches.layout.max_segments)

    def callback(step: int, _: Any) -> None:
        del step
        os.write(started, b"x")

    result = train(
        task,
        batches,
        small.fresh_state(task, small.mesh(), spec.optimizer),
        spec,
        out,
        mesh=small.mesh(),
        callback=callback,
        callback_every=1,
        progress=False,
    )
    flat = [np.asarray(x) for x in jax.tree.leaves((result.state.params, result.state.opt_state))]
    np.savez(out / "params.npz", *flat)
    (out / "resumed_from").write_text(str(result.resumed_from))


def main(out: Path, kills: int, seed: int, kind: str) -> None:
    import laif_jax.data.pipeline
    import laif_jax.training.loop  # noqa: F401  imported before the forks, which then start fast

    for name, count in (("calm", 0), ("killed", kills)):
        (out / name).mkdir()
        killed_run.run(out / name, count, random.Random(seed), functools.partial(attempt, kind))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
