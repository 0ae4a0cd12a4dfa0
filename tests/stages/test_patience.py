"""A critic that dies in mid-run: the stage waits, goes on where it was, or ends with everything saved."""

import time

import pytest

from laif_jax.config import CriticSpec
from laif_jax.records import Comparison, Completion, Prompt, Status
from laif_jax.stages import label, patience
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
