"""Supervised fine-tuning: negative log-likelihood of the supervised tokens."""

from typing import Literal

import jax
import jax.numpy as jnp

from laif_jax.objectives.masked import masked_sum, supervised_segments
from laif_jax.objectives.types import LossOut, Metrics


def sft_loss(
    logps: jax.Array,
    loss_mask: jax.Array,
    segment_ids: jax.Array,
    *,
    reduction: Literal["token", "sequence"] = "token",
    entropy: jax.Array | None = None,
    correct: jax.Array | None = None,
) -> LossOut:
    """Negative log-likelihood, reduced over tokens or over sequences.

    "token": the mean over all supervised tokens of the batch. "sequence": the sum over a sequence's tokens, averaged
    over the sequences that have any (the objective of the LAIF paper, as of the official DPO code). A sequence is a
    segment, so packing changes neither.

    Args:
      logps: float32 [R, T], log p(token | earlier tokens of the segment).
      loss_mask: [R, T], 1 where the token is a supervised target.
      segment_ids: int32 [R, T], 0 = padding.
      reduction: static.
      entropy: [R, T] of the predictive distributions, or None. correct: [R, T], whether the arg max was the token.

    Returns:
      LossOut with weight = supervised tokens or sequences, and metrics under TRL's names: `nll_loss` (per token),
      `response_length/mean` (supervised tokens per sequence), and `entropy`, `mean_token_accuracy` if given.

    Raises:
      ValueError: for an unknown `reduction`.
    """
    tokens = jnp.sum(loss_mask.astype(jnp.float32))
    sequences = supervised_segments(loss_mask, segment_ids)
    total = -masked_sum(logps, loss_mask)
    if reduction == "token":
        weight = tokens
    elif reduction == "sequence":
        weight = sequences
    else:
        raise ValueError(f"unknown reduction `{reduction}` of the SFT loss; use `token` or `sequence`")
    metrics: Metrics = {"nll_loss": (total, tokens), "response_length/mean": (tokens, sequences)}
    if entropy is not None:
        metrics["entropy"] = (masked_sum(entropy, loss_mask), tokens)
    if correct is not None:
        metrics["mean_token_accuracy"] = (masked_sum(correct, loss_mask), tokens)
    return LossOut(total, weight, jax.lax.stop_gradient(metrics))
