"""The training loop: feed, step, log, checkpoint; stops with a clear message, and resumes bitwise where it was."""

import logging
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from laif_jax.config.schema import TrainSpec
from laif_jax.parallel import batch_shardings, preemption
from laif_jax.training import together
from laif_jax.training.checkpoint import Keep
from laif_jax.training.feed import (
    Batches,
    EmptyBatchError,
    check_batch,
    empty_message,
    example_indices,
    to_device,
)
from laif_jax.training.metrics import clean, flops_per_token, mean_rows, peak_flops
from laif_jax.training.optim import make_optimizer, optimizer_hyper, schedule
from laif_jax.training.recorder import NonFiniteError, Recorder
from laif_jax.training.reference import ReferenceLogps
from laif_jax.training.state import TrainState, state_shardings
from laif_jax.training.step import make_train_step

log = logging.getLogger(__name__)
Callback = Callable[[int, TrainState], str | None]


@dataclass(frozen=True)
class TrainResult:
    """What a finished run gives.

    Attributes:
      state: after the last step. history: one row per step, as in `metrics.jsonl`, over all resumptions.
      resumed_from: the step that this process began at.
    """

    state: TrainState
    history: list[dict[str, Any]]
    resumed_from: int


@dataclass
class _Pending:
    """Steps that were dispatched, and whose metrics the host has not read yet."""

    data_state: Any  # of the iterator, before the first of them
    steps: list[tuple[int, dict[str, Any], dict[str, np.ndarray]]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)


def train(
    task: Any,
    batches: Batches,
    state: TrainState,
    spec: TrainSpec,
    out_dir: str | epath.Path,
    *,
    mesh: Mesh,
    total_steps: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
    reference: ReferenceLogps | None = None,
    callback: Callback | None = None,
    callback_every: int = 0,
    wandb: Mapping[str, Any] | None = None,
    title: str = "train",
    progress: bool = True,
    own_reference: int | None = None,
) -> TrainResult:
    """Trains to the end, from the newest checkpoint in `out_dir` if there is one.

    Inside of a `together.Meeting` the run trains in one compiled step with the others that are alike, and leaves the
    same files.

    Args:
      task: the loss function (`sft_task`, `preference_task`); its `numbers` are passed to every step as traced scalars.
      batches: host batches [A, rows, ...] with `get_state` and `set_state` (JSON).
      state: a fresh one (`create_state`); it is donated, so the caller must not use it afterwards.
      spec: optimiser, `log_every`, `save_every`, what to keep. out_dir: gets checkpoints/, metrics.jsonl, tensorboard/.
      total_steps: updates of the whole run; None: `spec.steps`, or else `batches.total_steps`.
      optimizer: None: that of `spec.optimizer`; it must be the one that made the state.
      reference: reference log-probs by pair, filled into each batch; before the first update they are checked.
      callback: called with (step, state) every `callback_every` steps and after the last, for tables of samples. It
        must not keep the state, which the next step donates. A text that it returns goes to TensorBoard.
      wandb: arguments of `wandb.init`, or None. progress: False shows none (where another display is live).
      own_reference: in a meeting only, instead of `reference`: the number of pairs whose reference is `state` as given;
        the meeting computes it by the program that trains.

    Returns:
      TrainResult.

    Raises:
      NonFiniteError, EmptyBatchError: with the state before the bad step saved. FirstStepError, CheckpointError.
      Preempted: the run was asked to stop; its last step was saved.
    """
    out_dir = epath.Path(out_dir)
    total = total_steps or spec.steps or getattr(batches, "total_steps", None)
    if not total:
        raise ValueError("how long to train is not known: give `steps` or an iterator with `total_steps`")
    run = _Run(task, batches, spec, out_dir, mesh, int(total), optimizer, reference, wandb, title)
    meeting = together.joined()
    if meeting is not None:
        member = together.Member(run, state, callback, callback_every, own_reference, progress)
        state, resumed = meeting.train(member)
        return TrainResult(state, run.history, resumed)
    if own_reference is not None:
        raise ValueError("`own_reference` is for a run in a meeting; alone, give `reference`")
    with run.closing():
        state, resumed = run.resume(state)
        with run.showing(int(total), resumed, enabled=progress):
            state = run.steps(state, resumed, callback, callback_every)
    return TrainResult(state, run.history, resumed)


