"""`laif inspect`: the batches that a training stage will really see."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from laif_jax.config import PairsSpec, RewardConfig, RewardSpec, expand_arms, load_config
from laif_jax.config.load import describes
from laif_jax.data.inspect import render
from laif_jax.data.pipeline import Batches
from laif_jax.models.model import load_model, resolve
from laif_jax.models.reward import start_reward_model
from laif_jax.models.tokenizer import load_tokenizer
from laif_jax.stages import base, dpo, sft
from laif_jax.stages.artifact import Artifact, StageError
from laif_jax.stages.base import model_folder
from laif_jax.stages.context import Context, Services, StudyContext
from laif_jax.stages.reward_data import Encoder, read_pairs
from laif_jax.studies.graph import Node, execute
from laif_jax.studies.laif import build
from laif_jax.studies.single import run_folder

# How the nodes of a training stage are named; of several, those of one round come first.
_NODES = {"sft": ("sft ",), "dpo": ("dpo ",), "reward": ("reward model on ", "reward model of ")}


def inspect_stage(config_path: str, overrides: Sequence[str], stage: str, count: int) -> None:
    """Prints the first `count` batches of the first arm that has the stage "sft", "dpo" or "reward"; or of the reward
    model that a file for `laif reward` describes.

    What the stage reads is made first, if it is not there: for "sft" prompts and teacher completions, for the others
    also the SFT policy, its samples and their labels. The stage itself is not run.

    Raises:
      StageError: no arm has the stage, or something that it reads could not be made.
    """
    if stage == "reward" and describes(config_path) is RewardConfig:
        _inspect_reward(config_path, overrides, count)
        return
    config = load_config(config_path, overrides)
    root = run_folder(config)
    with Services(config, root) as services:
        ctx = StudyContext(config=config, root=root, seed=config.seed, services=services)
        node = _training_node(ctx, stage)
        # Training reads a base model or policy too, but batches of text need its tokenizer alone.
        apart = {"sft": ("base",), "dpo": ("model", "start"), "reward": ()}[stage]
        wanted = {name: source for name, source in node.inputs.items() if name not in apart}
        outcomes = execute(wanted.values())
        inputs: dict[str, Artifact] = {}
        for name, source in wanted.items():
            outcome = outcomes[source]
            if outcome.artifact is None:
                raise StageError(f"`{source.name}`, which the batches are made from: {outcome.error}")
            inputs[name] = outcome.artifact
        batches, tokenizer = _batches(ctx, stage, inputs)
    _show(node.name, batches, tokenizer, count)


def _inspect_reward(config_path: str, overrides: Sequence[str], count: int) -> None:
    config = load_config(config_path, overrides, RewardConfig)
    root = run_folder(config)
    with Services(config, root) as services:
        ctx = Context(config=config, root=root, seed=config.seed, services=services)
        batches, tokenizer = _reward_batches(ctx, base.run(ctx), config.pairs, config.reward)
    _show("reward model", batches, tokenizer, count)


def _show(name: str, batches: Batches, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    console = Console()
    layout, report = batches.layout, batches.report
    console.print(
        f"{name}: {batches.total_steps} steps of {layout.micro_batches} micro-batch(es) of {layout.rows} rows of "
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
    ctx: StudyContext, stage: str, inputs: Mapping[str, Artifact]
) -> tuple[Batches, PreTrainedTokenizerBase]:
    labels = inputs.get("labels") or inputs.get("labels0")  # of an arm of rounds: its first round's
    if stage == "reward" and labels is not None and ctx.config.reward is not None:
        return _reward_batches(ctx, inputs["model"], [labels], ctx.config.reward)
    tokenizer = load_tokenizer(ctx.config.model.tokenizer or resolve(ctx.config.model.source))
    if stage == "dpo" and labels is not None:
        return dpo.make_batches(ctx, tokenizer, labels)[0], tokenizer
    share = expand_arms(ctx.config)[0].share
    return sft.make_batches(ctx, tokenizer, inputs["prompts"], inputs["teacher"], share), tokenizer


def _reward_batches(
    ctx: Context, policy: Artifact, pairs: Sequence[Artifact] | PairsSpec, spec: RewardSpec
) -> tuple[Batches, PreTrainedTokenizerBase]:
    """The tokenizer is the reward model's own, which may have an end-of-context token more."""
    options = ctx.config.model
    tokenizer = options.tokenizer if options.source != "scratch" else None
    loaded = load_model(str(model_folder(policy)), mesh=ctx.mesh, tokenizer=tokenizer)
    key = jax.random.key(ctx.seed)
    model = start_reward_model(loaded, spec, key, mesh=ctx.mesh, template=options.template)
    data = read_pairs(pairs, spec, ctx.seed)
    return Encoder(ctx, model, spec).training_batches(data.train), model.tokenizer


def _training_node(ctx: StudyContext, stage: str) -> Node:
    """The first arm's SFT, or the first DPO or reward model."""
    nodes = [node for chain in build(ctx).training.values() for node in chain]
    found = [node for name in _NODES[stage] for node in nodes if node.name.startswith(name)]
    if not found:
        users = {"dpo": "dpo` or `iterated_dpo", "reward": "ppo` (with `reward: model`) or `best_of_n"}
        raise StageError(f"no arm of this study has `optimize: {users[stage]}`, so there are no such batches")
    return min(found, key=lambda node: "begin" in node.inputs)
