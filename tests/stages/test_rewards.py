"""A critic's ratings as rewards: what is rated, what is late, a critic that dies and comes back."""

import json
import time

import numpy as np
import pytest

from laif_jax.config import RewardSource
from laif_jax.parallel import distributed
from laif_jax.records import Completion, Prompt
from laif_jax.stages import patience, rewards
from laif_jax.stages.artifact import StageError
from laif_jax.worlds import symbols
from tests.labeling.helpers import Reply, chat, fake_endpoint
from tests.studies import tiny


def context(make, endpoint: dict, critic: str = "rating_1_10"):
    """A context with one more critic, `rater`, at `endpoint`."""
    endpoints = {**tiny.TREE["endpoints"], "judge": endpoint}
    critics = {**tiny.TREE["critics"], "rater": {"endpoint": "judge", "critic": critic}}
    return make(endpoints=endpoints, critics=critics)


def fake(server, **rest) -> dict:
    return {
        "provider": "openai",
        "model": "fake",
        "base_url": server.url,
        "max_attempts": 1,
        "concurrency": 4,
        "timeout": 20.0,
        **rest,
    }


def rows(count: int, start: int = 0) -> tuple[list[Prompt], list[Completion]]:
    prompts = [
        Prompt.from_text(f"rev:{chr(97 + (start + i) // 26)}{chr(97 + (start + i) % 26)}b")
        for i in range(count)
    ]
    texts = [symbols.solve(p.instruction) if i % 2 else "zzzz" for i, p in enumerate(prompts)]
    return prompts, [Completion(prompt_id=p.id, generator="policy", text=t) for p, t in zip(prompts, texts)]


def source(max_wait: float = 20.0) -> RewardSource:
    return RewardSource(critic="rater", max_wait=max_wait)


def eight(hang: float = 0.0) -> Reply:
    return Reply(body=chat("8.", top={"8": -0.1, "9": -3.0}), hang=hang)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(patience, "PAUSE_FIRST", 0.05)


def test_planted_quality_becomes_a_reward_between_minus_one_and_one(make):
    judge = {
        "provider": "simulated",
        "simulated": {"world": "symbols", "seed": 7},
        "prompt_price": 10.0,
        "completion_price": 30.0,
    }
    reward = rewards.critic_reward(context(make, judge), source())
    prompts, completions = rows(10)
    scores, ok = reward(prompts, completions)
    assert scores.dtype == np.float32
    assert ok.dtype == bool
    assert ok.all()
    np.testing.assert_allclose(scores[1::2], 1.0, atol=0.05)
    np.testing.assert_allclose(scores[::2], -1.0, atol=0.05)
    first = dict(reward.metrics)
    assert first["objective/ratings_ok"] == 1.0
    assert first["objective/ratings_score"] == pytest.approx(5.5, abs=0.05)
    assert first["objective/ratings_mass"] == pytest.approx(0.99)
    used = 10 * first["objective/ratings_prompt_tokens"] + 30 * first["objective/ratings_completion_tokens"]
    assert first["objective/ratings_cost"] == pytest.approx(used / 1e6)
    assert used > 0
    # Asked again: the same rewards, and nothing more is paid.
    again, _ = reward(prompts, completions)
    np.testing.assert_array_equal(again, scores)
    assert reward.metrics["objective/ratings_cost"] == 0.0


def test_equal_texts_are_paid_once(make):
    with fake_endpoint(lambda number, request: eight()) as server:
        reward = rewards.critic_reward(
            context(make, fake(server, prompt_price=1.0, completion_price=1.0)), source()
        )
        prompts, completions = rows(1)
        twice = [completions[0], completions[0].model_copy(update={"sample_index": 1, "id": "twin"})]
        scores, ok = reward(prompts * 2, twice)
        assert ok.all()
        assert scores[0] == scores[1] > 0.5
        assert sum(server.calls.values()) == 1
        assert reward.metrics["objective/ratings_prompt_tokens"] == 11


def test_the_step_does_not_wait_for_what_is_late_and_late_answers_are_used_later(make):
    with fake_endpoint(lambda number, request: eight(hang=60.0 if number % 2 else 0.0)) as server:
        reward = rewards.critic_reward(context(make, fake(server, concurrency=12)), source(max_wait=1.5))
        prompts, completions = rows(12)
        start = time.monotonic()
        scores, ok = reward(prompts, completions)
        assert time.monotonic() - start < 6.0
        assert ok.sum() == 6
        assert (scores[~ok] == 0).all()
        assert (scores[ok] > 0.5).all()
        assert reward.metrics["objective/ratings_late"] == 0.5
        server.release.set()
        time.sleep(0.5)
        _, ok = reward(prompts, completions)
        assert ok.all()
        assert sum(server.calls.values()) == 12


