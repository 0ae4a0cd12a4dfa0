"""Real HTTP endpoints that misbehave: each misbehaviour is a state with a reason, and never a preference."""

import json
import socket
import time

import pytest

from laif_jax.labeling.calls import Call, Endpoint
from laif_jax.labeling.errors import EndpointError
from laif_jax.labeling.jobs import CompleteJob, JudgeJob
from laif_jax.records import Prompt, Status
from tests.labeling.helpers import Reply, at, chat, comparison, fake_endpoint, judge, planted, run_job

GOOD_A = chat("Output (a)")
ITEM = [comparison(1, 0.1, 0.9)]
QUIET = Reply(status=429, body={"error": {"message": "slow down"}}, headers={"Retry-After": "0"})


@pytest.fixture(autouse=True)
def fast_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laif_jax.labeling.scheduler.BACKOFF_FIRST", 0.01)


@pytest.mark.parametrize(
    ("critic", "reply", "status", "says", "calls"),
    [
        ("laif_basic", QUIET, "failed", "429 (slow down)", 3),
        ("laif_basic", Reply(500, {"error": "boom"}), "failed", "500 (boom)", 3),
        ("laif_basic", Reply(503, b"<html>busy</html>"), "failed", "503", 3),
        ("laif_basic", Reply(200, b"<html>welcome</html>"), "failed", "not JSON", 3),
        ("laif_basic", Reply(200, {"choices": []}), "failed", "empty `choices`", 3),
        ("laif_basic", Reply(200, {"object": "x"}), "failed", "no `choices`", 3),
        ("laif_basic", Reply(200, {"choices": [{"text": "hi"}]}), "failed", "no `message`", 3),
        ("laif_basic", Reply(200, GOOD_A, cut=True), "failed", "cannot reach", 3),
        ("laif_basic", Reply(200, GOOD_A, hang=3.0), "failed", "within 0.5 s", 3),
        ("laif_basic", Reply(200, chat("")), "failed", "empty", 1),
        ("laif_basic", Reply(400, {"error": {"message": "too long"}}), "failed", "too long", 1),
        ("laif_basic", Reply(401, {"error": {"message": "bad key"}}), "failed", "api_key_env", 1),
        ("laif_basic", Reply(404, {"error": {"message": "no model x"}}), "failed", "/v1", 1),
        ("laif_basic", Reply(429, {"error": {"code": "insufficient_quota"}}), "failed", "balance", 1),
        ("laif_basic", Reply(307, b"", {"Location": "/elsewhere"}), "failed", "307", 1),
        ("ab_logprob", Reply(200, chat("A")), "failed", "log-probs", 1),
        (
            "ab_logprob",
            Reply(200, chat("Hm", top={"Hm": -0.1, "Well": -3.0})),
            "unparsable",
            "neither A or B",
            1,
        ),
        ("laif_basic", Reply(200, chat("Both are good.")), "unparsable", "no option", 1),
        ("pairwise_json", Reply(200, chat("The winner is b")), "unparsable", "no JSON", 1),
        ("alpaca_eval_gpt4", Reply(200, chat("model_1")), "unparsable", "no list", 1),
        ("laif_basic", Reply(200, chat("I'm sorry, but I can't compare these.")), "refused", "declined", 1),
        ("laif_basic", Reply(200, chat(None, refusal="Not this one.")), "refused", "Not this one", 1),
    ],
)
def test_each_misbehaviour_is_a_state_with_a_reason(tmp_path, critic, reply, status, says, calls) -> None:
    with fake_endpoint(lambda number, request: reply) as server:
        endpoint = at(server, max_attempts=3, timeout=0.5 if reply.hang else 5.0)
        (only,) = judge(tmp_path, endpoint, critic, ITEM, order="seeded")
        assert only.status == status
        assert only.p_b is None
        assert says in only.reason
        assert sum(server.calls.values()) == calls


