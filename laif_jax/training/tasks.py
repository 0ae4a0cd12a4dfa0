"""What is trained: a model and an objective as one loss function, hashable by what it compiles to."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

from laif_jax.config.schema import DpoSpec, PairTrainSpec, SftSpec
from laif_jax.models.config import ModelConfig
from laif_jax.models.decoder import hidden_and_load
from laif_jax.models.heads import token_logps, token_stats
from laif_jax.models.moe import RouterLoad, balance_loss
from laif_jax.objectives import LossOut, preference_loss, segment_sums, sft_loss
from laif_jax.parallel import constrain
from laif_jax.records.errors import LaifError

Remat = Literal["none", "full", "dots"]
Reduction = Literal["token", "sequence"]


class FirstStepError(LaifError, RuntimeError):
    """The policy does not equal its reference before the first update: the wrong weights, pairs or reference."""


def with_router_loss(
    out: LossOut, load: RouterLoad | None, cfg: ModelConfig, name: str = "router_loss"
) -> LossOut:
    """The loss with the load-balancing loss of a mixture of experts, `cfg.router_loss` times, as metric `name`.

    The latter is of the tokens of one micro-batch over all devices. So it is the same on every mesh, but, being a
    product of means, not quite the same for every `micro_batch` (as in `transformers` with accumulated gradients).
    """
    if load is None or not cfg.router_loss:
        return out
    loss = balance_loss(load)
    metrics = out.metrics | {name: (jax.lax.stop_gradient(loss) * out.weight, out.weight)}
    return LossOut(out.total + cfg.router_loss * loss * out.weight, out.weight, metrics)


@dataclass(frozen=True)
class SftTask:
    """Supervised fine-tuning, or pretraining, of a decoder.

    A task is a static value: two tasks that differ only in `numbers` are equal, and share compiled programs.

    Attributes:
      numbers: traced scalars that the loss reads from `hyper`.
    """

    cfg: ModelConfig
    reduction: Reduction
    dtype: str
    remat: Remat
    chunk: int
    numbers: Mapping[str, float] = field(default_factory=dict, compare=False, repr=False)

    def __call__(
        self, params: Any, batch: Mapping[str, jax.Array], hyper: Mapping[str, jax.Array]
    ) -> LossOut:
        """Sums over one micro-batch {tokens, segment_ids, positions, loss_mask: [R, T]}."""
        del hyper
        tokens, segments = batch["tokens"], batch["segment_ids"]
        hidden, load = hidden_and_load(
            params,
            self.cfg,
            tokens,
            batch["positions"],
            segments,
            dtype=jnp.dtype(self.dtype),
            remat=self.remat,
        )
        logps, entropy, correct = token_stats(params, self.cfg, hidden, tokens, segments, chunk=self.chunk)
        out = sft_loss(
            logps, batch["loss_mask"], segments, reduction=self.reduction, entropy=entropy, correct=correct
        )
        return with_router_loss(out, load, self.cfg)


@dataclass(frozen=True)
class PreferenceTask:
    """Preference optimisation without a reward model, see `laif_jax.objectives.preference`. Static, as `SftTask`.

    Attributes:
      max_segments: S, a bound on the segments of a row; 1 without packing.
      starts_at_reference: the policy in training is the reference before the first update, which is then checked.
    """

    cfg: ModelConfig
    loss: str
    dtype: str
    remat: Remat
    chunk: int
    max_segments: int
    numbers: Mapping[str, float] = field(default_factory=dict, compare=False, repr=False)
    starts_at_reference: bool = field(default=True, compare=False, repr=False)

    def sequence_logps(self, params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
        """Log-probs and counts of the supervised tokens of each pair: (chosen, rejected, |chosen|, |rejected|), [N]."""
        return self._sequences(params, batch)[0]

    def _sequences(
        self, params: Any, batch: Mapping[str, jax.Array]
    ) -> tuple[tuple[jax.Array, ...], RouterLoad | None]:
        tokens, segments, mask = batch["tokens"], batch["segment_ids"], batch["loss_mask"]
        hidden, load = hidden_and_load(
            params,
            self.cfg,
            tokens,
            batch["positions"],
            segments,
            prefix=batch.get("prefix"),
            dtype=jnp.dtype(self.dtype),
            remat=self.remat,
        )
        logps = token_logps(params, self.cfg, hidden, tokens, segments, chunk=self.chunk)

        # [R, S] -> [R * S], on every device: the pairs of a table may lie on any row.
        def flat(values: jax.Array) -> jax.Array:
            return constrain(segment_sums(values, mask, segments, self.max_segments), None, None).reshape(-1)

        sums, counts = flat(logps), flat(jnp.ones_like(mask))
        chosen, rejected = constrain(batch["chosen"], None), constrain(batch["rejected"], None)
        return (sums[chosen], sums[rejected], counts[chosen], counts[rejected]), load

    def __call__(
        self, params: Any, batch: Mapping[str, jax.Array], hyper: Mapping[str, jax.Array]
    ) -> tuple[LossOut, dict[str, jax.Array]]:
        """Sums over one micro-batch of rows [R, T] and pair tables [N], and the policy's log-probs of each pair."""
        (chosen, rejected, chosen_tokens, rejected_tokens), load = self._sequences(params, batch)
        table = {
            name: constrain(batch[name], None)
            for name in ("ref_chosen", "ref_rejected", "p_chosen", "weight")
        }
        # Hard labels: `chosen` is the preferred one by construction, so its probability counts as 1.
        p_chosen = jnp.where(hyper.get("soft_labels", 1.0) > 0, table["p_chosen"], 1.0)
        out = preference_loss(
            self.loss,
            chosen,
            rejected,
            table["ref_chosen"],
            table["ref_rejected"],
            chosen_tokens,
            rejected_tokens,
            p_chosen,
            table["weight"],
            hyper,
        )
        return with_router_loss(out, load, self.cfg), {"policy_chosen": chosen, "policy_rejected": rejected}

    @property
    def has_reference(self) -> bool:
        """Whether the loss reads the reference's log-probs."""
        return self.loss != "simpo" and not self.numbers.get("reference_free", 0.0)

    def loss_at_reference(self) -> float:
        """The loss of a pair whose margin is 0, without the SFT term."""
        if self.loss in ("ipo", "ipo_averaged"):
            return (1.0 / (2.0 * self.numbers["beta"])) ** 2
        return 1.0 if self.loss == "hinge" else math.log(2.0)

    def check_first_step(self, metrics: Mapping[str, float | None]) -> None:
        """Before any update the policy is the reference: margins exactly 0, loss log 2 (sigmoid) to rounding.

        Raises:
          FirstStepError: it is not.
        """
        if not (self.has_reference and self.starts_at_reference):
            return
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            if metrics[name] != 0.0:
                raise FirstStepError(
                    f"before the first update `{name}` is {metrics[name]!r}, but the policy is the reference and it "
                    "must be exactly 0: the reference log-probs are of other weights, other pairs or another order. "
                    "Delete the cached reference-*.npz of this run and start again"
                )
        expected, found = self.loss_at_reference(), metrics["preference_loss"]
        if found is None or abs(found - expected) > 2e-6 * max(1.0, expected):
            raise FirstStepError(
                f"before the first update the `{self.loss}` loss is {found!r}, but at margin 0 it must be {expected!r}"
            )


