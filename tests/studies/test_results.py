"""From artifacts to results.json, with artifacts made by hand so that every number is known."""

import json
import types
from pathlib import Path
from typing import Any, cast

import pytest
from etils import epath

from laif_jax.config import StudyConfig
from laif_jax.evaluation.winrate import win_rate
from laif_jax.records import write_jsonl
from laif_jax.stages.artifact import Artifact
from laif_jax.stages.context import StudyContext
from laif_jax.studies import laif
from laif_jax.studies.graph import Node, Outcome, ordered
from laif_jax.studies.results import _twins, collect, describe, questions
from laif_jax.studies.table import number
from tests.studies import tiny

P: dict[str, list[list[float | None]]] = {  # arm -> seed -> prompt
    "SFT weak": [[0.0, 0.5, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]],
    "SFT strong": [[1.0, 1.0, 0.5, None], [1.0, 1.0, 1.0, 0.0]],
    "LAIF weak": [[0.5, 1.0, 0.25, 1.0], [0.5, 0.5, 0.0, 1.0]],
}


def artifact(folder: Path, node: Node, metrics: dict[str, Any]) -> Artifact:
    path = epath.Path(folder) / f"{node.name}-{node.seed}".replace(" ", "-")
    kind = node.name.split()[0]
    manifest = {
        "kind": kind, "key": f"{node.name} {node.seed}", "status": "done", "seconds": 1.5, "attempts": 1,
        "metrics": metrics,
    }  # fmt: skip
    return Artifact(path, manifest)


def evaluation(folder: Path, node: Node) -> Artifact:
    p = P[node.arm][node.seed]
    summary = win_rate([float("nan") if value is None else value for value in p]).to_dict()
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "cost": 0.5}
    lengths = {"mean_length": 4.0 + node.seed, "reference_mean_length": 3.0, "longest_wins": 60.0}
    made = artifact(folder, node, {**summary, **lengths, "usage": usage, "true_quality": 0.5})
    rows = [
        {
            "prompt_id": str(i),
            "prompt": f"copy:{i}",
            "reference": "r",
            "output": f"{node.arm} {i}",
            "p": value,
        }
        for i, value in enumerate(p)
    ]
    write_jsonl(made.path / "verdicts.jsonl.gz", rows)
    return made


def training(folder: Path, node: Node) -> Artifact:
    made = artifact(folder, node, {"steps": 2})
    rows = [{"step": step, "loss": 1.0 / step} for step in (1, 2)]
    write_jsonl(made.path / "train" / "metrics.jsonl", rows)
    return made


@pytest.fixture
def study(tmp_path):
    """(config, replicates, outcomes) of a study in which everything finished."""
    config = tiny.config(tmp_path, seeds=2)
    services = cast(Any, types.SimpleNamespace())
    replicates = [laif.build(StudyContext(config, epath.Path(tmp_path), seed, services)) for seed in (0, 1)]
    outcomes = {}
    for replicate in replicates:
        trained = {node for chain in replicate.training.values() for node in chain}
        for node in ordered(replicate.arms.values()):
            if node in replicate.arms.values():
                made = evaluation(tmp_path, node)
            elif node in trained:
                made = training(tmp_path, node)
            else:
                made = artifact(tmp_path, node, {"ok": 3, "n": 4})
            outcomes[node] = Outcome(made)
    return config, replicates, outcomes


def test_arms_that_are_one_model_are_named():
    def rows(arm, count=4):
        return [[{"output": f"{arm} {i}"} for i in range(count)]]

    (warning,) = _twins({"start": rows("x"), "tuned": rows("x"), "other": rows("y"), "failed": [[]]})
    assert "`start` and `tuned`" in warning
    assert "4 of 4" in warning


