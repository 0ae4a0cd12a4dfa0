"""Masked reductions. Masks are carried, never inferred; a sum over nothing is 0 and so is a mean over nothing."""

import jax
import jax.numpy as jnp


def safe_divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """`numerator / denominator`, and 0 where the denominator is 0; gradients there are 0 too, never NaN."""
    positive = denominator != 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1), 0.0)


def masked_sum(x: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Sum of `mask * x` in float32. What lies under a mask of 0 counts nothing, even if it is NaN or infinite.

    Args:
      x, mask: arrays of one shape; the mask is bool or a weight.
      axis: axes to reduce; None: all.
    """
    mask = mask.astype(jnp.float32)
    return jnp.sum(jnp.where(mask != 0, x.astype(jnp.float32), 0.0) * mask, axis=axis)


def masked_mean(x: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """`masked_sum(x, mask) / sum(mask)` in float32, and 0 where the mask is empty.

    For values to look at. A loss is never a mean of means: it returns sums (`LossOut`).
    """
    return safe_divide(masked_sum(x, mask, axis), jnp.sum(mask.astype(jnp.float32), axis=axis))


def segment_sums(x: jax.Array, mask: jax.Array, segment_ids: jax.Array, max_segments: int) -> jax.Array:
    """Masked sums of each segment of packed rows.

    Args:
      x: [R, T], for example token log-probs. mask: [R, T].
      segment_ids: int32 [R, T]; 0 is padding, segments count from 1.
      max_segments: S, static; a segment id above S is dropped, so S must be a bound (the data pipeline gives it).

    Returns:
      float32 [R, S]; column s - 1 holds segment s, 0 where the row has no such segment.
    """
    mask = mask.astype(jnp.float32)
    values = jnp.where(mask != 0, x.astype(jnp.float32), 0.0) * mask
    # A compare and a reduce, which XLA fuses: no [R, T, S] array in memory, and rows stay where they are sharded.
    belongs = segment_ids[..., None] == jnp.arange(1, max_segments + 1)  # [R, T, S]
    return jnp.sum(jnp.where(belongs, values[..., None], 0.0), axis=-2)


def supervised_segments(mask: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """How many segments have at least one supervised token; float32 scalar.

    Args:
      mask: [R, T]. segment_ids: int32 [R, T], contiguous in a row, 0 = padding.
    """
    supervised = (mask > 0) & (segment_ids > 0)
    before = jnp.cumsum(supervised, axis=-1) - supervised  # supervised tokens left of t, in the row
    previous = jnp.pad(
        segment_ids[..., :-1], [(0, 0)] * (segment_ids.ndim - 1) + [(1, 0)], constant_values=-1
    )
    # `before` never falls along a row, so a running maximum carries its value at the segment's start to all of it.
    at_start = jax.lax.cummax(jnp.where(segment_ids != previous, before, 0), axis=segment_ids.ndim - 1)
    return jnp.sum(supervised & (before == at_start)).astype(jnp.float32)
