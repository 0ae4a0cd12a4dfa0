"""Several processes as one program: start-up, who writes, and small values that all must agree on."""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

from laif_jax.parallel import preemption
from laif_jax.parallel.pulse import Pulse
from laif_jax.records.errors import LaifError

log = logging.getLogger(__name__)

# Set by hand or by a launcher: all three, or none.
EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class DistributedError(LaifError, RuntimeError):
    """The processes of a run could not find each other, or one of them failed where all wait."""


def initialize(
    *, environ: Mapping[str, str] | None = None, timeout: int = 300, heartbeat: int = 40, shutdown: int = 60
) -> bool:
    """Joins this process to the others of the run, if the environment says that there are others.

    That is: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID are set; or a Cloud
    TPU pod, a Slurm step or an Open MPI job of more than one process is found. Call it before any other use of JAX.

    Args:
      environ: None: `os.environ`.
      timeout: seconds to wait for all processes to come. heartbeat: seconds after which a silent process counts as
        lost: the others say so and end with exit code 75 (`pulse`). shutdown: seconds that the processes wait for each
        other at the end.

    Returns:
      Whether there are several processes (also where this was called before).

    Raises:
      DistributedError: if the settings are incomplete or wrong, if JAX was used before, or if process 0 cannot be
        reached in time. If instead another process is missing, JAX ends this one, after an error in the log.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    environ = os.environ if environ is None else environ
    settings = _explicit_settings(environ)
    if settings is None and not _in_cluster(environ):
        return False
    where = settings or {"cluster": "found by JAX"}
    log.info("joining the other processes: %s", where)
    if settings and settings["process_id"] > 0:
        _wait_for_coordinator(settings["coordinator_address"], timeout)
    # JAX does not raise when the time is over: it ends the process, with a message about its own internals.
    warn = threading.Timer(0.8 * timeout, log.error, [_STILL_WAITING, 0.8 * timeout, where, timeout])
    warn.daemon = True
    warn.start()
    try:
        jax.distributed.initialize(
            **(settings or {}),
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=heartbeat + 10,  # ours comes first: it says who was lost
            shutdown_timeout_seconds=shutdown,
        )
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"this process could not join the others ({where}): {error}. Call `initialize` before any other use of "
            "JAX, and check the settings of every process"
        ) from error
    finally:
        warn.cancel()
    preemption.take_back_signal()
    if jax.process_count() > 1:
        _start_pulse(heartbeat)
    return jax.process_count() > 1


_pulse: Pulse | None = None


def _start_pulse(silence: float) -> None:
    global _pulse
    known = jax_distributed.global_state  # the client has no public name
    _pulse = Pulse(
        known.client, jax.process_index(), jax.process_count(), silence, known.coordinator_address or ""
    )
    _pulse.start()


def confirm_processes() -> None:
    """After an error, before it is handled: if its cause is that another process was lost, ends this one, saying so."""
    if _pulse is not None:
        _pulse.confirm()


_STILL_WAITING = (
    "after %g s not all processes of the run have come (%s); at %g s JAX ends this one. Check that every process was "
    "started, that all have the same coordinator address and number of processes, and that each has its own process id"
)


def _wait_for_coordinator(address: str, timeout: float) -> None:
    """Returns once process 0 listens at `address`; DistributedError if it does not within `timeout` seconds."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection(
                (host.strip("[]"), int(port)), timeout=max(1.0, deadline - time.monotonic())
            ):
                return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise DistributedError(
                    f"nobody answered at {address} within {timeout:g} s ({error}); check that process 0 was started "
                    f"there, that {EXPLICIT[0]} is its address as seen from this machine, and that the port is open"
                ) from error
            time.sleep(min(0.2, timeout / 10))


def _explicit_settings(environ: Mapping[str, str]) -> dict[str, Any] | None:
    given = [name for name in EXPLICIT if environ.get(name)]
    if not given:
        return None
    missing = [name for name in EXPLICIT if name not in given]
    if missing:
        raise DistributedError(
            f"{', '.join(given)} is set but {', '.join(missing)} is not; set all of {', '.join(EXPLICIT)}, or none"
        )
    address = environ[EXPLICIT[0]]
    if not address.rpartition(":")[2].isdigit() or not address.rpartition(":")[0]:
        raise DistributedError(f"{EXPLICIT[0]}={address} is not host:port; give the address of process 0")
    numbers = {}
    for name in EXPLICIT[1:]:
        try:
            numbers[name] = int(environ[name])
        except ValueError as error:
            raise DistributedError(f"{name}={environ[name]} is not an integer") from error
    count, index = numbers[EXPLICIT[1]], numbers[EXPLICIT[2]]
    if not 0 <= index < count:
        raise DistributedError(f"{EXPLICIT[2]}={index} must be from 0 to {EXPLICIT[1]} - 1 = {count - 1}")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _in_cluster(environ: Mapping[str, str]) -> bool:
    """Whether the environment is a multi-process job of a kind that JAX finds the addresses of by itself."""
    workers = environ.get("TPU_WORKER_HOSTNAMES", "")
    tasks = [environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    return (
        "," in workers
        or "MEGASCALE_COORDINATOR_ADDRESS" in environ
        or any(int(n) > 1 for n in tasks if n.isdigit())
    )


def process_index() -> int:
    """The number of this process, from 0."""
    return jax.process_index()


def process_count() -> int:
    """How many processes the run has."""
    return jax.process_count()


def is_main() -> bool:
    """Whether this process is the one that writes small files and talks to services."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here. All must give the same name: another one is a DistributedError."""
    if jax.process_count() == 1:
        return
    try:
        multihost_utils.sync_global_devices(name)
    except AssertionError as error:
        raise DistributedError(
            f"the processes wait at different places; this one at barrier `{name}`"
        ) from error


def broadcast_json(value: Any = None) -> Any:
    """Process 0's value, in every process. Every process must call it; what the others give does not matter.

    The value travels as JSON in every case, so that one process gives what many would (tuples come back as lists).

    Raises:
      TypeError: if the value is not JSON; in the other processes it is a DistributedError that says so.
    """
    return from_main(lambda: value)


def from_main(make: Callable[[], Any]) -> Any:
    """Calls `make` in process 0 alone, and returns its result (JSON) in every process.

    Raises:
      DistributedError: in the other processes, if `make` failed in process 0, with its message; process 0 raises what
        `make` raised. No process is left waiting.
    """
    failure: Exception | None = None
    message = b""
    if is_main():
        try:
            message = json.dumps({"value": make()}).encode()
        except Exception as error:  # noqa: BLE001 (raised below, once the others have heard of it)
            failure = error
            message = json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()
    answer = json.loads(_broadcast_bytes(message))
    if failure is not None:
        raise failure
    if "error" in answer:
        raise DistributedError(f"process 0 failed: {answer['error']}")
    return answer["value"]


def _broadcast_bytes(message: bytes) -> bytes:
    """Process 0's bytes in every process: first their number, which the others do not know, then they."""
    if jax.process_count() == 1:
        return message
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    buffer = np.frombuffer(message if is_main() else bytes(size), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).astype(np.uint8).tobytes()


def gather_to_host(tree: Any) -> Any:
    """NumPy arrays of global arrays, whole, in every process. Every process must call it."""

    def one(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(one, tree)
