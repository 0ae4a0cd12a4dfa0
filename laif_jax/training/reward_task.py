"""Training reward models on pairs: the loss of one, or of an ensemble in one step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from laif_jax.config.rl import RewardSpec
from laif_jax.models.config import ModelConfig
from laif_jax.models.moe import RouterLoad
from laif_jax.models.reward import reward_scores_and_load
from laif_jax.objectives import LossOut
from laif_jax.objectives.reward import reward_loss
from laif_jax.parallel import constrain
from laif_jax.training.tasks import Remat, with_router_loss


@dataclass(frozen=True)
class RewardTask:
    """The loss of a reward model, or of an ensemble; see `laif_jax.objectives.reward`.

    Static, as `SftTask`: tasks that differ only in `numbers` share compiled programs.

    Attributes:
      members: K. Above 1, the trained leaves have a leading axis [K], and so have the loss's sums.
      max_segments: S, a bound on the segments of a row; 1 without packing.
      numbers: traced scalars that the loss reads from `hyper`.
    """

    cfg: ModelConfig
    loss: str
    members: int
    dtype: str
    remat: Remat
    max_segments: int
    numbers: Mapping[str, float] = field(default_factory=dict, compare=False, repr=False)

    def pair_scores(self, params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Scores (chosen, rejected) of each pair, float32 [N], or [K, N] of an ensemble."""
        return self._pairs(params, batch)[0]

    def _pairs(
        self, params: Any, batch: Mapping[str, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], RouterLoad | None]:
        scores, load = reward_scores_and_load(
            params,
            self.cfg,
            batch["tokens"],
            batch["positions"],
            batch["segment_ids"],
            members=self.members,
            max_segments=self.max_segments,
            prefix=batch.get("prefix"),
            dtype=jnp.dtype(self.dtype),
            remat=self.remat,
        )
        # [.., R, S] -> [.., R * S], on every device: the pairs of a table may lie on any row.
        flat = constrain(scores, *[None] * scores.ndim).reshape(*scores.shape[:-2], -1)
        chosen, rejected = constrain(batch["chosen"], None), constrain(batch["rejected"], None)
        return (flat[..., chosen], flat[..., rejected]), load

    def __call__(
        self, params: Any, batch: Mapping[str, jax.Array], hyper: Mapping[str, jax.Array]
    ) -> tuple[LossOut, dict[str, jax.Array]]:
        """Sums over one micro-batch, and the scores of each pair.

        Args:
          batch: rows [R, T] and pair tables [N] as of `preference_batches` (reference log-probs are not read), and
            optionally its columns `margin` [N], and `member_weight` [N, K], factors of `weight`.
        """
        (chosen, rejected), load = self._pairs(params, batch)
        p, weight = constrain(batch["p_chosen"], None), constrain(batch["weight"], None)
        hard = jnp.where(p == 0.5, 0.5, (p > 0.5).astype(jnp.float32))
        p = jnp.where(hyper.get("soft_labels", 1.0) > 0, p, hard)
        margin = constrain(batch["margin"], None) if "margin" in batch else None
        outputs = {"chosen": chosen, "rejected": rejected}
        if self.members == 1:
            out = reward_loss(self.loss, chosen, rejected, p, weight, margin, hyper)
            return with_router_loss(out, load, self.cfg), outputs
        weights = jnp.broadcast_to(weight, chosen.shape)
        if "member_weight" in batch:
            weights *= constrain(batch["member_weight"], None, None).T

        def one(chosen: Any, rejected: Any, weight: Any, load: Any) -> LossOut:
            out = reward_loss(self.loss, chosen, rejected, p, weight, margin, hyper)
            return with_router_loss(out, load, self.cfg)

        return jax.vmap(one)(chosen, rejected, weights, load), outputs


def reward_task(
    cfg: ModelConfig,
    spec: RewardSpec,
    *,
    dtype: str = "bfloat16",
    remat: Remat = "full",
    chunk: int = 1024,
    max_segments: int = 1,
) -> RewardTask:
    """The loss of a reward model (`start_reward_model` gives `cfg`); scores and loss are float32.

    Args:
      dtype: of compute. chunk: not read (there is no vocabulary), for the form that all tasks share.
      max_segments: the data iterator's bound on the segments of a row.
    """
    del chunk
    numbers = {
        "margin": spec.margin,
        "label_smoothing": spec.label_smoothing,
        "centering": spec.centering,
        "tie_threshold": spec.tie_threshold,
        "drop_ties": float(spec.loss == "bradley_terry" and spec.ties == "drop"),
        "soft_labels": float(spec.soft_labels),
    }
    return RewardTask(cfg, spec.loss, spec.members, str(jnp.dtype(dtype)), remat, max_segments, numbers)


def bootstrap_weights(pairs: int, members: int, seed: int) -> np.ndarray:
    """float32 [pairs, K], the weight of each pair to each member, independent Exp(1) (Rubin 1981, the Bayesian
    bootstrap: normalised by their sum, as the loss does, they are uniform over all weightings)."""
    random = np.random.default_rng(np.random.SeedSequence([seed, members]))
    return random.exponential(size=(pairs, members)).astype(np.float32)
