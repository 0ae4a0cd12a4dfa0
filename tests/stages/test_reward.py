"""The stage of reward models: one compiled step for a sweep, the best kept, bitwise resume, files and labels alike."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from laif_jax.models.reward import load_reward_model
from laif_jax.records import Completion, Preference, Prompt, read_jsonl, write_jsonl
from laif_jax.rollout.rewards import RewardScorer, encode_response
from laif_jax.stages import base, reward
from laif_jax.stages.artifact import Artifact, StageError
from laif_jax.stages.context import Context, Services
from laif_jax.stages.reward_data import read_pairs
from laif_jax.training import reward_task, step
from tests.studies import tiny_reward

RATES = [1e-3, 3e-2, 1e30]
SWEEP: dict[str, Any] = {"reward__learning_rates": RATES, "reward__optimizer": {"clip_norm": None}}


def context(folder: Path, root: Path | None = None, **changes: Any) -> Any:
    config = tiny_reward.config(folder, **changes)
    return Context(
        config, epath.Path(root or folder / "runs"), config.seed, Services(config, epath.Path(folder))
    )


def run(ctx: Any, pairs=None) -> Artifact:
    config = ctx.config
    return reward.run(ctx, base.run(ctx), pairs if pairs is not None else config.pairs, config.reward)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("reward")


@pytest.fixture(scope="module")
def sweep(folder) -> tuple[Artifact, list[int]]:
    """A finished sweep, and how often the loss had been traced after each rate."""
    traces, after = [0], []
    loss, train = reward_task.reward_loss, reward.train

    def counted(*args):
        traces[0] += 1
        return loss(*args)

    def trained(*args, **options):
        try:
            return train(*args, **options)
        finally:
            after.append(traces[0])

    step._compiled_step.cache_clear()  # an equal task may have been compiled by another test
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward_task, "reward_loss", counted)
        patch.setattr(reward, "train", trained)
        return run(context(folder, **SWEEP)), after


def test_a_sweep_compiles_one_step(sweep) -> None:
    _, traces = sweep
    assert len(traces) == len(RATES)
    assert traces[0] > 0
    assert traces == traces[:1] * len(RATES)


def test_the_most_accurate_rate_is_kept_and_the_curve_is_there(sweep) -> None:
    artifact, _ = sweep
    metrics = artifact.metrics
    rows = {row["learning_rate"]: row for row in metrics["rates"]}
    assert "not finite" in rows[1e30]["failed"] or "nan" in rows[1e30]["failed"]
    good = [rows[rate] for rate in RATES[:2]]
    assert [[point["step"] for point in row["curve"]] for row in good] == [[0, 12, 24]] * 2
    assert good[0]["curve"][0] == good[1]["curve"][0] == rows[1e30]["curve"][0]  # one start for all
    best = max(good, key=lambda row: (row["held_out"]["accuracy"], -row["held_out"]["log_loss"]))
    assert metrics["learning_rate"] == best["learning_rate"]
    assert metrics["sets"]["held_out"]["accuracy"] == best["held_out"]["accuracy"]
    assert best["curve"][-1]["accuracy"] > 0.9
    assert best["curve"][-1]["log_loss"] < 0.3 < best["curve"][0]["log_loss"]
    assert not list(artifact.path.glob("rate-*/model")), "what only the others needed is gone"
    assert not list(artifact.path.glob("rate-*/train/checkpoints"))


def test_scores_on_file_are_those_of_the_written_model(sweep, folder) -> None:
    artifact, _ = sweep
    model = load_reward_model(artifact.path / "model")
    rows = list(read_jsonl(artifact.path / "scores-short.jsonl.gz"))
    by_id = {}
    for row in read_jsonl(folder / "short.jsonl"):
        by_id.setdefault(Prompt.from_text(row["prompt"]).id, []).append(row)
    row = rows[0]
    texts = next(
        r for r in by_id[row["prompt_id"]] if (len(r["a"]), len(r["b"])) == (row["length_a"], row["length_b"])
    )
    messages = Prompt.from_text(texts["prompt"]).messages
    found = RewardScorer(model).score([encode_response(model, messages, texts[side]) for side in "ab"])
    np.testing.assert_allclose([row["score_a"], row["score_b"]], found, atol=2e-5)
    assert len(rows) == 20
    assert artifact.metrics["sets"]["short"]["groups"]["length"]
    assert artifact.metrics["sets"]["human"]["ties"] == 1
    scores = [row[f"score_{side}"] for row in rows for side in "ab"]
    assert model.mean == pytest.approx(np.mean(scores), abs=3 * np.std(scores))


def test_a_finished_rate_is_not_trained_again_and_an_unfinished_one_goes_on_where_it_was(
    sweep, folder, tmp_path, monkeypatch
) -> None:
    whole, _ = sweep
    ctx = context(folder, tmp_path, **SWEEP)
    evaluate, steps = reward._Trainer._evaluate, []

    def cut(self, rate, task, at, state):
        evaluate(self, rate, task, at, state)
        steps.append((rate, at))
        if (rate, at) == (RATES[1], 12):  # behind the checkpoint of step 8
            raise KeyboardInterrupt

    monkeypatch.setattr(reward._Trainer, "_evaluate", cut)
    with pytest.raises(KeyboardInterrupt):
        run(ctx)
    assert steps == [(RATES[0], 0), (RATES[0], 12), (RATES[0], 24), (RATES[1], 12)]
    steps.clear()
    monkeypatch.setattr(
        reward._Trainer, "_evaluate", lambda self, *args: (steps.append(args[::2]), evaluate(self, *args))[1]
    )
    again = run(ctx)
    assert [row for row in steps if row[0] == RATES[0]] == []
    assert [row for row in steps if row[0] == RATES[1]] == [(RATES[1], 12), (RATES[1], 24)]
    assert again.metrics["rates"][:2] == [
        {**row, "tokens_per_second_per_device": other["tokens_per_second_per_device"], "last": other["last"]}
        for row, other in zip(whole.metrics["rates"][:2], again.metrics["rates"][:2], strict=True)
    ]
    files = [artifact.path / "model" / "model.safetensors" for artifact in (whole, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert again.manifest["attempts"] == 2


def labels_of(folder: Path, name: str, rows, key: str) -> Artifact:
    """What a stage `label` leaves behind."""
    made = []
    for row in rows:
        prompt = Prompt.from_text(row["prompt"])
        texts = (row["a"], row["b"]) if row["p_b"] < 0.5 else (row["b"], row["a"])
        sides = [Completion(prompt_id=prompt.id, generator="policy", text=text) for text in texts]
        made.append(Preference(prompt=prompt, chosen=sides[0], rejected=sides[1], p_chosen=0.9))
    (folder / name).mkdir()
    write_jsonl(folder / name / "preferences.jsonl.gz", made)
    return Artifact(epath.Path(folder / name), {"key": key, "metrics": {}, "status": "done"})


def test_labels_of_several_rounds_and_an_ensemble(folder, tmp_path) -> None:
    ctx = context(folder, tmp_path, reward__members=2, reward__bootstrap=True, reward__end_of_context="<end>")
    rounds = [labels_of(tmp_path, name, tiny_reward.make_pairs(name, 30), name) for name in ("d", "e")]
    artifact = run(ctx, rounds)
    assert set(artifact.manifest["inputs"]) == {"policy", "labels-0", "labels-1"}
    metrics = artifact.metrics
    assert metrics["data"]["train"]["read"] == 60
    assert metrics["data"]["used"] + metrics["data"]["held_out"] == 60
    assert list(metrics["sets"]) == ["held_out"]
    assert len(metrics["sets"]["held_out"]["members"]["accuracy"]) == 2
    model = load_reward_model(artifact.path / "model")
    assert model.members == 2
    assert model.end_of_context == model.tokenizer.convert_tokens_to_ids("<end>")
    score = model.params["score"]["kernel"]
    assert not np.array_equal(score[0], score[1])


def test_ties_of_a_critic_reach_the_reward_model(folder, tmp_path) -> None:
    rows = [row | {"p_b": 0.9} for row in tiny_reward.make_pairs("ties", 20)]
    labels = labels_of(tmp_path, "labels", rows, "labels")
    made = list(read_jsonl(labels.path / "preferences.jsonl.gz"))
    write_jsonl(labels.path / "preferences.jsonl.gz", made[:15])
    write_jsonl(labels.path / "ties.jsonl.gz", [row | {"p_chosen": 0.5} for row in made[15:]])
    half = context(folder, tmp_path).config.reward.model_copy(update={"held_out": 0.0})
    assert sum(pair.p_b == 0.5 for pair in read_pairs([labels], half, 0).train) == 5
    dropped = read_pairs([labels], half.model_copy(update={"ties": "drop"}), 0)
    assert len(dropped.train) == 15
    assert dropped.counts["ties_dropped"] == 5


def test_prompts_of_a_test_set_are_not_trained_on(folder, tmp_path) -> None:
    ctx = context(folder, tmp_path)
    leak = list(read_jsonl(folder / "short.jsonl"))[:4]
    shutil.copy(folder / "train.jsonl", tmp_path / "train.jsonl")
    write_jsonl(tmp_path / "train.jsonl", [*read_jsonl(folder / "train.jsonl"), *leak])
    pairs = ctx.config.pairs.model_copy(
        update={"train": ctx.config.pairs.train.model_copy(update={"path": str(tmp_path / "train.jsonl")})}
    )
    data = read_pairs(pairs, ctx.config.reward, 0)
    tested = {pair.prompt.id for name in ("short", "human") for pair in data.sets[name]}
    trained = {pair.prompt.id for pair in data.train}
    assert data.counts["dropped_because_in_test"] == 4
    assert not trained & tested
    assert not trained & {pair.prompt.id for pair in data.held_out}
    assert data.held_out


def test_nothing_to_choose_on_is_told() -> None:
    good = {"learning_rate": 1e-3, "held_out": {"accuracy": None, "log_loss": None}}
    with pytest.raises(StageError, match="held_out"):
        reward.choose([good, good])
    with pytest.raises(StageError, match=r"0\.1: nan"):
        reward.choose([{"learning_rate": 0.1, "failed": "nan"}])
    assert reward.choose([good, {"learning_rate": 0.1, "failed": "nan"}]) is good