class _Run(Recorder):
    """The moving parts of one call of `train`."""

    def __init__(
        self,
        task: Any,
        batches: Batches,
        spec: TrainSpec,
        out_dir: epath.Path,
        mesh: Mesh,
        total: int,
        optimizer: optax.GradientTransformation | None,
        reference: ReferenceLogps | None,
        wandb: Mapping[str, Any] | None,
        title: str,
    ):
        super().__init__(out_dir, title, Keep(spec.keep, spec.keep_every, spec.keep_best), wandb)
        self.task, self.batches, self.spec, self.mesh, self.total = task, batches, spec, mesh, total
        self.optimizer = optimizer or make_optimizer(spec.optimizer)
        self.reference = reference
        self.tokens = 0.0
        numbers = optimizer_hyper(spec.optimizer) | dict(getattr(task, "numbers", {}))
        self.hyper = {name: np.asarray(value, np.float32) for name, value in numbers.items()}
        self.rate = schedule(spec.optimizer, total)
        self.step_fn: Any = None
        self.flops = 0.0
        self.fetch: Callable[[list[Any]], list[dict[str, Any]]] = _fetch

    # ---- start ----

    def resume(self, state: TrainState) -> tuple[TrainState, int]:
        """The state to start from, and its step; the data iterator and the metrics go back to it."""
        restored = self.checkpoints.restore(state)
        if restored is not None:
            state, extra = restored
            self.batches.set_state(extra["data"])
            self.tokens = extra["num_tokens"]
            log.info("%s: resumed from the checkpoint of step %d", self.title, int(state.step))
        step = self.saved = int(state.step)
        self.history = self.writer.resume(step)
        self.flops = flops_per_token(state.trainable, state.frozen)
        return state, step

    # ---- steps ----

    def steps(self, state: TrainState, first: int, callback: Callback | None, every: int) -> TrainState:
        """Runs from step `first` to the end."""
        now = [state]
        course = self.course(lambda: now[0], first, callback, every)
        metrics: Any = None
        while (batch := together.advance(course, metrics)) is not None:
            now[0], metrics = self._dispatch(now[0], batch)
        return now[0]

    def course(
        self, state: Callable[[], TrainState], first: int, callback: Callback | None, every: int
    ) -> Generator[dict[str, np.ndarray], Any, None]:
        """All that a run does around its steps, from step `first` to the end. It yields the batch of each step, for
        which `self.hyper` is set, and is sent the step's metrics, which `self.fetch` reads.

        The host reads metrics only every `log_every` steps.

        Args:
          state: gives the state after the steps whose metrics were sent.
        """
        pending = _Pending(self.batches.get_state())
        for step in range(first + 1, self.total + 1):
            batch = self._next(step)
            self.hyper["learning_rate"] = np.asarray(self.rate(step - 1), np.float32)
            metrics = yield batch
            pending.steps.append((step, metrics, batch))
            last = step == self.total
            stop = preemption.reached() and not last
            save = last or stop or (self.spec.save_every > 0 and step % self.spec.save_every == 0)
            call = callback is not None and (last or (every > 0 and step % every == 0))
            if last or save or call or step == 1 or step % self.spec.log_every == 0:
                pending = self._collect(state, pending)
            if stop:
                self.stop(state(), self._extra(pending.data_state))
            if save:
                self.save(state(), self._extra(pending.data_state), wait=last)
                pending.started = time.perf_counter()  # a save is not training time
            if call and callback is not None:
                text = callback(step, state())
                if text:
                    self.writer.text("samples", text, step)
                pending.started = time.perf_counter()

    def _next(self, step: int) -> dict[str, np.ndarray]:
        try:
            batch = dict(next(self.batches))
        except StopIteration as error:
            raise ValueError(
                f"the data ended before step {step} of {self.total}; give more `epochs`, or fewer `steps`"
            ) from error
        if self.reference is not None:
            batch |= self.reference.fill(batch["pair_index"])
        check_batch(batch, step)
        return batch

    def _dispatch(self, state: TrainState, batch: dict[str, np.ndarray]) -> tuple[TrainState, dict[str, Any]]:
        arrays = to_device(batch, self.mesh)
        if self.step_fn is None:
            self.step_fn = make_train_step(
                self.task,
                self.optimizer,
                mesh=self.mesh,
                state_shardings=state_shardings(state),
                batch_shardings=batch_shardings(arrays, self.mesh),
            )
        return self.step_fn(state, arrays, self.hyper)

    # ---- reading metrics ----

    def _collect(self, state: Callable[[], TrainState], pending: _Pending) -> _Pending:
        """Reads the metrics of the dispatched steps, writes them, and stops the run if one of them went wrong."""
        fetched = self.fetch([metrics for _, metrics, _ in pending.steps])
        seconds = time.perf_counter() - pending.started
        rows = []
        for (step, _, batch), values in zip(pending.steps, fetched):
            if not values["healthy"]:
                self.writer.write(rows)
                self._refuse(state(), pending, step, values, batch)
            rows.append(self._row(step, values))
            if step == 1 and hasattr(self.task, "check_first_step"):
                self.task.check_first_step(rows[-1])
        if rows[0]["step"] > 1:  # the first step's time is compilation
            rows[-1] |= self._speed(sum(float(v.get("num_tokens", 0)) for v in fetched), seconds)
        self.writer.write(rows)
        self.history += rows
        shown = mean_rows(rows)
        self.writer.show(shown)
        self.progress.update(rows[-1]["step"], shown)
        return _Pending(self.batches.get_state())

    def _row(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
        """A row of `metrics.jsonl`; `num_tokens` counts from the start of training, as in TRL."""
        row: dict[str, Any] = {"step": step} | clean(values)
        row.pop("healthy")
        row.pop("weight")
        if "num_tokens" in row:
            self.tokens += float(values["num_tokens"])
            row["num_tokens"] = self.tokens
        per_epoch = getattr(self.batches, "steps_per_epoch", None)
        return row | ({"epoch": step / per_epoch} if per_epoch else {})

    def _speed(self, tokens: float, seconds: float) -> dict[str, float]:
        if not tokens:
            return {}
        per_device = tokens / max(seconds, 1e-9) / self.mesh.size
        peak = peak_flops(self.mesh.devices.flat[0].device_kind)
        mfu = {"perf/mfu": per_device * self.flops / peak} if peak else {}
        return {"perf/tokens_per_second_per_device": per_device} | mfu

    # ---- checkpoints ----

    def _extra(self, data_state: Any) -> dict[str, Any]:
        return {"data": data_state, "num_tokens": self.tokens}

    def _refuse(
        self, state: TrainState, pending: _Pending, step: int, values: Any, batch: dict[str, np.ndarray]
    ) -> None:
        """Saves the last good state, with the iterator in front of the bad batch, and raises."""
        self.batches.set_state(pending.data_state)
        for good, _, _ in pending.steps:
            if good == step:
                break
            next(self.batches)
        saved = self.save_good(state, self._extra(self.batches.get_state()))
        if not values["weight"]:
            raise EmptyBatchError(f"{empty_message(step, batch)}. {saved}")
        indices = example_indices(batch)
        which = f" The batch holds the examples {indices}." if indices else ""
        raise NonFiniteError(
            f"{self.title}: step {step} has loss {float(values['loss'])}, gradient norm {float(values['grad_norm'])} "
            f"at learning rate {float(values['learning_rate']):.3g}.{which} {saved}; lower `optimizer.learning_rate`, "
            "lengthen `optimizer.warmup`, or look at these examples with `laif inspect`, then start the command again"
        )


def _fetch(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics of steps on the host, without their outputs."""
    return jax.device_get([{k: v for k, v in row.items() if k != "outputs"} for row in metrics])
