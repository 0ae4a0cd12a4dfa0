"""The stage `ppo` on the tiny study's model: rewards from folders, bridges and critics; bad input told before training."""

import jax
import numpy as np
import pytest

from laif_jax.config import PpoSpec, RewardSource, RewardSpec
from laif_jax.models.model import load_model
from laif_jax.models.reward import save_reward_model, start_reward_model
from laif_jax.records import read_jsonl
from laif_jax.stages import base, ppo
from laif_jax.stages import prompts as prompts_stage
from laif_jax.stages.artifact import StageError
from laif_jax.stages.base import model_folder

OPTIONS = {
    "iterations": 2,
    "batch_size": 8,
    "epochs": 1,
    "sampling": {"max_new_tokens": 6},
    "max_prompt_length": 24,
    "eval_prompts": 4,
    "keep_every": 1,
    "optimizer": {"learning_rate": 1e-3},
}


def spec(**changes) -> PpoSpec:
    return PpoSpec.model_validate(OPTIONS | changes)


@pytest.fixture(scope="module")
def world(make, tmp_path_factory):
    """(context, prompts, policy, folder of an untrained reward model)."""
    ctx = make()
    policy, prompts = base.run(ctx), prompts_stage.run(ctx)
    model = load_model(str(model_folder(policy)))
    options = RewardSpec(steps=1, end_of_context="<end>", max_length=40, max_prompt_length=24)
    folder = tmp_path_factory.mktemp("reward")
    save_reward_model(folder, start_reward_model(model, options, jax.random.key(0)))
    return ctx, prompts, policy, folder


def test_a_policy_is_trained_kept_and_evaluated(world):
    ctx, prompts, policy, folder = world
    rewards = {"helpful": (RewardSource(model=str(folder), weight=2.0), None)}
    done = ppo.run(ctx, prompts, policy, spec(), rewards=rewards)
    rows = list(read_jsonl(done.path / "train" / "metrics.jsonl"))
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[1]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert rows[1]["objective/scores"] == pytest.approx(2 * rows[1]["rewards/helpful/mean"], rel=1e-5)
    assert done.metrics["value"] == "reward"
    assert 0 <= done.metrics["last"]["eval/quality"] <= 1
    assert done.metrics["snapshots"] == [1, 2]
    before, after = (
        load_model(str(path)).params["layers"]["mlp"]["up"]["kernel"]
        for path in (model_folder(policy), model_folder(done))
    )
    assert np.abs(np.asarray(before) - np.asarray(after)).max() > 1e-5
    kept = load_model(str(done.path / ppo.SNAPSHOTS / "2")).params["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(kept, after)
    assert ppo.run(ctx, prompts, policy, spec(log_every=2), rewards=rewards).key == done.key
