"""The stage `ppo` on the tiny study's model: rewards from folders, bridges and critics; bad input is told at once."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from laif_jax.cli.main import main
from laif_jax.config import PpoSpec, RewardSource, RewardSpec
from laif_jax.models.model import Model, load_model
from laif_jax.models.reward import load_reward_model, save_reward_model, start_reward_model
from laif_jax.records import read_jsonl
from laif_jax.rollout.rewards import encode_response
from laif_jax.stages import base, ppo, ppo_rewards
from laif_jax.stages import prompts as prompts_stage
from laif_jax.stages.artifact import StageError
from laif_jax.stages.base import model_folder
from laif_jax.training import ppo_plan
from laif_jax.training.ppo_roll import Roller

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


# ---- rewards ---------------------------------------------------------------------------------------------------


def other_tokens(policy, tmp_path_factory) -> Path:
    """A reward model whose tokenizer has the policy's tokens under other ids."""
    model = load_model(str(model_folder(policy)))
    options = RewardSpec(steps=1, max_length=40, max_prompt_length=24)
    folder = tmp_path_factory.mktemp("other")
    save_reward_model(folder, start_reward_model(model, options, jax.random.key(1)))
    file = folder / "tokenizer.json"
    tree = json.loads(file.read_text())
    vocab = tree["model"]["vocab"]
    a, b = sorted(token for token in vocab if len(token) == 1 and token.isalpha())[:2]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    file.write_text(json.dumps(tree))
    return folder


def test_another_tokenizer_is_an_error_before_training_unless_the_text_is_encoded_again(
    world, tmp_path_factory
):
    ctx, prompts, policy, _ = world
    folder = other_tokens(policy, tmp_path_factory)
    options = spec(iterations=1, keep_every=0, value_init="policy")
    source = RewardSource(model=str(folder))
    with pytest.raises(StageError, match=r"rewards.other: .* 2 of \d+ tokens differ.*retokenize: true"):
        ppo.run(ctx, prompts, policy, options, rewards={"other": (source, None)})
    failed = [path for path in Path(ctx.root).glob("ppo-*") if not (path / "train").exists()]
    assert failed
    source = source.model_copy(update={"retokenize": True})
    done = ppo.run(ctx, prompts, policy, options, rewards={"other": (source, None)})
    assert np.isfinite(done.metrics["rewards/other/mean"])
    assert done.metrics["value"] == "policy"


def test_scores_in_the_rollout_are_those_of_the_text(world):
    """The bridge encodes the text as training does; the rollout scores the very tokens. They must be one reward."""
    ctx, prompts, policy, folder = world
    sources = {"r": (RewardSource(model=str(folder), normalize=True), None)}
    job = ppo._Job(ctx, spec(value_init="policy"), 0, sources, policy, None)
    task = job.task(prompts, 0, None, None)
    layout = ppo_plan.make_layout(spec(), job.models.mesh, 24, 6)
    roller = Roller(
        job.models,
        ppo_plan.rollout_config(spec(), job.models, layout, dtype="float32", chunk=64),
        layout,
        eos_ids=task.eos_ids,
        decode=task.decode,
        rewards={},
        temperature=1.0,
        generator="test",
    )
    rolled = roller(job.models.state, task.prompts[:8], 1, jax.random.key(0))
    model = load_reward_model(folder, mesh=ctx.mesh)
    expected, ok = ppo_rewards.Bridge(ctx, model, sources["r"][0])(
        [p.prompt for p in rolled.prompts], rolled.completions
    )
    assert ok.all()
    # A response with special tokens, or spaces at its ends, has a text that says less than its tokens.
    rows = np.asarray(rolled.rollout.tokens)
    same = []
    for i, (asked, completion) in enumerate(zip(rolled.prompts, rolled.completions)):
        text = encode_response(model, asked.prompt.messages, completion.text, completion.finish_reason)
        same.append(rows[i, : len(asked.tokens) + rolled.counts[i]].tolist() == text)
    assert sum(same) >= 3
    np.testing.assert_allclose(np.asarray(rolled.scores["r"])[: len(same)][same], expected[same], atol=1e-4)


