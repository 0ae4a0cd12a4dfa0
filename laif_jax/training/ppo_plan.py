"""What an iteration of PPO looks like before it is computed: shapes, prompts, order of rows, and traced numbers.

Everything is a function of the seed and the iteration, so that a resumed run repeats it bitwise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from laif_jax.config.rl import PpoSpec
from laif_jax.rollout.generate import row_keys
from laif_jax.rollout.placement import row_shards
from laif_jax.rollout.ppo import Prompts, RolloutConfig
from laif_jax.training.optim import hyper_arrays, optimizer_hyper, schedule
from laif_jax.training.ppo import UpdateConfig
from laif_jax.training.ppo_models import PpoModels

ORDER, PROMPTS = 1, 2  # streams of random numbers of one seed
EVALUATION = 0x7FFFFFFF  # the "iteration" whose keys evaluation draws with, always the same


@dataclass(frozen=True)
class Layout:
    """Shapes of an iteration.

    Attributes:
      rows: sequences, prompts x samples. padded: rows of the arrays. width: tokens of a padded prompt.
      new_tokens: N. score_rows, decode_rows: rows at a time. micro: rows of a micro-batch, padded to the devices.
    """

    rows: int
    padded: int
    width: int
    new_tokens: int
    score_rows: int
    decode_rows: int
    micro: int


def make_layout(spec: PpoSpec, mesh: Mesh, longest: int, new_tokens: int) -> Layout:
    """The shapes for prompts of at most `longest` tokens."""
    shards = row_shards(mesh)
    rows = spec.batch_size * spec.sampling.samples
    micro = spec.micro_batch or rows // spec.minibatches
    group = -(-micro // shards) * shards
    count = -(-rows // group)
    fits = spec.sampling.batch_size // group
    decoded = max(n for n in range(1, count + 1) if count % n == 0 and (n == 1 or n <= fits))
    width = -(-longest // 8) * 8
    return Layout(rows, count * group, width, new_tokens, group, decoded * group, group)


def rollout_config(
    spec: PpoSpec, models: PpoModels, layout: Layout, *, dtype: str, chunk: int
) -> RolloutConfig:
    """What the rollout compiles to."""
    full = spec.kl.estimator == "full"
    return RolloutConfig(
        policy=models.policy,
        reference=models.reference,
        new_tokens=layout.new_tokens,
        decode_rows=layout.decode_rows,
        score_rows=layout.score_rows,
        value=models.value,
        shared=models.shared,
        scorers=tuple((name, models.scorers[name].config) for name in sorted(models.scorers)),
        full_kl=full,
        keep_states=full and spec.kl.place == "loss",
        dtype=dtype,
        chunk=chunk,
    )


def update_config(spec: PpoSpec, models: PpoModels, *, dtype: str, remat: str, chunk: int) -> UpdateConfig:
    """What the update compiles to."""
    return UpdateConfig(
        policy=models.policy,
        value=models.value,
        shared=models.shared,
        algorithm=spec.algorithm,
        normalize=spec.normalize,
        kl_estimator=spec.kl.estimator,
        kl_place=spec.kl.place,
        whiten_advantages=spec.whiten_advantages,
        whiten_rewards=spec.whiten_rewards,
        replace_eos=spec.missing_eos_reward is not None,
        samples=spec.sampling.samples,
        dtype=dtype,
        remat=remat,  # ty: ignore[invalid-argument-type]
        chunk=chunk,
    )


class Numbers:
    """The traced numbers of each iteration.

    Args:
      weights: of the rewards, by name.
    """

    def __init__(self, spec: PpoSpec, weights: Mapping[str, float]):
        self._spec = spec
        self._updates = spec.epochs * spec.minibatches
        self._rate = schedule(spec.optimizer, spec.iterations * self._updates)
        none = lambda x: math.inf if x is None else x  # noqa: E731
        values = optimizer_hyper(spec.optimizer) | {
            "clip_low": spec.clip_low,
            "clip_high": spec.clip_high,
            "dual_clip": none(spec.dual_clip),
            "value_clip": none(spec.value_clip) if spec.algorithm == "ppo" else math.inf,
            "value_coef": spec.value_coef,
            "entropy_coef": spec.entropy_coef,
            "gamma": spec.gamma,
            "lam": spec.lam,
            "reward_clip": none(spec.reward_clip),
            "missing_eos_penalty": spec.missing_eos_penalty or 0.0,
            "missing_eos_reward": spec.missing_eos_reward or 0.0,
            "temperature": spec.sampling.temperature,
        }
        self._fixed: dict[str, Any] = hyper_arrays(values)
        self._fixed["weights"] = hyper_arrays(weights)

    def hyper(self, iteration: int, kl_coef: float) -> dict[str, Any]:
        """`hyper` of the update of iteration 0, 1, 2, ..."""
        first = iteration * self._updates
        rates = [self._rate(step) for step in range(first, first + self._updates)]
        learns = not (self._spec.learns_values and iteration < self._spec.head_start)
        return self._fixed | {
            "learning_rate": np.asarray(rates, np.float32),
            "kl_coef": np.asarray(kl_coef, np.float32),
            "policy_coef": np.asarray(float(learns), np.float32),
        }


# ---- data ------------------------------------------------------------------------------------------------------


def prompts_of(seed: int, iteration: int, count: int, batch_size: int) -> np.ndarray:
    """Which of `count` prompts iteration 0, 1, ... asks, int64 [batch_size]: passes over all of them, each in an order
    of its own, one after the other without a gap."""
    places = np.arange(iteration * batch_size, (iteration + 1) * batch_size)
    orders = {
        epoch: np.random.default_rng([seed, PROMPTS, epoch]).permutation(count)
        for epoch in sorted({int(place) // count for place in places})
    }
    return np.asarray([orders[int(place) // count][int(place) % count] for place in places])


def update_order(spec: PpoSpec, layout: Layout, seed: int, iteration: int) -> np.ndarray:
    """Rows of each update and micro-batch of an iteration, int32 [epochs x minibatches, A, R]; -1 is padding.

    The rows of an update depend on the seed and the iteration, not on how micro-batches split them.
    """
    rng = np.random.default_rng([seed, ORDER, iteration])
    updates = spec.epochs * spec.minibatches
    per_update = layout.rows // spec.minibatches
    size = spec.micro_batch or per_update
    rows = np.stack([rng.permutation(layout.rows) for _ in range(spec.epochs)])
    order = np.full((updates, per_update // size, layout.micro), -1, np.int32)
    order[:, :, :size] = rows.reshape(updates, -1, size)
    return order


def make_prompts(
    layout: Layout, tokens: Sequence[Sequence[int]], samples: int, key: jax.Array, max_length: int
) -> Prompts:
    """Rows for a rollout: `samples` of each prompt, side by side, then rows of padding.

    Each row's key is folded from its place in the batch and its sample, so that a prompt that comes twice in a batch is
    not answered alike. A row draws at most `max_length` less its prompt.
    """
    array = np.zeros((layout.padded, layout.width), np.int32)
    lengths, limits = np.ones(layout.padded, np.int32), np.zeros(layout.padded, np.int32)
    drawn = row_keys(key, range(len(tokens)), samples).reshape(len(tokens) * samples, -1)
    keys = np.zeros((layout.padded, drawn.shape[-1]), np.uint32)
    keys[: len(drawn)] = drawn
    for place, prompt in enumerate(tokens):
        rows = slice(place * samples, (place + 1) * samples)
        array[rows, : len(prompt)] = prompt
        lengths[rows] = len(prompt)
        limits[rows] = min(layout.new_tokens, max_length - len(prompt))
    return Prompts(array, lengths, keys, limits)


def iteration_key(seed: int, iteration: int) -> jax.Array:
    """The key that an iteration samples with."""
    return jax.random.fold_in(jax.random.key(seed), iteration)
