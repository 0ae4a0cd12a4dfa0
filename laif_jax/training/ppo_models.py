"""The models of PPO on one mesh: which weights are trained, which are frozen, and which are views of others.

policy      trained; with adapters, they alone (and the scalar head of a shared trunk)
reference   frozen: other weights if they are given; else the policy's start: with adapters the very same arrays
            without the adapters, else a copy in the compute dtype
value       a model of its own, or a scalar head on the policy's trunk. With adapters: adapters of its own and a scalar
            head over frozen weights that the policy, or the reward model, has anyway
scorers     frozen: reward models, which may be adapters over the reference's weights (`RewardAdapters.over`)
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from laif_jax.config.rl import PpoSpec
from laif_jax.config.schema import LoraSpec
from laif_jax.models.arch import ModelConfig
from laif_jax.models.dtypes import in_compute_dtype
from laif_jax.models.lora import add_lora, merge_lora, trainable_mask
from laif_jax.models.reward import change_head, member
from laif_jax.models.specs import param_specs
from laif_jax.parallel import param_shardings
from laif_jax.rollout.ppo import ScorerConfig, auto_mesh
from laif_jax.rollout.ppo_heads import vocabulary_head
from laif_jax.training.optim import make_optimizer
from laif_jax.training.state import TrainState, create_state, partition

Tree = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Scorer:
    """A reward model that reads the policy's tokens. Its scores become (score - mean) / std."""

    config: ScorerConfig
    params: Any
    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True, eq=False)
class PpoModels:
    """All models of a run.

    Attributes:
      policy: the policy's architecture, with adapters and scalar head where it has them. value: of a separate value
        model, or None. reference: the reference's.
      state: of {"policy"} or {"policy", "value"}. reference_params: its tree. scorers: by name.
      mesh: of automatic axes.
    """

    mesh: Mesh
    policy: ModelConfig
    reference: ModelConfig
    value: ModelConfig | None
    state: TrainState
    reference_params: Any
    scorers: Mapping[str, Scorer] = field(default_factory=dict)

    @property
    def shared(self) -> bool:
        """Whether values come from the policy's trunk."""
        return self.policy.head == "both"

    def for_rollout(self, state: TrainState) -> Tree:
        """The trees of `make_rollout`, with the parameters of a state."""
        scorers = {
            name: {
                "params": scorer.params,
                "mean": jnp.float32(scorer.mean),
                "std": jnp.float32(scorer.std),
            }
            for name, scorer in self.scorers.items()
        }
        return state.params | {"reference": self.reference_params, "scorers": scorers}

    def reference_head(self) -> Tree:
        """What a full KL in the loss reads of the reference."""
        return vocabulary_head(self.reference_params, self.reference)

    def language_model(self, state: TrainState) -> tuple[ModelConfig, Tree]:
        """The policy as it is saved: without a scalar head."""
        return change_head(self.policy, state.params["policy"], "lm")


def build_models(
    spec: PpoSpec,
    cfg: ModelConfig,
    params: Mapping[str, Any],
    *,
    mesh: Mesh,
    key: jax.Array,
    dtype: Any = jnp.float32,
    reference: tuple[ModelConfig, Any] | None = None,
    scorers: Mapping[str, Scorer] | None = None,
    value_from: Scorer | None = None,
) -> PpoModels:
    """Lays out the models of a run; what is trained is copied, so that no given array is ever donated.

    Args:
      cfg, params: the policy to start from, a language model, with adapters (`add_lora`) where they are to be trained.
      mesh: of any axis type; all models come to it. key: of fresh heads and adapters. dtype: of compute.
      reference: another model than the policy's start. scorers: reward models by name.
      value_from: the reward model that a separate value model starts from; None: it starts from the policy.
    """
    mesh = auto_mesh(mesh)
    moved = {name: _moved(scorer, mesh) for name, scorer in (scorers or {}).items()}
    if value_from is not None:  # where it is one of the scorers, its frozen weights are to be the very same
        same = next((moved[name] for name, scorer in (scorers or {}).items() if scorer is value_from), None)
        value_from = same or _moved(value_from, mesh)
    params = _on(params, mesh)
    if cfg.lora is not None:
        params = frozen_in(params, cfg, dtype)
    if reference is None:
        ref_cfg, ref_params = without_adapters(cfg, params)
    else:
        ref_cfg, ref_params = reference[0], _on(reference[1], mesh)
    ref_params = in_compute_dtype(ref_params, dtype)
    keys = jax.random.split(key, 2)
    value = None
    if spec.learns_values and spec.value == "shared":
        cfg, params = change_head(cfg, params, "both", key=keys[0], mesh=mesh)
    elif spec.learns_values:
        value = _value_model(cfg, params, value_from, keys[1], mesh, dtype)
    state = _state(spec, {"policy": (cfg, params)} | ({"value": value} if value else {}), mesh)
    return PpoModels(mesh, cfg, ref_cfg, value[0] if value else None, state, ref_params, moved)


