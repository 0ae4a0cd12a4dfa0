"""The update of one iteration in one compiled program: rewards, advantages, then epochs, minibatches, micro-batches.

Every loss is a sum over real tokens (or responses) of a minibatch divided by their global number, so micro-batches,
padding and devices change nothing but the order of additions. Everything that a sweep changes is traced.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from laif_jax.models.arch import ModelConfig
from laif_jax.objectives import LossOut
from laif_jax.objectives.rl import (
    clip_scores,
    gae,
    grpo_advantages,
    kl_estimate,
    reinforce_advantages,
    rl_loss,
    rloo_advantages,
    rollout_metrics,
    scores_with_eos,
    token_rewards,
    whiten,
)
from laif_jax.rollout.placement import row_sharding
from laif_jax.rollout.ppo import Rollout
from laif_jax.rollout.ppo_heads import (
    by_rows,
    predicting,
    response_kl,
    response_stats,
    response_values,
    row_hidden,
)
from laif_jax.training.state import TrainState, merge

TRACES: Counter[str] = Counter()  # how often the update was traced; tests hold compilation down with it
Array = jax.Array


@dataclass(frozen=True)
class UpdateConfig:
    """All that an update compiles to; the options are those of `PpoSpec`.

    Attributes:
      policy: its architecture. value: of a separate value model, or None. shared: values from the policy's trunk.
      replace_eos: a response without an end has its score replaced, by `hyper["missing_eos_reward"]`.
      samples: responses per prompt; row p * samples + s holds sample s of prompt p.
    """

    policy: ModelConfig
    value: ModelConfig | None = None
    shared: bool = False
    algorithm: Literal["ppo", "reinforce", "rloo", "grpo"] = "ppo"
    normalize: Literal["token", "sequence"] = "token"
    kl_estimator: Literal["k1", "k2", "k3", "full"] = "k1"
    kl_place: Literal["reward", "loss"] = "reward"
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    replace_eos: bool = False
    samples: int = 1
    dtype: str = "float32"
    remat: Literal["none", "full", "dots"] = "none"
    chunk: int = 1024

    @property
    def has_values(self) -> bool:
        return self.shared or self.value is not None


class Experience(NamedTuple):
    """What the losses of an iteration read, constants all: float32 [B, N] but for `scores`, float32 [B].

    `mask` is 1 on drawn tokens of rows that count. `kl`: per token, by the configured estimator. `rewards`: before they
    are whitened. `scores`: as they entered the rewards.
    """

    mask: Array
    kl: Array
    scores: Array
    rewards: Array
    advantages: Array
    returns: Array


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
            metrics |= _rollout_side(config, rollout, found, scores, weight, hyper)
            return state, metrics | {"rows_finite": rows_finite}

    return jax.jit(
        update,
        in_shardings=(shardings, None, None, rows, rows, rows, everywhere, everywhere),
        out_shardings=(shardings, everywhere),
        donate_argnums=(0,),
    )


# ---- rewards and advantages ------------------------------------------------------------------------------------


def experience(
    config: UpdateConfig, rollout: Rollout, scores: Mapping[str, Array], weight: Array, hyper: Any
) -> Experience:
    """Rewards per token, advantages and returns, over the global batch."""
    mask = rollout.mask * (weight > 0)[:, None]
    if config.kl_estimator == "full":
        if rollout.full_kl is None:
            raise ValueError("a full KL needs a rollout that computes it")
        kl = rollout.full_kl
    else:
        kl = kl_estimate(config.kl_estimator, rollout.logps, rollout.ref_logps)
    total = sum((hyper["weights"][name] * jnp.asarray(x, jnp.float32) for name, x in sorted(scores.items())))
    total = clip_scores(jnp.where(weight > 0, total, 0.0), hyper["reward_clip"])
    if config.replace_eos:
        total = scores_with_eos(total, rollout.ended, replacement=hyper["missing_eos_reward"])
    else:
        total = scores_with_eos(total, rollout.ended, penalty=hyper["missing_eos_penalty"])
    coef = hyper["kl_coef"] if config.kl_place == "reward" else 0.0
    rewards = token_rewards(total, kl, coef, mask)
    advantages, returns = _advantages(config, rewards, rollout.values, mask, hyper)
    return Experience(mask, kl, total, rewards, by_rows(advantages), by_rows(returns))


def _advantages(
    config: UpdateConfig, rewards: Array, values: Array, mask: Array, hyper: Any
) -> tuple[Array, Array]:
    """(advantages, returns), [B, N] each; returns are zeros for algorithms without values."""
    if config.algorithm == "ppo":
        rewards = whiten(rewards, mask, shift_mean=False) if config.whiten_rewards else rewards
        advantages, returns = gae(rewards, values, mask, hyper["gamma"], hyper["lam"])
    elif config.algorithm == "reinforce":
        advantages, returns = reinforce_advantages(rewards, values, mask)
    else:
        grouped = rloo_advantages if config.algorithm == "rloo" else grpo_advantages
        rows = rewards.shape[0] - rewards.shape[0] % config.samples  # rows beyond are padding
        whole, valid = rewards.sum(axis=1)[:rows], (mask.sum(axis=1) > 0)[:rows]
        each = grouped(whole.reshape(-1, config.samples), valid.reshape(-1, config.samples)).reshape(-1)
        advantages = jnp.pad(each, (0, rewards.shape[0] - rows))[:, None] * mask
        returns = jnp.zeros_like(rewards)
    if config.whiten_advantages and config.algorithm != "grpo":
        advantages = whiten(advantages, mask)
    return advantages, returns


def finite_rows(rollout: Rollout, found: Experience) -> Array:
    """Which rows, bool [B], are finite in all that their rewards are made of; rows that do not count are."""
    tokens = [rollout.logps, rollout.ref_logps, rollout.values, found.kl]
    good = [jnp.isfinite(jnp.where(found.mask > 0, x, 0.0)).all(axis=1) for x in tokens]
    return functools.reduce(jnp.logical_and, good) & jnp.isfinite(found.scores)


def _rollout_side(
    config: UpdateConfig,
    rollout: Rollout,
    found: Experience,
    scores: Mapping[str, Array],
    weight: Array,
    hyper: Any,
) -> dict[str, Array]:
    """Metrics of the experience itself."""
    in_reward = config.kl_place == "reward"
    metrics = rollout_metrics(
        scores=found.scores,
        kl=found.kl,
        kl_coef=hyper["kl_coef"] if in_reward else 0.0,
        logps=rollout.logps,
        mask=found.mask,
        ended=rollout.ended,
        values=rollout.values if config.has_values else None,
        returns=found.returns if config.has_values else None,
    )
    return metrics | named_means(rollout, scores, weight) | logp_difference(rollout)


def named_means(rollout: Rollout, scores: Mapping[str, Array], weight: Array) -> dict[str, Array]:
    """`rewards/NAME/mean` and `/std` over the rows that count, and how many those are."""
    real = ((weight > 0) & (rollout.counts > 0)).astype(jnp.float32)
    count = jnp.maximum(real.sum(), 1.0)
    metrics = {"rewards/rows": real.sum()}
    for name, values in scores.items():
        values = jnp.where(real > 0, jnp.asarray(values, jnp.float32), 0.0)
        mean = values.sum() / count
        variance = jnp.sum(real * jnp.square(values - mean)) / count
        metrics |= {f"rewards/{name}/mean": mean, f"rewards/{name}/std": jnp.sqrt(variance)}
    return metrics


def logp_difference(rollout: Rollout) -> dict[str, Array]:
    """How far the sampler's log-probs are from those of the full forward pass: mean and maximum per token."""
    difference = jnp.where(rollout.mask > 0, jnp.abs(rollout.sampled_logps - rollout.logps), 0.0)
    return {
        "sampling/logp_diff": difference.sum() / jnp.maximum(rollout.mask.sum(), 1.0),
        "sampling/logp_diff_max": difference.max(),
    }


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

        def total(trainable: Any, rows: Array) -> tuple[Array, tuple[LossOut, Array]]:
            out, finite = self.loss(merge(trainable, self.frozen), rows)
            return out.total, (out, finite)

        def body(carry: Any, rows: Array) -> tuple[Any, Array]:
            grads, sums = carry
            (_, (out, finite)), new = jax.value_and_grad(total, has_aux=True)(trainable, rows)
            grads = lay(jax.tree.map(lambda a, b: a + b.astype(jnp.float32), grads, new))
            return (grads, jax.tree.map(jnp.add, sums, out)), finite

        zeros = lambda x: jnp.zeros(x.shape, jnp.float32)  # noqa: E731
        shapes = jax.eval_shape(total, trainable, order[0])[1][0]
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
        states = self.states(params["policy"], config.policy, rollout)
        stats = response_stats(
            params["policy"],
            config.policy,
            states,
            rollout.responses,
            mask,
            temperature=hyper["temperature"],
            chunk=config.chunk,
        )
        values = None
        if config.shared:
            values = response_values(params["policy"], config.policy, states, mask)
        elif config.value is not None:
            own = self.states(params["value"], config.value, rollout)
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
        finite = jnp.isfinite(stats.logps).all(axis=1) & jnp.isfinite(found.advantages).all(axis=1)
        return out, finite if values is None else finite & jnp.isfinite(values).all(axis=1)

    def states(self, params: Any, cfg: ModelConfig, rollout: Rollout) -> Array:
        """Hidden states [R, N, D] before each response token."""
        hidden = row_hidden(
            params,
            cfg,
            rollout.tokens,
            rollout.lengths + rollout.counts,
            dtype=jnp.dtype(self.config.dtype),
            remat=self.config.remat,
        )
        return predicting(hidden, rollout.lengths, rollout.responses.shape[1])

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
