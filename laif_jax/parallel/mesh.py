"""The device mesh: four named axes over all devices of all processes.

`data` replicates parameters and splits rows; `fsdp` splits rows and parameters (ZeRO-3); `expert` splits rows, and the
experts of a mixture (other parameters as `fsdp` does); `tensor` splits heads, MLP columns, the vocabulary, and the
length of what is between blocks. Where devices come in slices joined by a slower network, `data` is the axis across
slices.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from laif_jax.config.schema import MeshSpec
from laif_jax.records.errors import LaifError

AXES = ("data", "fsdp", "expert", "tensor")  # the last one's devices are the nearest neighbours
ROW_AXES = ("data", "fsdp", "expert")  # the axes that split the rows of a batch

Sizes = tuple[int, int, int, int]


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


def set_libtpu_args(spec: MeshSpec) -> None:
    """Gives the TPU compiler the arguments of the configuration, beside those of the environment. Before JAX is used.

    They go into LIBTPU_INIT_ARGS, which nothing but libtpu reads, once, when it is loaded.
    """
    given = os.environ.get("LIBTPU_INIT_ARGS", "").split()
    shown = lambda value: str(value).lower() if isinstance(value, bool) else str(value)  # noqa: E731
    wanted = [f"--{name}={shown(value)}" for name, value in spec.libtpu_args.items()]
    added = [arg for arg in wanted if arg not in given]
    if added:
        os.environ["LIBTPU_INIT_ARGS"] = " ".join([*given, *added])


def resolve_sizes(spec: MeshSpec, device_count: int) -> Sizes:
    """The sizes of `AXES` with the -1 filled in. Raises MeshError where that cannot be done."""
    asked: Sizes = (spec.data, spec.fsdp, spec.expert, spec.tensor)
    shown = _shown(asked)
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
        data, fsdp, expert, tensor = (device_count // fixed if size == -1 else size for size in asked)
        return data, fsdp, expert, tensor
    if fixed != device_count:
        raise MeshError(
            f"mesh {shown} needs {fixed} device{'s' * (fixed != 1)}, {here}; set one axis to -1 to take what is left, "
            "or change the number of devices"
        )
    return asked


def _shown(sizes: Sequence[int]) -> str:
    """Sizes of the axes for a message; an expert axis of 1 goes without saying."""
    pairs = [(name, size) for name, size in zip(AXES, sizes) if name != "expert" or size != 1]
    return " x ".join(f"{name}={size}" for name, size in pairs)


def device_grid(sizes: Sizes, devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array [data, fsdp, expert, tensor], neighbours in the network next to each other.

    Devices that report a `slice_index` of more than one value are in several slices; `data` then runs across them.

    Raises:
      MeshError: if `data` is not a multiple of the number of slices.
    """
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) == 1:
        # A mesh axis may take a part of an axis of the network: 4 neighbours of the 16 in a row, say.
        return mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)
    data, *inner = sizes
    if data % len(slices):
        raise MeshError(
            f"mesh {_shown(sizes)} over {len(slices)} slices: `mesh.data` runs across slices, so make it a multiple "
            f"of {len(slices)}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // len(slices), *inner),
        (len(slices), *[1] * len(inner)),
        devices=devices,
        allow_split_physical_axes=True,
    )


def row_parts(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the mesh splits the rows of a batch."""
    return math.prod(mesh.shape.get(axis, 1) for axis in ROW_AXES)


def row_shard(mesh: Mesh) -> tuple[int, int]:
    """Which part of the rows of a batch this process holds, as (index, count), for the data pipeline.

    Processes that hold the same rows (a `tensor` axis across processes) get the same index and must load the same.

    Raises:
      MeshError: if two processes hold some, but not all, of the same rows.
    """
    count, tensor = row_parts(mesh), mesh.shape.get("tensor", 1)
    rows = np.arange(count).repeat(tensor)  # the row block of each device
    held: dict[int, set[int]] = {}
    for block, device in zip(rows.tolist(), mesh.devices.flat):
        held.setdefault(device.process_index, set()).add(block)
    groups = sorted({frozenset(blocks) for blocks in held.values()}, key=min)
    if sum(len(group) for group in groups) != count or len({len(group) for group in groups}) > 1:
        raise MeshError(
            f"mesh {_shown([mesh.shape.get(axis, 1) for axis in AXES])} splits the rows unevenly over {len(held)} "
            "processes; make `mesh.tensor` divide the devices of a process, or a multiple of them"
        )
    mine = held.get(jax.process_index())
    if mine is None:
        raise MeshError(
            f"process {jax.process_index()} has no device in the mesh; use all devices of all processes"
        )
    return groups.index(frozenset(mine)), len(groups)
