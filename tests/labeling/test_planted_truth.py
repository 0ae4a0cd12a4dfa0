"""The planted-truth tests: an oracle is always right, in both orders, for every critic; no failure is a preference."""

import collections
import statistics

import pytest

from laif_jax.config.schema import SimulatedSpec, SymbolsSpec
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.critic import load_critic, shipped_critics
from laif_jax.labeling.jobs import CompleteJob, JudgeJob
from laif_jax.labeling.preferences import to_preferences
from laif_jax.records import Comparison, Completion, Prompt, Status
from laif_jax.worlds import symbols
from tests.labeling.helpers import comparison, judge, planted, run_job, simulated, truth

CRITICS = shipped_critics("comparison")
LABELS = (Status.OK, Status.TIE)


@pytest.mark.parametrize("critic", CRITICS)
def test_an_oracle_points_the_right_way_in_both_orders(tmp_path, critic: str) -> None:
    items = planted(60)
    job = JudgeJob(endpoint=simulated(), critic=critic, comparisons=tuple(items))
    status, final, parts = run_job(tmp_path, job)
    assert status.counts == {"ok": 60}
    assert [part["order"] for part in parts] == ["ab", "ba"] * 60
    by_id = {item.id: item for item in items}
    for row in final + parts:
        assert (row["p_b"] > 0.5) == (truth(by_id[row["comparison_id"]]) == 1.0)
    preferences, counts = to_preferences(items, judge(tmp_path, simulated(), critic, items))
    assert counts["preferences"] == 60
    assert all(p.chosen.meta["quality"] > p.rejected.meta["quality"] for p in preferences)


@pytest.mark.parametrize("critic", CRITICS)
def test_one_seeded_order_is_right_too_and_uses_both_places(tmp_path, critic: str) -> None:
    items = planted(60)
    judgements = judge(tmp_path, simulated(), critic, items, order="seeded", seed=3)
    assert all((j.p_b > 0.5) == (truth(item) == 1.0) for item, j in zip(items, judgements))
    orders = collections.Counter(j.order for j in judgements)
    assert min(orders["ab"], orders["ba"]) > 10
    again = judge(tmp_path, simulated(), critic, items[::-1], order="seeded", seed=3)
    assert [j.order for j in again[::-1]] == [j.order for j in judgements]
    other = judge(tmp_path, simulated(), critic, items, order="seeded", seed=4)
    assert [j.order for j in other] != [j.order for j in judgements]


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("misbehaviour", ["failure", "rate_limit", "empty", "refusal", "garbage"])
def test_no_failure_becomes_a_preference(tmp_path, critic: str, misbehaviour: str) -> None:
    items = planted(150)
    endpoint = simulated(max_attempts=1, **{f"{misbehaviour}_rate": 0.1})
    job = JudgeJob(endpoint=endpoint, critic=critic, comparisons=tuple(items))
    status, final, parts = run_job(tmp_path, job)
    expected = {"refusal": "refused", "garbage": "unparsable"}.get(misbehaviour, "failed")
    assert set(status.counts) == {"ok", expected}
    # About 1 - 0.9**2 of the comparisons lose one of their two orders; 1 - 0.9**4 where an order takes two calls.
    assert 10 < status.counts[expected] < (60 if load_critic(critic).calls_per_order == 1 else 80)
    by_id = {item.id: item for item in items}
    for row in final + parts:
        if row["status"] == "ok":
            assert (row["p_b"] > 0.5) == (truth(by_id[row["comparison_id"]]) == 1.0)
        else:
            assert row["status"] == expected
            assert row["p_b"] is None
            assert row["reason"]
    preferences, counts = to_preferences(items, judge(tmp_path / "new", endpoint, critic, items))
    assert counts["preferences"] == counts["ok"] == len(preferences)
    assert all(p.chosen.meta["quality"] > p.rejected.meta["quality"] for p in preferences)


def test_retries_recover_what_can_be_recovered(tmp_path) -> None:
    endpoint = simulated(max_attempts=12, failure_rate=0.2, rate_limit_rate=0.2, empty_rate=0.1)
    judgements = judge(tmp_path, endpoint, "ab_logprob", planted(100))
    assert {j.status for j in judgements} == {Status.OK}


