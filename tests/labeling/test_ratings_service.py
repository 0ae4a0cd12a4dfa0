"""Ratings through the service: planted truth comes back, failures are states, deadlines hold, nothing is paid twice."""

import math
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from laif_jax.config.schema import SimulatedSpec, SymbolsSpec
from laif_jax.labeling import CriticError, LabelServiceError, start_service
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.critic import shipped_critics
from laif_jax.labeling.jobs import RateItem, RateJob
from laif_jax.records import Completion, Prompt, Rating, Status
from laif_jax.worlds import symbols
from tests.labeling.helpers import Reply, at, chat, fake_endpoint, run_job, simulated

CRITICS = shipped_critics("rating")
Item = tuple[Prompt, Completion]


def item(number: int, quality: float, pad: int = 0) -> Item:
    prompt = Prompt.from_text(f"Question {number}")
    text = f"answer {number}" + "." * pad
    return prompt, Completion(prompt_id=prompt.id, generator="g", text=text, meta={"quality": quality})


def spread(count: int) -> list[Item]:
    """Completions whose planted qualities are spread over [0, 1]."""
    return [item(i, i / (count - 1)) for i in range(count)]


def score(rating: Rating | None) -> float:
    assert rating is not None
    assert rating.score is not None
    return rating.score


def rate(folder, endpoint: Endpoint, critic: str, items: Sequence[Item]) -> list[Rating]:
    parts = tuple(RateItem(prompt=prompt, completion=completion) for prompt, completion in items)
    status, final, _ = run_job(folder, RateJob(endpoint=endpoint, critic=critic, items=parts))
    assert status.state == "done", status.reason
    assert status.done == len(items)
    return [Rating.from_row(row) for row in final]


# ---- planted truth -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", CRITICS)
def test_an_oracles_scores_are_the_planted_ones(tmp_path, critic: str) -> None:
    items = spread(37)
    ratings = rate(tmp_path, simulated(), critic, items)
    assert [r.completion_id for r in ratings] == [completion.id for _, completion in items]
    assert {r.status for r in ratings} == {Status.OK}
    for (_, completion), rating in zip(items, ratings):
        # Sharpness 4: a bell of standard deviation 1/2; the scale's ends cut off half of it. Text: rounded.
        assert rating.score == pytest.approx(1 + 9 * completion.meta["quality"], abs=0.51)
        assert rating.reward == pytest.approx((score(rating) - 5.5) / 4.5)
        assert -1 <= (rating.reward or 0) <= 1
    scores = [score(r) for r in ratings]
    assert scores == sorted(scores)
    soft = [r for r in ratings if r.p is not None]
    assert bool(soft) == (critic == "rating_1_10")
    assert all(r.mass == pytest.approx(0.99) and r.ambiguous == 0.0 for r in soft)


def test_sharpness_is_the_inverse_of_the_variance(tmp_path) -> None:
    for sharpness in (1.0, 4.0):
        (rating,) = rate(tmp_path, simulated(sharpness=sharpness), "rating_1_10", [item(1, 0.5)])
        assert rating.p is not None
        mean = math.fsum(i * p for i, p in enumerate(rating.p, 1))
        variance = math.fsum((i - mean) ** 2 * p for i, p in enumerate(rating.p, 1))
        assert mean == pytest.approx(5.5, abs=0.01)
        assert variance == pytest.approx(1 / sharpness, rel=0.15)


@pytest.mark.parametrize("critic", CRITICS)
def test_accuracy_is_the_share_of_scores_that_are_not_turned_round(tmp_path, critic: str) -> None:
    items = [item(i, 0.9) for i in range(1500)]
    ratings = rate(tmp_path, simulated(accuracy=0.8), critic, items)
    right = statistics.mean(score(r) > 5.5 for r in ratings)
    assert abs(right - 0.8) < 4 * (0.8 * 0.2 / 1500) ** 0.5
    assert {round(score(r)) for r in ratings} == {2, 9}


def test_length_bias_moves_the_score_by_what_is_documented(tmp_path) -> None:
    short, long = item(1, 0.5), item(1, 0.5, pad=192)
    ratings = rate(tmp_path, simulated(length_bias=8.0), "rating_1_10", [short, long])
    for (_, completion), rating in zip((short, long), ratings):
        length = len(completion.text)
        assert rating.score == pytest.approx(5.5 + 8.0 / 4.0 * length / (length + 50), abs=0.03)
    assert score(ratings[1]) - score(ratings[0]) > 1.2


