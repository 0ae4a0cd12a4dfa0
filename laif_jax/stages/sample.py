"""Completions sampled from one of our models."""

import json
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from laif_jax.config import SamplingSpec
from laif_jax.data.chat import encode_prompts, end_of_turn_ids
from laif_jax.data.sources import SourceRow
from laif_jax.models.model import Model, load_model
from laif_jax.parallel import distributed
from laif_jax.records import Completion, Usage, read_jsonl, write_json, write_jsonl
from laif_jax.rollout.generate import Sample, generate
from laif_jax.rollout.score import logp_difference
from laif_jax.stages import prompts as prompts_stage
from laif_jax.stages.artifact import Artifact, StageError, run_stage
from laif_jax.stages.base import compute_dtype, model_folder, model_settings
from laif_jax.stages.context import Context
from laif_jax.stages.progress import progress_lines

FILE = "completions.jsonl.gz"
CHECKED = 16  # samples of a part whose log-probs are computed again by a full forward pass
PART = 32  # batches after which what was sampled is put aside


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
        completions, difference, truncated = _sample(
            ctx, folder, rows, model_folder(model), generator, spec, max_prompt_length
        )
        lengths = [completion.usage.completion_tokens for completion in completions if completion.usage]
        clipped = sum(completion.finish_reason == "length" for completion in completions)
        return {
            "completions": len(completions),
            "prompts_truncated": truncated,
            **difference,
            "response_length/mean": sum(lengths) / len(lengths),
            "response_length/max": max(lengths),
            "response_length/clip_ratio": clipped / len(completions),
        }

    return run_stage("sample", settings, {"prompts": prompts, "model": model}, ctx.root, work)


def read(artifact: Artifact) -> list[Completion]:
    """The completions; those of one prompt stand together, by sample index."""
    return [Completion.from_row(row) for row in read_jsonl(artifact.path / FILE)]


def _sample(
    ctx: Context,
    folder: epath.Path,
    rows: Sequence[SourceRow],
    weights: epath.Path,
    generator: str,
    spec: SamplingSpec,
    max_prompt_length: int,
) -> tuple[list[Completion], dict[str, float], int]:
    """Writes the completions and returns them, how far sampler and trainer differ, and how many prompts were cut.

    What was sampled is put aside every `PART` batches, so that a stage that was cut short goes on behind it. A sample's
    random key names its prompt, so the parts are what one call would have drawn.
    """
    loaded = load_model(str(weights), mesh=ctx.mesh)
    template = ctx.config.model.template
    encoded = encode_prompts(
        loaded.tokenizer, [row.prompt.messages for row in rows], template, max_prompt_length
    )
    ends = tuple(dict.fromkeys((*loaded.cfg.eos_ids, *end_of_turn_ids(loaded.tokenizer, template))))
    size = max(1, PART * spec.batch_size // spec.samples)
    parts = []
    for start in range(0, len(rows), size):
        indices = range(start, min(start + size, len(rows)))
        path = folder / "parts" / f"{indices.start}-{indices.stop}.json"

        def draw(indices: range = indices) -> dict[str, Any]:
            tokens = [encoded.tokens[i] for i in indices]
            samples = generate(
                loaded.params,
                loaded.cfg,
                tokens,
                spec,
                jax.random.key(ctx.seed),
                dtype=compute_dtype(ctx),
                eos_ids=ends,
                mesh=ctx.mesh,
                indices=indices,
                progress=progress_lines(f"samples of {generator}, prompts {indices.start} to {indices.stop}"),
            )
            # Sampler and trainer must agree on what was sampled: the trainer's forward pass over a few rows shows it.
            difference = logp_difference(
                loaded.params,
                loaded.cfg,
                tokens,
                samples[: min(len(samples), CHECKED)],
                temperature=spec.temperature,
                dtype=compute_dtype(ctx),
            )
            rows_of = [
                _completion(rows[indices[s.prompt_index]], s, generator, loaded, tokens) for s in samples
            ]
            return {"completions": [completion.to_row() for completion in rows_of], "difference": difference}

        found = distributed.from_main(
            lambda path=path: json.loads(path.read_text()) if path.exists() else None
        )
        if found is None:
            found = draw()
            if distributed.is_main():
                write_json(path, found)
        parts.append(found)
    completions = [Completion.from_row(row) for part in parts for row in part["completions"]]
    if distributed.is_main():
        write_jsonl(folder / FILE, completions)
        (folder / "parts").rmtree()
    names = parts[0]["difference"]
    difference = {name: max(part["difference"][name] for part in parts) for name in names}
    return completions, difference, encoded.truncated_count


def _completion(
    row: SourceRow, sample: Sample, generator: str, model: Model, prompts: Sequence[Sequence[int]]
) -> Completion:
    return Completion(
        prompt_id=row.prompt.id,
        generator=generator,
        text=str(model.tokenizer.decode(sample.tokens, skip_special_tokens=True)).strip(),
        finish_reason=sample.finish_reason,
        sample_index=sample.sample_index,
        usage=Usage(prompt_tokens=len(prompts[sample.prompt_index]), completion_tokens=len(sample.tokens)),
    )
