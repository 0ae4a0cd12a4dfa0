"""The train step: unreduced sums over micro-batches, one division by the global weight, clip, update."""

import functools
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from laif_jax.models.dtypes import bound, gradient_places
from laif_jax.objectives import LossOut
from laif_jax.training.executables import prepared
from laif_jax.training.state import TrainState, merge

LossFn = Callable[[Any, Mapping[str, jax.Array], Mapping[str, jax.Array]], Any]
log = logging.getLogger(__name__)


def enable_compilation_cache(directory: str | Path | None = None) -> Path | None:
    """Keeps compiled programs on disk, so that a second run of the same shapes starts at once.

    Args:
      directory: where; None: `xla` in the folder of the environment variable LAIF_CACHE, else ~/.cache/laif_jax/xla.
        JAX's own JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.

    Returns:
      The folder, or None when it cannot be written (which is logged, and harmless).
    """
    cache = Path(os.environ.get("LAIF_CACHE") or Path.home() / ".cache" / "laif_jax")
    path = Path(directory or cache / "xla").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning(
            "no compilation cache: cannot write %s (%s); set LAIF_CACHE to another folder", path, error
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return path


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    state_shardings: TrainState,
    batch_shardings: Mapping[str, NamedSharding],
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """The jitted `step(state, batch, hyper) -> (state, metrics)`; `state` is donated.

    Two calls with equal arguments return the same jitted function, so arms and seeds that share static settings and
    shapes share one compiled program. `loss_fn` therefore has to be hashable by what it compiles to (the tasks of
    `laif_jax.training.tasks` are).

    Args:
      loss_fn: `(params, micro_batch, hyper) -> LossOut` of unreduced sums, or `(LossOut, outputs)` with a dict of
        per-example arrays that are stacked over micro-batches and returned under `metrics["outputs"]`. Sums of shape
        [K] train K models at once, an ensemble: each trainable leaf has a leading axis [K], each member's gradient is
        divided by its own weight and clipped by its own norm, and metrics are means over members.
      optimizer: of `make_optimizer` (or any optax transformation of fixed learning rate).
      mesh: all shardings are on it.
      state_shardings: a TrainState of shardings. batch_shardings: one per array of the batch, [A, ...] each, A being
        the number of micro-batches.

    Returns:
      The step. `hyper` is a dict of float32 scalars: `learning_rate`, `weight_decay`, `clip_norm` and what the loss
      reads. Metrics are float32 scalars: `loss` and each metric of the loss (sum / weight over the whole batch),
      `grad_norm` (before clipping), `learning_rate`, `num_tokens` (real tokens, where the batch has segment ids),
      `weight` (what the loss was divided by) and `healthy` (1, or 0 if the update was refused, see `TrainState`).
    """
    leaves, treedef = jax.tree.flatten(state_shardings)
    return _compiled_step(
        loss_fn, cast(Any, optimizer), mesh, treedef, tuple(leaves), tuple(sorted(batch_shardings.items()))
    )


@functools.lru_cache(maxsize=64)
def _compiled_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    treedef: Any,
    leaves: tuple[NamedSharding, ...],
    batch_items: tuple[tuple[str, NamedSharding], ...],
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    shardings: TrainState = jax.tree.unflatten(treedef, leaves)
    replicated = NamedSharding(mesh, PartitionSpec())

    def step(state: TrainState, batch: Any, hyper: Any) -> tuple[TrainState, dict[str, Any]]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # what `constrain` lays activations over
            return apply_step(loss_fn, optimizer, state, batch, hyper, shardings.trainable)

    jitted = jax.jit(
        step,
        in_shardings=(shardings, dict(batch_items), replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=(0,),
    )
    return prepared(jitted, mesh)


def apply_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Any,
    hyper: Any,
    shardings: Any = None,
) -> tuple[TrainState, dict[str, Any]]:
    """One update, as `make_train_step` describes it, inside of a jitted function.

    Args:
      shardings: of `state.trainable`; None: gradients are left where the compiler puts them.
    """
    run = optax.with_extra_args_support(optimizer)
    grads, sums, outputs = _accumulate(loss_fn, state, batch, hyper, shardings)
    total, weight, sums = sums
    scale = 1.0 / jnp.where(weight > 0, weight, 1.0)
    grads = jax.tree.map(lambda g: g * _leading(scale, g), grads)
    norm = _norms(grads) if total.ndim else optax.global_norm(grads)
    loss = total * scale
    healthy = state.healthy & jnp.all(jnp.isfinite(loss) & jnp.isfinite(norm) & (weight > 0))
    clip = hyper.get("clip_norm", jnp.inf)
    shrink = jnp.where(norm > clip, clip / norm, 1.0)
    clipped = jax.tree.map(lambda g: g * _leading(shrink, g), grads)
    updates, opt_state = run.update(
        clipped,
        state.opt_state,
        state.trainable,
        learning_rate=hyper["learning_rate"],
        weight_decay=hyper.get("weight_decay", 0.0),
    )
    new = (state.step + 1, optax.apply_updates(state.trainable, updates), opt_state)
    old = (state.step, state.trainable, state.opt_state)
    count, trainable, opt_state = jax.tree.map(lambda n, o: jnp.where(healthy, n, o), new, old)
    metrics = {name: value / count_of for name, (value, count_of) in sums.items()}
    metrics |= {
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": hyper["learning_rate"],
        "weight": weight,
    }
    metrics = {name: jnp.mean(value) for name, value in metrics.items()}  # over members, if there are several
    metrics["healthy"] = healthy.astype(jnp.float32)
    if "segment_ids" in batch:
        metrics["num_tokens"] = jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32)
    if outputs:
        metrics["outputs"] = outputs
    return TrainState(count, trainable, state.frozen, opt_state, healthy), metrics


