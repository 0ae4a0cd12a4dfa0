"""The device mesh: three named axes over all devices of all processes.

`data` replicates parameters and splits rows; `fsdp` splits rows and parameters (ZeRO-3); `tensor` splits heads, MLP
columns and the vocabulary. Where devices come in slices joined by a slower network, `data` is the axis across slices.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from laif_jax.config.schema import MeshSpec
from laif_jax.records.errors import LaifError

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")  # the axes that split the rows of a batch


class MeshError(LaifError, ValueError):
    """The mesh that the configuration asks for cannot be laid over the devices."""


def make_mesh(spec: MeshSpec, devices: Sequence[Any] | None = None) -> Mesh:
    """Lays the mesh of `spec` over the devices.

    Args:
      spec: devices per axis, one of which may be -1 (what is left), and the axis type.
      devices: the devices to use; None: all, of all processes.

    Returns:
      A mesh with the axes `AXES`, all of one axis type: "auto" (the compiler propagates shardings) or "explicit"
      (shardings are part of array types). Enter it with `jax.set_mesh(mesh)`.

    Raises:
      MeshError: if the axes do not multiply to the number of devices; the message has the numbers.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = resolve_sizes(spec, len(devices))
    axis_type = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[spec.axis_type]
    return Mesh(device_grid(sizes, devices), AXES, axis_types=(axis_type,) * len(AXES))


def resolve_sizes(spec: MeshSpec, device_count: int) -> tuple[int, int, int]:
    """(data, fsdp, tensor) with the -1 filled in. Raises MeshError where that cannot be done."""
    asked = (spec.data, spec.fsdp, spec.tensor)
    shown = " x ".join(f"{name}={size}" for name, size in zip(AXES, asked))
    here = f"{device_count} {'is' if device_count == 1 else 'are'} here"
    bad = [name for name, size in zip(AXES, asked) if size != -1 and size < 1]
    if bad:
        raise MeshError(
            f"mesh {shown}: `mesh.{bad[0]}` must be at least 1, or -1 to take the devices that are left"
        )
    if asked.count(-1) > 1:
        raise MeshError(f"mesh {shown}: only one axis can be -1; give the others their size")
    fixed = math.prod(size for size in asked if size != -1)
    if -1 in asked:
        if device_count % fixed:
            raise MeshError(
                f"mesh {shown} needs a multiple of {fixed} devices, {here}; change `mesh`, or the number of devices"
            )
        data, fsdp, tensor = (device_count // fixed if size == -1 else size for size in asked)
        return data, fsdp, tensor
    if fixed != device_count:
        raise MeshError(
            f"mesh {shown} needs {fixed} device{'s' * (fixed != 1)}, {here}; set one axis to -1 to take what is left, "
            "or change the number of devices"
        )
    return asked


def device_grid(sizes: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array [data, fsdp, tensor], neighbours in the network next to each other.

    Devices that report a `slice_index` of more than one value are in several slices; `data` then runs across them.

    Raises:
      MeshError: if `data` is not a multiple of the number of slices.
    """
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(sizes, devices=devices)
    data, fsdp, tensor = sizes
    if data % len(slices):
        raise MeshError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} over {len(slices)} slices: `mesh.data` runs across "
            f"slices, so make it a multiple of {len(slices)}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // len(slices), fsdp, tensor), (len(slices), 1, 1), devices=devices
    )


def row_shard(mesh: Mesh) -> tuple[int, int]:
    """Which part of the rows of a batch this process holds, as (index, count), for the data pipeline.

    Processes that hold the same rows (a `tensor` axis across processes) get the same index and must load the same.

    Raises:
      MeshError: if two processes hold some, but not all, of the same rows.
    """
    data, fsdp, tensor = (mesh.shape[axis] for axis in AXES)
    rows = np.arange(data * fsdp).repeat(tensor)  # the row block of each device
    held: dict[int, set[int]] = {}
    for block, device in zip(rows.tolist(), mesh.devices.flat):
        held.setdefault(device.process_index, set()).add(block)
    groups = sorted({frozenset(blocks) for blocks in held.values()}, key=min)
    if sum(len(group) for group in groups) != data * fsdp or len({len(group) for group in groups}) > 1:
        raise MeshError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} splits the rows unevenly over {len(held)} processes; "
            "make `mesh.tensor` divide the devices of a process, or a multiple of them"
        )
    mine = held.get(jax.process_index())
    if mine is None:
        raise MeshError(
            f"process {jax.process_index()} has no device in the mesh; use all devices of all processes"
        )
    return groups.index(frozenset(mine)), len(groups)
