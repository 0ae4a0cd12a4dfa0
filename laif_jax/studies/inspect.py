"""`laif inspect`: the batches that a training stage of a study will really see."""

import dataclasses
from collections.abc import Sequence

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from laif_jax.config import expand_arms, load_config
from laif_jax.data.inspect import render
from laif_jax.data.pipeline import Batches
from laif_jax.models.model import resolve
from laif_jax.models.tokenizer import load_tokenizer
from laif_jax.stages import dpo, sft
from laif_jax.stages.artifact import Artifact, StageError
from laif_jax.stages.context import Services, StudyContext
from laif_jax.studies.graph import Node, execute
from laif_jax.studies.laif import build
from laif_jax.studies.run import study_folder


def inspect_stage(config_path: str, overrides: Sequence[str], stage: str, count: int) -> None:
    """Prints the first `count` batches of the first arm that has the stage "sft" or "dpo".

    What the stage reads is made first, if it is not there: for "sft" prompts and teacher completions, for "dpo" also
    the SFT policy, its samples and their labels. The stage itself is not run.

    Raises:
      StageError: no arm has the stage, or something that it reads could not be made.
    """
    config = load_config(config_path, overrides)
    root = study_folder(config)
    with Services(config, root) as services:
        ctx = StudyContext(config=config, root=root, seed=config.seed, services=services)
        node = _training_node(ctx, stage)
        # Training reads a base model or policy too, but batches need its tokenizer alone.
        wanted = {name: source for name, source in node.inputs.items() if name not in ("base", "model")}
        outcomes = execute(wanted.values())
    inputs: dict[str, Artifact] = {}
    for name, source in wanted.items():
        outcome = outcomes[source]
        if outcome.artifact is None:
            raise StageError(f"`{source.name}`, which the batches are made from: {outcome.error}")
        inputs[name] = outcome.artifact
    tokenizer = load_tokenizer(config.model.tokenizer or resolve(config.model.source))
    batches = _batches(ctx, stage, tokenizer, inputs)
    console = Console()
    layout, report = batches.layout, batches.report
    console.print(
        f"{node.name}: {batches.total_steps} steps of {layout.micro_batches} micro-batch(es) of {layout.rows} rows of "
        f"{layout.row_length} tokens, at most {layout.max_segments} example(s) in a row"
    )
    console.print(
        ", ".join(
            f"{name.replace('_', ' ')} {value:.3g}" for name, value in dataclasses.asdict(report).items()
        )
    )
    for step in range(min(count, batches.total_steps)):
        console.print(render(batches.at(step), tokenizer, flags=batches.flags))


def _batches(
    ctx: StudyContext, stage: str, tokenizer: PreTrainedTokenizerBase, inputs: dict[str, Artifact]
) -> Batches:
    if stage == "dpo":
        return dpo.make_batches(ctx, tokenizer, inputs["labels"])[0]
    share = expand_arms(ctx.config)[0].share
    return sft.make_batches(ctx, tokenizer, inputs["prompts"], inputs["teacher"], share)


def _training_node(ctx: StudyContext, stage: str) -> Node:
    """The first arm's SFT, or the first DPO."""
    chains = build(ctx).training
    if stage == "sft":
        return next(iter(chains.values()))[0]
    found = next((chain[-1] for chain in chains.values() if len(chain) > 1), None)
    if found is None:
        raise StageError("no arm of this study has `optimize: dpo`, so there are no such batches")
    return found
