"""A critic or teacher that dies in mid-run: the stage waits, goes on where it was, or ends with everything saved."""

import time

import pytest

from laif_jax.config import CriticSpec
from laif_jax.records import Comparison, Completion, Prompt, Status
from laif_jax.stages import label, patience, prompts, teach
from laif_jax.stages.artifact import StageError
from tests.labeling.helpers import Reply, chat, fake_endpoint
from tests.studies import tiny


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(patience, "PAUSE_FIRST", 0.05)
    monkeypatch.setattr(patience, "PAUSE_MOST", 0.2)


def comparisons(count: int) -> list[Comparison]:
    prompts = [Prompt.from_text(f"question {i}") for i in range(count)]
    sides = [[Completion(prompt_id=p.id, generator=g, text=g + p.instruction) for g in "xy"] for p in prompts]
    return [Comparison(prompt=p, a=a, b=b) for p, (a, b) in zip(prompts, sides)]


def judge(make, server, max_wait: float, count: int = 8, **labeling):
    address = {"provider": "openai", "model": "fake", "base_url": server.url, "max_attempts": 1}
    ctx = make(
        endpoints={**tiny.TREE["endpoints"], "judge": address},
        labeling={"poll": 0.02, "max_wait": max_wait, **labeling},
    )
    critic = CriticSpec(endpoint="judge", critic="ab_logprob", order="seeded")
    return label.judge(ctx, critic, comparisons(count))


def verdict() -> Reply:
    return Reply(body=chat("A", top={"A": -0.1, "B": -2.4}))


def test_a_critic_that_comes_back_is_asked_for_the_rest_only(make):
    paid = []

    def reply(number: int, request: dict) -> Reply:
        if 3 <= number < 10:
            return Reply(status=503, body={})
        paid.append(request["messages"][-1]["content"])
        return verdict()

    with fake_endpoint(reply) as server:
        found = judge(make, server, max_wait=30.0)
    assert {judgement.status for judgement in found} == {Status.OK}
    assert len(paid) == len(set(paid)) == 8


def test_one_that_stays_away_is_waited_for_as_long_as_asked(make):
    with fake_endpoint(lambda number, request: Reply(status=503, body={})) as server:
        start = time.monotonic()
        found = judge(make, server, max_wait=1.0)
        assert 0.9 < time.monotonic() - start < 8.0
        assert {judgement.status for judgement in found} == {Status.FAILED}
        assert all(judgement.meta["passing"] for judgement in found)


@pytest.mark.parametrize(
    "reply", [Reply(status=401, body={}), Reply(status=400, body={}), Reply(body=chat("A"))]
)
def test_nobody_waits_for_what_does_not_pass(make, reply):
    with fake_endpoint(lambda number, request: reply) as server:
        start = time.monotonic()
        found = judge(make, server, max_wait=300.0)
        assert time.monotonic() - start < 20.0
        assert {judgement.status for judgement in found} == {Status.FAILED}


def test_enough_is_not_waited_past(make):
    with fake_endpoint(lambda n, _: verdict() if n < 6 else Reply(status=503, body={})) as server:
        start = time.monotonic()
        found = judge(make, server, max_wait=300.0, min_coverage=0.75)
        assert time.monotonic() - start < 20.0
        assert sum(judgement.p_b is not None for judgement in found) == 6


# ---- teachers ----------------------------------------------------------------------------------------------------


def taught(make, server, max_wait: float, rows: int = 8, teacher: dict | None = None, **labeling):
    """The completions of a teacher at `server`, through the stage."""
    address = {"provider": "openai", "model": "fake", "base_url": server.url, "max_attempts": 1}
    ctx = make(
        endpoints={**tiny.TREE["endpoints"], "away": address},
        teachers={**tiny.TREE["teachers"], "away": {"endpoint": "away", **(teacher or {})}},
        labeling={"poll": 0.02, "max_wait": max_wait, **labeling},
    )
    return teach.read(teach.run(ctx, prompts.run(ctx), teacher="away", split="train", stop=rows))


def test_a_teacher_that_comes_back_is_asked_for_the_rest_only(make):
    paid = []

    def reply(number: int, request: dict) -> Reply:
        if 3 <= number < 12:
            return Reply(status=503, body={})
        paid.append(request["messages"][-1]["content"])
        return Reply(body=chat(f"answer {number}"))

    with fake_endpoint(reply) as server:
        found = taught(make, server, max_wait=30.0)
    assert len(found) == 8
    assert len(paid) == len(set(paid)) == 8


def test_a_dead_teacher_may_be_started_again_while_the_stage_waits(make):
    """Every connection breaks at first, as when the machine of the teacher goes down and comes back."""

    def reply(number: int, request: dict) -> Reply:
        return Reply(cut=True, body={}) if number < 12 else Reply(body=chat("here again"))

    with fake_endpoint(reply) as server:
        found = taught(make, server, max_wait=60.0)
    assert {completion.text for completion in found} == {"here again"}
    assert len(found) == 8


def test_a_teacher_that_stays_away_is_waited_for_as_long_as_asked(make):
    with fake_endpoint(lambda number, request: Reply(status=503, body={})) as server:
        start = time.monotonic()
        with pytest.raises(StageError, match=r"(?s)0 of 8 prompts.*run again"):
            taught(make, server, max_wait=1.0)
        assert time.monotonic() - start > 0.9
        assert sum(server.calls.values()) > 8


@pytest.mark.parametrize("status", [400, 401])
def test_nobody_waits_for_a_teacher_that_refuses(make, status):
    with fake_endpoint(lambda number, request: Reply(status=status, body={})) as server:
        with pytest.raises(StageError, match="0 of 8 prompts"):
            taught(make, server, max_wait=10_000.0)
        assert sum(server.calls.values()) <= 8


def test_revisions_wait_too(make):
    """Eight answers, and then the teacher is away for a while in the middle of revising them."""

    def reply(number: int, request: dict) -> Reply:
        return Reply(status=503, body={}) if 11 <= number < 16 else Reply(body=chat(f"text {number}"))

    with fake_endpoint(reply) as server:
        found = taught(make, server, max_wait=30.0, teacher={"revisions": 1})
    assert len(found) == 8
    assert all(len(completion.meta["steps"]) == 1 for completion in found)
