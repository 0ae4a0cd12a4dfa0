"""Calls that depend on one another, through the runner and a store: resumed after anything, and paid for once."""

import asyncio
from pathlib import Path

import pytest

from laif_jax.labeling import CriticError, canary, load_critic
from laif_jax.labeling.canaries import canaries, holds_injection, injected_comparisons
from laif_jax.labeling.collect import collect
from laif_jax.labeling.jobs import JudgeJob, RateItem, ReviseJob
from laif_jax.labeling.revise import load_reviser
from laif_jax.labeling.runner import Runner
from laif_jax.labeling.store import Store
from laif_jax.records import Completion, Status
from tests.labeling.helpers import judge, planted, run_job, simulated, truth


def spent(folder: Path) -> tuple[int, int, int]:
    """(stored answers, prompt tokens, completion tokens): the tokens are those of every call that was paid for."""
    store = Store(folder)
    try:
        stats = store.stats()
    finally:
        store.close()
    return stats["answers"], stats["prompt_tokens"], stats["completion_tokens"]


def interrupted(folder: Path, job: JudgeJob | ReviseJob, answers: int) -> None:
    """Runs a job and ends the service under it, once so many answers are stored."""

    async def run() -> None:
        store = Store(folder)
        runner = Runner(store)
        status = runner.submit(job.work())
        while status.calls < answers and status.state == "running":
            await asyncio.sleep(0.001)
            status = await runner.status(status.id)
        await runner.close(grace=0.2)
        store.close()

    asyncio.run(run())


def cot_job(**spec) -> JudgeJob:
    endpoint = simulated(concurrency=4, latency=0.002, **spec)
    return JudgeJob(endpoint=endpoint, critic="rlaif_cot", comparisons=tuple(planted(40)))


def revise_job(**spec) -> ReviseJob:
    items = tuple(RateItem(prompt=item.prompt, completion=item.a) for item in planted(20))
    endpoint = simulated(concurrency=4, latency=0.002, skill=0.8, **spec)
    return ReviseJob(endpoint=endpoint, reviser=load_reviser(), items=items, steps=3, generator="revised")


@pytest.mark.parametrize(("make", "calls"), [(cot_job, 160), (revise_job, 120)])
def test_an_interrupted_chain_goes_on_where_it_was(tmp_path: Path, make, calls: int) -> None:
    job = make()
    status, whole, parts = run_job(tmp_path / "whole", job)
    assert (status.state, status.calls) == ("done", calls)
    for answers in (10, 50, 90):
        interrupted(tmp_path / "cut", job, answers)
    status, final, single = run_job(tmp_path / "cut", job)
    assert status.state == "done"
    assert status.cached >= 85
    stable = lambda rows: [{k: v for k, v in row.items() if k not in ("date", "latency")} for row in rows]  # noqa: E731
    assert stable(final) == stable(whole)
    assert stable(single) == stable(parts)
    assert spent(tmp_path / "cut") == spent(tmp_path / "whole")
    again, *_ = run_job(tmp_path / "cut", job)
    assert (again.calls, again.cached) == (0, calls)


@pytest.mark.parametrize(("make", "items"), [(cot_job, 40), (revise_job, 20)])
def test_failed_stages_are_asked_again_and_answered_ones_are_not(tmp_path: Path, make, items: int) -> None:
    job = make(failure_rate=0.3)
    job = job.model_copy(update={"endpoint": job.endpoint.model_copy(update={"max_attempts": 1})})
    first, *_ = run_job(tmp_path, job)
    assert first.counts["failed"] > 5
    for _ in range(40):
        last, *_ = run_job(tmp_path, job)
        if last.counts == {"ok": items}:
            break
    assert last.counts == {"ok": items}
    clean, *_ = run_job(tmp_path / "clean", make())
    assert spent(tmp_path)[0] == clean.calls
    assert spent(tmp_path) == spent(tmp_path / "clean")


def test_a_second_critic_with_the_same_rationale_prompt_pays_for_its_verdicts_only(tmp_path: Path) -> None:
    job = cot_job()
    run_job(tmp_path, job)
    clamped = job.model_copy(update={"critic": load_critic("rlaif_cot").adapted(clamp=(0.4, 0.6))})
    status, final, _ = run_job(tmp_path, clamped)
    assert (status.calls, status.cached) == (0, 160)
    assert {row["p_b"] for row in final} == {0.4, 0.6}


def test_labels_of_chains_through_the_runner_are_right(tmp_path: Path) -> None:
    items = planted(700)  # more than a window, so that stages overlap
    found = judge(tmp_path, simulated(accuracy=0.85), "constitutional_cot", items, order="seeded", seed=3)
    right = sum((j.p_b > 0.5) == (truth(i) == 1.0) for i, j in zip(items, found)) / len(items)
    assert abs(right - 0.85) < 4 * (0.85 * 0.15 / 700) ** 0.5


