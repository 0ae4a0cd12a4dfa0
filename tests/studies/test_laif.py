"""The LAIF matrix as a graph: what arms share, and how much each teacher is asked."""

import types
from typing import Any, cast

import pytest
from etils import epath

from laif_jax.config import expand_arms
from laif_jax.stages.artifact import Artifact
from laif_jax.stages.context import StudyContext
from laif_jax.studies import laif
from laif_jax.studies.graph import Node, ordered
from tests.studies import tiny

PROMPTS = Artifact(epath.Path("/nowhere"), {"key": "prompts", "metrics": {"train": 40, "eval": 16}})


def arm(name: str, teacher: str = "weak", share: float = 0.25, **rest: Any) -> dict[str, Any]:
    return {"name": name, "teacher": teacher, "share": share, **rest}


def tuned(name: str, **rest: Any) -> dict[str, Any]:
    return arm(name, optimize="dpo", critic="strong", **rest)


def graph(tmp_path, **changes: Any) -> laif.Replicate:
    config = tiny.config(tmp_path, **{"questions": [], **changes})
    return laif.build(StudyContext(config, epath.Path(tmp_path), 0, cast(Any, types.SimpleNamespace())))


def names(replicate: laif.Replicate) -> list[str]:
    return [node.name for node in ordered(replicate.arms.values())]


def test_arms_that_share_an_sft_share_its_node_and_everything_before_it(tmp_path):
    replicate = graph(
        tmp_path,
        arms=[
            arm("SFT"),
            tuned("LAIF"),
            tuned("LAIF against teacher", pairs="policy_vs_teacher"),
            arm("all", share=1.0),
        ],
    )
    assert replicate.training["SFT"][0] is replicate.training["LAIF"][0]
    assert replicate.training["SFT"][0] is replicate.training["LAIF against teacher"][0]
    assert replicate.training["SFT"][0] is not replicate.training["all"][0]
    found = names(replicate)
    for shared in (
        "prompts",
        "base model",
        "teacher weak",
        "sft weak 25%",
        "reference completions of strong",
    ):
        assert found.count(shared) == 1
    assert found.index("sft weak 25%") < found.index("dpo LAIF") < found.index("evaluation of LAIF")


def test_arms_with_the_same_labels_share_them_and_other_pairs_need_other_samples(tmp_path):
    replicate = graph(
        tmp_path, arms=[tuned("a"), tuned("b"), tuned("c", pairs="policy_vs_teacher"), tuned("d", share=0.5)]
    )
    labels = replicate.labels
    assert labels["a"] is labels["b"]
    assert len({id(node) for node in labels.values()}) == 3
    assert set(labels["a"].inputs) == {"prompts", "samples"}
    assert set(labels["c"].inputs) == {"prompts", "samples", "teacher"}
    # Two samples per prompt against one: another stage.
    assert labels["a"].inputs["samples"] is not labels["c"].inputs["samples"]


def test_a_model_is_judged_once_per_arm_and_against_one_reference(tmp_path):
    replicate = graph(tmp_path)
    assert list(replicate.arms) == ["SFT weak", "SFT strong", "LAIF weak"]
    assert len({id(node.inputs["references"]) for node in replicate.arms.values()}) == 1
    assert len({id(node.inputs["samples"]) for node in replicate.arms.values()}) == 3
    assert replicate.agreement is None


@pytest.mark.parametrize(
    ("arms", "stop"),
    [
        ([arm("x", share=0.1)], 4),
        ([arm("x", share=0.1), arm("y", share=0.5)], 20),
        ([tuned("x", share=0.1)], 4),
        ([arm("x", share=0.1), tuned("y", share=0.1, pairs="policy_vs_teacher")], 40),
        ([arm("x", share=0.001)], 1),  # at least one
        ([arm("x", share=0.1), arm("other", teacher="strong", share=1.0)], 4),
    ],
)
def test_a_teacher_is_asked_for_no_more_prompts_than_an_arm_needs(tmp_path, monkeypatch, arms, stop):
    asked = {}

    def run(_ctx, _prompts, *, teacher, split, start=0, stop=None):
        asked[teacher] = (split, start, stop)
        return PROMPTS

    monkeypatch.setattr(laif.teach, "run", run)
    drop = {} if any(a.get("critic") for a in arms) else {"dpo": None, "critics": {}}
    teacher = graph(tmp_path, arms=arms, **drop).training["x"][0].inputs["teacher"]
    teacher.run({"prompts": PROMPTS})
    assert asked == {"weak": ("train", 0, stop)}


def test_the_policy_is_sampled_on_the_prompts_that_its_sft_did_not_see(tmp_path, monkeypatch):
    asked = []

    def run(_ctx, _prompts, _model, *, generator, split, spec, max_prompt_length, start=0, stop=None):
        asked.append((generator, split, spec.samples, start, stop, max_prompt_length))
        return PROMPTS

    monkeypatch.setattr(laif.sample, "run", run)
    replicate = graph(
        tmp_path, arms=[tuned("x", share=0.1), tuned("y", share=0.1, pairs="policy_vs_teacher")]
    )
    for name in ("x", "y"):
        replicate.labels[name].inputs["samples"].run({"prompts": PROMPTS, "model": PROMPTS})
    replicate.arms["x"].inputs["samples"].run({"prompts": PROMPTS, "model": PROMPTS})
    assert asked == [
        ("sft weak 10%", "train", 2, 4, None, 24),
        ("sft weak 10%", "train", 1, 4, None, 24),
        ("x", "eval", 1, 0, None, 24),
    ]


def test_the_matrix_gives_the_arms_of_the_paper(tmp_path):
    matrix = {
        "teachers": ["weak", "strong"],
        "shares": [1.0, 0.1],
        "critics": ["strong"],
        "pairs": ["policy_vs_policy", "policy_vs_teacher"],
    }
    replicate = graph(tmp_path, arms=[], matrix=matrix)
    assert list(replicate.arms) == [
        "sft-weak-10", "sft-weak-100", "sft-strong-10", "sft-strong-100",
        "laif-weak-strong-policy", "laif-weak-strong-teacher",
        "laif-strong-strong-policy", "laif-strong-strong-teacher",
    ]  # fmt: skip
    arms = {arm.name: arm for arm in expand_arms(tiny.config(tmp_path, arms=[], matrix=matrix, questions=[]))}
    assert arms["laif-weak-strong-teacher"].share == 0.1
    for name, chain in replicate.training.items():
        assert len(chain) == (2 if name.startswith("laif") else 1)
        assert (
            chain[0] is replicate.training[f"sft-{arms[name].teacher}-{arms[name].share:.0%}".rstrip("%")][0]
        )


def test_a_judge_with_human_labels_is_checked(tmp_path):
    replicate = graph(tmp_path, evaluation__agreement="human.jsonl")
    assert isinstance(replicate.agreement, Node)
    assert replicate.agreement.inputs == {}