def test_a_critic_that_dies_is_waited_for_and_asked_only_for_the_rest(make):
    """Three calls are answered; then it is down, for nine calls; then it comes back."""
    paid = []

    def reply(number: int, request: dict) -> Reply:
        if 3 <= number < 12:
            return Reply(status=503, body={})
        paid.append(request["messages"][-1]["content"])
        return eight()

    with fake_endpoint(reply) as server:
        reward = rewards.critic_reward(context(make, fake(server, concurrency=8)), source(max_wait=30.0))
        _, ok = reward(*rows(10))
        assert ok.all()
        assert len(paid) == len(set(paid)) == 10
        assert sum(server.calls.values()) == 19


def test_a_critic_that_dies_late_in_an_iteration_gives_what_it_rated(make):
    with fake_endpoint(lambda n, _: eight() if n < 9 else Reply(status=503, body={})) as server:
        reward = rewards.critic_reward(context(make, fake(server, concurrency=1)), source(max_wait=20.0))
        start = time.monotonic()
        _, ok = reward(*rows(10))
        assert time.monotonic() - start < 10.0  # 9 of 10 are `labeling.min_coverage`
        assert ok.sum() == 9
        assert reward.metrics["objective/ratings_failed"] == 0.1


def test_a_critic_that_stays_dead_ends_the_run_after_max_wait_with_what_to_do(make):
    with fake_endpoint(lambda n, _: Reply(status=503, body={})) as server:
        reward = rewards.critic_reward(context(make, fake(server)), source(max_wait=1.0))
        start = time.monotonic()
        with pytest.raises(
            StageError, match=r"(?s)rated none of 4 completions.*503.*`judge`.*same command again"
        ):
            reward(*rows(4))
        assert 0.9 < time.monotonic() - start < 6.0


@pytest.mark.parametrize(
    ("reply", "says"),
    [(Reply(status=401, body={}), "key"), (Reply(body=chat("I cannot help with that.")), "log-probs")],
)
def test_nobody_waits_for_what_does_not_pass(make, reply, says):
    with fake_endpoint(lambda n, _: reply) as server:
        reward = rewards.critic_reward(context(make, fake(server)), source(max_wait=300.0))
        start = time.monotonic()
        with pytest.raises(StageError, match=says):
            reward(*rows(3))
        assert time.monotonic() - start < 30.0


def test_unreadable_and_refused_answers_are_not_ok_and_no_number(make):
    def reply(number: int, request: dict) -> Reply:
        words = ["8.", "Sorry, I cannot rate this.", "A fine answer!", "I give it 7"]
        return Reply(body=chat(words[number % 4]))

    with fake_endpoint(reply) as server:
        ctx = context(make, fake(server, concurrency=1), "rating_1_10_text")
        reward = rewards.critic_reward(ctx, source())
        scores, ok = reward(*rows(4))
        assert ok.tolist() == [True, False, False, True]
        np.testing.assert_allclose(scores, [2.5 / 4.5, 0, 0, 1.5 / 4.5], rtol=1e-6)
        assert reward.metrics["objective/ratings_refused"] == 0.25
        assert reward.metrics["objective/ratings_unparsable"] == 0.25
        assert "objective/ratings_mass" not in reward.metrics


def test_a_critic_that_compares_cannot_be_a_reward(make):
    ctx = context(make, {"provider": "simulated", "simulated": {}}, "ab_logprob")
    with pytest.raises(StageError, match=r"critics\.rater.*rating_1_10"):
        rewards.critic_reward(ctx, source())


def test_rows_must_be_pairs_and_none_is_none(make):
    reward = rewards.critic_reward(context(make, {"provider": "simulated", "simulated": {}}), source())
    prompts, completions = rows(2)
    with pytest.raises(ValueError, match="1 prompts for 2"):
        reward(prompts[:1], completions)
    scores, ok = reward([], [])
    assert len(scores) == len(ok) == 0


def test_beside_process_0_nobody_talks_to_the_service(make, monkeypatch):
    """The others get process 0's answer, in float32 the same."""
    ctx = context(make, {"provider": "simulated", "simulated": {}})
    reward = rewards.critic_reward(ctx, source())
    answer = {"rewards": [0.1, None, -1.0], "metrics": {"objective/ratings_ok": 2 / 3}}
    monkeypatch.setattr(distributed, "from_main", lambda make: json.loads(json.dumps(answer)))
    monkeypatch.setattr(type(ctx.services), "endpoint", None)
    scores, ok = reward(*rows(3))
    np.testing.assert_array_equal(scores, np.array([0.1, 0.0, -1.0], np.float32))
    assert ok.tolist() == [True, False, True]
    assert reward.metrics == answer["metrics"]
