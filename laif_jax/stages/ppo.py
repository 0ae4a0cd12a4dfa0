"""Reinforcement learning of a policy: PPO, REINFORCE, RLOO or GRPO on given rewards."""

import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from laif_jax.config import PpoSpec
from laif_jax.data.chat import encode_prompts, end_of_turn_ids
from laif_jax.models.dtypes import in_compute_dtype
from laif_jax.models.model import Model, load_model, save_model
from laif_jax.records import Completion, Prompt
from laif_jax.stages import fit
from laif_jax.stages import prompts as prompts_stage
from laif_jax.stages.artifact import Artifact, StageError, run_stage
from laif_jax.stages.base import compute_dtype, model_folder, model_settings
from laif_jax.stages.context import Context
from laif_jax.stages.ppo_rewards import Sources, load_rewards, reward_inputs, reward_settings
from laif_jax.training.ppo_loop import PpoResult, PpoTask, run_ppo
from laif_jax.training.ppo_models import PpoModels, build_models, frozen_in, without_adapters
from laif_jax.training.ppo_roll import PpoPrompt, Quality
from laif_jax.training.state import TrainState
from laif_jax.worlds import symbols

logger = logging.getLogger(__name__)
SNAPSHOTS = "snapshots"


def run(
    ctx: Context,
    prompts: Artifact,
    policy: Artifact,
    spec: PpoSpec,
    *,
    rewards: Sources,
    reference: Artifact | None = None,
    start: int = 0,
    stop: int | None = None,
    seed: int | None = None,
    quality: Quality | None = None,
) -> Artifact:
    """Trains the policy and writes `model/` in Hugging Face layout, `train/metrics.jsonl`, and `snapshots/ITERATION/`
    every `spec.keep_every` iterations, each such a model too. `spec.sweep` is the caller's to run.

    Args:
      prompts: of the stage `prompts`; rows `start:stop` of "train" are trained on, "eval" is held out.
      policy: the stage whose model is trained. reference: of the KL; None: the policy as it starts.
      rewards: by name; a reward model that a stage made is given as its artifact, whose model then counts.
      seed: of prompts' order, sampling and fresh weights; None: the replicate's.
      quality: the true quality of completions, for `eval/quality`; None: known in the synthetic world alone.

    Returns:
      The artifact. Metrics: `iterations`, `episodes`, `prompts`, `prompts_cut`, `kl_coef` (at the end), `first` and
      `last` (the `eval/` values before and after), `objective/*` and `rewards/NAME/mean` of the last iteration,
      `snapshots` (their iterations), `value` (what the value model started from), `views` (rewards that are adapters
      over the policy's weights), `tokens_per_second_per_device`.

    Raises:
      StageError: a reward cannot be used, or the prompts leave no room. NonFiniteError and what a reward raises come as
        StageError too, with a checkpoint saved: the same call goes on there.
    """
    seed = ctx.seed if seed is None else seed
    settings = {
        "model": model_settings(ctx),
        "ppo": {name: value for name, value in spec.resolved().items() if name not in _FREE},
        "rewards": reward_settings(ctx, rewards),
        "start": start,
        "stop": stop,
        "seed": seed,
    }
    inputs = {"prompts": prompts, "policy": policy} | reward_inputs(rewards)
    other = None if reference is None or reference.key == policy.key else reference
    inputs |= {"reference": other} if other else {}

    def work(folder: epath.Path) -> dict[str, Any]:
        job = _Job(ctx, spec, seed, rewards, policy, other)
        task = job.task(prompts, start, stop, quality)
        result = run_ppo(
            spec,
            job.models,
            task,
            folder / "train",
            seed=seed,
            snapshot=lambda number, state: job.save(state, folder / SNAPSHOTS / f"{number}"),
            wandb={"project": ctx.config.wandb, "name": f"ppo-{folder.name}"} if ctx.config.wandb else None,
        )
        job.save(result.state, folder / fit.MODEL)
        return job.metrics(task, result)

    return run_stage("ppo", settings, inputs, ctx.root, work)


# What changes neither the policy nor what is kept of it.
_FREE = ("sweep", "save_every", "keep", "keep_best", "log_every")


