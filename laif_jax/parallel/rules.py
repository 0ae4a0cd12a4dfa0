"""Where arrays live: one table from logical axes to mesh axes, and the shardings made from it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from laif_jax.parallel.mesh import ROW_AXES, row_parts
from laif_jax.records.errors import LaifError

Tree = TypeVar("Tree")
AnyMesh = Mesh | AbstractMesh  # shardings of parameters need no devices

# Logical axis -> mesh axes. The first dimension that names a mesh axis has it: in [batch, length, embed] `batch` takes
# fsdp and `embed` stays whole, in a kernel [embed, mlp] `embed` has it. So one set of names serves parameters and
# activations. `length` is the time axis of what is between blocks (the residual stream), not of what is inside them.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ROW_AXES,
    "length": ("tensor",),
    "embed": ("fsdp", "expert"),
    "expert": ("expert",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "layers": (),
    "lora": (),
}

# A parameter below this many elements (1 MB in float32) may stay whole where its dimension does not divide; a larger
# one must divide, and is never whole on every device.
SMALL = 2**18
# Where the rules split no dimension of a larger parameter (a norm's scales on a mesh of `tensor` alone), these axes
# split the one that they fit best. `data` never splits a parameter.
SPARE = ("fsdp", "expert", "tensor")


class ShardingError(LaifError, ValueError):
    """An array cannot be laid over the mesh as the rules say."""


class Spec(Protocol):
    """What `param_shardings` reads of a parameter's specification."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def logical_axes(self) -> tuple[str | None, ...]: ...


def partition_spec(
    logical_axes: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    *,
    strict: bool = False,
    name: str = "array",
) -> P:
    """The PartitionSpec of an array by `RULES`.

    Mesh axes of size 1 are left out, and so is one that an earlier dimension asked for. Where the devices of a
    dimension's mesh axes do not divide it, the longest leading part of them that does is kept.

    Args:
      logical_axes: one name of `RULES`, or None (never split), per dimension.
      strict: raise instead of keeping less than the rules say.
      name: of the array, for messages.

    Raises:
      ShardingError: for an unknown logical axis, a wrong number of them, or, if strict, what does not divide.
    """
    if len(logical_axes) != len(shape):
        raise ShardingError(
            f"{name} of shape {tuple(shape)} has {len(shape)} dimensions, but {len(logical_axes)} logical axes: "
            f"{tuple(logical_axes)}"
        )
    used: set[str] = set()
    entries: list[Any] = []
    for logical, size in zip(logical_axes, shape):
        if logical is not None and logical not in RULES:
            raise ShardingError(
                f"{name}: unknown logical axis `{logical}`; the rules have {', '.join(RULES)}"
            )
        wanted = RULES[logical] if logical is not None else ()
        axes = tuple(axis for axis in wanted if axis not in used and mesh.shape.get(axis, 1) > 1)
        kept = axes
        while kept and size % math.prod(mesh.shape[axis] for axis in kept):
            kept = kept[:-1]
        if strict and kept != axes:
            over = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
            raise ShardingError(
                f"{name} of shape {tuple(shape)}: its `{logical}` dimension of {size} does not divide over "
                f"mesh axes {over}; choose sizes whose product divides {size}, or 1"
            )
        used.update(wanted)
        entries.append(kept[0] if len(kept) == 1 else (kept or None))
    return P(*entries)


def sharding_for(
    logical_axes: Sequence[str | None], shape: Sequence[int], mesh: AnyMesh, *, name: str = "parameter"
) -> NamedSharding:
    """The sharding of one parameter. A mesh axis that does not divide its dimension is dropped for a small parameter
    (fewer than `SMALL` elements), and is a ShardingError for a large one, where it would cost memory unseen. A large
    one that the rules leave whole is split by the axes `SPARE`, where they divide any of its dimensions."""
    strict = math.prod(shape) >= SMALL
    spec = partition_spec(logical_axes, shape, mesh, strict=strict, name=name)
    return NamedSharding(mesh, spec) if any(spec) else spare_sharding(shape, mesh)


def spare_sharding(shape: Sequence[int], mesh: AnyMesh) -> NamedSharding:
    """The sharding of an array that no rule splits: of a small one, none; of a large one, one dimension by `SPARE`,
    into as many parts as can be, the largest dimension of those, the last among equals."""
    if math.prod(shape) < SMALL:
        return NamedSharding(mesh, P(*[None] * len(shape)))
    axes = tuple(axis for axis in SPARE if mesh.shape.get(axis, 1) > 1)
    best: tuple[int, int, int] = (1, 0, 0)
    kept: tuple[str, ...] = ()
    for place, size in enumerate(shape):
        fitting = axes
        while fitting and size % math.prod(mesh.shape[axis] for axis in fitting):
            fitting = fitting[:-1]
        parts = math.prod(mesh.shape[axis] for axis in fitting)
        if fitting and (parts, size, place) > best:
            best, kept = (parts, size, place), fitting
    entries: list[Any] = [None] * len(shape)
    if kept:
        entries[best[2]] = kept[0] if len(kept) == 1 else kept
    return NamedSharding(mesh, P(*entries))


def param_shardings(specs: Any, mesh: AnyMesh) -> Any:
    """The shardings of a tree of parameters.

    Args:
      specs: a tree (nested dicts) of specifications with `.shape` and `.logical_axes`.

    Returns:
      The same tree of NamedSharding.
    """

    def one(path: Any, spec: Spec) -> NamedSharding:
        name = "parameter " + jax.tree_util.keystr(path, simple=True, separator="/")
        return sharding_for(spec.logical_axes, spec.shape, mesh, name=name)

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=lambda leaf: hasattr(leaf, "logical_axes"))


