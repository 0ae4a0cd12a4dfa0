"""A reward model on pairs from files or from a critic's labels: trained, measured, and chosen among learning rates."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from laif_jax.config import PairsSpec, RewardSpec
from laif_jax.data.pairs import Pair
from laif_jax.evaluation.reward_accuracy import accuracy, calibration, plain, reward_report
from laif_jax.models.lora import trainable_mask
from laif_jax.models.model import Model, load_model
from laif_jax.models.reward import (
    RewardModel,
    is_reward_model,
    load_reward_model,
    reward_specs,
    save_reward_model,
    start_reward_model,
)
from laif_jax.parallel import distributed
from laif_jax.parallel.rules import param_shardings
from laif_jax.records import read_jsonl, write_json, write_jsonl
from laif_jax.stages import fit
from laif_jax.stages.artifact import Artifact, StageError, run_stage
from laif_jax.stages.base import model_folder, model_settings
from laif_jax.stages.context import Context
from laif_jax.stages.reward_data import Encoder, RewardData, pairs_settings, read_pairs, scored
from laif_jax.training.loop import train
from laif_jax.training.optim import make_optimizer
from laif_jax.training.pair_scores import pair_scores
from laif_jax.training.recorder import NonFiniteError
from laif_jax.training.reward_task import RewardTask, reward_task
from laif_jax.training.state import TrainState, create_state

logger = logging.getLogger(__name__)

CURVE = "held_out.jsonl"
RESULT = "result.json"
MOMENT_PAIRS = 128  # training pairs whose scores give the model's mean and standard deviation


def run(ctx: Context, policy: Artifact, pairs: Sequence[Artifact] | PairsSpec, spec: RewardSpec) -> Artifact:
    """Trains a reward model and writes `model/`, its folder, and `scores-<set>.jsonl.gz` of each set of pairs.

    With `spec.learning_rates`, one model per rate is trained, all by one compiled step; the one that is most accurate
    on held-out pairs is kept. A rate that is finished is not trained again, an unfinished one goes on at its
    checkpoint; one whose loss is not finite is out.

    Args:
      policy: what the reward model starts from: an SFT policy, a base model, or a reward model.
      pairs: files, or the artifacts of stages `label` (several: rounds whose labels are used again).

    Returns:
      The artifact. Metrics: `learning_rate` (kept), `steps`, `rates` (per rate `learning_rate`, `curve`: rows of
      `step`, `accuracy`, `log_loss`, `n`; `held_out`, `last`, `failed`), `data` (counts), `examples`, `mean`, `std`,
      `members`, and `sets`: for the held-out pairs (`held_out`) and each test set the `reward_report`, with `unused`
      (pairs that cannot be scored) and `response_truncated`.

    Raises:
      StageError: no learning rate gave a model, or there is nothing to choose on.
    """
    settings = {
        "model": model_settings(ctx),
        "reward": spec.resolved(),
        "pairs": pairs_settings(pairs),
        "seed": ctx.seed,
    }
    labels = {} if isinstance(pairs, PairsSpec) else {f"labels-{i}": item for i, item in enumerate(pairs)}

    def work(folder: epath.Path) -> dict[str, Any]:
        data = read_pairs(pairs, spec, ctx.seed)
        trainer = _Trainer(ctx, folder, model_folder(policy), spec, data)
        results = [trainer.finished(rate) for rate in rates_of(spec)]
        best = choose(results)
        trainer.keep(best["learning_rate"])
        sets = {name: trainer.measure(name, rows) for name, rows in data.sets.items()}
        shared = ("steps", "learning_rate", "last", "examples", "mean", "std", "tokens_per_second_per_device")
        return {
            **{name: best[name] for name in shared},
            "members": spec.members,
            "rates": results,
            "data": data.counts,
            "sets": sets,
        }

    return run_stage("reward", settings, {"policy": policy, **labels}, ctx.root, work)


def rates_of(spec: RewardSpec) -> tuple[float, ...]:
    """The learning rates that are trained with."""
    return spec.learning_rates or (spec.optimizer.learning_rate,)


def choose(results: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The result with the highest accuracy on held-out pairs; of equal ones, that with the lower log-loss.

    Raises:
      StageError: all failed, or several have no held-out accuracy to choose by.
    """
    good = [result for result in results if not result.get("failed")]
    if not good:
        reasons = "; ".join(f"{row['learning_rate']:g}: {row['failed']}" for row in results)
        raise StageError(f"no learning rate gave a reward model: {reasons}")
    if len(good) == 1:
        return good[0]
    if any(result["held_out"].get("accuracy") is None for result in good):
        raise StageError(
            "there is no held-out pair with a winner to choose a learning rate on: raise `held_out`, or give more pairs"
        )
    return max(good, key=lambda result: (result["held_out"]["accuracy"], -result["held_out"]["log_loss"]))