def test_the_world_symbols_knows_how_good_an_answer_is(tmp_path) -> None:
    prompts = symbols.make_prompts(SymbolsSpec(), 30, 0)
    items = []
    for number, prompt in enumerate(prompts):
        right = symbols.solve(prompt.instruction)
        text = (right, right[:-1] + "z", "z" * 20, "")[number % 4]
        items.append((prompt, Completion(prompt_id=prompt.id, generator="g", text=text)))
    endpoint = Endpoint(provider="simulated", simulated=SimulatedSpec())
    for (prompt, completion), rating in zip(items, rate(tmp_path, endpoint, "rating_1_10", items)):
        quality = symbols.quality(prompt.instruction, completion.text)
        assert rating.score == pytest.approx(1 + 9 * quality, abs=0.2)


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("misbehaviour", ["failure", "rate_limit", "empty", "refusal", "garbage"])
def test_no_failure_becomes_a_number(tmp_path, critic: str, misbehaviour: str) -> None:
    rates: dict[str, Any] = {f"{misbehaviour}_rate": 0.2}
    endpoint = simulated(1, **rates)
    ratings = rate(tmp_path, endpoint, critic, spread(150))
    expected = {"refusal": "refused", "garbage": "unparsable"}.get(misbehaviour, "failed")
    assert {r.status for r in ratings} == {"ok", expected}
    bad = [r for r in ratings if r.status is not Status.OK]
    assert 10 < len(bad) < 60
    assert all(r.score is r.p is r.reward is None and r.reason for r in bad)
    if expected == "failed":
        assert all(r.meta["passing"] for r in bad)


def test_the_planted_world_says_when_quality_is_missing(tmp_path) -> None:
    prompt = Prompt.from_text("Say hi.")
    bare = (prompt, Completion(prompt_id=prompt.id, generator="g", text="hi"))
    (rating,) = rate(tmp_path, simulated(), "rating_1_10", [bare])
    assert rating.status is Status.FAILED
    assert "meta.quality" in rating.reason
    assert not rating.meta["passing"]


# ---- real HTTP: deadlines, and what is kept ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with start_service(tmp_path_factory.mktemp("store")) as running:
        yield running


def eight(hang: float = 0.0) -> Reply:
    return Reply(body=chat("8.", top={"8": -0.1, "9": -2.4}), hang=hang)


def test_a_real_endpoint_is_asked_for_log_probs_and_an_equal_text_once(service) -> None:
    prompt = Prompt.from_text("Say hi.")
    twins = [
        (prompt, Completion(prompt_id=prompt.id, generator="g", text="hi", sample_index=i)) for i in (0, 1)
    ]
    with fake_endpoint(lambda number, request: eight()) as server, service.client(poll=0.02) as client:
        ratings = client.rate(at(server), "rating_1_10", twins)
        assert [r.completion_id for r in ratings] == [completion.id for _, completion in twins]
        assert len({r.meta["request"] for r in ratings}) == 1
        (body,) = server.bodies
        assert (body["logprobs"], body["top_logprobs"], body["temperature"]) == (True, 20, 0.0)
        assert "hi" in body["messages"][-1]["content"]
        p = [math.exp(-0.1), math.exp(-2.4)]
        assert ratings[0].score == pytest.approx((8 * p[0] + 9 * p[1]) / sum(p))


def test_what_comes_by_the_deadline_is_given_and_the_rest_is_not_paid_twice(service) -> None:
    """Half of the calls hang. The job goes on behind the deadline; who asks again gets its answers."""
    items = spread(12)

    def reply(number: int, request: dict) -> Reply:
        return eight(hang=30.0 if number >= 6 else 0.0)

    with fake_endpoint(reply) as server, service.client(poll=0.02) as client:
        endpoint = at(server, concurrency=6, timeout=60.0)
        start = time.monotonic()
        early = client.rate(endpoint, "rating_1_10", items, deadline_s=1.0)
        assert 0.9 < time.monotonic() - start < 5.0
        assert sum(rating is not None for rating in early) == 6
        threading.Timer(0.3, server.release.set).start()
        late = client.rate(endpoint, "rating_1_10", items, deadline_s=30.0)
        assert all(rating is not None and rating.score is not None for rating in late)
        assert [b for a, b in zip(early, late) if a is not None] == [a for a in early if a is not None]
        assert sum(server.calls.values()) == 12
        client.rate(endpoint, "rating_1_10", items)
        assert sum(server.calls.values()) == 12


