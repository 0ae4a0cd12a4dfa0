"""Checkpoints through orbax (v1): asynchronous, atomic, sharded, with the data iterator; resuming is bitwise.

Each process writes its own shards. On a disk a step is written to a temporary folder and renamed when whole; in a
bucket, which has no renames, a file marks it as whole. So a kill at any moment leaves the steps before it as they were.
A step can be read onto another mesh, and by another number of devices or hosts: arrays are stored whole, whoever wrote
which part, and the data iterator's state counts steps of the whole run.

orbax has its v1 API under `experimental` (as of 0.12.8); this file alone knows that.
"""

import json
import logging
import math
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from laif_jax.config.training import BestSpec
from laif_jax.parallel import barrier, from_main, is_main
from laif_jax.records import fingerprint
from laif_jax.records.errors import LaifError
from laif_jax.training.state import TrainState

log = logging.getLogger(__name__)
FORMAT = 1
CHECKED_BYTES = 1 << 30
# Metadata, file-system blocks, and the log files that are written next to a checkpoint.
SPARE_BYTES = 16 << 20


class CheckpointError(LaifError, RuntimeError):
    """A checkpoint cannot be written, or none can be read; the message says where and what to do."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay on disk; one that any rule keeps stays.

    Attributes:
      last: this many of the newest. every: those whose step is a multiple of it; 0: none for that reason.
      best: the best by a metric, as `best.metric`, `best.count` and `best.mode` say; a checkpoint without that metric
        is none of them.
    """

    last: int = 2
    every: int = 0
    best: BestSpec | None = None

    def policy(self) -> Any:
        """The same, for orbax."""
        of = ocp.training.preservation_policies
        rules: list[Any] = [of.LatestN(self.last)]
        if self.every:
            rules.append(of.EveryNSteps(self.every))
        if self.best is not None:
            name, low = self.best.metric, self.best.mode == "min"
            best = of.BestN(
                get_metric_fn=lambda metrics: metrics[name],
                reverse=low,
                n=self.best.count,
                keep_checkpoints_without_metrics=False,
            )
            rules.append(best)
        return of.AnyPreservationPolicy(rules)

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """What `best` ranks a checkpoint by: the mean of its metric over the rows that have it; None if none has."""
        if self.best is None:
            return None
        values = [row[self.best.metric] for row in rows if row.get(self.best.metric) is not None]
        mean = math.fsum(values) / len(values) if values else math.nan
        return {self.best.metric: mean} if math.isfinite(mean) else None