class _Trainer:
    """Trains one model per learning rate, from the same start on the same batches."""

    def __init__(
        self, ctx: Context, folder: epath.Path, start: epath.Path, spec: RewardSpec, data: RewardData
    ):
        self.ctx, self.folder, self.start, self.spec, self.data = ctx, folder, start, spec, data
        self._encoder: Encoder | None = None

    def place(self, rate: float) -> epath.Path:
        """Where a rate's training lies."""
        return self.folder / f"rate-{rate:g}" if self.spec.learning_rates else self.folder

    # ---- one rate ----

    def finished(self, rate: float) -> dict[str, Any]:
        """The result of a learning rate, from an earlier run or trained now."""
        file = self.place(rate) / RESULT
        known = distributed.from_main(lambda: json.loads(file.read_text()) if file.exists() else None)
        if known is not None:
            logger.info("reward: learning rate %g was finished earlier", rate)
            return known
        try:
            result = self._train(rate)
        except NonFiniteError as error:
            if not self.spec.learning_rates:
                raise
            # Where the sweep's scale ends is a result too.
            logger.warning("reward: learning rate %g: %s", rate, error)
            result = {"learning_rate": rate, "failed": str(error), "curve": self._curve(rate)}
        distributed.from_main(lambda: write_json(file, plain(result)))
        return plain(result)

    def _train(self, rate: float) -> dict[str, Any]:
        ctx, place = self.ctx, self.place(rate)
        spec = self.spec.model_copy(
            update={"optimizer": self.spec.optimizer.model_copy(update={"learning_rate": rate})}
        )
        model = self._start()
        batches = self._encode(model).training_batches(self.data.train)
        task = self._task(model, batches.layout.max_segments)
        optimizer = make_optimizer(spec.optimizer)
        state = _state(ctx, model, optimizer)
        if spec.eval_every:
            self._first(rate, task, state)
        title = f"reward-{rate:g}" if spec.learning_rates else "reward"
        result = train(
            task,
            batches,
            state,
            spec,
            place / "train",
            mesh=ctx.mesh,
            optimizer=optimizer,
            callback=lambda step, state: self._evaluate(rate, task, step, state),
            callback_every=spec.eval_every,
            wandb={"project": ctx.config.wandb, "name": f"{title}-{place.name}"}
            if ctx.config.wandb
            else None,
            title=title,
        )
        steps = int(result.state.step)
        if self.data.held_out and self._last_step(rate) != steps:  # it was cut short between the two
            self._evaluate(rate, task, steps, result.state)
        mean, std = self._moments(task, result.state)
        trained = dataclasses.replace(model, params=result.state.params, mean=mean, std=std)
        save_reward_model(place / fit.MODEL, trained, dtype=jnp.dtype(ctx.config.model.save_dtype))
        last = {name: value for name, value in result.history[-1].items() if name not in ("step", "epoch")}
        speeds = [row[_SPEED] for row in result.history if _SPEED in row]
        return {
            "learning_rate": rate,
            "steps": steps,
            "curve": self._curve(rate),
            "held_out": (self._curve(rate) or [{}])[-1],
            "last": last,
            "mean": mean,
            "std": std,
            "examples": dataclasses.asdict(batches.report),
            "tokens_per_second_per_device": sorted(speeds)[len(speeds) // 2] if speeds else None,
        }

    def _start(self) -> RewardModel:
        """The untrained reward model, the same for every rate."""
        ctx, options = self.ctx, self.ctx.config.model
        dtype = jnp.dtype(options.dtype) if options.lora else jnp.float32
        if is_reward_model(self.start):
            loaded = load_reward_model(self.start, dtype=dtype, mesh=ctx.mesh)
            model = Model(loaded.cfg, loaded.params, loaded.tokenizer)
        else:
            tokenizer = options.tokenizer if options.source != "scratch" else None
            model = load_model(str(self.start), dtype=dtype, mesh=ctx.mesh, tokenizer=tokenizer)
        model = fit.routed(model, options.router_loss)
        if options.lora is not None:
            model = dataclasses.replace(model, cfg=dataclasses.replace(model.cfg, lora=options.lora))
        key = jax.random.key(ctx.seed)
        return start_reward_model(model, self.spec, key, mesh=ctx.mesh, template=options.template)

    def _encode(self, model: RewardModel) -> Encoder:
        if self._encoder is None:  # every rate starts with the same tokenizer
            self._encoder = Encoder(self.ctx, model, self.spec)
        return self._encoder

    def _task(self, model: RewardModel, max_segments: int) -> RewardTask:
        options = self.ctx.config.model
        return reward_task(
            model.cfg, self.spec, dtype=options.dtype, remat=options.remat, max_segments=max_segments
        )

    # ---- accuracy over steps ----

    def _evaluate(self, rate: float, task: RewardTask, step: int, state: TrainState) -> None:
        """A point of the curve; later ones, which a run that was cut short left behind, are dropped."""
        if self.data.held_out:
            row = {"step": step, **self._point(task, state)}
            rows = [old for old in self._curve(rate) if old["step"] < step]
            distributed.from_main(lambda: write_jsonl(self.place(rate) / CURVE, [*rows, row]) and None)
            logger.info(
                "reward %g: step %d: accuracy %.3f on %d held-out pairs, longest wins %.3f",
                rate,
                step,
                row["accuracy"] or float("nan"),
                row["n"],
                row["longest_wins"] or float("nan"),
            )

    def _first(self, rate: float, task: RewardTask, state: TrainState) -> None:
        """The point before training, the same for every rate: measured once."""
        if self._curve(rate):
            return
        for other in rates_of(self.spec):
            if rows := self._curve(other):
                distributed.from_main(
                    lambda rows=rows: write_jsonl(self.place(rate) / CURVE, rows[:1]) and None
                )
                return
        self._evaluate(rate, task, 0, state)

    def _point(self, task: RewardTask, state: TrainState) -> dict[str, Any]:
        pairs, _ = scored(self.data.held_out, *self._score(task, state.params, self.data.held_out))
        found = accuracy(pairs)
        return plain(
            {
                "accuracy": found.accuracy,
                "ci95": found.ci95,
                "longest_wins": found.longest_wins,
                "n": found.n,
                "log_loss": calibration(pairs.difference, pairs.p_b)["log_loss"],
            }
        )

    def _curve(self, rate: float) -> list[dict[str, Any]]:
        file = self.place(rate) / CURVE
        return distributed.from_main(lambda: list(read_jsonl(file)) if file.exists() else [])

    def _last_step(self, rate: float) -> int | None:
        rows = self._curve(rate)
        return rows[-1]["step"] if rows else None

    # ---- scores ----

    def _score(self, task: RewardTask, params: Any, pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
        assert self._encoder is not None
        batches = self._encoder.test_batches(pairs)
        return pair_scores(task, params, batches, len(pairs), mesh=self.ctx.mesh)

    def _moments(self, task: RewardTask, state: TrainState) -> tuple[float, float]:
        """Mean and standard deviation of the scores of training pairs (of an ensemble, of the members' mean)."""
        scores = np.stack(self._score(task, state.params, self.data.train[:MOMENT_PAIRS]))
        scores = scores.mean(axis=1) if scores.ndim == 3 else scores
        return float(np.nanmean(scores)), max(float(np.nanstd(scores)), 1e-6)

    def keep(self, rate: float) -> None:
        """Puts the chosen model at `model/`, and deletes what only the others needed."""
        if not self.spec.learning_rates:
            return

        def move() -> None:
            chosen, kept = self.place(rate) / fit.MODEL, self.folder / fit.MODEL
            if chosen.exists():
                if kept.exists():
                    kept.rmtree()
                chosen.rename(kept)
            for other in rates_of(self.spec):
                for waste in (self.place(other) / fit.MODEL, self.place(other) / "train" / "checkpoints"):
                    if waste.exists():
                        waste.rmtree()

        distributed.from_main(move)

    def measure(self, name: str, pairs: list[Pair]) -> dict[str, Any]:
        """The report of the written model on one set of pairs; scores of every pair go to a file."""
        model = self._written
        encoder = self._encode(model)
        batches = encoder.test_batches(pairs)
        task = self._task(model, batches.layout.max_segments)
        chosen, rejected = pair_scores(task, model.params, batches, len(pairs), mesh=self.ctx.mesh)
        found, unused = scored(pairs, chosen, rejected)
        file = self.folder / f"scores-{name}.jsonl.gz"
        cut = [
            (side.chosen.response_truncated, side.rejected.response_truncated)
            for side in encoder.encode(pairs)
        ]
        rows = [_row(pair, chosen[..., i], rejected[..., i], cut[i]) for i, pair in enumerate(pairs)]
        distributed.from_main(lambda: write_jsonl(file, rows) and None)
        report = reward_report(found, seed=self.ctx.config.seed)
        return {**report, "unused": unused, "response_truncated": batches.report.response_truncated}

    @property
    def _written(self) -> RewardModel:
        if self._model is None:
            self._model = load_reward_model(self.folder / fit.MODEL, mesh=self.ctx.mesh)
        return self._model

    _model: RewardModel | None = None


_SPEED = "perf/tokens_per_second_per_device"


def _row(pair: Pair, chosen: np.ndarray, rejected: np.ndarray, cut: tuple[bool, bool]) -> dict[str, Any]:
    """A pair's scores, of a and b; null where it could not be scored. The texts stay in the data."""
    sides = (rejected, chosen) if pair.chosen_is_b else (chosen, rejected)
    return {
        "prompt_id": pair.prompt.id,
        "p_b": pair.p_b,
        **{f"score_{name}": plain(side.tolist()) for name, side in zip("ab", sides, strict=True)},
        **{
            f"cut_{name}": flag
            for name, flag in zip("ab", cut[::-1] if pair.chosen_is_b else cut, strict=True)
        },
        **{f"length_{name}": len(getattr(pair, name)) for name in "ab"},
        "groups": dict(pair.groups),
    }


def _state(ctx: Context, model: RewardModel, optimizer: Any) -> TrainState:
    lora = model.cfg.lora is not None
    return create_state(
        model.params,
        optimizer,
        mesh=ctx.mesh,
        shardings=param_shardings(reward_specs(model.cfg, model.members), ctx.mesh),
        trainable=trainable_mask(model.params, model.cfg) if lora else None,
        frozen_dtype=jnp.dtype(ctx.config.model.dtype) if lora else None,
        donate=True,
    )
