"""The real steps of a configuration as abstract programs: the jitted functions that the stages run, and the shapes and
shardings of what they are given. No weight is made and no data is read."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import yaml
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from laif_jax.aot.flops import model_flops
from laif_jax.config import DpoSpec, PairTrainSpec, PpoSpec, RewardSpec, RunConfig, SamplingSpec, TrainSpec
from laif_jax.data.plan import make_layout
from laif_jax.models.config import from_hf, scratch
from laif_jax.models.decoder import unstack_layers
from laif_jax.models.lora import trainable_mask
from laif_jax.models.model import load_config, resolve
from laif_jax.models.reward import reward_specs
from laif_jax.models.specs import ParamSpec, param_specs
from laif_jax.models.tokenizer import load_tokenizer
from laif_jax.parallel import batch_shardings, param_shardings
from laif_jax.parallel.mesh import row_parts
from laif_jax.records.errors import LaifError
from laif_jax.rollout import engine
from laif_jax.rollout.buckets import batch_bucket, length_bucket
from laif_jax.rollout.placement import row_sharding
from laif_jax.rollout.ppo import Prompts, ScorerConfig, make_rollout
from laif_jax.rollout.sampling import SamplingParams
from laif_jax.training.optim import make_optimizer, optimizer_hyper
from laif_jax.training.ppo import make_update
from laif_jax.training.ppo_models import PpoModels, Scorer, without_adapters
from laif_jax.training.ppo_plan import make_layout as ppo_layout
from laif_jax.training.ppo_plan import rollout_config, update_config
from laif_jax.training.reward_task import reward_task
from laif_jax.training.state import TrainState, opt_state_shardings, partition
from laif_jax.training.step import make_train_step
from laif_jax.training.tasks import preference_task, sft_task, shares_prompts

AnyMesh = Any  # a Mesh, or an AbstractMesh for estimates: what is made of shapes takes either
STAGES = ("sft", "reward", "dpo", "ppo", "sample")
_KEY_WIDTH = 2  # words of a PRNG key's data


class NoStageError(LaifError, ValueError):
    """The configuration does not have the stage that was asked for."""


@dataclass(frozen=True)
class Program:
    """One compiled program of a stage.

    Attributes:
      name: "train", "rollout", "update", "prefill" or "decode". function: jitted. args: ShapeDtypeStructs, and static
        numbers.
      examples: of one run, over all chips.
      model_flops: of one run, over all chips. trips: of loops that end on data. repeat: runs per stage step.
      resident: bytes per chip that lie in memory meanwhile and are not among the arguments.
      shared: bytes per chip that are counted twice among the arguments, being the same arrays.
      saved: bytes per chip that the backward pass keeps with `remat: full`, for estimates; grads: of gradients.
    """

    name: str
    function: Any
    args: tuple[Any, ...]
    examples: float
    model_flops: float
    trips: int = 1
    repeat: int = 1
    resident: float = 0.0
    shared: float = 0.0
    saved: float = 0.0
    grads: float = 0.0


# ---- models ------------------------------------------------------------------------------------------------------


def architecture(config: RunConfig) -> Any:
    """The ModelConfig of `model`, adapters included, from the package's table of models or from the model's folder."""
    spec = config.model
    table = yaml.safe_load(Path(__file__).with_name("models.yaml").read_text())
    if spec.source == "scratch":
        assert spec.scratch is not None
        assert spec.tokenizer is not None
        return scratch(spec.scratch, len(load_tokenizer(spec.tokenizer)), lora=spec.lora)
    if spec.source in table:
        return from_hf(table[spec.source], lora=spec.lora)
    return dataclasses.replace(load_config(resolve(spec.source)), lora=spec.lora)


def struct(shape: Any, dtype: Any, sharding: Any) -> Any:
    """Stands for an array."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def abstract_params(specs: Any, mesh: AnyMesh, dtype: Any) -> Any:
    """The tree of parameters, laid over the mesh as `param_shardings` says."""
    shardings = param_shardings(specs, mesh)
    leaf = lambda x: isinstance(x, ParamSpec)  # noqa: E731
    return jax.tree.map(lambda s, p: struct(s.shape, dtype, p), specs, shardings, is_leaf=leaf)


