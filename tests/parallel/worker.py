"""One of the processes of `test_processes.py`; prints what it saw as one line of JSON.

python -m tests.parallel.worker OUT    with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID set
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from laif_jax import parallel
from laif_jax.config.schema import MeshSpec, SamplingSpec
from laif_jax.data.chat import Encoded, EncodedPair
from laif_jax.data.pipeline import preference_batches
from laif_jax.models.decoder import init_params
from laif_jax.models.specs import param_specs
from laif_jax.models.weights import Checkpoint, load_params, save_params
from laif_jax.rollout.generate import generate
from laif_jax.rollout.score import score
from laif_jax.training.tasks import preference_task
from tests.parallel import stages
from tests.training import small

ROWS, WIDTH = 4, 3  # of this process, per micro-batch


def sums(axis_type: str) -> dict[str, Any]:
    mesh = parallel.make_mesh(MeshSpec(data=2, fsdp=2, tensor=2, axis_type=axis_type))  # type: ignore[arg-type]
    index, count = parallel.row_shard(mesh)
    local = np.arange(2 * ROWS * WIDTH, dtype=np.float32).reshape(2, ROWS, WIDTH) + 1000 * index
    batch = parallel.host_to_global({"x": local}, mesh)
    scale = parallel.replicate(np.float32(2), mesh)

    @jax.jit
    def total(x: jax.Array, scale: jax.Array) -> jax.Array:
        x = parallel.constrain(x, "layers", "batch", None)
        return jnp.sum(x * scale)

    with jax.set_mesh(mesh):
        value = float(total(batch["x"], scale))
        whole = parallel.gather_to_host(batch["x"])
        said = parallel.broadcast_json({"from": parallel.process_index()})
    return {"row_shard": [index, count], "sum": value, "rows": whole[0, :, 0].tolist(), "said": said}


def mesh_of(count: int) -> jax.sharding.Mesh:
    """All devices of several processes; one device of one, which compiles faster."""
    return small.mesh(data=2, fsdp=2, tensor=2) if count > 1 else small.mesh()


def preference_metrics(index: int, count: int) -> dict[str, float]:
    """Of one DPO update over packed pairs, of whose rows this process makes part `index` of `count`."""

    def encoded(document: small.Document) -> Encoded:
        tokens, prompt = document.tokens.tolist(), document.prompt
        return Encoded(tokens, [0] * prompt + [1] * (len(tokens) - prompt), prompt)

    documents = [encoded(document) for document in small.documents(24)]
    batches = preference_batches(
        [EncodedPair(*sides) for sides in zip(documents[::2], documents[1::2])],
        batch_size=16,
        micro_batch=8,
        max_length=32,
        pad_id=0,
        packing=True,
        steps=1,
        row_multiple=4,
        process_index=index,
        process_count=count,
    )
    task = preference_task(small.config(), small.DPO, **small.F32, max_segments=batches.layout.max_segments)
    _, metrics = small.update(task, next(batches), mesh_of(count))
    return {name: float(value) for name, value in metrics.items()}


def completions(count: int) -> list[Any]:
    """Samples of `count` processes, as [tokens, log-probs of the sampler, of a full forward pass] each."""
    mesh, cfg = mesh_of(count), small.config()
    params = init_params(cfg, jax.random.key(0), shardings=parallel.param_shardings(param_specs(cfg), mesh))
    prompts, spec = [[3, 4, 5], [6, 7], [8], [9, 10, 11]], SamplingSpec(max_new_tokens=5, batch_size=3)
    samples = generate(params, cfg, prompts, spec, jax.random.key(1), mesh=mesh)
    scores = score(params, cfg, prompts, [sample.tokens for sample in samples], mesh=mesh)
    return [[s.tokens, s.logps, scored.tolist()] for s, scored in zip(samples, scores)]


def weights(folder: Path) -> dict[str, Any]:
    """A mixture is exported by all processes together, and read in again: what each read of it, and whether every
    device has the bits that it had."""
    cfg, mesh = stages.mixtral(), small.mesh(fsdp=2, expert=2, tensor=2)
    params = stages.born(cfg, mesh)
    save_params(folder, params, cfg)
    parallel.barrier("exported")
    read = []
    forget = Checkpoint.forget
    Checkpoint.forget = lambda self: (read.append(self.bytes_read), forget(self))[1]  # type: ignore[method-assign]
    again = load_params(folder, cfg, shardings=parallel.param_shardings(param_specs(cfg), mesh))
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True)
    same = [
        np.array_equal(ours.data, theirs.data)
        for old, new in pairs
        for ours, theirs in zip(old.addressable_shards, new.addressable_shards, strict=True)
    ]
    return {"read": read[-1] / sum(leaf.nbytes for leaf in jax.tree.leaves(params)), "same": all(same)}


def raised(call: Any) -> str:
    try:
        call()
    except (parallel.DistributedError, OSError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def disk_full() -> None:
    raise OSError("disk full")


def main() -> None:
    jax.config.update(
        "jax_disable_most_optimizations", True
    )  # many small programs: they compile in half the time
    several = parallel.initialize(timeout=60)
    seen: dict[str, Any] = {
        "several": several,
        "again": parallel.initialize(),
        "process": [parallel.process_index(), parallel.process_count(), parallel.is_main()],
        "devices": [jax.local_device_count(), jax.device_count()],
        "auto": sums("auto"),
        "explicit": sums("explicit"),
        "preference": preference_metrics(parallel.process_index(), parallel.process_count()),
        "completions": completions(parallel.process_count()),
        "stages": {
            "mixtral_sft": stages.mixtral_sft(small.mesh(fsdp=2, expert=2, tensor=2)),
            "reward": stages.reward(small.mesh(data=2, fsdp=2, tensor=2)),
            "ppo": stages.ppo(small.mesh(fsdp=4, tensor=2), Path(sys.argv[1])),
        },
        "weights": weights(Path(sys.argv[1]) / "exported"),
        "long": len(parallel.broadcast_json("x" * 100_000)),
        "failed": raised(lambda: parallel.from_main(disk_full)),
        "not_json": raised(lambda: parallel.broadcast_json({1, 2})),
        "after": parallel.broadcast_json([None, 1.5, "ü"]),
    }
    parallel.barrier("end")
    seen["apart"] = raised(lambda: parallel.barrier(f"place {parallel.process_index()}"))
    sys.stdout.write("RESULT " + json.dumps(seen) + "\n")


if __name__ == "__main__":
    main()