def test_a_value_model_cannot_start_from_a_critic(world):
    ctx, prompts, policy, _ = world
    rewards = {"critic": (RewardSource(critic="strong"), None)}
    with pytest.raises(StageError, match=r"rating|value_init"):
        ppo.run(ctx, prompts, policy, spec(value_init="reward"), rewards=rewards)


def test_prompts_that_leave_no_room_are_told(world):
    ctx, prompts, policy, folder = world
    rewards = {"r": (RewardSource(model=str(folder)), None)}
    with pytest.raises(StageError, match=r"max_new_tokens` 64 leaves no room for a prompt"):
        ppo.run(ctx, prompts, policy, spec(sampling={"max_new_tokens": 64}), rewards=rewards)


def test_adapters_of_a_reward_model_are_views_of_the_policy(make, world, tmp_path_factory):
    lora = {"rank": 2, "alpha": 4.0, "targets": ["q", "v"]}
    _, prompts, policy, _ = world
    ctx = make(model__lora=lora)
    plain = load_model(str(model_folder(policy)))
    model = Model(dataclasses.replace(plain.cfg, lora=ctx.config.model.lora), plain.params, plain.tokenizer)
    folder = tmp_path_factory.mktemp("adapters")
    options = RewardSpec(steps=1, end_of_context="<end>", members=2, max_length=40, max_prompt_length=24)
    save_reward_model(folder, start_reward_model(model, options, jax.random.key(2)))
    source = RewardSource(model=str(folder), members="min")
    done = ppo.run(ctx, prompts, policy, spec(iterations=1, keep_every=0), rewards={"r": (source, None)})
    assert done.metrics["views"] == ["r"]
    assert done.metrics["value"] == "reward"
    job = ppo._Job(ctx, spec(), 0, {"r": (source, None)}, policy, None)
    up = job.models.reference_params["layers"]["mlp"]["up"]["kernel"]
    assert job.models.scorers["r"].params["layers"]["mlp"]["up"]["kernel"] is up
    assert job.models.state.frozen["policy"]["layers"]["mlp"]["up"]["kernel"] is up
    assert job.models.state.frozen["value"]["layers"]["mlp"]["up"]["kernel"] is up
    trained, before = (load_model(str(model_folder(a))).params for a in (done, policy))
    np.testing.assert_array_equal(
        trained["layers"]["mlp"]["up"]["kernel"], before["layers"]["mlp"]["up"]["kernel"]
    )
    assert not np.array_equal(
        trained["layers"]["attn"]["q"]["kernel"], before["layers"]["attn"]["q"]["kernel"]
    )


# ---- laif ppo --------------------------------------------------------------------------------------------------


def test_laif_ppo_from_its_file_to_its_report(world, tmp_path, capsys):
    ctx, _, policy, folder = world
    tree = {
        "name": "cheap",
        "out": str(tmp_path / "runs"),
        "model": {
            "source": str(model_folder(policy)),
            "template": ctx.config.model.template,
            "dtype": "float32",
            "remat": "none",
            "logprob_chunk": 64,
        },
        "mesh": ctx.config.mesh.model_dump(),
        "data": ctx.config.data.model_dump(exclude_unset=True),
        "rewards": {"helpful": {"model": str(folder)}},
        "ppo": OPTIONS | {"keep_every": 0},
    }
    file = tmp_path / "cheap.yaml"
    file.write_text(yaml.safe_dump(json.loads(json.dumps(tree))))
    assert main(["ppo", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "held-out prompts" in shown
    root = tmp_path / "runs" / "cheap"
    results = json.loads((root / "results.json").read_text())
    assert results["metrics"]["iterations"] == 2
    page = (root / "report" / "index.html").read_text()
    assert "<svg" in page
    assert results["verdicts"][0][:40] in page
    (root / "report" / "index.html").unlink()
    assert main(["report", str(root)]) == 0
    assert (root / "report" / "index.html").read_text() == page
    assert main(["ppo", str(file), "rewards.helpful.model=nowhere"]) == 2
    assert "no such folder" in capsys.readouterr().err
