"""Preference optimisation on a critic's labels, without a reward model."""

from typing import Any

from etils import epath
from transformers import PreTrainedTokenizerBase

from laif_jax.data.chat import encode_pair
from laif_jax.data.pipeline import Batches, preference_batches
from laif_jax.stages import fit, label
from laif_jax.stages.artifact import Artifact, StageError, run_stage
from laif_jax.stages.base import model_folder, model_settings
from laif_jax.stages.context import StudyContext
from laif_jax.training.tasks import preference_task


def run(ctx: StudyContext, policy: Artifact, labels: Artifact) -> Artifact:
    """Trains the SFT policy, which is also the reference, on its preferences and writes `model/`."""
    spec = ctx.config.dpo
    if spec is None:
        raise StageError("the configuration has no section `dpo`")
    settings = {"model": model_settings(ctx), "dpo": spec.resolved(), "seed": ctx.seed}

    def work(folder: epath.Path) -> dict[str, Any]:
        model = fit.load(ctx, model_folder(policy))
        batches, pairs = make_batches(ctx, model.tokenizer, labels)
        shown = [preference.prompt for preference in label.read_preferences(labels)[: fit.SHOWN]]
        return fit.fit(
            ctx,
            folder,
            "dpo",
            model,
            preference_task,
            spec,
            batches,
            pairs=pairs,
            shown=shown,
            sampling=ctx.config.sampling,
        )

    return run_stage("dpo", settings, {"policy": policy, "labels": labels}, ctx.root, work)


def make_batches(
    ctx: StudyContext, tokenizer: PreTrainedTokenizerBase, labels: Artifact
) -> tuple[Batches, int]:
    """(the batches of the whole run, how many pairs there are)."""
    spec = ctx.config.dpo
    assert spec is not None
    encoded = [
        encode_pair(
            tokenizer,
            preference.prompt.messages,
            preference.chosen.text,
            preference.rejected.text,
            ctx.config.model.template,
            max_length=spec.max_length,
            max_prompt_length=spec.max_prompt_length,
            p_chosen=preference.p_chosen,
            finish_reasons=(preference.chosen.finish_reason, preference.rejected.finish_reason),
        )
        for preference in label.read_preferences(labels)
    ]
    return preference_batches(encoded, **fit.batch_options(ctx, spec, tokenizer)), len(encoded)
