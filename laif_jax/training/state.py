"""What training changes: step, parameters, optimiser state. Frozen parameters travel along, untouched and unsaved."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from laif_jax.parallel.rules import spare_sharding

Tree = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes.

    Attributes:
      step: int32 [], updates done.
      trainable: nested dict of float32 leaves (master weights), the part of the parameters that is trained.
      frozen: nested dict of the other leaves, in any dtype; empty when everything is trained. Not checkpointed.
      opt_state: of the trainable leaves alone.
      healthy: bool []; a step whose loss or gradient is not finite, or whose batch has no weight, changes nothing but
        sets this to False, and then no later step changes anything: the state stays the last good one.
    """

    step: jax.Array
    trainable: Tree
    frozen: Tree
    opt_state: Any
    healthy: jax.Array

    @property
    def params(self) -> Tree:
        """The whole parameter tree, trainable and frozen leaves together."""
        return merge(self.trainable, self.frozen)


def partition(params: Mapping[str, Any], mask: Mapping[str, Any] | None) -> tuple[Tree, Tree]:
    """Splits a nested dict into (trainable, frozen) by a tree of bools of the same structure; None: all trainable.

    Subtrees without leaves are left out, so neither part holds a placeholder.
    """
    if mask is None:
        return dict(params), {}
    trainable, frozen = {}, {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            parts = partition(value, mask[name])
            for target, part in zip((trainable, frozen), parts):
                if part:
                    target[name] = part
        else:
            (trainable if mask[name] else frozen)[name] = value
    return trainable, frozen


def merge(a: Mapping[str, Any], b: Mapping[str, Any]) -> Tree:
    """The inverse of `partition`: one nested dict with the leaves of both."""
    merged = dict(a)
    for name, value in b.items():
        if name in merged and isinstance(merged[name], Mapping) and isinstance(value, Mapping):
            merged[name] = merge(merged[name], value)
        elif name in merged:
            raise ValueError(f"parameter `{name}` is both trainable and frozen")
        else:
            merged[name] = value
    return merged


def create_state(
    params: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    shardings: Mapping[str, Any] | None = None,
    trainable: Mapping[str, Any] | None = None,
    frozen_dtype: Any = None,
    donate: bool = False,
) -> TrainState:
    """A fresh state at step 0. The given arrays are copied, so that a donating step never deletes the caller's.

    Args:
      params: nested dict of arrays. mesh: where the state lives.
      shardings: tree of NamedSharding like `params`; None: replicated.
      trainable: tree of bools like `params`; None: everything is trained.
      frozen_dtype: dtype that frozen leaves are kept in (the compute dtype saves memory); None: as they are.
      donate: do not copy; the caller no longer uses `params`.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    if shardings is None:
        shardings = jax.tree.map(lambda _: replicated, dict(params))
    train_params, frozen = partition(params, trainable)
    train_shard, frozen_shard = partition(shardings, trainable)
    train_params = _place(train_params, train_shard, jnp.float32, donate)
    frozen = _place(frozen, frozen_shard, frozen_dtype, donate)
    opt_shapes = jax.eval_shape(optimizer.init, train_params)
    opt_shard = opt_state_shardings(optimizer, opt_shapes, train_params, train_shard, replicated)
    opt_state = _init_optimizer(optimizer, opt_shard)(train_params)
    step = jax.device_put(jnp.zeros((), jnp.int32), replicated)
    healthy = jax.device_put(jnp.ones((), jnp.bool_), replicated)
    return TrainState(step, train_params, frozen, opt_state, healthy)


def state_shardings(state: TrainState) -> TrainState:
    """The same tree with each array's sharding, for `in_shardings` and for restoring."""
    return jax.tree.map(lambda x: x.sharding, state)


def opt_state_shardings(
    optimizer: optax.GradientTransformation,
    shapes: Any,
    params: Any,
    shardings: Any,
    replicated: NamedSharding,
) -> Any:
    """Moments lie where their parameter lies, factored ones (Adafactor's, of a parameter without one of its dimensions)
    as what is left of it; counts and the like are replicated."""

    def place(leaf: Any, param: Any, sharding: NamedSharding) -> NamedSharding:
        if leaf.shape == param.shape:
            return sharding
        spec = [*sharding.spec, *[None] * (len(param.shape) - len(sharding.spec))]
        left = [
            [*spec[:axis], *spec[axis + 1 :]]
            for axis in range(len(param.shape))
            if leaf.shape == (*param.shape[:axis], *param.shape[axis + 1 :])
        ]
        # Of equal dimensions any may be the one that is gone: the one whose loss leaves most of the split.
        best = max(left, key=lambda entries: sum(entry is not None for entry in entries), default=())
        if any(best):
            return NamedSharding(sharding.mesh, PartitionSpec(*best))
        return spare_sharding(leaf.shape, sharding.mesh)

    return optax.tree_map_params(
        optimizer, place, shapes, params, shardings, transform_non_params=lambda _: replicated
    )


_INITS: dict[Any, Any] = {}


def _init_optimizer(optimizer: optax.GradientTransformation, shardings: Any) -> Any:
    """`optimizer.init` jitted so that its state is born sharded; one jitted function per optimiser and shardings."""
    leaves, treedef = jax.tree.flatten(shardings)
    key = (optimizer, treedef, tuple(leaves))
    if key not in _INITS:
        _INITS[key] = jax.jit(optimizer.init, out_shardings=shardings)
    return _INITS[key]


def _place(tree: Tree, shardings: Tree, dtype: Any, donate: bool) -> Tree:
    """The tree in `dtype` (None: as is) under `shardings`; a copy unless donated (`device_put` may share buffers)."""
    tree = jax.device_put(tree, shardings)
    same = all(dtype is None or x.dtype == dtype for x in jax.tree.leaves(tree))
    return tree if donate and same else _copy(tree, dtype)


@functools.partial(jax.jit, static_argnums=1)
def _copy(tree: Tree, dtype: Any) -> Tree:
    return jax.tree.map(lambda x: jnp.array(x, dtype or x.dtype, copy=True), tree)
