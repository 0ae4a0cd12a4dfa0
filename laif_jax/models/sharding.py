"""The decoder under meshes with explicit axes: the compiler places what is inside, types say what goes in and out."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec, auto_axes, use_abstract_mesh


def _explicit_mesh(args: Any) -> Any | None:
    """The mesh with explicit axes that some array of `args` lives on, or None."""
    for leaf in jax.tree.leaves(args):
        mesh = getattr(jax.typeof(leaf).sharding, "mesh", None)
        if mesh is not None and AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def spec_of(x: Any) -> PartitionSpec:
    """How an array's type says that it is sharded; on a mesh without explicit axes: not at all."""
    sharding = jax.typeof(x).sharding
    return PartitionSpec(*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))


def compiler_partitioned(run: Callable[..., Any], args: tuple[Any, ...], out: Callable[[], Any]) -> Any:
    """`run(*args)`, with explicit mesh axes handed to the compiler inside.

    A decoder's inner shardings follow from its weights and its rows, and the compiler derives them; typing each
    product would repeat the sharding rules in the model. So under `AxisType.Explicit` the whole function is one region
    of automatic partitioning with a typed border. Without explicit axes this is a plain call.

    Args:
      out: gives the PartitionSpecs of the results, a prefix of their tree.
    """
    mesh = _explicit_mesh(args)
    if mesh is None:
        return run(*args)
    axes = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit)
    with use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh)):
        return auto_axes(run, axes=axes, out_sharding=out())(*args)
