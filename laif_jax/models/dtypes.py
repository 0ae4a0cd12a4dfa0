"""Parameters in the dtype that they are computed with."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def in_compute_dtype(params: Any, dtype: Any) -> Any:
    """Weights in the compute dtype, which every use would cast them to; norms and scalar heads compute in float32 from
    what they are, and stay. Arrays that are in it are not copied."""

    def convert(path: Any, leaf: jax.Array) -> jax.Array:
        keep = any(str(entry.key).endswith("norm") or entry.key == "score" for entry in path)
        return leaf if keep or leaf.dtype == dtype else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(convert, params)


class Master(NamedTuple):
    """A float32 weight, and a place of its shape in the compute dtype that its gradient is taken at.

    The weight is cast where it is used, one layer at a time: no copy of the whole model in the compute dtype exists,
    and its gradient is in that dtype as if there were one.
    """

    weight: jax.Array
    place: jax.Array


@jax.custom_vjp
def in_use(weight: jax.Array, place: jax.Array) -> jax.Array:
    """The weight of a `Master` as it is computed with; its gradient goes to `place`, whose values count for nothing."""
    # As bits: of a float32 array that is only cast, XLA's TPU compiler makes that copy all the same, of all layers
    # ahead of the loop over them.
    bits = jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(weight, jnp.uint32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(place.dtype)


in_use.defvjp(lambda weight, place: (in_use(weight, place), None), lambda _, cotangent: (None, cotangent))


def gradient_places(params: Any, dtype: Any) -> Any:
    """What to differentiate at instead of `params`, for gradients in the compute dtype: zeros for the weights of layers
    that every use would cast, to be bound by `bound`; for other leaves what `in_compute_dtype` gives."""
    cast = in_compute_dtype(params, dtype)

    def place(path: Any, leaf: jax.Array, used: jax.Array) -> jax.Array:
        return jnp.zeros(leaf.shape, used.dtype) if _by_layer(path) and leaf.dtype != used.dtype else used

    return jax.tree_util.tree_map_with_path(place, params, cast)


def bound(params: Any, places: Any) -> Any:
    """The parameters for a forward pass that is differentiated at `places`, of `gradient_places(params, ...)`."""

    def bind(path: Any, leaf: jax.Array, place: jax.Array) -> Any:
        return Master(leaf, place) if _by_layer(path) and leaf.dtype != place.dtype else place

    return jax.tree_util.tree_map_with_path(bind, params, places)


def _by_layer(path: Any) -> bool:
    return any(entry.key == "layers" for entry in path)