def test_failures_are_asked_again_by_the_next_job_and_answers_are_not(tmp_path) -> None:
    items = tuple(planted(80))
    job = JudgeJob(
        endpoint=simulated(max_attempts=1, failure_rate=0.3), critic="laif_basic", comparisons=items
    )
    first, *_ = run_job(tmp_path, job)
    assert first.calls == 160
    assert first.counts["failed"] > 10
    second, *_ = run_job(tmp_path, job)
    assert second.calls + second.cached == 160
    assert second.calls < 80
    assert second.counts["failed"] < first.counts["failed"]
    for _ in range(8):
        last, *_ = run_job(tmp_path, job)
    assert last.counts == {"ok": 80}
    done, *_ = run_job(tmp_path, job)
    assert (done.calls, done.cached) == (0, 160)


def test_answers_do_not_depend_on_order_concurrency_or_company(tmp_path) -> None:
    items = planted(60)
    spec = {"accuracy": 0.7, "tie_rate": 0.1, "position_bias": 2.0, "garbage_rate": 0.1, "failure_rate": 0.2}

    def labels(name: str, some: list[Comparison], concurrency: int) -> dict[str, tuple]:
        endpoint = simulated(concurrency=concurrency, **spec)
        return {j.comparison_id: (j.id, j.p_b) for j in judge(tmp_path / name, endpoint, "ab_logprob", some)}

    reference = labels("one", items, 8)
    assert labels("two", items[::-1], 300) == reference
    alone = labels("three", items[7:9], 1)
    assert alone == {key: reference[key] for key in alone}
    assert len({p for _, p in reference.values()}) > 2


@pytest.mark.parametrize("critic", ["ab_logprob", "laif_basic"])
def test_accuracy_is_what_was_asked_for_and_noise_agrees_between_the_orders(tmp_path, critic: str) -> None:
    items = planted(1500)
    judgements = judge(tmp_path, simulated(accuracy=0.8), critic, items)
    right = statistics.mean((j.p_b > 0.5) == (truth(item) == 1.0) for item, j in zip(items, judgements))
    assert abs(right - 0.8) < 4 * (0.8 * 0.2 / 1500) ** 0.5
    assert {j.status for j in judgements} == {Status.OK}
    assert all(j.meta["p_ab"] == pytest.approx(j.meta["p_ba"]) for j in judgements)


def test_sharpness_and_position_bias_are_logits(tmp_path) -> None:
    import math

    (only,) = judge(
        tmp_path, simulated(sharpness=1.5, position_bias=0.5), "ab_logprob", [comparison(1, 0.1, 0.9)]
    )
    # b is better. Shown second, the bias is against it; shown first, for it.
    assert only.meta["p_ab"] == pytest.approx(1 / (1 + math.exp(-1.0)))
    assert only.meta["p_ba"] == pytest.approx(1 / (1 + math.exp(-2.0)))
    assert only.p_b == pytest.approx((only.meta["p_ab"] + only.meta["p_ba"]) / 2)


def test_a_biased_judge_is_a_coin_in_one_order_and_a_tie_in_both(tmp_path) -> None:
    items = planted(40)
    endpoint = simulated(position_bias=100.0)
    both = judge(tmp_path, endpoint, "laif_basic", items)
    assert {j.status for j in both} == {Status.TIE}
    seeded = judge(tmp_path, endpoint, "laif_basic", items, order="seeded")
    assert all(j.p_b == (0.0 if j.order == "ab" else 1.0) for j in seeded)


def test_length_bias_survives_averaging(tmp_path) -> None:
    items = [comparison(i, 0.5, 0.5, pad_b=60) for i in range(20)]
    judgements = judge(tmp_path, simulated(length_bias=3.0), "ab_logprob", items)
    assert all(j.p_b > 0.7 for j in judgements)


@pytest.mark.parametrize("critic", CRITICS)
def test_equal_quality_is_a_tie(tmp_path, critic: str) -> None:
    items = [comparison(i, 0.5, 0.5) for i in range(30)]
    judgements = judge(tmp_path, simulated(), critic, items)
    assert {j.status for j in judgements} == {Status.TIE}
    rates = judge(tmp_path, simulated(tie_rate=0.5), critic, planted(200))
    assert 60 < sum(j.status is Status.TIE for j in rates) < 140