def test_a_critic_that_goes_by_the_order_is_named(study):
    config, replicates, outcomes = study
    (labels,) = {replicate.labels["LAIF weak"] for replicate in replicates[:1]}
    metrics = outcomes[labels].artifact.manifest["metrics"]
    assert not any("order" in text for text in collect(config, "x", replicates, outcomes).results["warnings"])
    metrics |= {"swap_consistency": 0.1, "first_shown_wins": 0.95}
    warnings = collect(config, "x", replicates, outcomes).results["warnings"]
    assert any("10% of comparisons only" in text and "95%" in text for text in warnings)


def test_numbers_by_hand(study):
    config, replicates, outcomes = study
    found = collect(config, "configs/x.yaml", replicates, outcomes)
    results = found.results
    json.dumps(results, allow_nan=False)

    assert list(results["arms"]) == ["SFT weak", "SFT strong", "LAIF weak"]
    strong = results["arms"]["SFT strong"]
    assert strong["win_rate"] == pytest.approx(100 * 5.5 / 7)
    assert (strong["n"], strong["missing"], strong["wins"], strong["ties"], strong["losses"]) == (
        7,
        1,
        5,
        1,
        1,
    )
    assert strong["mean_length"] == 4.5
    assert [row["seed"] for row in strong["per_seed"]] == [0, 1]
    assert strong["per_seed"][1]["win_rate"] == pytest.approx(75.0)
    assert strong["standard_error"] > 0

    row = next(r for r in results["comparisons"] if (r["a"], r["b"]) == ("SFT weak", "LAIF weak"))
    assert row["delta"] == pytest.approx(100 * (2.5 - 4.75) / 8)
    # Paired: the prompt that has no verdict for one arm counts for neither.
    row = next(r for r in results["comparisons"] if (r["a"], r["b"]) == ("SFT weak", "SFT strong"))
    assert (row["n"], row["cells"]) == (4, 7)
    assert row["delta"] == pytest.approx(100 * (1.5 - 5.5) / 7)
    low, high = row["ci95"]
    assert low <= row["delta"] <= high
    assert 0 < row["p_value"] <= 1

    assert results["seeds"] == [0, 1]
    assert {name: arm["critic_endpoint"] for name, arm in results["arms"].items()} == {
        "SFT weak": None,
        "SFT strong": None,
        "LAIF weak": "strong",
    }
    assert "Critic and judge are one model" in results["answer"]
    assert "LAIF weak" in results["answer"]
    assert "SFT strong" in results["answer"]
    assert results["labels"]["LAIF weak"] == {"seed": 0, "ok": 3, "n": 4}
    assert any("SFT strong" in text and "1 of 8" in text for text in results["warnings"])
    assert {row["status"] for row in results["stages"]} == {"done"}
    assert sum(row.get("usage", {}).get("cost", 0) for row in results["stages"]) == 3.0

    assert found.curves["LAIF weak"]["1"] == [
        {"stage": "sft", "step": [1, 2], "loss": [1.0, 0.5]},
        {"stage": "dpo", "step": [1, 2], "loss": [1.0, 0.5]},
    ]
    assert [row["prompt"] for row in found.samples] == [f"copy:{i}" for i in range(4)]
    assert found.samples[3]["verdicts"] == {"SFT weak": 1.0, "SFT strong": None, "LAIF weak": 1.0}


def without(outcomes, node: Node, error: str):
    return {**outcomes, node: Outcome(None, error)}


def test_a_seed_that_failed_leaves_the_arm_with_the_others(study):
    config, replicates, outcomes = study
    outcomes = without(outcomes, replicates[0].arms["SFT strong"], "the judge is down")
    results = collect(config, "", replicates, outcomes).results
    strong = results["arms"]["SFT strong"]
    assert strong["win_rate"] == pytest.approx(75.0)
    assert [row["seed"] for row in strong["per_seed"]] == [1]
    row = next(r for r in results["comparisons"] if (r["a"], r["b"]) == ("SFT weak", "SFT strong"))
    assert (row["seeds"], row["cells"]) == (1, 4)
    assert row["delta"] == pytest.approx(100 * (1 - 3) / 4)
    assert any("the judge is down" in text for text in results["warnings"])
    failed = [row for row in results["stages"] if row["status"] == "failed"]
    assert [(row["arm"], row["seed"], row["error"]) for row in failed] == [
        ("SFT strong", 0, "the judge is down")
    ]