def _leading(x: jax.Array, like: jax.Array) -> jax.Array:
    """A scalar as it is; one number per member, [K], against the leading axis of `like`."""
    return x.reshape(-1, *[1] * (like.ndim - 1)) if x.ndim else x


def _norms(grads: Any) -> jax.Array:
    """The gradient norm of each member of an ensemble, [K]."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(g), axis=tuple(range(1, g.ndim))) for g in jax.tree.leaves(grads)))


def _accumulate(
    loss_fn: LossFn, state: TrainState, batch: Any, hyper: Any, shardings: Any
) -> tuple[Any, Any, Any]:
    """Float32 sums of gradients, loss, weight and metrics over the leading micro-batch axis, and stacked outputs.

    Gradients are taken of a copy of the weights in the compute dtype, to which every use of them would cast them: what
    comes out is what float32 weights would get, in half the memory until it is added up.
    """
    leaves = jax.tree.leaves(shardings)
    explicit = bool(leaves) and AxisType.Explicit in leaves[0].mesh.axis_types
    constrained = jax.reshard if explicit else jax.lax.with_sharding_constraint

    def lay(tree: Any, shardings: Any) -> Any:
        return tree if shardings is None else constrained(tree, shardings)

    dtype = getattr(loss_fn, "dtype", None)

    def loss(places: Any, micro: Any) -> tuple[jax.Array, tuple[LossOut, dict[str, jax.Array]]]:
        trainable = places if dtype is None else bound(state.trainable, places)
        out = loss_fn(merge(trainable, state.frozen), micro, hyper)
        out, outputs = (out, {}) if isinstance(out, LossOut) else out
        return jnp.sum(out.total), (out, outputs)  # members' parameters are apart, so gradients are their own

    places = state.trainable
    if dtype is not None:
        places = lay(gradient_places(places, jnp.dtype(dtype)), shardings)
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def body(carry: Any, micro: Any) -> tuple[Any, dict[str, jax.Array]]:
        grads, sums = carry
        (_, (out, outputs)), new = value_and_grad(places, micro)
        grads = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), grads, new)
        # Keeps the running sums where their parameters lie: a reduce-scatter instead of an all-reduce.
        grads = lay(grads, shardings)
        return (grads, jax.tree.map(jnp.add, sums, tuple(out))), outputs

    first = jax.tree.map(lambda x: x[0], batch)
    if jax.tree.leaves(batch)[0].shape[0] == 1:  # nothing to add up, and no second copy of the gradients
        (_, (out, outputs)), grads = value_and_grad(places, first)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), lay(grads, shardings))
        return grads, tuple(out), jax.tree.map(lambda x: x[None], outputs)
    shapes = jax.eval_shape(loss, places, first)[1][0]
    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)  # noqa: E731
    start = (lay(jax.tree.map(zeros, state.trainable), shardings), jax.tree.map(zeros, tuple(shapes)))
    (grads, sums), outputs = jax.lax.scan(body, start, batch)
    return grads, sums, outputs