class Checkpointer:
    """The checkpoints of one run.

    Args:
      directory: their folder, local or `gs://`. Made when first needed.
      keep: which stay; a number: so many of the newest.
    """

    def __init__(self, directory: str | epath.Path, keep: Keep | int = 2):
        self.directory = epath.Path(directory)
        self.keep = Keep(keep) if isinstance(keep, int) else keep
        self._manager: ocp.training.Checkpointer | None = None

    def _open(self) -> ocp.training.Checkpointer:
        if self._manager is None:
            handlers = ocp.handlers.local_registry()
            handlers.add(ocp.handlers.JsonHandler, checkpointable_name="extra")
            context = ocp.Context()
            context.checkpointables.registry = handlers
            try:
                self._manager = ocp.training.Checkpointer(
                    self.directory if "://" in str(self.directory) else self.directory.absolute(),
                    context=context,
                    preservation_policy=self.keep.policy(),
                    cleanup_tmp_directories=True,  # what a killed run left half-written
                )
            except OSError as error:
                raise CheckpointError(self._explain("opened", error)) from error
        return self._manager

    def _explain(self, what: str, error: Any) -> str:
        good = self._committed()
        kept = f"the last good one, step {good[-1]}, is intact" if good else "there is no earlier one"
        return (
            f"checkpoint in {self.directory} could not be {what}: {error}. {kept[0].upper()}{kept[1:]}; "
            "free space or make the folder writable, then start the same command again to resume from it"
        )

    def _committed(self) -> list[int]:
        """Steps that were written to the end; without opening (and so cleaning) the folder."""
        if not self.directory.exists():
            return []
        steps = [path for path in self.directory.iterdir() if path.name.isdigit()]
        return sorted(int(path.name) for path in steps if (path / "commit_success.txt").exists())

    def latest_step(self) -> int | None:
        """The newest committed step, or None."""
        steps = self._committed()
        return steps[-1] if steps else None

    # ---- save ----

    def save(
        self,
        state: TrainState,
        extra: dict[str, Any],
        *,
        wait: bool = False,
        rows: Sequence[Mapping[str, Any]] = (),
    ) -> int:
        """Starts to write a checkpoint of `state` under its step; returns when the arrays are copied.

        Args:
          extra: JSON-able; the data iterator's state and the loop's counters.
          wait: return only when it is on disk.
          rows: of metrics since the checkpoint before, by which `keep.best` ranks this one.

        Returns:
          The step.

        Raises:
          CheckpointError: this save, or the one before it, failed: a full disk, a read-only folder.
        """
        manager = self._open()
        step = int(state.step)
        tree = _saved(state)
        self._check_space(tree)
        try:
            manager.wait()  # surfaces the failure of the save before
            if all(found.step != step for found in manager.checkpoints):
                body = {"format": FORMAT, "leaves": _describe(tree), "loop": extra}
                items = {"state": tree, "extra": {"sha256": fingerprint(body), "body": body}}
                metrics = self.keep.metrics(rows)
                manager.save_checkpointables_async(step, items, force=True, metrics=metrics)
            if wait:
                manager.wait()
        except Exception as error:
            raise CheckpointError(self._explain("written", error)) from error
        return step

    def _check_space(self, tree: Any) -> None:
        """Refuses before writing when the disk has clearly no room; a local file system only."""
        folder = str(self.directory)
        if "://" in folder:
            return
        need = sum(_local_bytes(x) for x in jax.tree.leaves(tree)) + SPARE_BYTES
        free = shutil.disk_usage(folder).free
        if free < need:
            raise CheckpointError(
                self._explain(
                    "written", f"it needs {need / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free"
                )
            )

    def wait(self) -> None:
        """Blocks until what was saved is on disk.

        Raises:
          CheckpointError: the save failed.
        """
        if self._manager is not None:
            try:
                self._manager.wait()
            except Exception as error:
                raise CheckpointError(self._explain("written", error)) from error

    def close(self) -> None:
        """Waits and releases threads; a failed save raises as in `wait`."""
        if self._manager is None:
            return
        try:
            self.wait()
        finally:
            manager, self._manager = self._manager, None
            manager.close()

    # ---- restore ----

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that is whole, or None if there is none at all.

        A checkpoint that cannot be read, or whose checksums differ, is set aside as `corrupt-STEP` with a warning that
        names it, and the one before it is taken.

        Args:
          like: a state of the same structure; gives shapes, dtypes, shardings, and the frozen parameters.

        Returns:
          (state, `extra` as saved).

        Raises:
          CheckpointError: there are checkpoints, but none can be read, or they are of another model or optimiser.
        """
        if not self._committed():
            return None
        self._set_aside_unopenable()
        manager = self._open()
        failures = []
        for step in sorted((found.step for found in manager.checkpoints), reverse=True):
            try:
                restored = self._read(manager, step, like)
            except _MISMATCH as error:
                raise CheckpointError(str(error)) from error
            except _UNREADABLE as error:
                failures.append(f"step {step}: {_first_line(error)}")
                self._set_aside(manager, step, error)
                continue
            return restored
        if (
            not failures
        ):  # buckets have no renames: a killed save's folder had the step's name, and was cleaned
            return None
        raise CheckpointError(
            f"no checkpoint in {self.directory} can be read ({'; '.join(failures)}). They were set aside as corrupt-*; "
            "start the same command again to train from the beginning"
        )

    def _read(
        self, manager: ocp.training.Checkpointer, step: int, like: TrainState
    ) -> tuple[TrainState, dict[str, Any]]:
        extra = manager.load_checkpointables(step, {"extra": None})["extra"]
        body = extra["body"]
        if fingerprint(body) != extra["sha256"]:
            raise ValueError("its description was altered (SHA-256 differs)")
        if body["format"] != FORMAT:
            raise StructureError(
                f"{self.directory}/{step} has format {body['format']}, this version reads {FORMAT}"
            )
        target = _saved(like)
        _check_structure(body["leaves"], target, f"{self.directory}/{step}")
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target)
        tree = manager.load_checkpointables(step, {"state": abstract})["state"]
        found = _describe(tree)
        bad = [
            k for k, v in body["leaves"].items() if None not in (v[2], found[k][2]) and v[2] != found[k][2]
        ]
        if bad:
            raise ValueError(f"checksums differ for {', '.join(bad[:3])}{' ...' if len(bad) > 3 else ''}")
        healthy = jax.device_put(np.ones((), np.bool_), like.healthy.sharding)
        state = TrainState(tree["step"], tree["trainable"], like.frozen, tree["opt_state"], healthy)
        return state, body["loop"]

    def _set_aside_unopenable(self) -> None:
        """Orbax reads the description of every step when it opens a folder, and one that is not an object stops it."""
        # Process 0 looks for all: once it renames, the others would not see what it saw.
        for step in from_main(self._unopenable):
            self._rename_aside(step, ValueError("its metadata does not describe a checkpoint"))

    def _unopenable(self) -> list[int]:
        bad = []
        for step in self._committed():
            file = self.directory / str(step) / "_CHECKPOINT_METADATA"
            try:
                description = json.loads(file.read_text() or "{}") if file.exists() else {}
            except ValueError:  # orbax itself copes with text that is no JSON
                continue
            if not isinstance(description, dict) or not isinstance(
                description.get("item_handlers", {}), dict | str
            ):
                bad.append(step)
        return bad

    def _set_aside(self, manager: ocp.training.Checkpointer, step: int, error: BaseException) -> None:
        self._rename_aside(step, error)
        manager.reload()

    def _rename_aside(self, step: int, error: BaseException) -> None:
        bad, aside = self.directory / str(step), self.directory / f"corrupt-{step}"
        if is_main():
            if aside.exists():
                aside.rmtree()
            bad.rename(aside)
        barrier(f"set-aside-{step}")
        log.warning(
            "checkpoint %s cannot be read (%s); it was set aside as %s, and training goes on from the one before it",
            bad,
            _first_line(error),
            aside.name,
        )


class StructureError(ValueError):
    """A checkpoint is whole but of another model, optimiser or version."""


_MISMATCH = (StructureError,)
# What orbax and tensorstore raise for missing, truncated or altered files; for altered metadata, whatever comes of it.
_UNREADABLE = (
    ValueError,
    OSError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
    zlib.error,
)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


def _saved(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of a state. Frozen parameters come from the base model."""
    return {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state}