def _value_model(
    cfg: ModelConfig,
    params: Tree,
    source: Scorer | None,
    key: jax.Array,
    mesh: Mesh,
    dtype: Any,
) -> tuple[ModelConfig, Tree]:
    """A separate value model: of the policy under a fresh scalar head, or of a reward model (an ensemble's first)."""
    head_key, lora_key = jax.random.split(key)
    if source is None:
        base_cfg, base = without_adapters(cfg, params)
        new, tree = change_head(base_cfg, base, "score", key=head_key, mesh=mesh)
    else:
        new = source.config.cfg
        tree = member(source.params, new, 0) if source.config.members > 1 else source.params
    if cfg.lora is None:  # everything is trained
        return (new, tree) if new.lora is None else (_plain(new), merge_lora(tree, new, dtype=jnp.float32))
    if new.lora is None:
        new, tree = _with_adapters(new, tree, cfg.lora, lora_key, mesh)
    return new, frozen_in(tree, new, dtype)


def _with_adapters(
    cfg: ModelConfig, params: Tree, lora: LoraSpec, key: jax.Array, mesh: Mesh
) -> tuple[ModelConfig, Tree]:
    new = dataclasses.replace(cfg, lora=lora)
    return new, add_lora(params, new, key, param_shardings(param_specs(new), mesh))


def _state(spec: PpoSpec, models: Mapping[str, tuple[ModelConfig, Tree]], mesh: Mesh) -> TrainState:
    """Trained leaves copied to float32, frozen ones as they are."""
    trained, frozen, shardings = {}, {}, {}
    for name, (cfg, params) in models.items():
        mask = trainable_mask(params, cfg)
        trained[name], rest = partition(params, mask)
        if rest:
            frozen[name] = rest
        shardings[name] = partition(param_shardings(param_specs(cfg), mesh), mask)[0]
    state = create_state(trained, make_optimizer(spec.optimizer), mesh=mesh, shardings=shardings)
    return dataclasses.replace(state, frozen=frozen)


# ---- views -----------------------------------------------------------------------------------------------------


def without_adapters(cfg: ModelConfig, params: Mapping[str, Any]) -> tuple[ModelConfig, Tree]:
    """The language model below adapters and scalar head; the same arrays."""

    def strip(tree: Mapping[str, Any]) -> Tree:
        return {
            name: strip(child) if isinstance(child, Mapping) else child
            for name, child in tree.items()
            if not name.startswith("lora_") and name != "score"
        }

    return dataclasses.replace(_plain(cfg), head="lm"), strip(params)


def frozen_in(params: Tree, cfg: ModelConfig, dtype: Any) -> Tree:
    """A model with adapters, its frozen weights in the compute dtype."""
    mask = trainable_mask(params, cfg)
    return jax.tree.map(
        lambda x, trained, cast: x if trained else cast, params, mask, in_compute_dtype(params, dtype)
    )


def _plain(cfg: ModelConfig) -> ModelConfig:
    return dataclasses.replace(cfg, lora=None)


def _moved(scorer: Scorer, mesh: Mesh) -> Scorer:
    return dataclasses.replace(scorer, params=_on(scorer.params, mesh))


def _on(params: Any, mesh: Mesh) -> Tree:
    """The tree on the mesh: laid as it is on a mesh of the same devices, replicated where it lies elsewhere. Arrays
    that are there already are not copied."""

    def one(leaf: Any) -> jax.Array:
        sharding = getattr(leaf, "sharding", None)
        named = isinstance(sharding, NamedSharding) and sharding.mesh.shape == mesh.shape
        spec = sharding.spec if named else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(one, dict(params))
