"""Completions sampled from one of our models."""

from typing import Any

import jax
from etils import epath

from laif_jax.config import SamplingSpec
from laif_jax.data.chat import encode_prompts, end_of_turn_ids
from laif_jax.models.model import load_model
from laif_jax.parallel import distributed
from laif_jax.records import Completion, Usage, read_jsonl, write_jsonl
from laif_jax.rollout.generate import generate
from laif_jax.rollout.score import logp_difference
from laif_jax.stages import prompts as prompts_stage
from laif_jax.stages.artifact import Artifact, StageError, run_stage
from laif_jax.stages.base import compute_dtype, model_folder, model_settings
from laif_jax.stages.context import Context
from laif_jax.stages.progress import progress_lines

FILE = "completions.jsonl.gz"
CHECKED = 16  # samples whose log-probs are computed again by a full forward pass


def run(
    ctx: Context,
    prompts: Artifact,
    model: Artifact,
    *,
    generator: str,
    split: str,
    spec: SamplingSpec,
    max_prompt_length: int,
    start: int = 0,
    stop: int | None = None,
) -> Artifact:
    """Samples `spec.samples` completions for each of the rows `start:stop` of a split. None is dropped; a completion
    that reached `max_new_tokens` says so in `finish_reason`."""
    settings = {
        "model": model_settings(ctx),
        "split": split,
        "start": start,
        "stop": stop,
        "sampling": {key: value for key, value in spec.resolved().items() if key != "batch_size"},
        "max_prompt_length": max_prompt_length,
        "generator": generator,
        "seed": ctx.seed,
    }

    def work(folder: epath.Path) -> dict[str, Any]:
        rows = prompts_stage.read(prompts, split)[start:stop]
        if not rows:
            raise StageError(
                f"no prompts are left to sample for: the share for SFT takes all {start} of them. Give more prompts "
                "(`data.train`) or a smaller `share`"
            )
        loaded = load_model(str(model_folder(model)), mesh=ctx.mesh)
        template = ctx.config.model.template
        encoded = encode_prompts(
            loaded.tokenizer, [row.prompt.messages for row in rows], template, max_prompt_length
        )
        samples = generate(
            loaded.params,
            loaded.cfg,
            encoded.tokens,
            spec,
            jax.random.key(ctx.seed),
            dtype=compute_dtype(ctx),
            eos_ids=tuple(dict.fromkeys((*loaded.cfg.eos_ids, *end_of_turn_ids(loaded.tokenizer, template)))),
            mesh=ctx.mesh,
            progress=progress_lines(f"samples of {generator}"),
        )
        # Sampler and trainer must agree on what was sampled: the trainer's forward pass over a few rows shows it.
        checked = samples[: min(len(samples), CHECKED)]
        difference = logp_difference(
            loaded.params,
            loaded.cfg,
            encoded.tokens,
            checked,
            temperature=spec.temperature,
            dtype=compute_dtype(ctx),
        )
        completions = [
            Completion(
                prompt_id=rows[sample.prompt_index].prompt.id,
                generator=generator,
                text=str(loaded.tokenizer.decode(sample.tokens, skip_special_tokens=True)).strip(),
                finish_reason=sample.finish_reason,
                sample_index=sample.sample_index,
                usage=Usage(
                    prompt_tokens=len(encoded.tokens[sample.prompt_index]),
                    completion_tokens=len(sample.tokens),
                ),
            )
            for sample in samples
        ]
        if distributed.is_main():
            write_jsonl(folder / FILE, completions)
        lengths = [len(sample.tokens) for sample in samples]
        return {
            "completions": len(completions),
            "prompts_truncated": encoded.truncated_count,
            **difference,
            "response_length/mean": sum(lengths) / len(lengths),
            "response_length/max": max(lengths),
            "response_length/clip_ratio": sum(s.finish_reason == "length" for s in samples) / len(samples),
        }

    return run_stage("sample", settings, {"prompts": prompts, "model": model}, ctx.root, work)


def read(artifact: Artifact) -> list[Completion]:
    """The completions; those of one prompt stand together, by sample index."""
    return [Completion.from_row(row) for row in read_jsonl(artifact.path / FILE)]
