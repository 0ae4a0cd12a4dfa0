"""The update of one iteration in one compiled program: rewards, advantages, then epochs, minibatches, micro-batches.

Every loss is a sum over real tokens (or responses) of a minibatch divided by their global number, so micro-batches,
padding and devices change nothing but the order of additions. Everything that a sweep changes is traced.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from laif_jax.models.arch import ModelConfig
from laif_jax.models.dtypes import bound, gradient_places
from laif_jax.models.moe import RouterLoad
from laif_jax.objectives import LossOut
from laif_jax.objectives.rl import kl_estimate, rl_loss
from laif_jax.rollout.placement import row_sharding
from laif_jax.rollout.ppo import Rollout
from laif_jax.rollout.ppo_heads import (
    by_rows,
    predicting,
    response_kl,
    response_stats,
    response_values,
    row_hidden_and_load,
)
from laif_jax.training.ppo_experience import Experience, UpdateConfig, experience, finite_rows, rollout_side
from laif_jax.training.state import TrainState, merge
from laif_jax.training.tasks import with_router_loss

TRACES: Counter[str] = Counter()  # how often the update was traced; tests hold compilation down with it
Array = jax.Array


def make_update(
    config: UpdateConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    state_shardings: TrainState,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """The jitted `update(state, reference, rollout, scores, weight, order, hyper) -> (state, metrics)`.

    Two calls with equal arguments give the same function. The trained arrays of `state` are donated, its frozen ones
    (which other models may share) are not.

    Args:
      mesh: of automatic axes. state_shardings: a TrainState of shardings, of the trained arrays alone.

    Returns:
      The update. `state.params` is {"policy": tree} or {"policy": tree, "value": tree}. `reference`: the reference's
      vocabulary head for a full KL in the loss, else None. `rollout`: Rollout. `scores`: name -> float32 [B], rewards
      by name; `weight`: float32 [B], 0 for rows that are left out. `order`: int32 [U, A, R], the rows of every update
      and micro-batch, -1 for padding. `hyper`: float32 scalars, but `learning_rate` [U] and `weights`, a dict of the
      rewards' weights.

      Metrics: float32 scalars under TRL's names; `healthy`: 1, or 0 if something was not finite. If it was the
      experience, nothing was changed; if the loss or gradient of an update, that one and all after it were refused.
      For naming examples: `rows_finite` bool [B], of the experience; `finite` bool [U, A, R], of each row's log-probs
      and values in each update; `update_finite` bool [U].
    """
    leaves, treedef = jax.tree.flatten(replace(state_shardings, frozen={}))
    run = _compiled(config, cast(Any, optimizer), mesh, treedef, tuple(leaves))

    def update(state: TrainState, *arguments: Any) -> tuple[TrainState, dict[str, Any]]:
        new, metrics = run(replace(state, frozen={}), state.frozen, *arguments)
        return replace(new, frozen=state.frozen), metrics

    return update


@functools.lru_cache(maxsize=32)
def _compiled(config: UpdateConfig, optimizer: Any, mesh: Mesh, treedef: Any, leaves: tuple[Any, ...]) -> Any:
    shardings: TrainState = jax.tree.unflatten(treedef, leaves)
    rows, everywhere = row_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    def update(
        state: TrainState,
        frozen: Any,
        reference: Any,
        rollout: Rollout,
        scores: Mapping[str, Array],
        weight: Array,
        order: Array,
        hyper: Any,
    ) -> tuple[TrainState, dict[str, Any]]:
        TRACES["update"] += 1
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            found = experience(config, rollout, scores, weight, hyper)
            rows_finite = finite_rows(rollout, found)
            state = replace(state, healthy=state.healthy & rows_finite.all())
            learner = _Learner(config, optimizer, frozen, reference, rollout, found, hyper, shardings)
            state, metrics = learner.all_updates(state, order)
            metrics |= rollout_side(config, rollout, found, scores, weight, hyper)
            return state, metrics | {"rows_finite": rows_finite}

    return jax.jit(
        update,
        in_shardings=(shardings, None, None, rows, rows, rows, everywhere, everywhere),
        out_shardings=(shardings, everywhere),
        donate_argnums=(0,),
    )


# ---- updates ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Learner:
    """The loss of rows of an iteration, and the scans over all updates."""

    config: UpdateConfig
    optimizer: Any
    frozen: Any
    reference: Any
    rollout: Rollout
    found: Experience
    hyper: Any
    shardings: TrainState

    def all_updates(self, state: TrainState, order: Array) -> tuple[TrainState, dict[str, Any]]:
        """Scan over the updates [U, A, R] of all epochs."""

        def body(now: TrainState, part: tuple[Array, Array]) -> tuple[TrainState, Any]:
            return self.one_update(now, *part)

        state, (sums, each, finite) = lax.scan(body, state, (order, self.hyper["learning_rate"]))
        sums = jax.tree.map(lambda x: x.sum(axis=0), sums)
        metrics = {name: value / jnp.where(weight > 0, weight, 1.0) for name, (value, weight) in sums.items()}
        metrics |= {name: x.mean() for name, x in each.items()}
        metrics |= {
            "lr": self.hyper["learning_rate"][-1],
            "healthy": state.healthy.astype(jnp.float32),
            "finite": finite,
            "update_finite": jnp.isfinite(each["loss"]) & jnp.isfinite(each["grad_norm"]),
        }
        return replace(state, step=state.step + state.healthy), metrics

    def one_update(self, state: TrainState, order: Array, rate: Array) -> tuple[TrainState, Any]:
        """One optimiser step over the micro-batches [A, R] of a minibatch."""
        grads, out, finite = self.accumulate(state.trainable, order)
        # A minibatch all of whose rows were left out has nothing to say, which is no fault: it changes nothing.
        scale = 1.0 / jnp.where(out.weight > 0, out.weight, 1.0)
        active = self.hyper["policy_coef"] > 0
        grads = _only(active, jax.tree.map(lambda g: g * scale, grads))
        norm, loss = optax.global_norm(grads), out.total * scale
        clip = self.hyper["clip_norm"]
        clipped = jax.tree.map(lambda g: g * jnp.where(norm > clip, clip / norm, 1.0), grads)
        updates, opt_state = self.optimizer.update(
            clipped,
            state.opt_state,
            state.trainable,
            learning_rate=rate,
            weight_decay=self.hyper["weight_decay"],
        )
        healthy = state.healthy & jnp.isfinite(loss) & jnp.isfinite(norm)
        new = (optax.apply_updates(state.trainable, _only(active, updates)), opt_state)
        change = healthy & (out.weight > 0)
        trainable, opt_state = jax.tree.map(
            lambda n, o: jnp.where(change, n, o), new, (state.trainable, state.opt_state)
        )
        state = replace(state, trainable=trainable, opt_state=opt_state, healthy=healthy)
        return state, (out.metrics, {"loss": loss, "grad_norm": norm}, finite)

    def accumulate(self, trainable: Any, order: Array) -> tuple[Any, LossOut, Array]:
        """Float32 sums over micro-batches [A, R] of gradients and losses, and which rows were finite, [A, R]."""

        def lay(tree: Any) -> Any:
            return lax.with_sharding_constraint(tree, self.shardings.trainable)

        def total(places: Any, rows: Array) -> tuple[Array, tuple[LossOut, Array]]:
            out, finite = self.loss(merge(bound(trainable, places), self.frozen), rows)
            return out.total, (out, finite)

        places = lay(
            gradient_places(trainable, jnp.dtype(self.config.dtype))
        )  # as in `laif_jax.training.step`

        def body(carry: Any, rows: Array) -> tuple[Any, Array]:
            grads, sums = carry
            (_, (out, finite)), new = jax.value_and_grad(total, has_aux=True)(places, rows)
            grads = lay(jax.tree.map(lambda a, b: a + b.astype(jnp.float32), grads, new))
            return (grads, jax.tree.map(jnp.add, sums, out)), finite

        zeros = lambda x: jnp.zeros(x.shape, jnp.float32)  # noqa: E731
        shapes = jax.eval_shape(total, places, order[0])[1][0]
        start = (lay(jax.tree.map(zeros, trainable)), jax.tree.map(zeros, shapes))
        (grads, out), finite = lax.scan(body, start, order)
        return grads, out, finite

    def loss(self, params: Any, rows: Array) -> tuple[LossOut, Array]:
        """The loss of some rows int32 [R] (-1: none), and which of them were finite, bool [R]."""
        config, hyper = self.config, self.hyper
        pick = lambda x: by_rows(jnp.take(x, jnp.maximum(rows, 0), axis=0))  # noqa: E731
        rollout = jax.tree.map(pick, without_scores(self.rollout))
        found = jax.tree.map(pick, self.found)
        mask = found.mask * (rows >= 0)[:, None]
        states, load = self.states(params["policy"], config.policy, rollout)
        stats = response_stats(
            params["policy"],
            config.policy,
            states,
            rollout.responses,
            mask,
            temperature=hyper["temperature"],
            chunk=config.chunk,
        )
        values = value_load = None
        if config.shared:
            values = response_values(params["policy"], config.policy, states, mask)
        elif config.value is not None:
            own, value_load = self.states(params["value"], config.value, rollout)
            values = response_values(params["value"], config.value, own, mask)
        out = rl_loss(
            config.algorithm,
            logps=stats.logps,
            old_logps=rollout.logps,
            advantages=found.advantages,
            mask=mask,
            hyper=hyper,
            normalize=config.normalize,
            entropy=stats.entropy,
            kl=self.kl_term(params["policy"], states, stats.logps, rollout, mask),
            values=values,
            old_values=None if values is None else rollout.values,
            returns=None if values is None else found.returns,
        )
        out = with_router_loss(out, load, config.policy)
        if config.value is not None:
            out = with_router_loss(out, value_load, config.value, "val/router_loss")
        finite = jnp.isfinite(stats.logps).all(axis=1) & jnp.isfinite(found.advantages).all(axis=1)
        return out, finite if values is None else finite & jnp.isfinite(values).all(axis=1)

    def states(self, params: Any, cfg: ModelConfig, rollout: Rollout) -> tuple[Array, RouterLoad | None]:
        """Hidden states [R, N, D] before each response token, and the load of the experts if there are some."""
        hidden, load = row_hidden_and_load(
            params,
            cfg,
            rollout.tokens,
            rollout.lengths + rollout.counts,
            dtype=jnp.dtype(self.config.dtype),
            remat=self.config.remat,
        )
        return predicting(hidden, rollout.lengths, rollout.responses.shape[1]), load

    def kl_term(
        self, policy: Any, states: Array, logps: Array, rollout: Rollout, mask: Array
    ) -> Array | None:
        """The KL [R, N] of the loss, with its gradient; None where the KL is in the reward."""
        config = self.config
        if config.kl_place == "reward":
            return None
        if config.kl_estimator != "full":
            return kl_estimate(
                config.kl_estimator,
                jnp.where(mask > 0, logps, 0.0),
                jnp.where(mask > 0, rollout.ref_logps, 0.0),
            )
        if rollout.ref_states is None:
            raise ValueError("a full KL in the loss needs a rollout that keeps the reference's hidden states")
        return response_kl(
            policy,
            config.policy,
            states,
            self.reference,
            rollout.ref_states,
            mask,
            temperature=self.hyper["temperature"],
            chunk=config.chunk,
        )


def without_scores(rollout: Rollout) -> Rollout:
    """The rollout without the scores, which the losses do not read row by row."""
    return rollout._replace(scores={})


def _only(active: Array, tree: Any) -> Any:
    """Gradients or updates, where `active` is False of the value function alone (the policy's tree but its scalar head
    gets zeros)."""

    def one(path: Any, x: Array) -> Array:
        learns_values = path[0].key == "value" or path[1].key == "score"
        return x if learns_values else jnp.where(active, x, 0.0)

    return jax.tree_util.tree_map_with_path(one, tree)