def batch_sharding(mesh: Mesh, *, rows_axis: int = 0) -> NamedSharding:
    """Rows (dimension `rows_axis`) over `ROW_AXES`, the rest whole. `rows_axis=1`: after a micro-batch axis."""
    axes = tuple(axis for axis in ROW_AXES if mesh.shape.get(axis, 1) > 1)
    rows = axes[0] if len(axes) == 1 else (axes or None)
    return NamedSharding(mesh, P(*[None] * rows_axis, rows))


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh, *, rows_axis: int = 1) -> dict[str, NamedSharding]:
    """The shardings of a batch whose arrays are [A, rows, ...] (A micro-batches, by default).

    Args:
      batch: name -> array, or anything with a `shape`, of the *global* batch.

    Raises:
      ShardingError: if the rows of an array do not divide over the devices that split them.
    """
    sharding = batch_sharding(mesh, rows_axis=rows_axis)
    parts = row_parts(mesh)
    for name, array in batch.items():
        if len(array.shape) <= rows_axis or array.shape[rows_axis] % parts:
            over = " x ".join(
                f"{axis}={mesh.shape.get(axis, 1)}"
                for axis in ROW_AXES
                if axis != "expert" or mesh.shape.get(axis, 1) > 1
            )
            raise ShardingError(
                f"batch array `{name}` of shape {tuple(array.shape)}: its rows (dimension {rows_axis}) do not divide "
                f"over mesh {over}; make `micro_batch` a multiple of {parts}"
            )
    return dict.fromkeys(batch, sharding)


def constrain(x: jax.Array, *logical: str | None, mesh: Mesh | AbstractMesh | None = None) -> jax.Array:
    """Lays an activation over the mesh; the one line that models write in either mode.

    On an Auto mesh it is `with_sharding_constraint`, on an Explicit one `jax.reshard`. Without a mesh, and for axes
    that a `shard_map` has made manual, it does nothing. A dimension that does not divide stays whole.

    Args:
      x: any array, traced or not.
      logical: a name of `RULES` or None per dimension of `x`.
      mesh: None: the mesh of the context (`jax.set_mesh`), or else the one that `x` lives on.

    Raises:
      ShardingError: for a wrong number of logical axes, or an unknown one.
    """
    mesh = _mesh_of(x) if mesh is None else mesh
    if mesh.empty:
        return x
    types = dict(zip(mesh.axis_names, mesh.axis_types))
    spec = partition_spec(logical, x.shape, mesh)
    spec = P(*(_without_manual(entry, types) for entry in spec))
    if AxisType.Manual in types.values() and not any(spec):
        return x
    sharding = NamedSharding(mesh, spec)
    if AxisType.Explicit in types.values():
        return jax.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)


def _mesh_of(x: jax.Array) -> Any:
    """The mesh of the context, or else the one that `x` lives on; it may be empty."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.typeof(x).sharding.mesh if mesh.empty else mesh


def mesh_in_force(x: jax.Array) -> AbstractMesh | None:
    """The mesh that a `shard_map` over `x` can run on; None without one, and inside another `shard_map`."""
    mesh = _mesh_of(x)
    return None if mesh.empty or AxisType.Manual in mesh.axis_types else mesh


def _without_manual(entry: Any, types: Mapping[str, AxisType]) -> Any:
    axes = entry if isinstance(entry, tuple) else (entry,)
    kept = tuple(axis for axis in axes if axis is not None and types[axis] != AxisType.Manual)
    return kept[0] if len(kept) == 1 else (kept or None)


# ---- between hosts and the mesh --------------------------------------------------------------------------------


def host_to_global(batch: Tree, mesh: Mesh, specs: Any = None) -> Tree:
    """Global arrays from what each process loaded.

    Args:
      batch: tree of NumPy arrays: of a split dimension this process's part (`row_shard`), of the others all.
      specs: tree (or prefix) of NamedSharding or PartitionSpec; None: [A, rows, ...] with the rows split.

    Returns:
      The same tree of jax.Array on the mesh; a split dimension is the parts of all processes, in order.

    Raises:
      ShardingError: if this process's part does not divide over its devices.
    """
    specs = batch_sharding(mesh, rows_axis=1) if specs is None else specs
    is_spec = lambda leaf: isinstance(leaf, P | NamedSharding)  # noqa: E731
    flat_specs = jax.tree.broadcast(specs, batch, is_leaf=is_spec)

    def one(path: Any, local: Any, spec: Any) -> jax.Array:
        sharding = spec if isinstance(spec, NamedSharding) else NamedSharding(mesh, spec)
        local = np.asarray(local)
        try:
            return jax.make_array_from_process_local_data(sharding, local)
        except (ValueError, IndexError) as error:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ShardingError(
                f"batch array `{name}`: the local part of shape {local.shape} does not fit {sharding.spec} on mesh "
                f"{dict(mesh.shape)} with {jax.process_count()} processes ({error}); make `micro_batch` a multiple of "
                f"{row_parts(mesh)}"
            ) from error

    return jax.tree_util.tree_map_with_path(one, batch, flat_specs)


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """The tree on every device of the mesh. All processes must give the same values."""
    whole = NamedSharding(mesh, P())

    def one(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array):
            return jax.device_put(leaf, whole)
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, whole, lambda index: value[index])

    return jax.tree.map(one, tree)
