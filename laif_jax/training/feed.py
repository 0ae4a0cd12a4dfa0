"""From the host's batches to arrays that a step takes: checks, padding of rows to the mesh, several processes."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from laif_jax.parallel import host_to_global, row_parts
from laif_jax.records.errors import LaifError

# Which rows of the data set a batch holds: for messages, not for devices.
HOST_ONLY = ("pair_index", "example_index")


class EmptyBatchError(LaifError, ValueError):
    """A batch without a single supervised token or weighted pair: it has no loss."""


@runtime_checkable
class Batches(Protocol):
    """What the loop reads: an iterator of host batches that can be stopped and continued."""

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...
    def __next__(self) -> dict[str, np.ndarray]: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


def check_batch(batch: Mapping[str, np.ndarray], step: int) -> None:
    """Refuses a batch of no weight, before it reaches a device. With several processes the step itself refuses it,
    since one process may have nothing where another has something.

    Raises:
      EmptyBatchError: naming the step.
    """
    name = "weight" if "weight" in batch else "loss_mask"
    if jax.process_count() == 1 and name in batch and not np.any(batch[name]):
        raise EmptyBatchError(empty_message(step, batch))


def empty_message(step: int, batch: Mapping[str, np.ndarray] | None) -> str:
    """What to tell a user whose batch has nothing to learn from."""
    shapes = f" (its arrays are { ({k: v.shape for k, v in batch.items()}) })" if batch else ""
    return (
        f"the batch of step {step} has no supervised token and no weighted pair{shapes}: there is nothing to "
        "learn from. Responses may be empty, or cut off by `max_length`; look at them with `laif inspect`"
    )


def example_indices(batch: Mapping[str, np.ndarray]) -> list[int]:
    """Rows of the data set that the batch holds, where it says so; padding (-1) left out."""
    for name in HOST_ONLY:
        if name in batch:
            return sorted({int(i) for i in np.asarray(batch[name]).ravel() if i >= 0})
    return []


def to_device(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Arrays [A, rows, ...] for a jitted step.

    With one process they stay NumPy arrays, which the jitted step moves itself (on a mesh of explicit axes they are
    placed here, so that their types say how), and rows are padded with zeros (no segment, no weight) to what the mesh
    splits. With several, each holds its slice (`row_shard`) and they become global
    arrays; the data pipeline has then padded them (`row_multiple`), since pair tables count rows globally.
    """
    arrays = {k: np.asarray(v) for k, v in batch.items() if k not in HOST_ONLY}
    if jax.process_count() == 1:
        parts = row_parts(mesh)
        arrays = {name: _pad_rows(array, parts) for name, array in arrays.items()}
    if jax.process_count() > 1 or AxisType.Explicit in mesh.axis_types:
        return host_to_global(arrays, mesh)
    return arrays


def _pad_rows(x: np.ndarray, parts: int) -> np.ndarray:
    short = -x.shape[1] % parts
    return x if short == 0 else np.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))
