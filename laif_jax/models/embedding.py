"""The table of token embeddings, looked up where its rows and columns lie.

On a mesh no device gets more of the table than it holds: devices that hold other columns (`fsdp`, `expert`) exchange
their few token ids, look up their own columns for all of these tokens, and hand each other the columns of their own
tokens (an all-to-all). Those that hold other rows of the vocabulary (`tensor`) look up zeros for tokens that are not
theirs, and add up while each keeps its part of the length.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from laif_jax.parallel.mesh import row_parts
from laif_jax.parallel.rules import mesh_in_force, partition_spec

Array = jax.Array


def look_up(table: Array, tokens: Array, dtype: Any) -> Array:
    """`table[tokens]` in `dtype`: [V, D] at int32 [R, T] gives [R, T, D]."""
    mesh = mesh_in_force(tokens)
    if mesh is None or mesh.size == 1 or tokens.shape[0] % row_parts(mesh):
        return table[tokens].astype(dtype)
    laid = partition_spec(("vocab", "embed"), table.shape, mesh)
    rows, length, _ = partition_spec(("batch", "length", "embed"), (*tokens.shape, table.shape[1]), mesh)
    axes = () if laid[1] is None else laid[1] if isinstance(laid[1], tuple) else (laid[1],)
    by_length = laid[0] == "tensor" and length == "tensor"

    def run(table: Array, tokens: Array) -> Array:
        if axes:
            tokens = jax.lax.all_gather(tokens, axes, axis=0, tiled=True)
        x = _of_part(table, tokens, "tensor" if laid[0] == "tensor" else None).astype(dtype)
        if by_length:
            x = jax.lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True)
        elif laid[0] == "tensor":
            x = jax.lax.psum(x, "tensor")
        return jax.lax.all_to_all(x, axes, split_axis=0, concat_axis=2, tiled=True) if axes else x

    out = P(rows, "tensor" if by_length else None, None)
    return jax.shard_map(run, mesh=mesh, in_specs=(laid, P(rows, None)), out_specs=out)(table, tokens)


def _of_part(table: Array, tokens: Array, axis: str | None) -> Array:
    """The rows of this device's part of the vocabulary, zeros for other tokens."""
    if axis is None:
        return table[tokens]
    local = tokens - jax.lax.axis_index(axis) * table.shape[0]
    here = (local >= 0) & (local < table.shape[0])
    return jnp.where(here[..., None], table[jnp.where(here, local, 0)], 0)
