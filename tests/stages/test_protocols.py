"""Judging protocols from a study's configuration: ensembles, two tiers, lists, options, and revised teachers."""

import pytest

from laif_jax.config import ConfigError
from laif_jax.records import Completion, read_jsonl
from laif_jax.stages import evaluate, label, prompts, teach
from laif_jax.studies.plan import plan_study
from laif_jax.worlds import symbols
from tests.stages.test_stages import ORACLE, answer, completions, wrong
from tests.studies import tiny

PRICES = {"prompt_price": 1.0, "completion_price": 1.0}
ENDPOINTS = {
    **ORACLE,
    "strong": {**ORACLE["strong"], **PRICES},
    "cheap": {
        "provider": "simulated",
        "simulated": {"world": "symbols", "accuracy": 0.8, "tie_rate": 0.3, "seed": 5},
        "prompt_price": 0.1,
        "completion_price": 0.1,
    },
    "noisy": {
        "provider": "simulated",
        "simulated": {"world": "symbols", "accuracy": 0.7, "seed": 6},
        **PRICES,
    },
    "reviser": {"provider": "simulated", "simulated": {"world": "symbols", "skill": 1.0, "seed": 7}},
}
CRITICS = {
    "strong": {"endpoint": "strong", "critic": "ab_logprob"},
    "tiers": {
        "endpoint": "cheap",
        "critic": "ab_logprob",
        "strong": {"endpoint": "strong", "critic": "rlaif_cot", "below": 0.2},
    },
    "panel": {
        "endpoint": "strong",
        "critic": "constitutional",
        "ensemble": [{"endpoint": "noisy", "critic": "ab_logprob", "samples": 3, "temperature": 1.0}],
    },
    "lists": {"endpoint": "strong", "critic": "listwise"},
}


@pytest.fixture(scope="module")
def study(make, tmp_path_factory):
    """A context, its prompts, and two samples of each: one right, one wrong."""
    ctx = make(endpoints=ENDPOINTS, critics=CRITICS)
    asked = prompts.run(ctx)
    rows = [row.prompt for row in prompts.read(asked, "train")]
    pairs = [
        answer(p, text, index=i)
        for p in rows
        for i, text in enumerate((symbols.solve(p.instruction), wrong(p.instruction)))
    ]
    return ctx, asked, completions(tmp_path_factory.mktemp("samples"), pairs), len(rows)


def right(made) -> float:
    found = label.read_preferences(made)
    return sum(p.chosen.text == symbols.solve(p.prompt.instruction) for p in found) / len(found)


def test_the_strong_tier_mends_the_cheap_one_and_the_saving_is_told(study) -> None:
    ctx, asked, samples, count = study
    made = label.run(ctx, asked, samples, None, critic="tiers")
    tiers = made.metrics["tiers"]
    assert 0 < tiers["share_strong"] < 1
    assert tiers["strong"]["comparisons"] == round(tiers["share_strong"] * count)
    assert tiers["first"]["calls"] == 2 * count
    assert tiers["strong"]["calls"] == 4 * tiers["strong"]["comparisons"]
    assert tiers["saved"]["cost"] > 0
    cost = tiers["first"]["cost"] + tiers["strong"]["cost"]
    assert made.metrics["usage"]["cost"] == pytest.approx(cost)
    assert len(label.read_preferences(made)) == count  # the ties of the cheap critic are gone


def test_an_ensemble_averages_its_critics(study) -> None:
    ctx, asked, samples, _ = study
    made = label.run(ctx, asked, samples, None, critic="panel")
    assert made.metrics["agreement"] < 1
    rows = list(read_jsonl(made.path / "judgements.jsonl.gz"))
    assert all(row["p_b"] == pytest.approx(sum(row["meta"]["members"]) / 2) for row in rows)
    assert all(row["critic"] == "constitutional+ab_logprob" and row["principle"] for row in rows)
    assert 0 < made.metrics["mean_outside"] < 0.05


def test_a_ranking_labels_every_pair_of_a_prompts_samples(study) -> None:
    ctx, asked, samples, count = study
    made = label.run(ctx, asked, samples, None, critic="lists")
    assert made.metrics["comparisons"] == count
    assert right(made) == 1.0


def test_options_are_part_of_what_a_stage_depends_on(make, study) -> None:
    ctx, *_ = study
    plain = label.critic_settings(ctx, ctx.config.critics["strong"])
    assert set(plain) == {"endpoint", "critic", "order"}  # as before there were options
    for change in ({"samples": 2, "temperature": 1.0}, {"invert": True}, {"clamp": [0.4, 0.6]}):
        spec = type(ctx.config.critics["strong"]).model_validate(CRITICS["strong"] | change)
        assert label.critic_settings(ctx, spec) != plain


def test_a_teachers_revisions_are_its_targets(make, study) -> None:
    teachers = {
        **tiny.TREE["teachers"],
        "reference": {"endpoint": "reviser", "revisions": 2},
    }
    evaluation = {**tiny.TREE["evaluation"], "reference": "reference"}
    ctx = make(endpoints=ENDPOINTS, critics=CRITICS, teachers=teachers, evaluation=evaluation)
    made = teach.run(ctx, prompts.run(ctx), teacher="reference", split="eval")
    targets = teach.read(made)
    assert all(len(target.meta["steps"]) == 2 for target in targets)
    every = [Completion.from_row(row) for row in read_jsonl(made.path / "revisions.jsonl.gz")]
    assert [row.meta["step"] for row in every] == [1, 2] * len(targets)
    plan = {row.role: row for row in plan_study(ctx.config).rows if row.name == "reference"}
    assert (plan["teacher"].calls, plan["teacher"].at_most) == (len(targets), [])
    assert plan["revision"].calls == 4 * len(targets)
    assert plan["revision"].critic == "constitutional"  # under which the store books them


def test_the_judge_of_an_evaluation_may_be_a_panel(make, study, tmp_path) -> None:
    evaluation = {**tiny.TREE["evaluation"], "judge": CRITICS["panel"]}
    ctx = make(endpoints=ENDPOINTS, critics=CRITICS, evaluation=evaluation)
    asked = prompts.run(ctx)
    rows = [row.prompt for row in prompts.read(asked, "eval")]
    arm = completions(tmp_path, [answer(p, symbols.solve(p.instruction), "arm") for p in rows], "arm")
    reference = completions(tmp_path, [answer(p, wrong(p.instruction), "r") for p in rows], "reference")
    made = evaluate.run(ctx, asked, arm, reference)
    assert made.metrics["win_rate"] > 60
    assert made.metrics["usage"]["cost"] > 0


def test_an_endpoint_that_is_not_there_is_named(tmp_path) -> None:
    critics = {"strong": {**CRITICS["strong"], "strong": {"endpoint": "stronk"}}}
    with pytest.raises(ConfigError, match=r"critics\.strong\.strong\.endpoint.*stronk"):
        tiny.config(tmp_path, endpoints=ENDPOINTS, critics=critics)