def shares_prompts(spec: PairTrainSpec, mesh: Any, cfg: ModelConfig | None = None) -> bool:
    """Whether the pairs of a run lie in rows where they share their prompt, see `preference_batches`.

    With `spec.share_prompts` and packing, but for two cases: on TPUs, whose attention kernel knows segments and windows
    alone; and for a model (`cfg`) whose rotary frequencies depend on the length of the sequence, beyond the length
    where they start to: the prompt has other keys there for every answer.
    """
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    stretched = (
        cfg is not None
        and spec.max_length > cfg.max_position
        and any(rope.kind == "dynamic" for rope in cfg.ropes)
    )
    return spec.packing and spec.share_prompts and not on_tpu and not stretched


def sft_task(
    cfg: ModelConfig,
    spec: SftSpec | Any,
    *,
    dtype: str = "bfloat16",
    remat: Remat = "full",
    chunk: int = 1024,
) -> SftTask:
    """The SFT loss of a model.

    Args:
      cfg: the architecture. spec: its `reduction` counts ("token" where it has none, as in pretraining).
      dtype: of compute; losses and log-probs are float32. remat: "none", "full" or "dots".
      chunk: tokens per chunk of the vocabulary log-probs.
    """
    return SftTask(cfg, getattr(spec, "reduction", "token"), str(jnp.dtype(dtype)), remat, chunk)


def preference_task(
    cfg: ModelConfig,
    spec: DpoSpec,
    *,
    dtype: str = "bfloat16",
    remat: Remat = "full",
    chunk: int = 1024,
    max_segments: int = 1,
) -> PreferenceTask:
    """The preference loss of a model; `max_segments` is the data iterator's bound on the segments of a row."""
    numbers = {
        "beta": spec.beta,
        "label_smoothing": spec.label_smoothing,
        "gamma": spec.gamma,
        "sft_weight": spec.sft_weight,
        "reference_free": float(spec.reference_free),
        "soft_labels": float(spec.soft_labels),
    }
    return PreferenceTask(cfg, spec.loss, str(jnp.dtype(dtype)), remat, chunk, max_segments, numbers)
