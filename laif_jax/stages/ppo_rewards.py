"""The rewards of PPO: reward models in the rollout, reward models behind a re-tokenising bridge, critics that rate."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath
from transformers import PreTrainedTokenizerBase

from laif_jax.config import RewardSource
from laif_jax.models.arch import ModelConfig
from laif_jax.models.dtypes import in_compute_dtype
from laif_jax.models.reward import RewardModel, load_reward_model
from laif_jax.models.reward_adapters import load_reward_adapters
from laif_jax.parallel import distributed
from laif_jax.records import Completion, Prompt
from laif_jax.rollout.ppo import ScorerConfig
from laif_jax.rollout.rewards import RewardScorer, combine, encode_response
from laif_jax.stages.artifact import Artifact, StageError
from laif_jax.stages.base import compute_dtype, fingerprint, model_folder
from laif_jax.stages.context import Context
from laif_jax.stages.label import critic_settings
from laif_jax.stages.rewards import critic_reward
from laif_jax.training.ppo_models import Scorer
from laif_jax.training.ppo_roll import HostReward

logger = logging.getLogger(__name__)

# Reward sources by name; a reward model that is another stage's is given as its artifact.
Sources = Mapping[str, tuple[RewardSource, Artifact | None]]


@dataclass
class Rewards:
    """What a run is rewarded by.

    Attributes:
      weights: of all, by name. scorers: reward models that read the policy's tokens. host: computed from text.
      value_from: the first of the scorers, for a value model to start from; whole and in float32, where all of it will
        be trained. views: names of the scorers that are adapters over the policy's own base weights.
    """

    weights: dict[str, float] = field(default_factory=dict)
    scorers: dict[str, Scorer] = field(default_factory=dict)
    host: dict[str, HostReward] = field(default_factory=dict)
    value_from: Scorer | None = None
    views: list[str] = field(default_factory=list)


def reward_settings(ctx: Context, sources: Sources) -> dict[str, Any]:
    """What the rewards depend on, for the stage's key: reward models and critics by their content."""
    settings = {}
    for name, (source, artifact) in sorted(sources.items()):
        found = {key: value for key, value in source.resolved().items() if key not in ("model", "critic")}
        if source.critic is not None:
            found["critic"] = critic_settings(ctx, ctx.config.critics[source.critic])
        elif artifact is None:
            found["model"] = _content(_folder(name, source, None))
        settings[name] = found
    return settings


def reward_inputs(sources: Sources) -> dict[str, Artifact]:
    """The artifacts among the rewards, as inputs of a stage."""
    return {f"reward-{name}": artifact for name, (_, artifact) in sources.items() if artifact is not None}


def load_rewards(
    ctx: Context,
    sources: Sources,
    tokenizer: PreTrainedTokenizerBase,
    bases: Sequence[tuple[ModelConfig, Any]],
    *,
    whole_value: bool,
) -> Rewards:
    """Loads and checks all rewards.

    Args:
      tokenizer: the policy's. bases: language models in memory (configuration, parameters) that a reward model may be
        adapters over. whole_value: a value model will train all weights of a reward model, so that the first one is
        also loaded whole.

    Raises:
      StageError: a reward model reads other tokens than the policy writes, and no bridge was chosen; or there is none.
    """
    rewards = Rewards()
    for name, (source, artifact) in sorted(sources.items()):
        rewards.weights[name] = source.weight
        if source.critic is not None:
            rewards.host[name] = critic_reward(ctx, source)
            continue
        folder = _folder(name, source, artifact)
        model = load_reward_model(folder, mesh=ctx.mesh)
        difference = tokens_differ(tokenizer, model, ctx.config.model.template)
        if difference and not source.retokenize:
            raise StageError(
                f"rewards.{name}: the reward model in {folder} reads other tokens than the policy writes: "
                f"{difference}. Set `rewards.{name}.retokenize: true` to score the decoded text by its own "
                "tokenizer, or train a reward model from this policy"
            )
        if difference:
            logger.info("rewards.%s: scored as text by its own tokenizer (%s)", name, difference)
            rewards.host[name] = Bridge(ctx, model, source)
            continue
        scorer, is_view = _scorer(ctx, folder, model, source, bases)
        rewards.scorers[name] = scorer
        rewards.views += [name] if is_view else []
        if rewards.value_from is None:
            rewards.value_from = _whole(model, source) if whole_value else scorer
    return rewards


