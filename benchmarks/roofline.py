"""What the machine itself can do: a big matrix product, a big copy and a big read, through XLA.

python -m benchmarks.roofline [DTYPE]      one JSON object
"""

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def measure_machine(dtype: str = "float32", *, side: int = 0, copied: int = 0) -> dict[str, Any]:
    """The rates of one device, best of several.

    Args:
      dtype: of the matrices. side: of the square matrices; copied: bytes of the array that is read and written; 0:
        what suits the device.

    Returns:
      device; flops: floating-point operations per second of the product; bytes_per_second: read and written by the
      copy, or read by the product of a few rows with a big matrix, which is what decoding does: the higher of the two
      (a copy also moves, unseen, what it is about to overwrite).
    """
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    fast = device.platform != "cpu"
    side = side or (8192 if fast else 2048)
    count = (copied or (2**31 if fast else 2**28)) // 4
    a = jnp.ones((side, side), dtype)
    product = jax.jit(lambda x: x @ x)
    array = jnp.ones((count,), jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    flops = 2.0 * side**3 / _best(product, a)
    copied_rate = 2.0 * 4 * count / _best(copy, array)
    inner = 2048
    matrix, rows = array.reshape(inner, -1), jnp.ones((8, inner), jnp.float32)
    read_rate = 4.0 * count / _best(jax.jit(jnp.matmul), rows, matrix)
    return {
        "device": device.device_kind,
        "flops": flops,
        "bytes_per_second": max(copied_rate, read_rate),
    }


def _best(function: Any, *arguments: Any, repeats: int = 5) -> float:
    import jax

    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def machine_apart(dtype: str = "float32") -> dict[str, Any]:
    """`measure_machine` in a process of its own, which leaves no memory taken on the device."""
    command = [sys.executable, "-m", "benchmarks.roofline", dtype]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def best_rates(*measured: dict[str, Any]) -> dict[str, Any]:
    """The highest rates of several measurements: what else ran can only have made them lower."""
    rates = {name: max(one[name] for one in measured) for name in ("flops", "bytes_per_second")}
    return measured[0] | rates


def describe_machine() -> dict[str, Any]:
    """The machine and the versions, for people."""
    models = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "jax": metadata.version("jax"),
        "load": round(os.getloadavg()[0], 1),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    print(json.dumps(measure_machine(*sys.argv[1:2])))
