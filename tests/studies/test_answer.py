"""The answer in plain language follows the interval, and says what weakens it."""

import copy

import pytest

from laif_jax.config.schema import QuestionSpec
from laif_jax.studies.answer import PAPER_CONTEXT, answer_text, answers, caveats, verdict

QUESTION = QuestionSpec(laif="laif", sft="sft")


def _results(delta=0.0, low=-2.0, high=2.0, **more):
    arm = {"win_rate": 50.0, "mean_length": 100.0, "coverage": 1.0}
    return {
        "seeds": [0, 1, 2],
        "judge": {"name": "GPT-4"},
        "arms": {"laif": dict(arm), "sft": dict(arm)},
        "comparisons": [
            {"a": "laif", "b": "sft", "delta": delta, "ci95": [low, high], "p_value": 0.5, "n": 805}
        ],
        **more,
    }


@pytest.mark.parametrize(
    ("numbers", "start"),
    [((3.0, 0.5, 5.5), "Yes"), ((-3.0, -5.5, -0.5), "No: "), ((3.0, -0.1, 6.1), "No detectable difference")],
)
def test_the_interval_decides(numbers, start):
    text = verdict(_results(*numbers), QUESTION)
    assert text.startswith(start)
    for words in (f"{numbers[0]:+.1f} points", "805 prompts", "3 seeds", "judge: GPT-4"):
        assert words in text


def test_a_judge_that_was_the_critic_is_named():
    results = _results(judge={"endpoint": "strong"})
    assert not any("one model" in text for text in caveats(results, QUESTION))
    results["arms"]["laif"]["critic_endpoint"] = "strong"
    assert any("Critic and judge are one model (strong)" in text for text in caveats(results, QUESTION))
    results["judge"]["endpoint"] = "another"
    assert not any("one model" in text for text in caveats(results, QUESTION))


def test_seeds_are_those_of_the_comparison_where_a_replicate_failed():
    results = _results()
    results["comparisons"][0]["seeds"] = 1
    assert ", 1 seed, judge" in verdict(results, QUESTION)
    assert any(text.startswith("One training seed") for text in caveats(results, QUESTION))
    results["comparisons"][0]["seeds"] = 2
    assert ", 2 seeds, judge" in verdict(results, QUESTION)


def test_a_comparison_stored_the_other_way_round_is_turned():
    results = _results(-3.0, -5.5, -0.5)
    row = results["comparisons"][0]
    row["a"], row["b"] = "sft", "laif"
    assert verdict(results, QUESTION).startswith("Yes")
    assert "+3.0 points (95% interval +0.5 to +5.5" in verdict(results, QUESTION)


def test_no_difference_says_what_could_have_been_found():
    assert "about 2.9 points four times in five" in verdict(_results(), QUESTION)
    results = _results()
    results["comparisons"][0]["detectable"] = 4.44
    assert "about 4.4 points" in verdict(results, QUESTION)


def test_missing_arm_and_missing_comparison():
    results = _results(stages=[{"stage": "dpo", "arm": "laif", "status": "failed", "error": "loss is NaN"}])
    lacking = copy.deepcopy(results)
    del lacking["arms"]["laif"]
    assert verdict(lacking, QUESTION) == (
        "Cannot be answered: arm laif has no result. Its stage dpo failed: loss is NaN."
    )
    assert caveats(lacking, QUESTION) == []
    results["comparisons"] = []
    assert "not compared" in verdict(results, QUESTION)


def test_caveats():
    assert caveats(_results(), QUESTION) == []
    assert "One training seed" in caveats(_results(seeds=[0]), QUESTION)[0]
    longer = _results()
    longer["arms"]["laif"]["mean_length"] = 150.0
    assert "50% longer" in caveats(longer, QUESTION)[0]
    thin = _results()
    thin["arms"]["sft"]["coverage"] = 0.8
    assert "sft 80%" in caveats(thin, QUESTION)[0]
    known = _results()
    for name, quality in (("laif", 0.5), ("sft", 0.75)):
        known["arms"][name]["true_quality"] = quality
    assert "laif 0.500, sft 0.750" in caveats(known, QUESTION)[0]


@pytest.mark.parametrize(("low", "weak"), [(0.55, True), (0.62, False)])
def test_a_judge_is_weak_unless_its_interval_clears_every_baseline(low, weak):
    row = {"without_ties": 0.66, "ci95": [low, 0.7], "longest_wins": 0.6, "random": 0.5}
    (text,) = caveats(_results(judge={"name": "J", "agreement": [row]}), QUESTION)
    assert ("taste, not quality" in text) == weak
    assert "picking the longer answer" in text


def test_judge_without_a_usable_verdict():
    row = {"without_ties": None, "ci95": [None, None], "longest_wins": None}
    (text,) = caveats(_results(judge={"agreement": [row]}), QUESTION)
    assert "no usable verdict" in text


def test_all_answers_say_the_context_once():
    found = answers(_results(seeds=[0]), [QUESTION, QuestionSpec(laif="sft", sft="laif")])
    assert len(found["answers"]) == 2
    assert found["answer"].count(PAPER_CONTEXT) == 1
    assert found["answer"].count("One training seed") == 1
    assert answer_text(_results(), QUESTION).endswith(PAPER_CONTEXT)
    assert answers(_results(), [])["answers"] == []


def test_judge_is_named_from_its_parts():
    results = _results(judge={"endpoint": "local", "model": "dir/SmolLM2.gguf", "critic": "ab_logprob"})
    assert "judge: local (SmolLM2.gguf, ab_logprob)" in verdict(results, QUESTION)
