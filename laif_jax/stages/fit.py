"""What the training stages share: a model into a train state, the loop, and the trained model out to a folder."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from transformers import PreTrainedTokenizerBase

from laif_jax.config import SamplingSpec, TrainSpec
from laif_jax.data.pipeline import Batches
from laif_jax.models.lora import add_lora, trainable_mask
from laif_jax.models.model import Model, load_model, save_model
from laif_jax.models.specs import param_specs
from laif_jax.parallel.mesh import row_parts, row_shard
from laif_jax.parallel.rules import param_shardings
from laif_jax.records import Prompt
from laif_jax.stages.context import Context
from laif_jax.stages.table import SampleTable
from laif_jax.training import together
from laif_jax.training.loop import train
from laif_jax.training.optim import make_optimizer, optimizer_hyper
from laif_jax.training.reference import ReferenceLogps, reference_logps
from laif_jax.training.state import TrainState, create_state

MODEL = "model"
SHOWN = 4  # prompts in a table of samples


def load(ctx: Context, folder: epath.Path) -> Model:
    """The model that training starts from, on the study's mesh: float32 weights; or fresh adapters over weights in the
    compute dtype, in which they stay frozen (in float32 they would lie beside that copy until the stage ends)."""
    spec = ctx.config.model
    tokenizer = spec.tokenizer if spec.source != "scratch" else None
    dtype = jnp.dtype(spec.dtype) if spec.lora else jnp.float32
    model = routed(load_model(str(folder), dtype=dtype, mesh=ctx.mesh, tokenizer=tokenizer), spec.router_loss)
    if spec.lora is None:
        return model
    cfg = dataclasses.replace(model.cfg, lora=spec.lora)
    return Model(cfg, add_lora(model.params, cfg, jax.random.key(ctx.seed)), model.tokenizer)


def routed(model: Model, router_loss: float | None) -> Model:
    """The model with another weight of its load-balancing loss; None leaves it, as does a model without experts."""
    if router_loss is None or not model.cfg.num_experts:
        return model
    return dataclasses.replace(model, cfg=dataclasses.replace(model.cfg, router_loss=router_loss))


def batch_options(ctx: Context, spec: TrainSpec, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The arguments that `sft_batches` and `preference_batches` share."""
    index, count = row_shard(ctx.mesh)
    return {
        "batch_size": spec.batch_size,
        "micro_batch": spec.micro_batch,
        "max_length": spec.max_length,
        # Any id serves: masks come from lengths.
        "pad_id": next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0),
        "packing": spec.packing,
        "seed": ctx.seed,
        "epochs": spec.epochs,
        "steps": spec.steps,
        "row_multiple": row_parts(ctx.mesh),
        "process_index": index,
        "process_count": count,
    }


def fit(
    ctx: Context,
    folder: epath.Path,
    title: str,
    model: Model,
    make_task: Callable[..., Any],
    spec: TrainSpec,
    batches: Batches,
    *,
    pairs: int | None = None,
    reference_folder: epath.Path | None = None,
    shown: Sequence[Prompt] = (),
    sampling: SamplingSpec | None = None,
) -> dict[str, Any]:
    """Trains `model` in `folder/train` and writes the result to `folder/model`, adapters merged.

    Args:
      make_task: `sft_task` or `preference_task`. pairs: of a preference data set: its number of pairs; their reference
        log-probs are then computed once, by the model as it starts, and kept in `folder/reference-*.npz`.
      reference_folder: of another model, which then is the reference.
      shown: prompts whose completions are sampled, as `sampling` says, every `spec.sample_every` steps, into
        `folder/train/samples.jsonl`.

    Returns:
      The stage's metrics: those of the last logged step, how many steps, and what happened to the examples.
    """
    options = ctx.config.model
    more = {} if pairs is None else {"max_segments": batches.layout.max_segments}
    task = make_task(
        model.cfg, spec, dtype=options.dtype, remat=options.remat, chunk=options.logprob_chunk, **more
    )
    optimizer = make_optimizer(spec.optimizer)
    reference = None
    if pairs is not None and task.has_reference and reference_folder is not None:
        task = dataclasses.replace(task, starts_at_reference=False)
        # Before the policy's optimiser state is made: that and the reference never lie side by side.
        other = _state(ctx, load(ctx, reference_folder), optimizer)
        reference, _ = _reference(ctx, folder, task, other, optimizer, spec, batches, pairs)
    state = _state(ctx, model, optimizer)
    starts_at_reference = pairs is not None and task.has_reference and reference is None
    if pairs is not None and starts_at_reference and not together.joined():
        reference, state = _reference(ctx, folder, task, state, optimizer, spec, batches, pairs)
    table = None
    if spec.sample_every and shown and sampling:
        table = SampleTable(ctx, model, shown, folder / "train" / "samples.jsonl", sampling)
    result = train(
        task,
        batches,
        state,
        spec,
        folder / "train",
        mesh=ctx.mesh,
        optimizer=optimizer,
        reference=reference,
        callback=table,
        callback_every=spec.sample_every,
        wandb={"project": ctx.config.wandb, "name": f"{title}-{folder.name}"} if ctx.config.wandb else None,
        title=title,
        own_reference=pairs if starts_at_reference and reference is None else None,
    )
    trained = Model(model.cfg, result.state.params, model.tokenizer)
    save_model(folder / MODEL, trained, dtype=jnp.dtype(options.save_dtype))
    last = {name: value for name, value in result.history[-1].items() if name not in ("step", "epoch")}
    speeds = [
        row["perf/tokens_per_second_per_device"]
        for row in result.history
        if "perf/tokens_per_second_per_device" in row
    ]
    return {
        "steps": batches.total_steps,
        "last": last,
        "tokens_per_second_per_device": sorted(speeds)[len(speeds) // 2] if speeds else None,
        "examples": dataclasses.asdict(batches.report),
    }


def _reference(
    ctx: Context,
    folder: epath.Path,
    task: Any,
    state: TrainState,
    optimizer: Any,
    spec: TrainSpec,
    batches: Batches,
    pairs: int,
) -> tuple[ReferenceLogps, TrainState]:
    return reference_logps(
        task,
        state,
        optimizer,
        batches,
        pairs,
        mesh=ctx.mesh,
        hyper=optimizer_hyper(spec.optimizer) | dict(task.numbers),
        cache_dir=folder,
        steps=min(batches.total_steps, batches.steps_per_epoch),
    )


def _state(ctx: Context, model: Model, optimizer: Any) -> TrainState:
    lora = model.cfg.lora is not None
    return create_state(
        model.params,
        optimizer,
        mesh=ctx.mesh,
        shardings=param_shardings(param_specs(model.cfg), ctx.mesh),
        trainable=trainable_mask(model.params, model.cfg) if lora else None,
        frozen_dtype=jnp.dtype(ctx.config.model.dtype) if lora else None,
        donate=True,
    )