@pytest.mark.parametrize("order", ["both", "seeded"])
def test_identical_outputs_are_a_tie_without_a_call(tmp_path, order: str) -> None:
    prompt = Prompt.from_text("Say hi.")
    a, b = (Completion(prompt_id=prompt.id, generator=name, text="hi") for name in "ab")
    job = JudgeJob(
        endpoint=simulated(failure_rate=1.0),
        critic="laif_basic",
        comparisons=(Comparison(prompt=prompt, a=a, b=b),),
        order=order,
    )
    status, final, _ = run_job(tmp_path, job)
    assert (status.calls, status.counts) == (0, {"tie": 1})
    assert final[0]["p_b"] == 0.5
    assert "identical" in final[0]["reason"]


def test_the_planted_world_says_when_quality_is_missing(tmp_path) -> None:
    prompt = Prompt.from_text("Say hi.")
    a, b = (Completion(prompt_id=prompt.id, generator=name, text=name) for name in "ab")
    (only,) = judge(tmp_path, simulated(), "laif_basic", [Comparison(prompt=prompt, a=a, b=b)])
    assert only.status is Status.FAILED
    assert "meta.quality" in only.reason


def test_symbols_teacher_and_critic(tmp_path) -> None:
    prompts = symbols.make_prompts(SymbolsSpec(), 40, 0)

    def teacher(skill: float) -> list[Completion]:
        endpoint = Endpoint(provider="simulated", simulated=SimulatedSpec(skill=skill))
        job = CompleteJob(endpoint=endpoint, prompts=tuple(prompts), generator=f"skill{skill}", n=2)
        status, final, _ = run_job(tmp_path, job)
        assert status.counts == {"ok": 80}
        return [Completion.from_row(row) for row in final]

    strong, weak = teacher(1.0), teacher(0.1)
    pairs = [(prompts[i // 2], strong[i], weak[i]) for i in range(80)]
    assert all(symbols.quality(prompt.instruction, good.text) == 1.0 for prompt, good, _ in pairs)
    assert [c.sample_index for c in strong[:4]] == [0, 1, 0, 1]
    items = [Comparison(prompt=prompt, a=good, b=bad) for prompt, good, bad in pairs if good.text != bad.text]
    assert len(items) > 40
    endpoint = Endpoint(provider="simulated", simulated=SimulatedSpec())
    assert all(j.p_b < 0.5 for j in judge(tmp_path, endpoint, "laif_basic", items))


def test_a_prompt_of_another_world_is_a_failure_that_says_so(tmp_path) -> None:
    endpoint = Endpoint(provider="simulated", simulated=SimulatedSpec())
    (only,) = judge(tmp_path, endpoint, "laif_basic", [comparison(1, 0.1, 0.9)])
    assert only.status is Status.FAILED
    assert "symbols" in only.reason


def test_planted_teachers_write_what_planted_critics_read(tmp_path) -> None:
    prompts = tuple(Prompt.from_text(f"Question {i}") for i in range(10))

    def teacher(skill: float) -> list[Completion]:
        job = CompleteJob(endpoint=simulated(skill=skill), prompts=prompts, generator="t")
        return [Completion.from_row(row) for row in run_job(tmp_path, job)[1]]

    items = [Comparison(prompt=p, a=a, b=b) for p, a, b in zip(prompts, teacher(0.2), teacher(0.9))]
    assert all(j.p_b > 0.5 for j in judge(tmp_path, simulated(), "pairwise_json", items))


def test_a_refused_completion_is_a_failure_not_a_text(tmp_path) -> None:
    prompts = tuple(Prompt.from_text(f"Question {i}") for i in range(5))
    job = CompleteJob(endpoint=simulated(refusal_rate=1.0), prompts=prompts, generator="t")
    status, final, _ = run_job(tmp_path, job)
    assert status.counts == {"refused": 5}
    assert all("text" not in row and row["reason"] for row in final)
