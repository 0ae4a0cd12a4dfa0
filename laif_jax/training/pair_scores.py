"""Scores of pairs by a reward model in training, without gradients, over the same packed batches."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from laif_jax.data.pipeline import Batches
from laif_jax.parallel import batch_shardings, gather_to_host, host_to_global
from laif_jax.training.feed import to_device
from laif_jax.training.reward_task import RewardTask


def pair_scores(
    task: RewardTask, params: Any, batches: Batches, pairs: int, *, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the chosen and of the rejected side of each pair. All processes call this together.

    Args:
      task: of the model. Tasks that are equal share one compiled program.
      params: its parameters, on the mesh.
      batches: `preference_batches(..., shuffle=False, epochs=1)` of the pairs, not yet read.
      pairs: how many pairs were given to it.

    Returns:
      (chosen, rejected), float32 [pairs], or [K, pairs] of an ensemble; NaN where a pair cannot be used.
    """
    run = _compiled(task, mesh)
    shape = (pairs,) if task.members == 1 else (task.members, pairs)
    chosen, rejected = np.full((2, *shape), np.nan, np.float32)
    for batch in batches:
        arrays = to_device(batch, mesh)
        shardings = batch_shardings(arrays, mesh)
        placed = {name: jax.device_put(array, shardings[name]) for name, array in arrays.items()}
        outputs = gather_to_host(run(params, placed))
        index = np.asarray(batch["pair_index"])
        if jax.process_count() > 1:  # each process has its own slots
            index = gather_to_host(host_to_global({"index": index}, mesh))["index"]
        real = index >= 0
        for target, values in zip((chosen, rejected), outputs, strict=True):
            # [A, (K,) N] -> [(K,) A, N]; rows beyond the data's were added for the mesh.
            values = np.moveaxis(np.asarray(values), 0, -2)[..., : index.shape[1]]
            target[..., index[real]] = values[..., real]
    return chosen, rejected


@functools.lru_cache(maxsize=16)
def _compiled(task: RewardTask, mesh: Mesh) -> Any:
    def run(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.lax.map(lambda micro: task.pair_scores(params, micro), batch)

    return jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))
