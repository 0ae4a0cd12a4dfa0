"""One of the processes of `test_processes.py`; prints what it saw as one line of JSON.

python -m tests.parallel.worker        with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID set
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from laif_jax import parallel
from laif_jax.config.schema import MeshSpec

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


def raised(call: Any) -> str:
    try:
        call()
    except (parallel.DistributedError, OSError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def disk_full() -> None:
    raise OSError("disk full")


def main() -> None:
    several = parallel.initialize(timeout=60)
    seen: dict[str, Any] = {
        "several": several,
        "again": parallel.initialize(),
        "process": [parallel.process_index(), parallel.process_count(), parallel.is_main()],
        "devices": [jax.local_device_count(), jax.device_count()],
        "auto": sums("auto"),
        "explicit": sums("explicit"),
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
