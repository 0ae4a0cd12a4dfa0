"""The LAIF matrix as a graph: what arms share, and how much each teacher is asked."""

import types
from typing import Any, cast

import pytest
from etils import epath

from laif_jax.config import IterateSpec, expand_arms
from laif_jax.config.load import SECTIONS
from laif_jax.stages.artifact import Artifact, StageError
from laif_jax.stages.context import StudyContext
from laif_jax.stages.split import round_slice
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


# ---- arms beyond DPO -------------------------------------------------------------------------------------------

TRAIN = tiny.TRAIN
LEARNING: dict[str, Any] = {
    "reward": {**TRAIN, "steps": 2},
    "ppo": {"iterations": 4, "batch_size": 8, "sampling": {"max_new_tokens": 8}, "max_prompt_length": 24},
    "best_of_n": {"n": 4},
    "rejection_sampling": {"n": 3, "train": {**TRAIN, "steps": 2}},
    "iterate": {"rounds": 3},
}


def learning(*methods: str, **changes: Any) -> dict[str, Any]:
    """The changes to the tiny study for arms that learn by these methods, each named after its own."""
    used = {section for method in methods for section in SECTIONS[method]}
    sections = {name: section for name, section in LEARNING.items() if name in used}
    if "dpo" not in used:
        sections["dpo"] = ...
    arms = [arm(method, optimize=method, critic="strong") for method in methods]
    return {"arms": arms, **sections, **changes}


def test_one_reward_model_serves_all_arms_on_the_same_labels(tmp_path):
    replicate = graph(tmp_path, **learning("dpo", "ppo", "best_of_n", "rejection_sampling"))
    rewards = replicate.rewards
    assert set(rewards) == {"ppo", "best_of_n", "rejection_sampling"}
    assert len({id(node) for node in rewards.values()}) == 1
    assert rewards["ppo"].inputs["labels"] is replicate.labels["dpo"]
    assert replicate.training["ppo"][-1].inputs["reward"] is rewards["ppo"]
    assert replicate.chosen["best_of_n"].inputs["reward"] is rewards["ppo"]
    # Best-of-n answers with its samples: no model is trained for it.
    assert replicate.arms["best_of_n"].inputs["samples"] is replicate.chosen["best_of_n"]


def test_ppo_on_a_critics_own_ratings_needs_no_labels(tmp_path):
    changes = learning("ppo", reward=...)
    changes["arms"][0]["reward"] = "critic"
    changes["ppo"] = {**changes["ppo"], "value_init": "policy"}
    replicate = graph(tmp_path, **changes)
    assert replicate.labels == {}
    assert replicate.rewards == {}
    assert not any("labels" in name or "reward" in name for name in names(replicate))


def test_a_sweep_runs_every_setting_once_beside_the_arms_own(tmp_path):
    changes = learning("ppo")
    changes["ppo"] = {**changes["ppo"], "sweep": {"kl_coefs": [0.05, 0.2], "learning_rates": [1e-6, 1e-5]}}
    replicate = graph(tmp_path, **changes)
    runs = replicate.runs["ppo"]
    assert list(runs) == [(0.05, 1e-6), (0.05, 1e-5), (0.2, 1e-6), (0.2, 1e-5)]
    assert runs[0.05, 1e-6] is replicate.training["ppo"][-1]
    assert len({node.name for node in runs.values()}) == 4
    assert all(node in replicate.targets() for node in runs.values())


@pytest.mark.parametrize("method", ["iterated_dpo", "iterated_ppo"])
def test_rounds_go_from_policy_to_policy(tmp_path, method):
    replicate = graph(tmp_path, **learning(method))
    rounds = replicate.rounds[method]
    assert [r.number for r in rounds] == [1, 2, 3]
    before = replicate.training[method][0]
    for r in rounds:
        assert r.samples.inputs["model"] is before
        assert r.policy.inputs["model"] is before
        before = r.policy
    assert replicate.training[method][-1] is before
    # The last round's evaluation is the arm's own.
    assert [r.evaluation is None for r in rounds] == [False, False, True]
    if method == "iterated_ppo":
        assert len({id(r.reward) for r in rounds}) == 3
        assert all(r.reward.inputs["model"] is replicate.training[method][0] for r in rounds)


@pytest.mark.parametrize(("staleness", "counts"), [(0, [1, 1, 1]), (1, [1, 2, 2]), (5, [1, 2, 3])])
def test_a_round_trains_on_no_labels_older_than_the_bound(tmp_path, staleness, counts):
    changes = learning("iterated_dpo", iterate={"rounds": 3, "max_staleness": staleness})
    rounds = graph(tmp_path, **changes).rounds["iterated_dpo"]
    for r, count in zip(rounds, counts):
        labels = [node for name, node in r.policy.inputs.items() if name.startswith("labels")]
        assert labels == [earlier.labels for earlier in rounds[r.number - count : r.number]]


def test_the_reference_is_the_start_or_the_policy_before(tmp_path):
    for choice, expected in (("previous", False), ("initial", True)):
        changes = learning("iterated_dpo", "iterated_ppo", iterate={"rounds": 2, "reference": choice})
        replicate = graph(tmp_path, **changes)
        for method, name in (("iterated_dpo", "start"), ("iterated_ppo", "reference")):
            inputs = replicate.rounds[method][1].policy.inputs
            assert (name in inputs) == expected
            assert not expected or inputs[name] is replicate.training[method][0]


@pytest.mark.parametrize("rounds", [1, 2, 3, 7])
def test_rounds_share_one_budget(tmp_path, monkeypatch, rounds):
    """Together they make as many updates, and take as many prompts, as one round over all of them."""
    made: list[int] = []

    def run(_ctx, _policy, _labels, *, reference, spec):
        made.append(spec.steps)
        return PROMPTS

    monkeypatch.setattr(laif.dpo, "run", run)
    changes = learning("iterated_dpo", iterate={"rounds": rounds}, dpo={**TRAIN, "steps": 20})
    nodes = graph(tmp_path, **changes).rounds["iterated_dpo"]
    begun = Artifact(epath.Path("/nowhere"), {"key": "begin", "metrics": {"begun": True}})
    for r in nodes:
        r.policy.run({**dict.fromkeys(r.policy.inputs, PROMPTS), "begin": begun})
    assert sum(made) == 20
    assert max(made) - min(made) <= 1
    slices = [round_slice(40, 0.25, IterateSpec(rounds=rounds), r.number) for r in nodes]
    assert [i for start, stop in slices for i in range(start, stop)] == list(range(10, 40))


def test_a_round_that_is_not_begun_hands_on_what_was_there(tmp_path):
    (_, second, _) = graph(tmp_path, **learning("iterated_dpo")).rounds["iterated_dpo"]
    begin = Artifact(epath.Path("/nowhere"), {"key": "begin", "metrics": {"begun": False}})
    policy = Artifact(epath.Path("/nowhere"), {"key": "policy", "metrics": {}})
    for node in second.nodes:
        inputs = {name: policy if name == "model" else begin for name in node.inputs}
        assert node.run(inputs) is (policy if node is second.policy else begin)


def test_prompts_for_too_many_rounds_are_told():
    with pytest.raises(StageError, match="leaves 30"):
        round_slice(40, 0.25, IterateSpec(rounds=4, prompts_per_round=8), 1)
    assert round_slice(40, 0.25, IterateSpec(rounds=3, prompts_per_round=8), 3) == (26, 34)
