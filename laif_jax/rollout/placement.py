"""Where generation runs: rows over the mesh of the parameters, and results back on every host."""

import contextlib
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from laif_jax.parallel.mesh import row_parts
from laif_jax.parallel.rules import batch_sharding


def place(params: Any, mesh: Mesh | None = None) -> tuple[Any, Mesh | None]:
    """The parameters and the mesh to generate on; (params, None) on a single device.

    A decode loop holds many small arrays whose shardings follow from the rows', so the compiler derives them: on a mesh
    with explicit axes, parameters are taken to the same mesh with automatic ones (same devices, same layout, no copy
    of the data).

    Args:
      mesh: None: the mesh that the parameters are on.
    """
    mesh = _mesh_of(params) if mesh is None else mesh
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return params, mesh
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))

    def move(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        return (
            jax.device_put(leaf, NamedSharding(auto, sharding.spec))
            if isinstance(sharding, NamedSharding)
            else leaf
        )

    return jax.tree.map(move, params), auto


def _mesh_of(params: Any) -> Mesh | None:
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def using(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Makes `mesh` the one that is in force, whatever the caller had set; None: leaves it as it is."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the mesh's `ROW_AXES`; what a row holds is whole."""
    return batch_sharding(mesh)


def row_shards(mesh: Mesh | None) -> int:
    """Over how many devices the rows are spread; a batch is a multiple of it."""
    return 1 if mesh is None else row_parts(mesh)


def spread(tree: Any, mesh: Mesh | None) -> Any:
    """NumPy arrays [rows, ...], the same on every host, as a function jitted with `row_sharding` takes them: as they
    are in one process; as global arrays in several, where `jax.jit` refuses NumPy."""
    if mesh is None or jax.process_count() == 1:
        return tree
    sharding = row_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i]), tree)


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array as NumPy, on every host."""
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
