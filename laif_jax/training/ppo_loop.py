"""The loop of PPO: roll out, reward, update, log, evaluate, checkpoint; stops with a clear message, resumes bitwise.

All that an iteration draws is a function of the seed and its number: the number is the data position, and random keys
need no saving. A checkpoint holds the trained parameters, the optimiser's state and the coefficient of the KL.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from etils import epath

from laif_jax.config.rl import PpoSpec
from laif_jax.objectives.rl import adaptive_kl
from laif_jax.parallel import is_main, preemption
from laif_jax.records import LaifError, append_jsonl, write_jsonl
from laif_jax.rollout.placement import to_host, using
from laif_jax.training.checkpoint import Keep
from laif_jax.training.metrics import clean, mean_rows, read_metrics
from laif_jax.training.optim import make_optimizer
from laif_jax.training.ppo import make_update
from laif_jax.training.ppo_models import PpoModels
from laif_jax.training.ppo_plan import (
    EVALUATION,
    Layout,
    Numbers,
    iteration_key,
    make_layout,
    prompts_of,
    rollout_config,
    update_config,
    update_order,
)
from laif_jax.training.ppo_roll import Decode, HostReward, PpoPrompt, Quality, Rolled, Roller, on_host
from laif_jax.training.recorder import NonFiniteError, Recorder
from laif_jax.training.state import TrainState, state_shardings

log = logging.getLogger(__name__)
Snapshot = Callable[[int, TrainState], None]
SHOWN = 4  # responses that are kept of an evaluation


@dataclass(frozen=True)
class PpoTask:
    """What a run of PPO is about, beside its options.

    Attributes:
      prompts: to train on. held_out: to evaluate on; none: no evaluation.
      eos_ids: tokens that end a response. decode: text of token ids.
      weights: of all rewards, by name: those of `models.scorers` and `rewards`. rewards: computed on the host.
      quality: the true quality of completions, logged as `eval/quality`.
      new_tokens: drawn at most.
    """

    prompts: Sequence[PpoPrompt]
    held_out: Sequence[PpoPrompt]
    eos_ids: Sequence[int]
    decode: Decode
    weights: Mapping[str, float]
    new_tokens: int
    rewards: Mapping[str, HostReward] = field(default_factory=dict)
    quality: Quality | None = None
    dtype: str = "float32"
    remat: str = "none"
    chunk: int = 1024


@dataclass(frozen=True)
class PpoResult:
    """What a finished run gives.

    Attributes:
      state: after the last iteration. history: one row per iteration, as in `metrics.jsonl`; iteration 0 is the
        evaluation before training. resumed_from: the iteration that this process began after. kl_coef: at the end.
    """

    state: TrainState
    history: list[dict[str, Any]]
    resumed_from: int
    kl_coef: float


def run_ppo(
    spec: PpoSpec,
    models: PpoModels,
    task: PpoTask,
    out_dir: str | epath.Path,
    *,
    seed: int,
    snapshot: Snapshot | None = None,
    wandb: Mapping[str, Any] | None = None,
    title: str = "ppo",
    progress: bool = True,
) -> PpoResult:
    """Runs to the end, from the newest checkpoint in `out_dir` if there is one.

    Args:
      models: fresh (`build_models`); the trained arrays of their state are donated.
      out_dir: gets checkpoints/, metrics.jsonl, samples.jsonl (of evaluations), tensorboard/.
      snapshot: called with (iteration, state) every `spec.keep_every` iterations; it must not keep the state.
      wandb: arguments of `wandb.init`, or None. progress: False shows none.

    Returns:
      PpoResult.

    Raises:
      NonFiniteError: a log-prob, KL, value, reward, loss or gradient is not finite; the last good state was saved.
      CheckpointError. What a reward raises, after the state was saved. Preempted: the run was asked to stop; the last
      iteration was saved.
    """
    run = _Run(spec, models, task, epath.Path(out_dir), seed, snapshot, wandb, title)
    with run.closing():
        state, resumed = run.resume()
        with run.showing(spec.iterations, resumed, enabled=progress):
            state = run.iterations(state, resumed)
    return PpoResult(state, run.history, resumed, run.kl_coef)


class _Run(Recorder):
    """The moving parts of one call of `run_ppo`."""

    def __init__(
        self,
        spec: PpoSpec,
        models: PpoModels,
        task: PpoTask,
        out_dir: epath.Path,
        seed: int,
        snapshot: Snapshot | None,
        wandb: Mapping[str, Any] | None,
        title: str,
    ):
        super().__init__(out_dir, title, Keep(spec.keep, best=spec.keep_best), wandb)
        self.spec, self.models, self.task, self.seed = spec, models, task, seed
        self.snapshot = snapshot
        self.samples = out_dir / "samples.jsonl"
        self.kl_coef = float(np.float32(spec.kl.coef))
        self.layout = _layout(spec, models, task)
        self.roller = Roller(
            models,
            rollout_config(spec, models, self.layout, dtype=task.dtype, chunk=task.chunk),
            self.layout,
            eos_ids=task.eos_ids,
            decode=task.decode,
            rewards=task.rewards,
            temperature=spec.sampling.temperature,
            generator=title,
        )
        self.update = make_update(
            update_config(spec, models, dtype=task.dtype, remat=task.remat, chunk=task.chunk),
            make_optimizer(spec.optimizer),
            models.mesh,
            state_shardings(models.state),
        )
        full = spec.kl.estimator == "full" and spec.kl.place == "loss"
        self.reference = models.reference_head() if full else None
        self.numbers = Numbers(spec, task.weights)

    # ---- start and end ----

    def resume(self) -> tuple[TrainState, int]:
        """The state to start from, and the iterations that it has behind it."""
        state = self.models.state
        restored = self.checkpoints.restore(state)
        if restored is not None:
            state, extra = restored
            self.kl_coef = extra["kl_coef"]
            log.info("%s: resumed from the checkpoint of iteration %d", self.title, int(state.step))
        done = self.saved = int(state.step)
        self.history = self.writer.resume(done)
        if is_main() and self.samples.exists():  # what was written after the checkpoint is written again
            write_jsonl(self.samples, [row for row in read_metrics(self.samples) if row["step"] <= done])
        return state, done

    def extra(self) -> dict[str, Any]:
        """What a checkpoint holds beside the state."""
        return {"kl_coef": self.kl_coef}

    # ---- iterations ----

    def iterations(self, state: TrainState, done: int) -> TrainState:
        """Runs iterations `done + 1` to the last."""
        spec = self.spec
        if done == 0 and self.task.held_out and not self.history:
            self.write({"step": 0} | self.guarded(state, lambda: self.evaluate(state, 0)), show=True)
        for number in range(done + 1, spec.iterations + 1):
            state, row = self.iteration(state, number, timed=number > done + 1)
            last = number == spec.iterations
            if self.task.held_out and (last or (spec.eval_every and number % spec.eval_every == 0)):
                row |= self.guarded(state, lambda now=state, step=number: self.evaluate(now, step))
            self.write(row, show=last or number == 1 or number % spec.log_every == 0)
            if self.snapshot is not None and spec.keep_every and number % spec.keep_every == 0:
                self.snapshot(number, state)
            if preemption.reached() and not last:
                self.stop(state, self.extra())
            if last or (spec.save_every > 0 and number % spec.save_every == 0):
                self.save(state, self.extra(), wait=last)
        return state

    def guarded(self, state: TrainState, work: Callable[[], Any]) -> Any:
        """What a reward raises (a critic that died) ends the run after the state was saved."""
        try:
            return work()
        except LaifError:
            self.save(state, self.extra(), wait=True)
            raise

    def iteration(self, state: TrainState, number: int, *, timed: bool) -> tuple[TrainState, dict[str, Any]]:
        """One rollout and one update: (state, row of metrics)."""
        spec, index = self.spec, number - 1
        picked = prompts_of(self.seed, index, len(self.task.prompts), spec.batch_size)
        asked = [self.task.prompts[i] for i in picked]
        key = iteration_key(self.seed, index)
        rolled = self.guarded(state, lambda: self.roller(state, asked, spec.sampling.samples, key))
        if preemption.reached():  # an iteration is long; its rollout will be drawn again, the same
            self.stop(state, self.extra())
        order = update_order(spec, self.layout, self.seed, index)
        started = time.perf_counter()
        with using(self.models.mesh):
            scores, weight = self.roller.on_devices(rolled)
            hyper = self.numbers.hyper(index, self.kl_coef)
            state, metrics = self.update(state, self.reference, rolled.rollout, scores, weight, order, hyper)
        metrics = {name: to_host(value) for name, value in metrics.items()}
        seconds = rolled.seconds | {"update": time.perf_counter() - started}
        if not metrics["healthy"]:
            self.refuse(state, number, metrics, order, picked)
        row = {"step": number} | clean({k: v for k, v in metrics.items() if np.ndim(v) == 0})
        row.pop("healthy")
        row |= (
            {"kl_coef": self.kl_coef, "episode": number * self.layout.rows} | rolled.about() | rolled.metrics
        )
        row |= {f"timing_s/{name}": value for name, value in seconds.items()}
        if timed:  # the first iteration's time is compilation
            row |= self.speed(rolled, sum(seconds.values()))
        if spec.kl.target is not None:
            # Rows without a score are not in `objective/kl`, so they are no episodes here either.
            kl, rows = row["objective/kl"] or 0.0, float(metrics["rewards/rows"])
            self.kl_coef = float(adaptive_kl(self.kl_coef, kl, spec.kl.target, spec.kl.horizon, rows))
        return state, row

    def speed(self, rolled: Rolled, seconds: float) -> dict[str, float]:
        """Responses and drawn tokens per second of a whole iteration."""
        drawn = float(rolled.counts.sum())
        return {
            "eps": len(rolled.prompts) / seconds,
            "perf/tokens_per_second_per_device": drawn / seconds / self.models.mesh.size,
            "perf/rollout_tokens_per_second": drawn / max(rolled.seconds["rollout"], 1e-9),
        }

    def write(self, row: dict[str, Any], *, show: bool) -> None:
        self.writer.write([row])
        self.history.append(row)
        if show:
            shown = mean_rows(self.history[-min(self.spec.log_every, len(self.history)) :])
            self.writer.show(shown)
            if row["step"] > 0:
                self.progress.update(row["step"], shown)

    # ---- evaluation ----

    def evaluate(self, state: TrainState, step: int) -> dict[str, Any]:
        """One response to each held-out prompt, by keys that are the same in every evaluation. The first few are kept
        in `samples.jsonl`."""
        held_out = self.task.held_out[: self.spec.eval_prompts]
        key = iteration_key(self.seed, EVALUATION)
        totals, kls, lengths, ended, quality = [], [], [], [], []
        named: dict[str, list[np.ndarray]] = {name: [] for name in self.task.weights}
        for first in range(0, len(held_out), self.layout.rows):
            part = held_out[first : first + self.layout.rows]
            rolled = self.roller(state, part, 1, jax.random.fold_in(key, first))
            totals.append(self.roller.totals(rolled, self.task.weights))
            if first == 0:
                self.keep_samples(step, rolled, totals[0])
            kls.append(self.roller.kl(rolled, self.spec.kl.estimator))
            stopped = np.asarray([c.finish_reason == "stop" for c in rolled.completions])
            ended.append(stopped)
            lengths.append(rolled.counts - stopped)
            for name, scores in rolled.scores.items():
                values = on_host(scores)[: len(part)]
                named[name].append(np.where(rolled.weight[: len(part)] > 0, values, np.nan))
            if self.task.quality is not None:
                quality.append(self.task.quality([p.prompt for p in part], rolled.completions))
        row = {
            "eval/reward": _mean(totals),
            "eval/objective/kl": _mean(kls),
            "eval/response_length": _mean(lengths),
            "eval/ended": _mean(ended),
            **{f"eval/rewards/{name}/mean": _mean(values) for name, values in named.items()},
        }
        return clean(row | ({"eval/quality": _mean(quality)} if quality else {}))

    def keep_samples(self, step: int, rolled: Rolled, rewards: np.ndarray) -> None:
        """Appends the first responses of an evaluation to `samples.jsonl`."""
        if is_main():
            rows = zip(rolled.prompts[:SHOWN], rolled.completions, rewards)
            for asked, completion, reward in rows:
                found = {
                    "step": step,
                    "prompt": asked.prompt.instruction,
                    "completion": completion.text,
                    "finish_reason": completion.finish_reason,
                    **clean({"reward": float(reward)}),
                }
                append_jsonl(self.samples, found)

    # ---- trouble ----

    def refuse(
        self,
        state: TrainState,
        number: int,
        metrics: Mapping[str, Any],
        order: np.ndarray,
        picked: np.ndarray,
    ) -> None:
        """Saves the last good state and raises."""
        saved = self.save_good(state, self.extra())
        rows, where = culprits(metrics, order)
        prompts = sorted({int(picked[row // self.spec.sampling.samples]) for row in rows})
        raise NonFiniteError(
            f"{self.title}: iteration {number}: {where} not finite (KL {float(metrics['objective/kl']):.4g}, loss "
            f"{float(metrics['loss']):.4g}, score {float(metrics['objective/scores']):.4g}, KL coefficient "
            f"{self.kl_coef:.4g}). Prompts (rows of the training prompts, from 0): {prompts}. {saved}; lower "
            "`ppo.optimizer.learning_rate`, raise `ppo.kl.coef`, or look at these prompts and their rewards, then "
            "start the command again: it resumes there"
        )


def culprits(metrics: Mapping[str, Any], order: np.ndarray) -> tuple[list[int], str]:
    """Which rows were not finite, and what of them.

    Args:
      metrics: of the update, on the host. order: int32 [U, A, R].
    """
    rows = np.flatnonzero(~np.asarray(metrics["rows_finite"]))
    if len(rows):
        return rows.tolist(), "log-probs, KL, values or rewards of the rollout are"
    update = int(np.argmin(np.asarray(metrics["update_finite"])))
    bad = ~np.asarray(metrics["finite"])[update] & (order[update] >= 0)
    where = f"the loss or gradient of update {update + 1} of {len(order)} is"
    chosen = order[update][bad] if bad.any() else order[update][order[update] >= 0]
    return sorted({int(row) for row in chosen}), where


def _layout(spec: PpoSpec, models: PpoModels, task: PpoTask) -> Layout:
    if not task.prompts:
        raise ValueError("PPO needs at least one prompt")
    missing = set(task.weights) ^ {*models.scorers, *task.rewards}
    if missing:
        raise ValueError(f"rewards without a weight, or weights without a reward: {sorted(missing)}")
    longest = max(len(p.tokens) for p in (*task.prompts, *task.held_out[: spec.eval_prompts]))
    return make_layout(spec, models.mesh, longest, task.new_tokens)


def _mean(parts: Sequence[Any]) -> float:
    values = np.concatenate([np.asarray(part, np.float64) for part in parts])
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")