def test_a_refused_connection_says_so(tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    endpoint = Endpoint(provider="openai", base_url=url, max_attempts=2)
    (only,) = judge(tmp_path, endpoint, "laif_basic", ITEM)
    assert only.status is Status.FAILED
    assert "cannot reach" in only.reason
    assert url in only.reason


def test_what_failed_is_asked_again_by_the_next_job_and_only_that(tmp_path) -> None:
    healthy = False

    def reply(number: int, request: dict) -> Reply:
        bad = "Question 1:" in request["messages"][-1]["content"]
        return Reply(500, {}) if bad and not healthy else Reply(body=GOOD_A)

    items = [comparison(i, 0.1, 0.9) for i in range(3)]
    with fake_endpoint(reply) as server:
        endpoint = at(server, max_attempts=2)
        first = judge(tmp_path, endpoint, "laif_basic", items, order="seeded")
        assert [j.status for j in first] == ["ok", "failed", "ok"]
        healthy = True
        second = judge(tmp_path, endpoint, "laif_basic", items, order="seeded")
        assert [j.status for j in second] == ["ok", "ok", "ok"]
        assert sorted(server.calls.values()) == [1, 1, 3]
        # An answer that cannot be parsed was paid for: it is kept, and read again, not bought again.
        assert second[0].id == first[0].id


def test_a_good_answer_is_kept_with_its_provenance(tmp_path) -> None:
    with fake_endpoint(chat("A", top={"A": -0.1, "B": -2.5})) as server:
        (only,) = judge(tmp_path, at(server), "ab_logprob", ITEM)
        assert only.status is Status.TIE  # it always says A: position bias, which averaging takes out
        assert only.provider_fingerprint == "fake-1/fp_fake"
        assert only.usage is not None
        assert only.usage.prompt_tokens == 22
        assert only.latency > 0
        assert only.date
        assert len(only.parts) == 2
        sent = server.bodies[0]
        assert (sent["logprobs"], sent["top_logprobs"], sent["max_tokens"], sent["temperature"]) == (
            True,
            20,
            1,
            0.0,
        )
        assert "sample" not in sent


@pytest.mark.parametrize("concurrency", [1, 8])
def test_equal_requests_are_one_call_and_samples_are_several(tmp_path, concurrency: int) -> None:
    with fake_endpoint(chat("Hello.")) as server:
        prompts = tuple([Prompt.from_text("Say hi.")] * 3)
        endpoint = at(server, concurrency=concurrency)
        job = CompleteJob(endpoint=endpoint, prompts=prompts, generator="g", n=2, system="Be brief.", seed=5)
        status, final, _ = run_job(tmp_path, job)
        assert status.counts == {"ok": 6}
        assert sum(server.calls.values()) == 2
        assert len({body["seed"] for body in server.bodies}) == 2
        assert server.bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
        assert [row["sample_index"] for row in final] == [0, 1] * 3


@pytest.mark.parametrize("concurrency", [1, 8])
def test_equal_requests_that_fail_are_one_call_per_job(tmp_path, concurrency: int) -> None:
    with fake_endpoint(lambda number, request: Reply(400, {})) as server:
        prompts = tuple([Prompt.from_text("Say hi.")] * 3)
        job = CompleteJob(endpoint=at(server, concurrency=concurrency), prompts=prompts, generator="g")
        for number in (1, 2):
            status, *_ = run_job(tmp_path, job)
            assert status.counts == {"failed": 3}
            assert sum(server.calls.values()) == number


def test_concurrency_is_bounded_and_used(tmp_path) -> None:
    with fake_endpoint(lambda number, request: Reply(body=GOOD_A, hang=0.03)) as server:
        judge(tmp_path, at(server, concurrency=3), "laif_basic", planted(15))
        assert server.most_in_flight == 3
        assert sum(server.calls.values()) == 30


def test_retry_after_holds_everybody_back(tmp_path) -> None:
    times: list[float] = []

    def reply(number: int, request: dict) -> Reply:
        times.append(time.monotonic())
        if number == 0:
            return Reply(429, {}, {"Retry-After": "1"})
        # The second call is under way while the first is refused; the worker that made it must wait as well.
        return Reply(body=GOOD_A, hang=0.3 if number == 1 else 0.0)

    with fake_endpoint(reply) as server:
        judgements = judge(tmp_path, at(server, concurrency=2), "laif_basic", planted(3))
        assert {j.status for j in judgements} == {Status.TIE}
        assert len(times) == 7
        assert min(times[2:]) - times[0] >= 0.99


def test_a_dead_endpoint_does_not_cost_every_item_its_attempts(tmp_path) -> None:
    with fake_endpoint(lambda number, request: Reply(500, {})) as server:
        judgements = judge(tmp_path, at(server, max_attempts=2, concurrency=2), "laif_basic", planted(60))
        assert {j.status for j in judgements} == {Status.FAILED}
        assert sum(server.calls.values()) < 40
        assert "not asked" in judgements[-1].reason
        assert "500" in judgements[-1].reason


def test_many_prompts_that_are_too_long_do_not_stop_the_others(tmp_path) -> None:
    def reply(number: int, request: dict) -> Reply:
        return Reply(400, {"error": "too long"}) if number < 50 else Reply(body=GOOD_A)

    with fake_endpoint(reply) as server:
        judgements = judge(tmp_path, at(server, concurrency=1), "laif_basic", planted(30))
        assert [j.status for j in judgements] == [Status.FAILED] * 25 + [Status.TIE] * 5


def test_a_refused_key_stops_the_job_at_once(tmp_path) -> None:
    with fake_endpoint(lambda number, request: Reply(401, {})) as server:
        judgements = judge(tmp_path, at(server, concurrency=2), "laif_basic", planted(60))
        assert {j.status for j in judgements} == {Status.FAILED}
        assert sum(server.calls.values()) <= 4


def test_keys_are_sent_and_never_stored(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MY_TEST_KEY", "sk-very-secret-123")

    def reply(number: int, request: dict) -> Reply:
        # Some endpoints quote the key back.
        return Reply(400, {"error": {"message": "bad request by sk-very-secret-123"}})

    with fake_endpoint(reply) as server:
        endpoint = at(server, api_key_env="MY_TEST_KEY")
        (only,) = judge(tmp_path, endpoint, "laif_basic", ITEM)
        assert server.headers[0]["Authorization"] == "Bearer sk-very-secret-123"
        assert "bad request by [key]" in only.reason
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert b"sk-very-secret" not in file.read_bytes(), file


def test_a_key_that_is_not_set_is_explained_before_anything_is_asked(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("MY_TEST_KEY", raising=False)
    with fake_endpoint(GOOD_A) as server:
        job = JudgeJob(
            endpoint=at(server, api_key_env="MY_TEST_KEY"), critic="laif_basic", comparisons=tuple(ITEM)
        )
        with pytest.raises(EndpointError, match="MY_TEST_KEY"):
            run_job(tmp_path, job)
        assert not server.calls


@pytest.mark.parametrize(
    "url", ["http://me:pw@host/v1", "http://host/v1?key=1", "ftp://host", "localhost:80"]
)
def test_an_address_with_a_secret_or_none_is_refused(url: str) -> None:
    with pytest.raises((EndpointError, ValueError)) as error:
        Endpoint(provider="openai", base_url=url)
    assert "pw@" not in str(error.value)


def test_the_key_of_a_request_holds_what_decides_the_answer_and_nothing_else() -> None:
    messages = ({"role": "user", "content": "hi \ud83d"},)  # a lone surrogate: half an emoji
    base = {"provider": "openai", "base_url": "http://host/v1", "model": "m"}

    def key(sample: int = 0, params: dict | None = None, **changes: object) -> str:
        endpoint = Endpoint.model_validate({**base, **changes})
        return Call(endpoint, messages, params or {"temperature": 0.0}, sample=sample).key

    reference = key()
    assert (
        key(concurrency=3, timeout=1.0, max_attempts=2, api_key_env="X", base_url="http://host/v1/")
        == reference
    )
    different = [
        key(model="n"),
        key(sample=1),
        key(params={"temperature": 1.0}),
        key(base_url="http://other/v1"),
    ]
    assert len({reference, *different}) == 5
    # A local server's port is no part of the key, its weights are.
    local = [key(identity="gguf:1", base_url=f"http://127.0.0.1:{port}/v1") for port in (1, 2)]
    assert local[0] == local[1] != key(identity="gguf:2")


def test_odd_text_survives_the_whole_way(tmp_path) -> None:
    text = 'half \ud83d emoji, nul \x00, "quotes", newline\n, {output_2}'
    with fake_endpoint(lambda number, request: Reply(body=chat("Output (b)"))) as server:
        item = comparison(1, 0.1, 0.9)
        odd = item.model_copy(update={"a": item.a.model_copy(update={"text": text}), "id": "odd"})
        (only,) = judge(tmp_path, at(server), "laif_basic", [odd])
        assert only.status is Status.TIE
        assert json.dumps(server.bodies[0]["messages"]).count("{output_2}") == 1
