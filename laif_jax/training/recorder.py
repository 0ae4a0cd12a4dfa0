"""What every training loop leaves behind, and how it ends: checkpoints, metrics, progress."""

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import jax
import numpy as np
from etils import epath

from laif_jax.parallel import preemption
from laif_jax.records.errors import LaifError
from laif_jax.training.checkpoint import Checkpointer, CheckpointError, Keep
from laif_jax.training.metrics import MetricsWriter
from laif_jax.training.progress import open_progress
from laif_jax.training.state import TrainState

log = logging.getLogger(__name__)


class NonFiniteError(LaifError, FloatingPointError):
    """Something that training computes is not finite. The last good state was saved."""


class Recorder:
    """The files and the display of one run.

    Args:
      out_dir: gets checkpoints/, metrics.jsonl, tensorboard/. title: of the run, in messages.
      keep: which checkpoints stay. wandb: arguments of `wandb.init`, or None.

    Attributes:
      history: one row per step, as in `metrics.jsonl`, over all resumptions. progress: of `open_progress`.
      saved: the step of the newest checkpoint.
    """

    def __init__(self, out_dir: epath.Path, title: str, keep: Keep, wandb: Mapping[str, Any] | None):
        self.title = title
        self.checkpoints = Checkpointer(out_dir / "checkpoints", keep)
        self.writer = MetricsWriter(out_dir, wandb)
        self.progress: Any = None
        self.history: list[dict[str, Any]] = []
        self.saved = 0

    @contextmanager
    def closing(self) -> Generator[None, None, None]:
        """Finishes what is being written at the end; if something went wrong, without hiding the reason."""
        try:
            with preemption.loop():
                yield
        except BaseException:
            self.writer.close()
            try:
                self.checkpoints.close()
            except CheckpointError as error:
                log.warning("%s: %s", self.title, error)
            raise
        self.checkpoints.close()
        self.writer.close()

    @contextmanager
    def showing(self, total: int, done: int, *, enabled: bool) -> Generator[None, None, None]:
        """A progress display of the steps after `done`."""
        with open_progress(self.title, total, done, enabled=enabled) as self.progress:
            yield

    def save(self, state: TrainState, extra: dict[str, Any], *, wait: bool = False) -> None:
        """Saves a checkpoint, ranked by the rows of `history` since the one before."""
        rows = [row for row in self.history if row["step"] > self.saved]
        self.saved = self.checkpoints.save(state, extra, wait=wait, rows=rows)

    def stop(self, state: TrainState, extra: dict[str, Any]) -> NoReturn:
        """Saves and ends the run, which was asked to stop (`preemption.reached`).

        Raises:
          Preempted: always.
        """
        self.save(state, extra, wait=True)
        raise preemption.Preempted(f"{self.title}: step {int(state.step)} was saved")

    def save_good(self, state: TrainState, extra: dict[str, Any]) -> str:
        """Saves a state in which a step was refused, as it was before that step. Returns a sentence that says where."""
        healthy = jax.device_put(np.ones((), np.bool_), state.healthy.sharding)
        self.save(replace(state, healthy=healthy), extra, wait=True)
        return f"The last good state was saved in {self.checkpoints.directory}"