def tokens_differ(tokenizer: PreTrainedTokenizerBase, model: RewardModel, template: str) -> str:
    """Why a reward model cannot read the policy's tokens as they are; "" if it can. Tokens that the reward model has
    beyond the policy's do not matter."""
    mine, theirs = tokenizer.get_vocab(), model.tokenizer.get_vocab()
    unlike = [token for token, index in mine.items() if theirs.get(token) != index]
    if unlike:
        return f"{len(unlike)} of {len(mine)} tokens differ, such as {unlike[0]!r}"
    if model.template != template:
        return f"its template is `{model.template}`, the policy's `{template}`"
    if template == "model" and tokenizer.chat_template != model.tokenizer.chat_template:
        return "the chat templates differ"
    return ""


class Bridge:
    """A reward model with a tokenizer of its own: it reads the decoded text, encoded as its training data were."""

    def __init__(self, ctx: Context, model: RewardModel, source: RewardSource):
        self._model, self._source = model, source
        self._scorer = RewardScorer(model, mesh=ctx.mesh, dtype=compute_dtype(ctx))
        self._mean, self._std = _scale(model, source)

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> tuple[np.ndarray, np.ndarray]:
        rows = [
            encode_response(self._model, p.messages, c.text, c.finish_reason)
            for p, c in zip(prompts, completions, strict=True)
        ]
        scores = combine(self._scorer.score(rows), self._source.members)
        return (scores - self._mean) / self._std, np.ones(len(rows), bool)


# ---- inside ----------------------------------------------------------------------------------------------------


def _folder(name: str, source: RewardSource, artifact: Artifact | None) -> epath.Path:
    if artifact is not None:
        return model_folder(artifact)
    assert source.model is not None  # checked by the schema
    folder = epath.Path(source.model).expanduser()
    inside = folder / "model"  # of a finished `laif reward`
    if not (folder / "config.json").exists() and not (folder / "reward.json").exists() and inside.exists():
        return inside
    if not folder.exists():
        raise StageError(
            f"rewards.{name}.model: {folder}: no such folder. `laif reward CONFIG` trains a reward model and prints "
            "where it is"
        )
    return folder


def _content(folder: epath.Path) -> dict[str, Any]:
    """Hashes of the folder's files and of its members'."""
    parts = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    return distributed.from_main(lambda: {str(part.relative_to(folder)): fingerprint(part) for part in parts})


def _scorer(
    ctx: Context,
    folder: epath.Path,
    model: RewardModel,
    source: RewardSource,
    bases: Sequence[tuple[ModelConfig, Any]],
) -> tuple[Scorer, bool]:
    """(the reward model as the rollout runs it, whether it is a view of a base)."""
    mean, std = _scale(model, source)
    adapters = load_reward_adapters(folder)
    base = None
    if adapters is not None:
        base = next((base for base in bases if adapters.fits(base[1])), None)
    if adapters is None or base is None:
        config = ScorerConfig(model.cfg, model.members, source.members, model.end_of_context)
        return Scorer(config, in_compute_dtype(dict(model.params), compute_dtype(ctx)), mean, std), False
    cfg, params = adapters.over(base[1], base[0])
    config = ScorerConfig(cfg, adapters.members, source.members, model.end_of_context)
    return Scorer(config, params, mean, std), True


def _whole(model: RewardModel, source: RewardSource) -> Scorer:
    config = ScorerConfig(model.cfg, model.members, source.members, model.end_of_context)
    return Scorer(config, dict(model.params))


def _scale(model: RewardModel, source: RewardSource) -> tuple[float, float]:
    return (model.mean, max(model.std, 1e-6)) if source.normalize else (0.0, 1.0)
