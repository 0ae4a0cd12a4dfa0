"""Supervised fine-tuning on a share of a teacher's completions."""

from typing import Any

from etils import epath
from transformers import PreTrainedTokenizerBase

from laif_jax.data.chat import encode_dialogue
from laif_jax.data.pipeline import Batches, sft_batches
from laif_jax.stages import fit, teach
from laif_jax.stages import prompts as prompts_stage
from laif_jax.stages.artifact import Artifact, run_stage
from laif_jax.stages.base import model_folder, model_settings
from laif_jax.stages.context import StudyContext
from laif_jax.stages.split import split
from laif_jax.training.tasks import sft_task


def run(
    ctx: StudyContext, base: Artifact, prompts: Artifact, completions: Artifact, *, share: float
) -> Artifact:
    """Trains on the completions of the first `share` of the training prompts and writes `model/`."""
    settings = {
        "model": model_settings(ctx),
        "sft": ctx.config.sft.resolved(),
        "share": share,
        "seed": ctx.seed,
    }
    inputs = {"base": base, "prompts": prompts, "completions": completions}

    def work(folder: epath.Path) -> dict[str, Any]:
        model = fit.load(ctx, model_folder(base))
        batches = make_batches(ctx, model.tokenizer, prompts, completions, share)
        shown = [row.prompt for row in prompts_stage.read(prompts, "eval")[: fit.SHOWN]]
        return fit.fit(
            ctx,
            folder,
            "sft",
            model,
            sft_task,
            ctx.config.sft,
            batches,
            shown=shown,
            sampling=ctx.config.sampling,
        )

    return run_stage("sft", settings, inputs, ctx.root, work)


def make_batches(
    ctx: StudyContext,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Artifact,
    completions: Artifact,
    share: float,
) -> Batches:
    """The batches of the whole run: one row per prompt of the share that has a completion."""
    spec = ctx.config.sft
    rows, _ = split(prompts_stage.read(prompts, "train"), share)
    by_prompt = {completion.prompt_id: completion for completion in teach.read(completions)}
    encoded = [
        encode_dialogue(
            tokenizer,
            row.prompt.messages,
            ctx.config.model.template,
            max_length=spec.max_length,
            max_prompt_length=spec.max_prompt_length,
            completion=completion.text,
            finish_reason=completion.finish_reason,
        )
        for row in rows
        if (completion := by_prompt.get(row.prompt.id))
    ]
    return sft_batches(encoded, **fit.batch_options(ctx, spec, tokenizer))
