"""Log-probs of the reference model: computed once, kept on disk, exact where training starts.

The first step's margins are exactly 0 only if the reference's log-probs come from the same arithmetic as the policy's:
the same batches and, where the compiler fuses a forward pass differently when gradients are taken, the same program.
So they are computed over the training batches of the first epoch, by a forward pass alone if that gives the bits that
the train step gives on the first batch, and else by the train step itself with updates switched off.
"""

import functools
import hashlib
import logging
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from laif_jax.parallel import barrier, batch_shardings, gather_to_host, host_to_global, is_main
from laif_jax.records import fingerprint
from laif_jax.records.errors import LaifError
from laif_jax.training.feed import Batches, to_device
from laif_jax.training.state import TrainState, merge, state_shardings
from laif_jax.training.step import make_train_step

log = logging.getLogger(__name__)
HASHED = ("tokens", "segment_ids", "loss_mask", "chosen", "rejected", "pair_index")
HASHED_IF_THERE = ("prefix",)  # of pairs that share their prompt


class MissingReferenceError(LaifError, KeyError):
    """A pair has no reference log-prob."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class ReferenceLogps:
    """Reference log-probs by pair.

    Attributes:
      chosen, rejected: float32 [pairs], summed over supervised tokens; NaN where a pair was never seen.
    """

    chosen: np.ndarray
    rejected: np.ndarray

    def fill(self, pair_index: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays `ref_chosen` and `ref_rejected` of a batch; 0 at padding (index -1).

        Raises:
          MissingReferenceError: a pair has none.
        """
        real = pair_index >= 0
        outside = np.unique(pair_index[real & (pair_index >= len(self.chosen))])
        index = np.where(real & (pair_index < len(self.chosen)), pair_index, 0)
        missing = [*outside, *np.unique(pair_index[real & np.isnan(self.chosen[index])])]
        if missing:
            raise MissingReferenceError(
                f"no reference log-probs for the pairs {[int(i) for i in missing[:10]]} of {len(self.chosen)}: "
                "they were made for other data. Delete the cached reference-*.npz of this run and start again"
            )
        return {
            "ref_chosen": np.where(real, self.chosen[index], 0.0).astype(np.float32),
            "ref_rejected": np.where(real, self.rejected[index], 0.0).astype(np.float32),
        }


def reference_logps(
    task: Any,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    batches: Batches,
    num_pairs: int,
    *,
    mesh: Mesh,
    hyper: Mapping[str, float],
    cache_dir: str | epath.Path,
    steps: int | None = None,
    model_key: str | None = None,
) -> tuple[ReferenceLogps, TrainState]:
    """Reference log-probs of the pairs that training will read, from the cache or computed.

    Args:
      task: the preference task that will be trained. state: its fresh state, whose parameters are the reference; it is
        donated, and comes back unchanged. optimizer: of the state.
      batches: the iterator that will train; it is read for one epoch and then set back.
      num_pairs: of the data set. hyper: the task's and optimiser's traced numbers (any values do).
      cache_dir: where `reference-KEY.npz` lies; KEY covers weights, data, task, layout and device.
      steps: of the run; pairs beyond them are not computed. None: a whole epoch.
      model_key: what names the weights (a file's hash); None: hash them, which reads them all.

    Returns:
      (ReferenceLogps, the state).

    Raises:
      MissingReferenceError: a batch names a pair beyond `num_pairs`.
    """
    start = batches.get_state()
    data_key, count = _survey(batches, num_pairs, steps)
    batches.set_state(start)
    key = fingerprint(
        {
            "model": model_key or weights_key(state),
            "data": data_key,
            "task": repr(task),
            "trainable": sorted(
                jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state.trainable)
            ),
            "mesh": [list(mesh.devices.shape), mesh.devices.flat[0].device_kind, jax.__version__],
        }
    )[:16]
    path = epath.Path(cache_dir) / f"reference-{key}.npz"
    found = _load(path, num_pairs)
    if found is None:
        found, state = _compute(task, state, optimizer, batches, num_pairs, count, mesh, hyper)
        batches.set_state(start)
        _store(path, found)
    return found, state


def _survey(batches: Batches, num_pairs: int, steps: int | None) -> tuple[str, int]:
    """(hash of the batches of the first epoch, how many they are); of all processes."""
    digest, count = hashlib.sha256(), 0
    seen = np.zeros(num_pairs, bool)
    limit = min(steps or sys.maxsize, getattr(batches, "steps_per_epoch", sys.maxsize))
    while count < limit and (limit < sys.maxsize or not seen.all()):
        batch = next(batches, None)
        if batch is None:
            break
        count += 1
        for name in (*HASHED, *(name for name in HASHED_IF_THERE if name in batch)):
            array = np.ascontiguousarray(batch[name])
            digest.update(f"{name}{array.shape}{array.dtype}".encode())
            digest.update(array.data)
        index = np.asarray(batch["pair_index"])
        if index.max(initial=-1) >= num_pairs:
            raise MissingReferenceError(f"a batch has pair {index.max()}, but the data set has {num_pairs}")
        seen[index[index >= 0]] = True
    if jax.process_count() == 1:
        return digest.hexdigest(), count
    parts = multihost_utils.process_allgather(np.frombuffer(digest.digest(), np.uint8))
    return hashlib.sha256(np.asarray(parts).tobytes()).hexdigest(), count


