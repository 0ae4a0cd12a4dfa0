"""Arms that learn by PPO, in rounds, and by the best of their samples: a whole study, and what stops a round."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laif_jax.cli.main import main
from laif_jax.models.model import load_model
from laif_jax.stages import label
from laif_jax.stages.artifact import StageError
from tests.studies import tiny, tiny_rl


@pytest.fixture(scope="module")
def study() -> Path:
    return tiny_rl.finished() / "runs" / "tiny"


@pytest.fixture(scope="module")
def results(study) -> dict[str, Any]:
    return json.loads((study / "results.json").read_text())


def stages(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [row for row in results["stages"] if row["stage"].startswith(name)]


def folder_of(study: Path, results: dict[str, Any], name: str) -> Path:
    (row,) = [row for row in results["stages"] if row["stage"] == name]
    return study / f"{row['kind']}-{row['key']}"


def copy_of(folder: Path, *, without: str = "") -> Path:
    """The finished study at `folder`, to go on with; stages whose names start with `without` were never run."""
    shutil.copytree(tiny_rl.finished() / "runs", folder / "runs")
    made = json.loads((folder / "runs" / "tiny" / "results.json").read_text())
    for row in stages(made, without) if without else ():
        shutil.rmtree(folder / "runs" / "tiny" / f"{row['kind']}-{row['key']}")
    return folder


def weights(folder: Path) -> bytes:
    return np.asarray(load_model(str(folder / "model")).params["layers"]["mlp"]["up"]["kernel"]).tobytes()


# ---- all arms --------------------------------------------------------------------------------------------------


def test_every_arm_ends_with_a_result(results):
    assert list(results["arms"]) == [arm["name"] for arm in tiny_rl.ARMS]
    assert {row["status"] for row in results["stages"]} == {"done"}
    assert "rounds" in results["answer"]
    assert (
        "SFT (DPO)" not in results["answer"]
    )  # a question about two ways of LAIF does not call one of them SFT


def test_arms_on_the_same_labels_share_them_and_their_reward_model(study, results):
    # One for PPO, best-of-n and rejection sampling; one per round of PPO.
    assert len(list(study.glob("reward-*"))) == 3
    assert len(stages(results, "reward model on labels")) == 1
    assert len(stages(results, "labels by strong")) == 1
    assert {row["name"] for row in results["rewards"]} == {
        "PPO",
        "PPO rounds, round 1",
        "PPO rounds, round 2",
    }
    for row in results["rewards"]:
        assert 0 <= row["accuracy"] <= 1
        assert row["n"] > 0
        assert row["longest_wins"] is not None


def test_all_rounds_together_ask_about_the_prompts_of_one_round_each_once(study, results):
    def asked(name):
        return [
            row["prompt_id"] for row in tiny.rows(folder_of(study, results, name) / "completions.jsonl.gz")
        ]

    one = asked("samples of sft weak 25%")
    parts = [asked(f"samples of rounds, round {number}") for number in (1, 2)]
    assert Counter(parts[0]) + Counter(parts[1]) == Counter(one)
    assert not set(parts[0]) & set(parts[1])
    rows = [row for row in results["rounds"]["rounds"] if row["round"]]
    assert [row["prompts"] for row in rows] == [15, 15]


def test_what_was_planned_is_what_was_asked(study, results):
    rows = {row["roles"][0]: row for row in results["spending"]["rows"]}
    assert set(rows) == {"teacher weak", "teacher strong", "critic strong", "judge strong"}
    for teacher in ("teacher weak", "teacher strong"):
        assert rows[teacher]["planned"]["calls"] == rows[teacher]["spent"]["calls"]
        assert not rows[teacher]["planned"]["at_most"]
    # One round over the prompts that are left, shared by four arms; and two arms of two rounds over them.
    for role, kind, comparisons in (
        ("critic strong", "label", 3 * 30),
        ("judge strong", "evaluate", 16 * len(list(study.glob("evaluate-*")))),
    ):
        asked, distinct = questions(study, kind)
        assert rows[role]["planned"]["calls"] == 2 * comparisons
        assert asked <= comparisons  # what came out empty is not compared
        assert rows[role]["spent"]["calls"] == distinct  # equal questions are asked once
        assert rows[role]["planned"]["at_most"]


def questions(study: Path, kind: str) -> tuple[int, int]:
    """Comparisons of a kind of stage, and different questions (texts in an order) among them."""
    found, count = set(), 0
    for file in study.glob(f"{kind}-*/judgements.jsonl.gz"):
        for row in tiny.rows(file):
            facts, count = row["meta"]["pair"], count + 1
            one, other = facts["texts"]
            if one != other:
                found |= {(facts["prompt"], one, other), (facts["prompt"], other, one)}
    return count, len(found)


def test_each_round_starts_from_the_policy_of_the_one_before(study, results):
    manifests = tiny.manifests(tiny_rl.finished())
    first, second = (folder_of(study, results, f"dpo rounds, round {number}") for number in (1, 2))
    assert manifests[second.name]["inputs"]["policy"] == manifests[first.name]["key"]
    sampled = folder_of(study, results, "samples of rounds, round 2")
    assert manifests[sampled.name]["inputs"]["model"] == manifests[first.name]["key"]
    assert (
        len({weights(folder) for folder in (folder_of(study, results, "sft weak 25%"), first, second)}) == 3
    )


def test_the_policy_of_every_round_is_evaluated(results):
    for arm in ("rounds", "PPO rounds"):
        rows = results["rounds"][arm]
        assert [row["round"] for row in rows] == [0, 1, 2]
        assert all(0 <= row["win_rate"] <= 100 and 0 <= row["true_quality"] <= 1 for row in rows)
        assert rows[0]["win_rate"] == results["arms"]["SFT"]["win_rate"]
        assert rows[2]["win_rate"] == results["arms"][arm]["win_rate"]
    assert results["one_round"] == {"rounds": ["DPO"], "PPO rounds": ["PPO"]}


def test_best_of_n_answers_with_the_sample_that_scores_highest(study, results):
    folder = folder_of(study, results, "best samples of best")
    kept = {row["prompt_id"]: row for row in tiny.rows(folder / "completions.jsonl.gz")}
    drawn: dict[str, list[str]] = {}
    for row in tiny.rows(
        folder_of(study, results, "4 evaluation samples each of sft weak 25%") / "completions.jsonl.gz"
    ):
        drawn.setdefault(row["prompt_id"], []).append(row["text"])
    scores = {row["prompt_id"]: row["scores"] for row in tiny.rows(folder / "scores.jsonl.gz")}
    assert len(kept) == 16
    for prompt, row in kept.items():
        assert len(scores[prompt]) == 4
        assert row["text"] == drawn[prompt][int(np.argmax(scores[prompt]))]
        assert row["meta"]["score"] == pytest.approx(max(scores[prompt]))
    (found,) = results["best_of_n"]["best"]
    assert found["kl_bound"] == pytest.approx(np.log(4) - 0.75)
    assert found["score/best"] >= found["score/mean"]


def test_rejection_sampling_trains_on_the_best_half(study, results):
    best = tiny.rows(folder_of(study, results, "best samples of own best") / "completions.jsonl.gz")
    metrics = tiny.manifests(tiny_rl.finished())[
        folder_of(study, results, "rejection sampling own best").name
    ]
    scores = sorted((row["meta"]["score"] for row in best if row["text"].strip()), reverse=True)
    assert metrics["metrics"]["kept"] == round(0.5 * len(scores))
    assert metrics["metrics"]["score/kept"] == pytest.approx(np.mean(scores[: round(0.5 * len(scores))]))


def test_ppo_and_its_sweep_have_curves(results):
    runs = results["ppo"]
    assert [(row["kl_coef"], row["learning_rate"], row["own"]) for row in runs] == [
        (0.05, 1e-3, True),
        (0.0, 1e-3, False),
    ]
    for row in runs:
        assert row["iteration"] == {"first": 0, "last": 2}
        assert row["kl"]["first"] == pytest.approx(
            0.0, abs=1e-5
        )  # before training the policy is its reference
        assert 0 <= row["true_quality"]["last"] <= 1
    assert [len(row["kl"]) for row in results["kl_reward"]] == [3, 3]


def test_the_report_shows_all_of_it(study):
    page = (study / "report" / "index.html").read_text()
    for title in ("Reward models", "Reinforcement learning", "Rounds", "Best of n"):
        assert f"<h2>{title}</h2>" in page
    for figure in (
        "Reward-model accuracy",
        "Train reward of PPO",
        "Validation reward of PPO",
        "after each round",
    ):
        assert figure in page


def test_a_critic_that_rates_is_itself_the_reward(tmp_path):
    copy_of(tmp_path)
    arm = {**tiny_rl.FROM, "name": "direct", "optimize": "ppo", "reward": "critic", "critic": "rater"}
    changes = tiny_rl.without_sections("ppo") | {
        "ppo": {**tiny_rl.PPO, "value_init": "policy"},
        "critics": {"rater": {"endpoint": "strong", "critic": "rating_1_10"}},
    }
    assert tiny_rl.run(tmp_path, f"arms={json.dumps([tiny_rl.ARMS[0], arm])}", **changes) == 0
    made = tiny.results(tmp_path)
    assert set(made["arms"]) == {"SFT", "direct"}
    (row,) = stages(made, "ppo")
    folder = tmp_path / "runs" / "tiny" / f"{row['kind']}-{row['key']}"
    rows = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    for trained in (row for row in rows if row["step"] > 0):
        # Expected scores of the scale from 1 to 10, taken to [-1, 1]; every response was rated.
        assert (trained["objective/ratings_ok"], trained["rewards/rows"]) == (1.0, 8)
        assert -1.0 <= trained["objective/scores"] <= 1.0
        assert trained["objective/scores"] == pytest.approx(
            (trained["objective/ratings_score"] - 5.5) / 4.5, abs=1e-5
        )
    # Two iterations of eight responses, and evaluations of eight before them and after each: all were planned.
    (planned,) = [row for row in made["spending"]["rows"] if row["roles"] == ["reward rater"]]
    assert planned["planned"]["calls"] == 2 * 8 + 3 * 8
    assert 0 < planned["spent"]["calls"] <= planned["planned"]["calls"]
    assert planned["planned"]["at_most"]


# ---- rounds that stop ------------------------------------------------------------------------------------------


def test_a_round_beyond_the_bound_is_not_begun_and_the_policy_so_far_is_the_arms(tmp_path):
    copy_of(tmp_path)
    before = set(tiny.manifests(tmp_path))
    assert tiny_rl.run(tmp_path, "iterate.max_comparisons=20", arms=["SFT", "rounds"]) == 0
    made = tiny.results(tmp_path)
    rows = made["rounds"]["rounds"]
    assert [row.get("begun") for row in rows] == [None, True, False]
    assert "max_comparisons" in rows[2]["reason"]
    assert any("round 2 was not begun" in text for text in made["warnings"])
    new = {manifest["kind"] for name, manifest in tiny.manifests(tmp_path).items() if name not in before}
    assert new == {"round", "sample", "evaluate"}  # nothing is trained or asked again
    assert made["arms"]["rounds"]["true_quality"] == rows[1]["true_quality"]
    assert "labels of rounds, round 2" not in {row["stage"] for row in made["stages"]}


def test_a_critic_that_dies_in_a_round_keeps_the_finished_ones(tmp_path, monkeypatch):
    copy_of(tmp_path, without="labels of rounds, round 2")
    (sampled,) = stages(tiny.results(tmp_path), "samples of rounds, round 2")
    asked = label.run

    def dead(ctx, prompts, samples, teacher, *, critic):
        if samples.key == sampled["key"]:
            raise StageError("the critic does not answer")
        return asked(ctx, prompts, samples, teacher, critic=critic)

    monkeypatch.setattr(label, "run", dead)
    assert tiny_rl.run(tmp_path, arms=["SFT", "rounds"], here=True) == 1
    made = tiny.results(tmp_path)
    first, second = made["rounds"]["rounds"][1:]
    assert first["win_rate"] is not None
    assert "does not answer" in second["reason"]
    assert any("does not answer" in text for text in made["warnings"])
    assert list(made["arms"]) == ["SFT"]
    trained = [name for name in tiny.manifests(tmp_path) if name.startswith("dpo-")]
    monkeypatch.setattr(label, "run", asked)
    assert tiny_rl.run(tmp_path, arms=["SFT", "rounds"], here=True) == 0
    assert [name for name in tiny.manifests(tmp_path) if name.startswith("dpo-")] == trained
    assert tiny.results(tmp_path)["rounds"]["rounds"][2]["win_rate"] is not None


@pytest.mark.slow
def test_people_label_a_round_between_two_runs(tmp_path):
    copy_of(tmp_path)
    study = tmp_path / "runs" / "tiny"
    for number in (1, 2):
        assert (
            tiny_rl.run(tmp_path, "iterate.labels=human", "iterate.evaluate=false", arms=["SFT", "rounds"])
            == 1
        )
        reason = tiny.results(tmp_path)["rounds"]["rounds"][number]["reason"]
        assert "wait for people" in reason
        (asked,) = [f for f in study.glob("comparisons-*") if not (f / "labels.jsonl").exists()]
        rows = [json.loads(line) for line in (asked / "comparisons.jsonl").read_text().splitlines()]
        labels = [{"id": row["id"], "preference": 1 + (len(row["a"]) < len(row["b"]))} for row in rows]
        (asked / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    assert (
        tiny_rl.run(tmp_path, "iterate.labels=human", "iterate.evaluate=false", arms=["SFT", "rounds"]) == 0
    )
    assert tiny.results(tmp_path)["arms"]["rounds"]["win_rate"] is not None


def test_with_the_initial_reference_a_later_round_starts_away_from_it(tmp_path):
    copy_of(tmp_path)
    before = {name for name in tiny.manifests(tmp_path) if name.startswith("dpo-")}
    assert tiny_rl.run(tmp_path, "iterate.reference=initial", arms=["SFT", "rounds"]) == 0
    (new,) = {name for name in tiny.manifests(tmp_path) if name.startswith("dpo-")} - before
    manifest = tiny.manifests(tmp_path)[new]
    assert manifest["inputs"]["reference"] != manifest["inputs"]["policy"]
    first = tiny.rows(tmp_path / "runs" / "tiny" / new / "train" / "metrics.jsonl")[0]
    assert first["rewards/chosen"] != 0.0
    assert first["rewards/rejected"] != 0.0


def test_a_reward_models_batches_can_be_looked_at(tmp_path, capsys):
    copy_of(tmp_path)
    before = tiny.manifests(tmp_path)
    assert main(["inspect", str(tiny.write(tmp_path, **tiny_rl.CHANGES)), "--stage", "reward"]) == 0
    text = capsys.readouterr().out
    assert "reward model on labels by strong" in text
    assert "<assistant>" in text
    assert tiny.manifests(tmp_path) == before  # nothing was run for it
