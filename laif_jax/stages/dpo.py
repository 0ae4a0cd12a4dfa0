"""Preference optimisation on a critic's labels, without a reward model."""

from typing import Any

from etils import epath
from transformers import PreTrainedTokenizerBase

from laif_jax.config import DpoSpec
from laif_jax.data.chat import encode_pair
from laif_jax.data.pipeline import Batches, preference_batches
from laif_jax.models.config import ModelConfig
from laif_jax.stages import fit, label
from laif_jax.stages.artifact import Artifact, StageError, run_stage
from laif_jax.stages.base import model_folder, model_settings
from laif_jax.stages.context import StudyContext
from laif_jax.training.tasks import preference_task, shares_prompts


def run(
    ctx: StudyContext,
    policy: Artifact,
    labels: Artifact,
    *,
    reference: Artifact | None = None,
    spec: DpoSpec | None = None,
) -> Artifact:
    """Trains a policy on preferences and writes `model/`.

    Args:
      policy: the model that training starts from. reference: None: the policy as it starts.
      labels: of the stage `label`, `human` or `pool`.
      spec: None: the study's section `dpo`.
    """
    spec = _spec(ctx, spec)
    settings = {"model": model_settings(ctx), "dpo": spec.resolved(), "seed": ctx.seed}
    elsewhere = reference is not None and reference.key != policy.key
    inputs = {"policy": policy, "labels": labels}
    if elsewhere:
        inputs["reference"] = reference

    def work(folder: epath.Path) -> dict[str, Any]:
        model = fit.load(ctx, model_folder(policy))
        batches, pairs = make_batches(ctx, model.tokenizer, labels, spec, model.cfg)
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
            reference_folder=model_folder(inputs["reference"]) if elsewhere else None,
            shown=shown,
            sampling=ctx.config.sampling,
        )

    return run_stage("dpo", settings, inputs, ctx.root, work)


def make_batches(
    ctx: StudyContext,
    tokenizer: PreTrainedTokenizerBase,
    labels: Artifact,
    spec: DpoSpec | None = None,
    cfg: ModelConfig | None = None,
) -> tuple[Batches, int]:
    """(the batches of the whole run, how many pairs there are). `cfg`: of the model that reads them, if known."""
    spec = _spec(ctx, spec)
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
    shared = shares_prompts(spec, ctx.mesh, cfg)
    options = fit.batch_options(ctx, spec, tokenizer)
    return preference_batches(encoded, share_prompts=shared, **options), len(encoded)


def _spec(ctx: StudyContext, spec: DpoSpec | None) -> DpoSpec:
    spec = spec or ctx.config.dpo
    if spec is None:
        raise StageError("the configuration has no section `dpo`")
    return spec