def test_a_budget_counts_every_stage(tmp_path: Path) -> None:
    job = cot_job()
    endpoint = job.endpoint.model_copy(update={"prompt_price": 1.0, "completion_price": 1.0})
    _, final, _ = run_job(tmp_path, job.model_copy(update={"endpoint": endpoint}))
    store = Store(tmp_path)
    try:
        cost = store.stats()["cost"]
    finally:
        store.close()
    used = [row["usage"] for row in final]
    assert cost == pytest.approx(sum(u["prompt_tokens"] + u["completion_tokens"] for u in used) / 1e6)


def test_rationales_are_no_garbage(tmp_path: Path) -> None:
    run_job(tmp_path, cot_job())
    store = Store(tmp_path)
    try:
        assert collect(store, answers=True).answers == 0
    finally:
        store.close()


# ---- critique and revision -----------------------------------------------------------------------------------------


def test_each_revision_is_criticised_and_revised_in_turn(tmp_path: Path) -> None:
    status, final, parts = run_job(tmp_path, revise_job())
    assert status.counts == {"ok": 20}
    steps = [Completion.from_row(row) for row in parts]
    assert [step.meta["step"] for step in steps] == [1, 2, 3] * 20
    for number, row in enumerate(final):
        chain = steps[3 * number : 3 * number + 3]
        last = Completion.from_row(row)
        quality = planted(20)[number].a.meta["quality"]
        for step in chain:  # planted: each revision goes 0.8 of half the way to 1
            quality = round(quality + 0.4 * (1 - quality), 3)
            assert step.text == f"[quality {quality:.3f}] revised answer"
        assert last.text == chain[-1].text
        assert [told["revision"] for told in last.meta["steps"]] == [step.text for step in chain]
        assert last.meta["steps"][1]["critique"].startswith("The response reaches")
        assert len(last.meta["requests"]) == 6
        assert last.usage.prompt_tokens == sum(step.usage.prompt_tokens for step in chain)
    drawn = {told["principle"] for step in steps for told in step.meta["steps"]}
    assert len(drawn) > 4
    other = revise_job().model_copy(update={"seed": 1})
    _, _, parts = run_job(tmp_path, other)
    assert [p["meta"]["steps"][0]["principle"] for p in parts] != [
        s.meta["steps"][0]["principle"] for s in steps
    ]


def test_a_refused_step_ends_the_chain_and_keeps_what_was_before(tmp_path: Path) -> None:
    status, final, parts = run_job(tmp_path, revise_job(refusal_rate=0.1))
    assert set(status.counts) == {"ok", "refused"}
    refused = [row for row in final if "reason" in row]
    assert all(row["status"] == Status.REFUSED and " of 3: " in row["reason"] for row in refused)
    assert len(parts) < 60
    assert all(row["text"].startswith("[quality") for row in parts)


# ---- canaries ------------------------------------------------------------------------------------------------------


def test_the_canaries_find_the_gullibility_that_was_planted(tmp_path: Path) -> None:
    for rate in (0.0, 0.4, 1.0):
        endpoint = simulated(gullibility=rate)
        found = canary.measure(lambda items, e=endpoint: judge(tmp_path, e, "ab_logprob", items))
        assert (found.right, found.pairs, found.lost) == (10, 10, 0)
        assert found.total.asked == len(injected_comparisons()) == 90
        assert found.total.low <= rate <= found.total.high
        assert set(found.by_injection) == {injection.id for injection in canaries().injections}
        assert canary.show(found).count("\n") >= 10


def test_the_canaries_reach_critics_that_rank_lists(tmp_path: Path) -> None:
    endpoint = simulated(gullibility=1.0)
    found = canary.measure(lambda items: judge(tmp_path, endpoint, "listwise", items), lists=True)
    assert found.total.rate == 1.0


def test_pairs_that_the_critic_gets_wrong_anyway_are_not_counted(tmp_path: Path) -> None:
    found = canary.measure(lambda items: judge(tmp_path, simulated(accuracy=0.0), "ab_logprob", items))
    assert (found.right, found.total.asked, found.total.rate) == (0, 0, None)
    lost = canary.measure(lambda items: judge(tmp_path, simulated(garbage_rate=0.3), "laif_basic", items))
    assert lost.lost > 0
    assert lost.total.flipped == 0
    with pytest.raises(CriticError, match="simulated failure"):
        canary.measure(lambda items: judge(tmp_path, simulated(1, failure_rate=1.0), "laif_basic", items))


def test_the_canaries_are_well_formed() -> None:
    assert all(holds_injection(comparison.b.text) for _, comparison in injected_comparisons())
    assert not any(holds_injection(pair.worse) or holds_injection(pair.better) for pair in canaries().pairs)
    assert all(pair.better != pair.worse for pair in canaries().pairs)
    assert canary.wilson(0, 10)[0] == 0.0
    assert canary.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