def test_a_job_that_is_stopped_starts_no_more_calls_and_keeps_those_under_way(service) -> None:
    items = [item(100 + i, 0.5) for i in range(20)]
    with (
        fake_endpoint(lambda number, request: eight(hang=0.0 if number >= 24 else 1.0)) as server,
        service.client(poll=0.02) as client,
    ):
        endpoint = at(server, concurrency=4)
        assert client.rate(endpoint, "rating_1_10", items, deadline_s=0.3, stop=True) == [None] * 20
        time.sleep(1.5)
        status = client.status(client.last_job)
        assert (status.state, status.calls) == ("interrupted", 4)
        assert "stopped" in status.reason
        assert sum(server.calls.values()) == sum(server.answered.values()) == 4
        # The four answers are there at once, unpaid, and the others are asked for.
        server.release.set()
        ratings = client.rate(endpoint, "rating_1_10", items)
        assert all(rating is not None and rating.score for rating in ratings)
        assert sum(server.calls.values()) == 20
        assert client.status(client.last_job).cached == 4


def test_a_stopped_job_does_not_take_another_jobs_calls_with_it(service) -> None:
    """Two jobs share a request. The first is stopped before it asks; the second asks."""
    items = [item(200 + i, 0.5) for i in range(8)]
    with (
        fake_endpoint(lambda number, request: eight(hang=0.5)) as server,
        service.client(poll=0.02) as one,
        service.client(poll=0.02) as two,
    ):
        endpoint = at(server, concurrency=2)
        results: list = []
        other = threading.Thread(
            target=lambda: results.extend(two.rate(endpoint, "rating_1_10", items[::-1]))
        )
        assert one.rate(endpoint, "rating_1_10", items, deadline_s=0.05) == [None] * 8
        other.start()
        time.sleep(0.1)
        one.rate(endpoint, "rating_1_10", items, deadline_s=0.05, stop=True)
        other.join(30)
        assert [rating.status for rating in results] == ["ok"] * 8
        assert sum(server.calls.values()) == 8


def test_a_refused_key_is_not_a_failure_that_passes(service) -> None:
    with fake_endpoint(lambda number, request: Reply(status=401, body={})) as server:
        with service.client(poll=0.02) as client:
            ratings = client.rate(at(server), "rating_1_10", spread(9))
        assert {rating.status for rating in ratings} == {Status.FAILED}
        assert not any(rating.meta["passing"] for rating in ratings)


def test_an_endpoint_without_log_probs_is_told_apart_and_read_by_its_text(service) -> None:
    with fake_endpoint(chat("7.")) as server, service.client(poll=0.02) as client:
        (soft,) = client.rate(at(server), "rating_1_10", [item(1, 0.5)])
        assert soft.status is Status.FAILED
        assert "rating_1_10_text" in soft.reason
        (hard,) = client.rate(at(server), "rating_1_10_text", [item(1, 0.5)])
        assert (hard.score, hard.p, hard.mass) == (7.0, None, None)


def test_the_wrong_kind_of_critic_is_refused_by_client_and_service(service) -> None:
    from tests.labeling.helpers import comparison

    endpoint = simulated()
    with service.client() as client:
        with pytest.raises(CriticError, match="rating_1_10"):
            client.rate(endpoint, "ab_logprob", [item(1, 0.5)])
        with pytest.raises(CriticError, match="ab_logprob"):
            client.judge(endpoint, "rating_1_10", [comparison(1, 0.1, 0.9)])
    prompt, completion = item(1, 0.5)
    job = {"kind": "rate", "endpoint": endpoint.model_dump(mode="json"), "critic": "ab_logprob"}
    job["items"] = [{"prompt": prompt.to_row(), "completion": completion.to_row()}]
    response = httpx.post(f"{service.url}/v1/jobs", json=job)
    assert response.status_code == 422
    assert "rating_1_10" in response.text
    assert httpx.post(f"{service.url}/v1/jobs/{'0' * 16}/stop", json={}).status_code == 404
    assert httpx.post(f"{service.url}/v1/jobs/{'0' * 16}/stop").status_code == 415


def test_a_service_that_is_gone_is_noticed_by_the_deadline(tmp_path) -> None:
    from laif_jax.labeling import LabelClient

    with LabelClient("http://127.0.0.1:9") as client:
        start = time.monotonic()
        with pytest.raises(LabelServiceError, match="does not answer"):
            client.rate(simulated(), "rating_1_10", [item(1, 0.5)], deadline_s=0.2)
        assert time.monotonic() - start < 10
