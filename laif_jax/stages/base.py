"""The base model of a study: a folder in Hugging Face layout that exists already, or one pretrained from scratch."""

import hashlib
import random
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from laif_jax.data.chat import Encoded, encode_dialogue
from laif_jax.data.pipeline import sft_batches
from laif_jax.models import config as model_config
from laif_jax.models.convert import convert
from laif_jax.models.decoder import init_params
from laif_jax.models.model import Model, resolve
from laif_jax.models.specs import param_specs
from laif_jax.models.tokenizer import load_tokenizer
from laif_jax.parallel.rules import param_shardings
from laif_jax.stages import fit
from laif_jax.stages.artifact import Artifact, run_stage
from laif_jax.stages.context import Context, StudyContext
from laif_jax.training.tasks import sft_task
from laif_jax.worlds import symbols


def run(ctx: Context) -> Artifact:
    """The base model. All replicates share it: it is given, what is studied comes after."""
    if ctx.config.model.source != "scratch":
        return _existing(ctx)
    assert isinstance(ctx, StudyContext)  # checked when the configuration was read
    return _pretrain(ctx)


def model_folder(artifact: Artifact) -> epath.Path:
    """The Hugging Face layout folder of a stage that makes, or names, a model."""
    return (
        epath.Path(artifact.metrics["folder"]) if "folder" in artifact.metrics else artifact.path / fit.MODEL
    )


def compute_dtype(ctx: Context) -> Any:
    """The dtype of forward passes."""
    return jnp.dtype(ctx.config.model.dtype)


def model_settings(ctx: Context) -> dict[str, Any]:
    """Options of the model that change what a stage computes or writes; the weights are an input of their own."""
    named = ("source", "scratch", "logprob_chunk", "remat")
    return {key: value for key, value in ctx.config.model.resolved().items() if key not in named}


def _existing(ctx: Context) -> Artifact:
    """Large weights are not copied: the artifact names their folder. A GGUF file is converted into the artifact."""
    source = resolve(ctx.config.model.source)
    is_gguf = source.endswith(".gguf")
    settings = {"weights": fingerprint(epath.Path(source)), "dtype": "float32" if is_gguf else None}

    def work(folder: epath.Path) -> dict[str, Any]:
        if not is_gguf:
            return {"folder": source}
        return {"folder": str(convert(source, folder / fit.MODEL, "float32"))}

    return run_stage("base", settings, {}, ctx.root, work)


def fingerprint(path: epath.Path, edge: int = 1 << 20) -> list[Any]:
    """Names, sizes and hashes of both ends of a model's files: tells models apart without reading 100 GB."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    found = []
    for file in files:
        size = file.stat().length
        with file.open("rb") as stream:
            digest = hashlib.sha256(stream.read(edge))
            stream.seek(max(0, size - edge))
            digest.update(stream.read(edge))
        found.append([file.name, size, digest.hexdigest()])
    return found


# ---- the synthetic world ---------------------------------------------------------------------------------------


def _pretrain(ctx: StudyContext) -> Artifact:
    """A decoder from random weights, trained on instructions answered with a chosen skill: a base of chosen strength.

    The instructions are of the world's own "pretrain" split; none is seen again later.
    """
    spec, world = ctx.config.pretrain, ctx.config.data.symbols
    settings = {
        "model": model_settings(ctx),
        "scratch": ctx.config.model.scratch and ctx.config.model.scratch.resolved(),
        "pretrain": spec and spec.resolved(),
        "world": world and world.resolved(),
        "seed": ctx.config.seed,
    }

    def work(folder: epath.Path) -> dict[str, Any]:
        model = _fresh_model(ctx)
        if spec is None or world is None:  # an untrained base: the study starts from noise
            fit.save_model(folder / fit.MODEL, model, dtype=jnp.dtype(ctx.config.model.save_dtype))
            return {"steps": 0}
        prompts = symbols.make_prompts(world, spec.examples, ctx.config.seed, split="pretrain")
        rng = random.Random(f"pretrain-{ctx.config.seed}")
        template = ctx.config.model.template

        def encode(prompt: Any) -> Encoded:
            answer = symbols.teacher_answer(prompt.instruction, spec.skill, rng)
            return encode_dialogue(
                model.tokenizer,
                prompt.messages,
                template,
                max_length=spec.max_length,
                max_prompt_length=spec.max_prompt_length,
                completion=answer,
            )

        options = fit.batch_options(ctx, spec, model.tokenizer)
        # Not the replicate's: all replicates share this stage, whichever of them comes to run it.
        options["seed"] = ctx.config.seed
        batches = sft_batches([encode(prompt) for prompt in prompts], **options)
        shown = prompts[: fit.SHOWN]
        return fit.fit(
            ctx,
            folder,
            "pretrain",
            model,
            sft_task,
            spec,
            batches,
            shown=shown,
            sampling=ctx.config.sampling,
        )

    return run_stage("pretrain", settings, {}, ctx.root, work)


def _fresh_model(ctx: StudyContext) -> Model:
    spec = ctx.config.model
    tokenizer = load_tokenizer(spec.tokenizer or "")
    assert spec.scratch is not None  # checked when the configuration was read
    cfg = model_config.scratch(
        spec.scratch,
        len(tokenizer),
        eos_ids=(tokenizer.eos_token_id,),
        pad_id=tokenizer.pad_token_id,
        bos_id=tokenizer.bos_token_id,
    )
    shardings = param_shardings(param_specs(cfg), ctx.mesh)
    params = init_params(cfg, jax.random.key(ctx.config.seed), jnp.float32, shardings)
    return Model(cfg, params, tokenizer)