def abstract_state(
    params: Any, optimizer: Any, mesh: AnyMesh, mask: Any, frozen: Callable[[Any], Any]
) -> TrainState:
    """What `create_state` gives. `mask`: what is trained, None: all. `frozen`: the tree of the rest, as it is kept."""
    whole = NamedSharding(mesh, PartitionSpec())
    trained, rest = partition(params, mask)
    shapes = jax.eval_shape(optimizer.init, trained)
    places = opt_state_shardings(
        optimizer, shapes, trained, jax.tree.map(lambda x: x.sharding, trained), whole
    )
    opt_state = jax.tree.map(lambda s, p: struct(s.shape, s.dtype, p), shapes, places)
    return TrainState(
        struct((), jnp.int32, whole), trained, frozen(rest), opt_state, struct((), jnp.bool_, whole)
    )


def in_dtype(tree: Any, dtype: Any) -> Any:
    """The tree in another dtype, but for what computes in float32: norms and scalar heads."""

    def one(path: Any, x: Any) -> Any:
        names = [str(getattr(entry, "key", "")) for entry in path]
        keep = any(name.endswith("norm") or name == "score" for name in names)
        return x if keep else struct(x.shape, dtype, x.sharding)

    return jax.tree_util.tree_map_with_path(one, tree)


