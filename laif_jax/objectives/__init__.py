"""Losses as pure functions of arrays: no I/O, no configuration, no mesh."""

from laif_jax.objectives.masked import masked_mean, masked_sum, safe_divide, segment_sums, supervised_segments
from laif_jax.objectives.preference import PREFERENCE_LOSSES, preference_loss
from laif_jax.objectives.reward import REWARD_LOSSES, reward_loss
from laif_jax.objectives.sft import sft_loss
from laif_jax.objectives.types import LossOut, Metrics, weighted

__all__ = [
    "PREFERENCE_LOSSES",
    "REWARD_LOSSES",
    "LossOut",
    "Metrics",
    "masked_mean",
    "masked_sum",
    "preference_loss",
    "reward_loss",
    "safe_divide",
    "segment_sums",
    "sft_loss",
    "supervised_segments",
    "weighted",
]
