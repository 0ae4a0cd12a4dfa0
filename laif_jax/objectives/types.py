"""What every loss returns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Metrics = dict[str, tuple[jax.Array, jax.Array]]


class LossOut(NamedTuple):
    """Unreduced sums of one micro-batch; the loss of a batch is `sum(total) / sum(weight)` over its micro-batches.

    Attributes:
      total: float32 scalar, the sum of the weighted per-unit losses. The only part that carries gradients.
      weight: float32 scalar, what `total` is divided by once all micro-batches and devices are summed.
      metrics: name -> (sum, weight), float32 scalars without gradients, reduced like the loss, each by its own weight.
    """

    total: jax.Array
    weight: jax.Array
    metrics: Metrics


def weighted(values: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of `weight * values`, sum of `weight`), without gradients; entries of weight 0 count nothing, even if NaN.

    Args:
      values, weight: arrays of one shape.
    """
    values, weight = jax.lax.stop_gradient((values.astype(jnp.float32), weight.astype(jnp.float32)))
    return jnp.sum(jnp.where(weight > 0, values * weight, 0.0)), jnp.sum(weight)