def bytes_per_chip(tree: Any) -> float:
    """What a tree of laid out arrays takes on one chip."""

    def one(x: Any) -> float:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * jnp.dtype(x.dtype).itemsize

    return float(sum(one(leaf) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape")))


# ---- training ----------------------------------------------------------------------------------------------------


def _train(
    task: Any, spec: TrainSpec, state: TrainState, optimizer: Any, mesh: AnyMesh, cfg: Any, *, pairs: bool
) -> list[Program]:
    # An estimate, without devices, is of a TPU: there pairs lie apart.
    shared = isinstance(spec, PairTrainSpec) and isinstance(mesh, Mesh) and shares_prompts(spec, mesh, cfg)
    layout = make_layout(
        batch_size=spec.batch_size,
        micro_batch=spec.micro_batch,
        max_length=spec.max_length,
        max_segments=None,
        packing=spec.packing,
        row_multiple=row_parts(mesh),
        process_count=1,
        of_pairs=pairs,
        share_prompts=shared,
    )
    rows = (layout.micro_batches, layout.rows, layout.row_length)
    shapes: dict[str, Any] = dict.fromkeys(("tokens", "segment_ids", "positions"), (rows, jnp.int32))
    shapes["loss_mask"] = (rows, jnp.float32)
    if pairs:
        table = (layout.micro_batches, layout.pairs)
        shapes |= dict.fromkeys(("chosen", "rejected", "pair_index"), (table, jnp.int32))
        shapes |= dict.fromkeys(("p_chosen", "weight", "ref_chosen", "ref_rejected"), (table, jnp.float32))
        if shared:
            shapes["prefix"] = (rows, jnp.int32)
        task = dataclasses.replace(task, max_segments=layout.max_segments)
        if getattr(task, "members", 1) > 1 and getattr(spec, "bootstrap", False):
            shapes["member_weight"] = ((*table, task.members), jnp.float32)
    plain = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}
    places = batch_shardings(plain, mesh)
    batch = {name: struct(x.shape, x.dtype, places[name]) for name, x in plain.items()}
    step = make_train_step(
        task,
        optimizer,
        mesh=mesh,
        state_shardings=jax.tree.map(lambda x: x.sharding, state),
        batch_shardings=places,
    )
    whole = NamedSharding(mesh, PartitionSpec())
    numbers = optimizer_hyper(spec.optimizer) | dict(task.numbers) | {"learning_rate": 0.0}
    hyper = {name: struct((), jnp.float32, whole) for name in numbers}
    tokens = layout.micro_batches * layout.rows * layout.row_length
    mine = layout.rows * layout.row_length / row_parts(mesh)
    return [
        Program(
            "train",
            step,
            (state, batch, hyper),
            examples=spec.batch_size,
            model_flops=model_flops(state.trainable, state.frozen, cfg, tokens, layout.row_length),
            saved=mine * cfg.hidden_size * cfg.num_layers * jnp.dtype(task.dtype).itemsize,
            grads=bytes_per_chip(state.trainable) * (2 if layout.micro_batches > 1 else 1),
        )
    ]


def _model_state(config: RunConfig, cfg: Any, spec: Any, mesh: AnyMesh, specs: Any) -> tuple[TrainState, Any]:
    """A stage's state at its start: float32 weights; or adapters over weights in the compute dtype."""
    optimizer = make_optimizer(spec.optimizer)
    params = abstract_params(specs, mesh, jnp.float32)
    dtype = jnp.dtype(config.model.dtype)
    mask = None if cfg.lora is None else trainable_mask(params, cfg)
    frozen = lambda rest: jax.tree.map(lambda x: struct(x.shape, dtype, x.sharding), rest)  # noqa: E731
    return abstract_state(params, optimizer, mesh, mask, frozen), optimizer


def _options(config: RunConfig) -> dict[str, Any]:
    model = config.model
    return {"dtype": model.dtype, "remat": model.remat, "chunk": model.logprob_chunk}


def sft(config: RunConfig, mesh: AnyMesh) -> list[Program]:
    """The step of supervised fine-tuning."""
    spec, cfg = section(config, "sft"), architecture(config)
    state, optimizer = _model_state(config, cfg, spec, mesh, param_specs(cfg))
    return _train(sft_task(cfg, spec, **_options(config)), spec, state, optimizer, mesh, cfg, pairs=False)


def dpo(config: RunConfig, mesh: AnyMesh) -> list[Program]:
    """The step of preference optimisation; log-probs of the reference are data."""
    spec, cfg = section(config, "dpo"), architecture(config)
    assert isinstance(spec, DpoSpec)
    state, optimizer = _model_state(config, cfg, spec, mesh, param_specs(cfg))
    task = preference_task(cfg, spec, **_options(config))
    return _train(task, spec, state, optimizer, mesh, cfg, pairs=True)


def reward(config: RunConfig, mesh: AnyMesh) -> list[Program]:
    """The step of a reward model, or of an ensemble."""
    spec = section(config, "reward")
    assert isinstance(spec, RewardSpec)
    cfg = dataclasses.replace(architecture(config), head="score")
    state, optimizer = _model_state(config, cfg, spec, mesh, reward_specs(cfg, spec.members))
    task = reward_task(cfg, spec, **_options(config))
    return _train(task, spec, state, optimizer, mesh, cfg, pairs=True)


# ---- reinforcement learning --------------------------------------------------------------------------------------


def ppo(config: RunConfig, mesh: AnyMesh) -> list[Program]:
    """Rollout and update, with one reward model of the policy's size that reads its tokens."""
    spec, cfg = section(config, "ppo"), architecture(config)
    assert isinstance(spec, PpoSpec)
    models, resident = _ppo_models(config, spec, cfg, mesh)
    layout = ppo_layout(spec, mesh, spec.max_prompt_length, spec.sampling.max_new_tokens)
    dtype, chunk = config.model.dtype, config.model.logprob_chunk
    rollout = make_rollout(rollout_config(spec, models, layout, dtype=dtype, chunk=chunk), mesh)
    rows = row_sharding(mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    number = lambda shape=(), dtype=jnp.float32: struct(shape, dtype, whole)  # noqa: E731
    size = (layout.padded,)
    prompts = Prompts(
        struct((layout.padded, layout.width), jnp.int32, rows),
        struct(size, jnp.int32, rows),
        struct((layout.padded, _KEY_WIDTH), jnp.uint32, rows),
        struct(size, jnp.int32, rows),
    )
    trees = _for_rollout(models)
    given = (trees, prompts, number((8,), jnp.int32), number())
    experience = jax.eval_shape(rollout, *given)
    experience = jax.tree.map(lambda x: struct(x.shape, x.dtype, rows), experience)
    updates = spec.epochs * spec.minibatches
    order = number(
        (updates, max(layout.rows // spec.minibatches // layout.micro, 1), layout.micro), jnp.int32
    )
    names = (*optimizer_hyper(spec.optimizer), *_PPO_NUMBERS)
    hyper = {name: number() for name in names} | {
        "learning_rate": number((updates,)),
        "weights": {"model": number()},
    }
    update = make_update(
        update_config(spec, models, dtype=dtype, remat=config.model.remat, chunk=chunk),
        make_optimizer(spec.optimizer),
        mesh,
        jax.tree.map(lambda x: x.sharding, models.state),
    )
    full = models.reference_head() if spec.kl.estimator == "full" and spec.kl.place == "loss" else None
    scores = {"model": struct(size, jnp.float32, rows)}
    weight = struct(size, jnp.float32, rows)
    state = models.state
    length = layout.width + layout.new_tokens
    tokens = layout.rows * length
    readers = 2 + ("value" in trees) + len(models.scorers)
    forward = model_flops({}, trees["reference"], models.reference, tokens, length, forward_only=True)
    train = model_flops(state.trainable, state.frozen, cfg, tokens * spec.epochs, length)
    twice = bytes_per_chip(state.frozen) + (bytes_per_chip(trees["reference"]) if cfg.lora else 0.0)
    return [
        Program(
            "rollout",
            rollout,
            given,
            examples=layout.rows,
            model_flops=forward * (readers + layout.new_tokens / length),
            trips=layout.new_tokens,
            resident=bytes_per_chip(state.opt_state),
            shared=twice if cfg.lora else 0.0,
            saved=0.0,
        ),
        Program(
            "update",
            _Whole(update),
            (state, full, experience, scores, weight, order, hyper),
            examples=layout.rows,
            model_flops=train,
            resident=resident,
            saved=layout.micro / row_parts(mesh) * length * cfg.hidden_size * cfg.num_layers * 2.0,
            grads=2 * bytes_per_chip(state.trainable),
        ),
    ]


_PPO_NUMBERS = (
    "clip_low", "clip_high", "dual_clip", "value_clip", "value_coef", "entropy_coef", "gamma", "lam", "reward_clip",
    "missing_eos_penalty", "missing_eos_reward", "temperature", "kl_coef", "policy_coef",
)  # fmt: skip


@dataclass(frozen=True)
class _Whole:
    """`make_update`'s plain function as one that can be traced: its inner jit is what is compiled."""

    update: Any

    def trace(self, *args: Any) -> Any:
        return jax.jit(self.update, donate_argnums=(0,)).trace(*args)


def _for_rollout(models: PpoModels) -> dict[str, Any]:
    whole = models.state.step.sharding
    scorers = {
        name: {
            "params": s.params,
            "mean": struct((), jnp.float32, whole),
            "std": struct((), jnp.float32, whole),
        }
        for name, s in models.scorers.items()
    }
    return models.state.params | {"reference": models.reference_params, "scorers": scorers}


def _ppo_models(config: RunConfig, spec: PpoSpec, cfg: Any, mesh: AnyMesh) -> tuple[PpoModels, float]:
    """The models of `build_models`, abstract, and the bytes that lie beside an update's arguments."""
    dtype = jnp.dtype(config.model.dtype)
    shared = spec.learns_values and spec.value == "shared"
    policy = dataclasses.replace(cfg, head="both") if shared else cfg
    value = dataclasses.replace(cfg, head="score") if spec.learns_values and not shared else None
    trained, frozen = {}, {}
    for name, each in {"policy": policy, "value": value}.items():
        if each is not None:
            params = abstract_params(param_specs(each), mesh, jnp.float32)
            mask = None if each.lora is None else trainable_mask(params, each)
            trained[name], rest = partition(params, mask)
            if rest:
                frozen[name] = in_dtype(rest, dtype)
    state = abstract_state(trained, make_optimizer(spec.optimizer), mesh, None, lambda rest: rest)
    state = dataclasses.replace(state, frozen=frozen)
    reference, _ = without_adapters(cfg, {})
    ref_params = in_dtype(abstract_params(param_specs(reference), mesh, jnp.float32), dtype)
    judge = dataclasses.replace(cfg, head="score", lora=None)
    scorer = Scorer(
        ScorerConfig(judge), in_dtype(abstract_params(param_specs(judge), mesh, jnp.float32), dtype)
    )
    models = PpoModels(mesh, policy, reference, value, state, ref_params, {"model": scorer})
    return models, bytes_per_chip(scorer.params) + (0.0 if cfg.lora else bytes_per_chip(ref_params))


# ---- sampling ----------------------------------------------------------------------------------------------------


def sample(config: RunConfig, mesh: AnyMesh) -> list[Program]:
    """Prefill of a batch of prompts, and one step of the decode loop per new token. (One process refills finished rows:
    the same loop, and prefills of fewer prompts at a time.)"""
    spec, cfg = section(config, "sampling"), dataclasses.replace(architecture(config), lora=None)
    assert isinstance(spec, SamplingSpec)
    dtype = jnp.dtype(config.model.dtype)
    first = next(
        (getattr(config, name, None) for name in ("sft", "dpo", "ppo") if getattr(config, name, None)), None
    )
    longest = min(first.max_prompt_length if first else 256, cfg.max_position - spec.max_new_tokens)
    limit = cfg.max_position
    width = length_bucket(longest, limit)
    rows = batch_bucket(spec.batch_size, spec.batch_size, row_parts(mesh))
    capacity = min(spec.max_new_tokens, limit - 1)
    run = engine.compiled(cfg, dtype, capacity, None, mesh, spec.kv_cache)
    by_rows = row_sharding(mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    row = lambda dtype, *more: struct((rows, *more), dtype, by_rows)  # noqa: E731
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        params = in_dtype(_unstacked(abstract_params(param_specs(cfg), mesh, jnp.float32), cfg), dtype)
    settings = engine.RowSettings(
        row(jnp.uint32, _KEY_WIDTH),
        SamplingParams(row(jnp.float32), row(jnp.float32), row(jnp.int32)),
        row(jnp.int32),
    )
    ends = struct((8,), jnp.int32, whole)
    cache = min(width + capacity, limit)
    prompt = (params, row(jnp.int32, width), row(jnp.int32), settings, ends)
    forward = lambda tokens, length: model_flops({}, params, cfg, tokens, length, forward_only=True)  # noqa: E731
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state = jax.eval_shape(lambda *args: run.prefill(*args, cache), *prompt)
    state = jax.tree.map(lambda x: struct(x.shape, x.dtype, by_rows), state)

    def by_heads(x: Any) -> jax.ShapeDtypeStruct:
        """Of the cache, as compilers lay it (`compiling._follow` takes what they say)."""
        split = ("tensor",) if x.shape[1] % mesh.shape["tensor"] == 0 else ()
        spec = PartitionSpec(*by_rows.spec, *split)
        return struct(x.shape, x.dtype, NamedSharding(mesh, spec))

    state = state._replace(cache=jax.tree.map(by_heads, state.cache))
    number = struct((), jnp.int32, whole)
    decode = (params, state, settings, ends, row(jnp.bool_), number, number)
    return [
        Program("prefill", run.prefill, (*prompt, cache), rows, forward(rows * width, width)),
        Program("decode", run.decode, decode, 0.0, forward(rows, cache), repeat=capacity),
    ]


def _unstacked(params: Any, cfg: Any) -> Any:
    """Layers as decoding has them, each leaf laid as its layer of the stack."""
    shapes = jax.eval_shape(lambda tree: unstack_layers(tree, cfg), params)

    def one(path: Any, x: Any) -> Any:
        if path[0].key not in params:  # the copy of a tied embedding, the other way round
            table = params["embed"]["embedding"].sharding
            return struct(x.shape, x.dtype, NamedSharding(table.mesh, PartitionSpec(*reversed(table.spec))))
        node: Any = params
        for entry in path:
            if not hasattr(entry, "idx"):
                node = node[entry.key]
        spec = node.sharding.spec
        inner = PartitionSpec(*spec[1:]) if path[0].key == "layers" else spec
        return struct(x.shape, x.dtype, NamedSharding(node.sharding.mesh, inner))

    return jax.tree_util.tree_map_with_path(one, shapes)


# ---- by name -----------------------------------------------------------------------------------------------------

BUILDERS: Mapping[str, Callable[[RunConfig, AnyMesh], list[Program]]] = {
    "sft": sft,
    "reward": reward,
    "dpo": dpo,
    "ppo": ppo,
    "sample": sample,
}
_SECTIONS = {"sample": "sampling"}


def section(config: RunConfig, name: str) -> Any:
    """A section of the configuration. Raises NoStageError where there is none."""
    found = getattr(config, name, None)
    if found is None:
        raise NoStageError(
            f"the configuration has no section `{name}`; it has stages {', '.join(stages_of(config))}"
        )
    return found


def stages_of(config: RunConfig) -> list[str]:
    """The stages that a configuration has sections for."""
    return [name for name in STAGES if getattr(config, _SECTIONS.get(name, name), None) is not None]
