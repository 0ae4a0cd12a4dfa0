"""The decoder under meshes with explicit axes: the compiler places what is inside, types say what goes in and out."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec, auto_axes, use_abstract_mesh

from laif_jax.parallel.rules import constrain


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gathered(logical_axes: tuple[str | None, ...], x: jax.Array) -> jax.Array:
    """A parameter brought together over its width, for one use; its gradient goes back in parts.

    Left alone, the compiler moves the activations around instead, which are larger than one layer's weights; and for a
    constraint that binds the gradient too, it would give every device the whole gradient (an all-reduce).
    """
    return constrain(x, *(None if axis == "embed" else axis for axis in logical_axes))


gathered.defvjp(
    lambda axes, x: (gathered(axes, x), None), lambda axes, _, cotangent: (constrain(cotangent, *axes),)
)


@jax.custom_vjp
def back_together(*trees: Any) -> tuple[Any, ...]:
    """The trees as they are; on the way back, no gradient goes on before all of them are there.

    Without it, the compiler puts off adding up the vocabulary head's gradient over the chips, and holds it, whole and
    in float32, while the layers' gradients are computed.
    """
    return trees


back_together.defvjp(
    lambda *trees: (trees, None), lambda _, cotangents: jax.lax.optimization_barrier(cotangents)
)
