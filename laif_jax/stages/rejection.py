"""Rejection-sampling fine-tuning: SFT of a policy on the best of its own samples."""

from typing import Any

from etils import epath
from transformers import PreTrainedTokenizerBase

from laif_jax.config import RejectionSpec
from laif_jax.data.chat import encode_dialogue
from laif_jax.data.pipeline import Batches, sft_batches
from laif_jax.records import Completion
from laif_jax.stages import fit, sample
from laif_jax.stages import prompts as prompts_stage
from laif_jax.stages.artifact import Artifact, StageError, run_stage
from laif_jax.stages.base import model_folder, model_settings
from laif_jax.stages.context import StudyContext
from laif_jax.training.tasks import sft_task


def run(
    ctx: StudyContext, prompts: Artifact, policy: Artifact, best: Artifact, spec: RejectionSpec
) -> Artifact:
    """Trains the policy further on the best samples of the `spec.top` share of the prompts and writes `model/`.

    Args:
      best: of the stage `best_of_n`: per training prompt the sample that scores highest, its score in `meta`.
    """
    settings = {
        "model": model_settings(ctx),
        "top": spec.top,
        "sft": spec.train.resolved(),
        "seed": ctx.seed,
    }
    inputs = {"prompts": prompts, "policy": policy, "best": best}

    def work(folder: epath.Path) -> dict[str, Any]:
        model = fit.load(ctx, model_folder(policy))
        kept = chosen(best, spec.top)
        batches = make_batches(ctx, model.tokenizer, prompts, kept, spec)
        shown = [row.prompt for row in prompts_stage.read(prompts, "eval")[: fit.SHOWN]]
        metrics = fit.fit(
            ctx,
            folder,
            "rejection",
            model,
            sft_task,
            spec.train,
            batches,
            shown=shown,
            sampling=ctx.config.sampling,
        )
        scores = [completion.meta["score"] for completion in kept]
        return {**metrics, "kept": len(kept), "score/kept": sum(scores) / len(scores)}

    return run_stage("rejection", settings, inputs, ctx.root, work)


def chosen(best: Artifact, top: float) -> list[Completion]:
    """The best samples of the share of prompts whose best sample scores highest, in the prompts' order. Empty answers
    teach nothing and are left out.

    Raises:
      StageError: none is left.
    """
    completions = [completion for completion in sample.read(best) if completion.text.strip()]
    if not completions:
        raise StageError(
            "every best sample is empty, so there is nothing to train on; look at the policy's samples"
        )
    count = max(1, round(top * len(completions)))
    order = sorted(range(len(completions)), key=lambda i: -completions[i].meta["score"])
    return [completions[i] for i in sorted(order[:count])]


def make_batches(
    ctx: StudyContext,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Artifact,
    completions: list[Completion],
    spec: RejectionSpec,
) -> Batches:
    """The batches of the whole run: one row per completion. One that was cut off is not taught to end there."""
    by_id = {row.prompt.id: row.prompt for row in prompts_stage.read(prompts, "train")}
    encoded = [
        encode_dialogue(
            tokenizer,
            by_id[completion.prompt_id].messages,
            ctx.config.model.template,
            max_length=spec.train.max_length,
            max_prompt_length=spec.train.max_prompt_length,
            completion=completion.text,
            finish_reason=completion.finish_reason,
        )
        for completion in completions
    ]
    return sft_batches(encoded, **fit.batch_options(ctx, spec.train, tokenizer))