def weights_key(state: TrainState) -> str:
    """SHA-256 of all parameters: paths, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        digest.update(f"{jax.tree_util.keystr(path)}{leaf.shape}{leaf.dtype}".encode())
        # Layer by layer: a whole stacked leaf of a large model is too much for a host.
        for i in range(leaf.shape[0]) if path[0].key == "layers" else (...,):
            digest.update(np.ascontiguousarray(gather_to_host(leaf[i])).view(np.uint8).data)
    return digest.hexdigest()


def _compute(
    task: Any,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    batches: Batches,
    num_pairs: int,
    count: int,
    mesh: Mesh,
    hyper: Mapping[str, float],
) -> tuple[ReferenceLogps, TrainState]:
    numbers = {name: np.asarray(value, np.float32) for name, value in {"learning_rate": 0.0, **hyper}.items()}
    shardings = state_shardings(state)
    chosen, rejected = np.full((2, num_pairs), np.nan, np.float32)
    state = replace(
        state, healthy=jax.device_put(np.zeros((), np.bool_), state.healthy.sharding)
    )  # no updates
    forward: Any = None
    for number, (batch, arrays) in enumerate(_arrays(batches, count, mesh)):
        placed = batch_shardings(arrays, mesh)
        if number == 0:
            step = make_train_step(
                task, optimizer, mesh=mesh, state_shardings=shardings, batch_shardings=placed
            )
            state, metrics = step(state, arrays, numbers)
            outputs = metrics["outputs"]
            forward = make_forward(task, mesh, shardings, placed)
            alone = forward(state.trainable, state.frozen, arrays)
            same = all(np.array_equal(*map(gather_to_host, (outputs[k], alone[k]))) for k in outputs)
            if not same:
                log.info(
                    "reference log-probs: the forward pass alone rounds otherwise; the train step computes them"
                )
                forward = None
        elif forward is not None:
            outputs = forward(state.trainable, state.frozen, arrays)
        else:
            state, metrics = step(state, arrays, numbers)
            outputs = metrics["outputs"]
        _scatter(_global_index(batch["pair_index"], mesh), outputs, chosen, rejected)
    healthy = jax.device_put(np.ones((), np.bool_), state.healthy.sharding)
    return ReferenceLogps(chosen, rejected), replace(state, healthy=healthy)


def _arrays(batches: Batches, count: int, mesh: Mesh) -> Iterator[tuple[Any, Any]]:
    for _ in range(count):
        batch = next(batches)
        zeros = np.zeros(np.shape(batch["pair_index"]), np.float32)
        batch = dict(batch) | {"ref_chosen": zeros, "ref_rejected": zeros}
        yield batch, to_device(batch, mesh)


def _scatter(pair_index: np.ndarray, outputs: Any, chosen: np.ndarray, rejected: np.ndarray) -> None:
    """Writes a batch's log-probs under their pairs, where nothing is written yet."""
    columns = pair_index.shape[1]  # rows beyond were added for the mesh
    new = (pair_index >= 0) & np.isnan(chosen[np.maximum(pair_index, 0)])
    for target, name in ((chosen, "policy_chosen"), (rejected, "policy_rejected")):
        values = gather_to_host(outputs[name])[:, :columns]
        target[pair_index[new]] = values[new]


def _global_index(pair_index: np.ndarray, mesh: Mesh) -> np.ndarray:
    """The pair index of the global batch, of which each process has its slots."""
    if jax.process_count() == 1:
        return np.asarray(pair_index)
    return gather_to_host(host_to_global({"index": np.asarray(pair_index)}, mesh))["index"]


def make_forward(
    task: Any, mesh: Mesh, state_tree: TrainState, batch_tree: Mapping[str, NamedSharding]
) -> Any:
    """The jitted forward pass over all micro-batches: (trainable, frozen, batch) -> log-probs [A, N] of each pair."""
    leaves, treedef = jax.tree.flatten((state_tree.trainable, state_tree.frozen))
    return _forward(task, mesh, treedef, tuple(leaves), tuple(sorted(batch_tree.items())))


@functools.lru_cache(maxsize=16)
def _forward(
    task: Any,
    mesh: Mesh,
    treedef: Any,
    leaves: tuple[NamedSharding, ...],
    batch_items: tuple[tuple[str, NamedSharding], ...],
) -> Any:
    trainable, frozen = jax.tree.unflatten(treedef, leaves)

    def run(trainable: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        def one(micro: Any) -> dict[str, jax.Array]:
            chosen, rejected, _, _ = task.sequence_logps(merge(trainable, frozen), micro)
            return {"policy_chosen": chosen, "policy_rejected": rejected}

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.lax.map(one, batch)

    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(run, in_shardings=(trainable, frozen, dict(batch_items)), out_shardings=whole)


def _load(path: epath.Path, num_pairs: int) -> ReferenceLogps | None:
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file) as data:
            found = ReferenceLogps(data["chosen"], data["rejected"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.warning("%s cannot be read (%s); reference log-probs are computed again", path, error)
        return None
    return found if found.chosen.shape == (num_pairs,) else None


def _store(path: epath.Path, found: ReferenceLogps) -> None:
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.tmp"
        with temporary.open("wb") as file:
            np.savez(file, chosen=found.chosen, rejected=found.rejected)
        temporary.replace(path)
    barrier("reference-stored")
