"""What the machine itself can do: a big matrix product and a big copy, through XLA."""

import time
from typing import Any

import jax
import jax.numpy as jnp


def measure_machine(dtype: str = "float32", *, side: int = 0, copied: int = 0) -> dict[str, Any]:
    """The rates of one device, best of several.

    Args:
      dtype: of the matrices. side: of the square matrices; copied: bytes of the array that is read and written; 0:
        what suits the device.

    Returns:
      device; flops: floating-point operations per second of the product; bytes_per_second: read and written by the
      copy.
    """
    device = jax.devices()[0]
    fast = device.platform != "cpu"
    side = side or (8192 if fast else 2048)
    count = (copied or (2**31 if fast else 2**28)) // 4
    a = jnp.ones((side, side), dtype)
    product = jax.jit(lambda x: x @ x)
    array = jnp.ones((count,), jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    return {
        "device": device.device_kind,
        "flops": 2.0 * side**3 / _best(product, a),
        "bytes_per_second": 2.0 * 4 * count / _best(copy, array),
    }


def _best(function: Any, argument: Any, repeats: int = 5) -> float:
    jax.block_until_ready(function(argument))
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function(argument))
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