class _Job:
    """The models of a run, and what goes in and out."""

    def __init__(
        self,
        ctx: Context,
        spec: PpoSpec,
        seed: int,
        sources: Sources,
        policy: Artifact,
        reference: Artifact | None,
    ):
        self.ctx, self.spec = ctx, spec
        dtype = compute_dtype(ctx)
        model = fit.load(ctx, model_folder(policy))
        params = dict(model.params)
        if model.cfg.lora is not None:
            params = frozen_in(params, model.cfg, dtype)
        base_cfg, base = without_adapters(model.cfg, params)
        own = (base_cfg, in_compute_dtype(base, dtype))
        theirs = own
        if reference is not None:
            loaded = load_model(str(model_folder(reference)), mesh=ctx.mesh)
            theirs = (loaded.cfg, in_compute_dtype(dict(loaded.params), dtype))
        self.tokenizer = model.tokenizer
        separate = spec.learns_values and spec.value == "separate"
        from_reward = separate and spec.value_init == "reward"
        self.rewards = load_rewards(
            ctx,
            sources,
            model.tokenizer,
            [own] if reference is None else [own, theirs],
            whole_value=from_reward and model.cfg.lora is None,
        )
        if from_reward:
            self._check_value_source()
        self.models: PpoModels = build_models(
            spec,
            model.cfg,
            params,
            mesh=ctx.mesh,
            key=jax.random.key(seed),
            dtype=dtype,
            reference=theirs,
            scorers=self.rewards.scorers,
            value_from=self.rewards.value_from if from_reward else None,
        )
        self.value = "none"
        if spec.learns_values:
            started = "reward" if from_reward and self.rewards.value_from else "policy"
            self.value = started if separate else "shared"

    def _check_value_source(self) -> None:
        """A value model reads the policy's tokens, so it can start only from a reward model that does too."""
        if self.rewards.value_from is not None:
            return
        if "value_init" in self.spec.model_fields_set:
            raise StageError(
                "`ppo.value_init: reward` needs a reward model that reads the policy's tokens, and none of "
                f"{sorted(self.rewards.weights)} is one; use `value_init: policy`"
            )
        logger.info("ppo: no reward model reads the policy's tokens; the value model starts from the policy")

    def task(self, prompts: Artifact, start: int, stop: int | None, quality: Quality | None) -> PpoTask:
        """Prompts, ends and rewards."""
        options = self.ctx.config.model
        cfg, new_tokens = self.models.policy, self.spec.sampling.max_new_tokens
        room = min(self.spec.max_prompt_length, cfg.max_position - new_tokens)
        if room < 1:
            raise StageError(
                f"`ppo.sampling.max_new_tokens` {new_tokens} leaves no room for a prompt in the model's context of "
                f"{cfg.max_position}; lower it"
            )
        train = [row.prompt for row in prompts_stage.read(prompts, "train")[start:stop]]
        held_out = [row.prompt for row in prompts_stage.read(prompts, "eval")][: self.spec.eval_prompts]
        if not train:
            raise StageError("no prompts are left for reinforcement learning: give more (`data.train`)")
        if quality is None and all(prompt.source == "symbols" for prompt in held_out):
            quality = symbols_quality
        tokenizer, template = self.tokenizer, options.template
        ends = tuple(dict.fromkeys((*cfg.eos_ids, *end_of_turn_ids(tokenizer, template))))
        return PpoTask(
            prompts=self._encoded(train, room),
            held_out=self._encoded(held_out, room),
            eos_ids=ends,
            decode=lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)),
            weights=self.rewards.weights,
            new_tokens=new_tokens,
            rewards=self.rewards.host,
            quality=quality,
            dtype=options.dtype,
            remat=options.remat,
            chunk=options.logprob_chunk,
        )

    def _encoded(self, prompts: Sequence[Prompt], room: int) -> list[PpoPrompt]:
        found = encode_prompts(
            self.tokenizer, [prompt.messages for prompt in prompts], self.ctx.config.model.template, room
        )
        cut = found.truncated_count
        if cut:
            logger.warning("ppo: %d of %d prompts were cut to %d tokens", cut, len(prompts), room)
        rows = zip(prompts, found.tokens, found.truncated, strict=True)
        return [PpoPrompt(prompt, tokens, truncated) for prompt, tokens, truncated in rows]

    def save(self, state: TrainState, folder: epath.Path) -> None:
        """The policy as a language model, adapters merged."""
        cfg, params = self.models.language_model(state)
        save_model(
            folder, Model(cfg, params, self.tokenizer), dtype=jnp.dtype(self.ctx.config.model.save_dtype)
        )

    def metrics(self, task: PpoTask, result: PpoResult) -> dict[str, Any]:
        rows = result.history
        last = rows[-1]
        evaluated = [row for row in rows if "eval/reward" in row]
        speeds = [row[_SPEED] for row in rows if _SPEED in row]
        kept = ("objective/", "rewards/", "response_length/", "critic/", "sampling/")
        every = self.spec.keep_every
        return {
            "iterations": self.spec.iterations,
            "episodes": last["episode"],
            "prompts": len(task.prompts),
            "prompts_cut": sum(prompt.cut for prompt in task.prompts),
            "kl_coef": result.kl_coef,
            "first": _evaluation(evaluated[0]) if evaluated else {},
            "last": _evaluation(evaluated[-1]) if evaluated else {},
            **{name: value for name, value in last.items() if name.startswith(kept)},
            "snapshots": list(range(every, self.spec.iterations + 1, every)) if every else [],
            "value": self.value,
            "views": self.rewards.views,
            "tokens_per_second_per_device": float(np.median(speeds)) if speeds else None,
        }


_SPEED = "perf/tokens_per_second_per_device"


def _evaluation(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name.startswith("eval/")}


def symbols_quality(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    """The synthetic world's own measure."""
    return [symbols.quality(p.instruction, c.text) for p, c in zip(prompts, completions, strict=True)]