def test_an_arm_without_any_result_is_absent_and_the_answer_says_so(study):
    config, replicates, outcomes = study
    for replicate in replicates:
        outcomes = without(
            outcomes, replicate.arms["LAIF weak"], "skipped: it needs `dpo`, which did not finish"
        )
    found = collect(config, "", replicates, outcomes)
    assert list(found.results["arms"]) == ["SFT weak", "SFT strong"]
    assert len(found.results["comparisons"]) == 1
    assert "annot be answered" in found.results["answer"]
    assert "LAIF weak" not in found.samples[0]["outputs"]
    # What was skipped is no warning of its own: the failure that caused it is.
    assert not any("skipped" in text for text in found.results["warnings"])


def test_nothing_finished_is_a_result_too(study):
    config, replicates, outcomes = study
    outcomes = {node: Outcome(None, "the disk is full") for node in outcomes}
    found = collect(config, "", replicates, outcomes)
    assert found.results["arms"] == {}
    assert found.results["comparisons"] == []
    assert found.samples == []
    assert "annot be answered" in found.results["answer"]


def test_a_judge_like_a_coin_is_a_warning(study):
    config, replicates, outcomes = study
    node = Node(name="judge agreement", run=lambda _: artifact)
    source = {"source": "all", "without_ties": 0.52, "ci95": [0.47, 0.57]}
    judged = Artifact(epath.Path("/nowhere"), {
        "kind": "agreement", "key": "k", "status": "done", "seconds": 1.0, "attempts": 1,
        "metrics": {"by_source": [source]},
    })  # fmt: skip
    first = laif.Replicate(
        **{
            **{f: getattr(replicates[0], f) for f in ("seed", "arms", "training", "labels")},
            "agreement": node,
        }
    )
    results = collect(config, "", [first, replicates[1]], {**outcomes, node: Outcome(judged)}).results
    assert results["judge"]["agreement"] == [source]
    assert any("coin" in text for text in results["warnings"])


def _questions(config: StudyConfig) -> list[tuple[str, str]]:
    return [(question.laif, question.sft) for question in questions(config)]


def test_questions_by_default(tmp_path):
    assert _questions(tiny.config(tmp_path)) == [("LAIF weak", "SFT strong")]
    # The critic's name is a teacher's: that teacher's SFT on everything is what LAIF must beat.
    matrix = {"teachers": ["weak", "strong"], "critics": ["strong"]}
    made = tiny.config(tmp_path, arms=[], questions=[], matrix=matrix)
    assert _questions(made) == [
        ("laif-weak-strong", "sft-strong-100"),
        ("laif-strong-strong", "sft-strong-100"),
    ]
    other = tiny.config(
        tmp_path,
        arms=[],
        questions=[],
        matrix={"teachers": ["weak", "strong"], "critics": ["oracle"]},
        critics={"oracle": {"endpoint": "strong", "critic": "ab_logprob"}},
    )
    assert _questions(other)[:2] == [
        ("laif-weak-oracle", "sft-weak-100"),
        ("laif-weak-oracle", "sft-strong-100"),
    ]


def test_arms_in_words(tmp_path):
    assert [describe(arm) for arm in tiny.config(tmp_path).arms] == [
        "SFT on 25% of weak's completions",
        "SFT on 100% of strong's completions",
        "SFT on 25% of weak's completions, then DPO on strong's judgements (policy vs policy)",
    ]


@pytest.mark.parametrize("value", [-0.0, 0.0, -0.04])
def test_nothing_is_minus_nothing(value):
    assert number(value, 1, sign=True) == "+0.0"
