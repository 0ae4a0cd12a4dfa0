"""Rollouts with their rewards: the compiled rollout, and the rewards that are computed on the host, from text."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from laif_jax.models.arch import ModelConfig
from laif_jax.objectives.rl import kl_estimate
from laif_jax.records import Completion, Prompt
from laif_jax.rollout.placement import spread, to_host, using
from laif_jax.rollout.ppo import Rollout, RolloutConfig, make_rollout
from laif_jax.training.ppo_models import PpoModels
from laif_jax.training.ppo_plan import Layout, make_prompts
from laif_jax.training.state import TrainState

# The true quality of completions, where a world knows it: one number each.
Quality = Callable[[Sequence[Prompt], Sequence[Completion]], Sequence[float]]
Decode = Callable[[list[int]], str]


class HostReward(Protocol):
    """A reward computed from text. A `metrics` attribute, numbers of the last call, is logged where there is one."""

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(scores float32 [n], ok bool [n]): rows that are not ok have no score and do not count. All processes call
        it together, with the same rows."""
        ...


@dataclass(frozen=True)
class PpoPrompt:
    """A prompt as it is asked: its tokens, and whether they were cut to fit the context."""

    prompt: Prompt
    tokens: list[int]
    cut: bool = False


@dataclass(frozen=True)
class Rolled:
    """A rollout and its rewards.

    Attributes:
      rollout: on the devices. scores: by name, [padded], on devices or hosts. weight: float32 [padded], 0 for padding
        and for rows without a score.
      prompts, completions: of the real rows. counts: int [rows], tokens drawn. seconds: by part. metrics: of the host
        rewards.
    """

    rollout: Rollout
    scores: Mapping[str, Any]
    weight: np.ndarray
    prompts: list[PpoPrompt]
    completions: list[Completion]
    counts: np.ndarray
    seconds: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def about(self) -> dict[str, float]:
        """Counts of what needs attention: `response_length/empty` (share of responses without a token of text),
        `prompt_length/mean` and `prompt_length/cut` (share of prompts that lost their start to fit the context)."""
        rows = max(len(self.prompts), 1)
        return {
            "response_length/empty": sum(not c.text for c in self.completions) / rows,
            "prompt_length/mean": sum(len(p.tokens) for p in self.prompts) / rows,
            "prompt_length/cut": sum(p.cut for p in self.prompts) / rows,
        }


class Roller:
    """Rolls out and scores.

    Args:
      eos_ids: tokens that end a response. decode: text of token ids. rewards: computed on the host, by name.
      temperature: of sampling and of all log-probs. generator: the name that completions carry.
    """

    def __init__(
        self,
        models: PpoModels,
        config: RolloutConfig,
        layout: Layout,
        *,
        eos_ids: Sequence[int],
        decode: Decode,
        rewards: Mapping[str, HostReward],
        temperature: float,
        generator: str,
    ):
        self.models, self.config, self.layout = models, config, layout
        self.run = make_rollout(config, models.mesh)
        ends = list(eos_ids)
        self.eos_ids = np.asarray(ends + [-1] * (-len(ends) % 8 or 8 * (not ends)), np.int32)
        self.decode, self.rewards, self.generator = decode, rewards, generator
        self.temperature = np.asarray(temperature, np.float32)
        self.max_length = context(config.policy, layout)

    def __call__(self, state: TrainState, asked: Sequence[PpoPrompt], samples: int, key: jax.Array) -> Rolled:
        """`samples` responses to each prompt and their scores; at most `layout.rows` rows."""
        start = time.perf_counter()
        prompts = make_prompts(self.layout, [p.tokens for p in asked], samples, key, self.max_length)
        mesh = self.models.mesh
        with using(mesh):
            rollout = self.run(
                self.models.for_rollout(state), spread(prompts, mesh), self.eos_ids, self.temperature
            )
        counts, ended, responses = (to_host(x) for x in (rollout.counts, rollout.ended, rollout.responses))
        rolled = time.perf_counter()
        rows = [prompt for prompt in asked for _ in range(samples)]
        completions = [
            self._completion(rows[i], i % samples, responses[i, : counts[i]].tolist(), bool(ended[i]))
            for i in range(len(rows))
        ]
        weight = (counts > 0).astype(np.float32)
        scores: dict[str, Any] = dict(rollout.scores)
        metrics: dict[str, float] = {}
        for name, reward in self.rewards.items():
            values, ok = reward([p.prompt for p in rows], completions)
            scores[name] = np.zeros(self.layout.padded, np.float32)
            scores[name][: len(rows)] = np.where(ok, np.asarray(values, np.float32), 0.0)
            weight[: len(rows)] *= ok
            suffix = f"/{name}" if len(self.rewards) > 1 else ""
            metrics |= {key + suffix: value for key, value in getattr(reward, "metrics", {}).items()}
        seconds = {"rollout": rolled - start, "rewards": time.perf_counter() - rolled}
        return Rolled(rollout, scores, weight, rows, completions, counts[: len(rows)], seconds, metrics)

    def _completion(self, prompt: PpoPrompt, sample: int, tokens: list[int], ended: bool) -> Completion:
        return Completion(
            prompt_id=prompt.prompt.id,
            generator=self.generator,
            text=self.decode(tokens[:-1] if ended else tokens).strip(),
            finish_reason="stop" if ended else "length",
            sample_index=sample,
        )

    def on_devices(self, rolled: Rolled) -> tuple[dict[str, Any], Any]:
        """(scores, weight) as the update takes them, on several hosts too."""
        mesh = self.models.mesh
        host = {name: x for name, x in rolled.scores.items() if isinstance(x, np.ndarray)}
        return dict(rolled.scores) | spread(host, mesh), spread(rolled.weight, mesh)

    def totals(self, rolled: Rolled, weights: Mapping[str, float]) -> np.ndarray:
        """The weighted sum of the rewards of the real rows, float32 [rows]; NaN where there is none."""
        rows = len(rolled.prompts)
        total = np.zeros(rows, np.float32)
        for name, scores in rolled.scores.items():
            total += np.float32(weights[name]) * on_host(scores)[:rows].astype(np.float32)
        return np.where(rolled.weight[:rows] > 0, total, np.nan)

    def kl(self, rolled: Rolled, estimator: str) -> np.ndarray:
        """The KL per response of the real rows, float32 [rows]."""
        rollout = rolled.rollout
        if estimator == "full" and rollout.full_kl is not None:
            tokens = to_host(rollout.full_kl)
        else:
            logps, ref_logps = (jnp.asarray(to_host(x)) for x in (rollout.logps, rollout.ref_logps))
            tokens = np.asarray(kl_estimate(estimator, logps, ref_logps))
        return tokens[: len(rolled.prompts)].sum(axis=1)


def context(cfg: ModelConfig, layout: Layout) -> int:
    """Tokens that prompt and response may have together."""
    return min(cfg.max_position, layout.width + layout.new_tokens)


def on_host(x: Any) -> np.ndarray:
    """The whole array on every host, whether it is there already or on devices."""
    return x if isinstance(x, np.ndarray) else to_host(x)