def _local_bytes(x: jax.Array) -> int:
    """Bytes of an array that this process holds, each part once."""
    return sum(s.data.nbytes for s in x.addressable_shards if s.replica_id == 0)


def _describe(tree: Any) -> dict[str, list[Any]]:
    """[shape, dtype, CRC-32 of the bytes] of each leaf by path.

    The last is None for arrays that this process does not hold whole, and in trees above `CHECKED_BYTES`, where it
    would hold up training; there the CRC-32C of the storage format is what guards.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    small = sum(x.nbytes for _, x in leaves) <= CHECKED_BYTES
    checked = [small and x.is_fully_addressable for _, x in leaves]
    values = iter(jax.device_get([x for (_, x), use in zip(leaves, checked) if use]))
    return {
        jax.tree_util.keystr(path): [
            list(x.shape),
            str(x.dtype),
            zlib.crc32(np.ascontiguousarray(next(values)).data) if use else None,
        ]
        for (path, x), use in zip(leaves, checked)
    }


def _check_structure(saved: dict[str, list[Any]], target: Any, where: str) -> None:
    expected = {
        jax.tree_util.keystr(path): [list(x.shape), str(x.dtype)]
        for path, x in jax.tree_util.tree_leaves_with_path(target)
    }
    different = [name for name in expected if name not in saved or saved[name][:2] != expected[name]]
    different += [name for name in saved if name not in expected]
    if different:
        shown = "; ".join(
            f"{name} is {saved.get(name, ['absent'])[:2]} there, {expected.get(name, 'absent')} here"
            for name in different[:2]
        )
        raise StructureError(
            f"{where} is of another model or optimiser: {shown}. "
            "Use another output folder, or the configuration that it was made with"
        )
