"""Each provider's official package against a local server that speaks its wire format, errors included."""

import asyncio
import contextlib
import json
import socket
import sys
from typing import Any

import pytest

from laif_jax.config.schema import EndpointSpec
from laif_jax.labeling import providers
from laif_jax.labeling.calls import Call, Endpoint
from laif_jax.labeling.errors import (
    AuthFailed,
    BadRequest,
    CallError,
    CallTimeout,
    EndpointError,
    Malformed,
    NoAnswer,
    Overloaded,
    RateLimited,
    Unreachable,
)
from laif_jax.labeling.providers import Reply, make_provider
from laif_jax.records import Usage
from tests.labeling.wire_server import (
    BODIES,
    PATHS,
    Request,
    Response,
    WireServer,
    anthropic_body,
    google_body,
    openai_body,
    serve,
)

KEY = "sk-test-0123456789abcdef"
KINDS = ("openai", "plain", "anthropic", "google")
MESSAGES = (
    {"role": "system", "content": "You judge."},
    {"role": "user", "content": "A or B? ü \ud83d"},  # half an emoji
)
PARAMS = {"temperature": 0.0, "max_tokens": 50}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    # What lies about in the environment must neither be sent nor change an address.
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "GOOGLE_API_KEY"):
        monkeypatch.setenv(name, "stray-key-from-the-environment")
    monkeypatch.setenv("OPENAI_ORG_ID", "stray-key-organisation")


def endpoint(kind: str, server: WireServer | str, **rest: Any) -> Endpoint:
    url = server if isinstance(server, str) else server.url
    provider = "openai" if kind == "plain" else kind
    shared = {
        "provider": provider,
        "model": "fake",
        "base_url": f"{url}/v1" if provider == "openai" else url,
        "api_key_env": "TEST_KEY",
        "client": "plain" if kind == "plain" else "sdk",
        "timeout": 5.0,
    }
    return Endpoint.model_validate({**shared, **rest})


def ask(at: Endpoint, params: dict[str, Any] | None = None, messages: Any = MESSAGES) -> Reply:
    async def run() -> Reply:
        provider = make_provider(at)
        try:
            return await provider.call(Call(at, messages, params or PARAMS), 0)
        finally:
            await provider.close()

    return asyncio.run(run())


def error(at: Endpoint) -> CallError:
    with pytest.raises(CallError) as caught:
        ask(at)
    assert KEY not in repr(caught.value) + caught.value.reason + caught.value.body
    return caught.value


def body_of(kind: str, *args: Any) -> dict[str, Any]:
    return BODIES["openai" if kind == "plain" else kind](*args)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_read_with_its_usage(kind: str) -> None:
    with serve(Response(body=body_of(kind))) as server:
        reply = ask(endpoint(kind, server))
        (request,) = server.requests
    assert (reply.text, reply.finish_reason, reply.refusal) == ("Output (a)", "stop", "")
    # Cached input is a part of the input; thinking is output.
    assert reply.usage == Usage(prompt_tokens=1219, completion_tokens=10, cached_tokens=1024)
    assert reply.provider_fingerprint.startswith(("gpt-4.1", "claude-sonnet-4-5", "gemini-2.5-flash"))
    assert reply.raw == body_of(kind)  # as it came
    assert request.path.partition("?")[0].endswith(PATHS["openai" if kind == "plain" else kind])
    assert "stray-key" not in str(request.headers) + request.path
    sent = [request.headers.get(name, "") for name in ("authorization", "x-api-key", "x-goog-api-key")]
    assert [KEY in value for value in sent].count(True) == 1
    assert KEY not in request.path


def test_requests_are_in_the_wire_formats() -> None:
    params = {"temperature": 0.5, "max_tokens": 9, "top_p": 0.9, "seed": 3, "stop": ["###"]}
    sent = {}
    for kind in ("openai", "plain", "anthropic", "google"):
        with serve(Response(body=body_of(kind))) as server:
            ask(endpoint(kind, server), params)
            sent[kind] = server.requests[0].json
    text = "A or B? ü ?"
    assert sent["openai"] == sent["plain"]
    assert sent["openai"] == {
        "model": "fake",
        "messages": [{"role": "system", "content": "You judge."}, {"role": "user", "content": text}],
        **params,
    }
    assert sent["anthropic"] == {
        "model": "fake",
        "system": "You judge.",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop_sequences": ["###"],
    }
    assert sent["google"]["contents"] == [{"role": "user", "parts": [{"text": text}]}]
    assert sent["google"]["systemInstruction"]["parts"] == [{"text": "You judge."}]
    config = {"temperature": 0.5, "maxOutputTokens": 9, "topP": 0.9, "seed": 3, "stopSequences": ["###"]}
    assert sent["google"]["generationConfig"] == config


def test_options_are_sent_and_part_of_the_key() -> None:
    options = {"openai": {"reasoning_effort": "low", "temperature": None}, "anthropic": {"temperature": None}}
    options["google"] = {"thinkingConfig": {"thinkingBudget": 0}}
    for kind, more in options.items():
        with serve(Response(body=body_of(kind))) as server:
            plain, changed = endpoint(kind, server), endpoint(kind, server, options=more)
            ask(changed)
            sent = server.requests[0].json
        assert Call(plain, MESSAGES, PARAMS).key != Call(changed, MESSAGES, PARAMS).key
        assert plain.key != changed.key
        if kind == "google":
            assert list(sent["generationConfig"]["thinkingConfig"].values()) == [0]
        else:
            assert "temperature" not in sent
            assert kind == "anthropic" or sent["reasoning_effort"] == "low"
    assert EndpointSpec(provider="openai", base_url="http://h/v1", options={"prompt_cache_key": "x"}).options
    for bad in ({"messages": []}, {"api_key": "x"}, {"x": float("nan")}):
        with pytest.raises(ValueError, match="options"):
            EndpointSpec(provider="openai", base_url="http://h/v1", options=bad)


def test_openai_itself_gets_the_newer_name_of_the_limit() -> None:
    at = Endpoint(provider="openai", base_url="https://api.openai.com/v1", model="gpt-5")
    body = Call(at, MESSAGES, PARAMS).body()
    assert body["max_completion_tokens"] == 50
    assert "max_tokens" not in body


@pytest.mark.parametrize("kind", ["openai", "plain", "google"])
def test_log_probs_are_read(kind: str) -> None:
    body = body_of(kind, "A")
    if kind != "google":
        top = [
            {"token": "A", "logprob": -0.105, "bytes": [65]},
            {"token": "B", "logprob": -2.303, "bytes": [66]},
        ]
        body["choices"][0]["logprobs"] = {"content": [{**top[0], "top_logprobs": top}], "refusal": None}
    with serve(Response(body=body)) as server:
        reply = ask(endpoint(kind, server), {**PARAMS, "top_logprobs": 5})
        sent = server.requests[0].json
    (token,) = reply.top_logprobs
    assert (token.token, token.top) == ("A", (("A", -0.105), ("B", -2.303)))
    asked = sent["generationConfig"] if kind == "google" else sent
    assert (asked.get("responseLogprobs"), asked.get("logprobs")) in [(True, 5), (None, True)]


def test_what_anthropic_does_not_have_is_an_error_before_anything_is_sent() -> None:
    at = Endpoint(provider="anthropic", model="claude")
    for params, says in (
        ({"top_logprobs": 5}, "no log-probs"),
        ({"n": 2}, "no `n`"),
        ({"temperature": 1.5}, "1.0"),
    ):
        with pytest.raises(EndpointError, match=says):
            Call(at, MESSAGES, params)


def test_several_samples_in_one_call() -> None:
    body = openai_body()
    body["choices"].append({**body["choices"][0], "index": 1, "message": {"content": "Output (b)"}})
    with serve(Response(body=body)) as server:
        reply = ask(endpoint("openai", server), {**PARAMS, "n": 2})
        assert server.requests[0].json["n"] == 2
    assert [answer.text for answer in reply.answers] == ["Output (a)", "Output (b)"]
    assert [answer.usage is None for answer in reply.answers] == [False, True]  # counted once


@pytest.mark.parametrize(
    ("kind", "body", "refusal"),
    [
        ("openai", openai_body(None, refusal="I can't help with that."), "can't help"),
        ("anthropic", anthropic_body("", "refusal"), "declined"),
        ("google", google_body("half of it", "SAFETY"), "SAFETY"),
        (
            "google",
            {
                "promptFeedback": {"blockReason": "PROHIBITED_CONTENT"},
                "usageMetadata": {"promptTokenCount": 7},
            },
            "PROHIBITED_CONTENT",
        ),
    ],
)
def test_refusals_are_answers(kind: str, body: Any, refusal: str) -> None:
    with serve(Response(body=body)) as server:
        reply = ask(endpoint(kind, server))
    assert refusal in reply.refusal
    assert reply.usage is not None
    assert "half of it" not in reply.text


@pytest.mark.parametrize(
    ("kind", "body"),
    [("anthropic", anthropic_body("Outp", "max_tokens")), ("google", google_body("Outp", "MAX_TOKENS"))],
)
def test_an_answer_that_was_cut_short_says_so(kind: str, body: Any) -> None:
    with serve(Response(body=body)) as server:
        assert ask(endpoint(kind, server)).finish_reason == "length"


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_answer_was_paid_for(kind: str) -> None:
    with serve(Response(body=body_of(kind, ""))) as server:
        failure = error(endpoint(kind, server))
    assert isinstance(failure, NoAnswer)
    assert (failure.kind, failure.billed, failure.retryable) == ("empty_answer", "yes", False)
    assert failure.usage == Usage(prompt_tokens=1219, completion_tokens=10, cached_tokens=1024)


def _anthropic_error(kind: str, message: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_011"}


def _google_error(code: int, status: str, message: str, *details: dict[str, Any]) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "status": status, "details": list(details)}}


_RETRY = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.5s"}
_DAILY = {
    "@type": "type.googleapis.com/google.rpc.QuotaFailure",
    "violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}],
}
_BAD_KEY = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}


@pytest.mark.parametrize(
    ("kind", "status", "body", "headers", "expected", "name", "wait"),
    [
        *(
            (kind, 429, {"error": {"message": "Rate limit reached", "code": "rate_limit_exceeded"}}, wait[0])
            + (RateLimited, "rate_limited", wait[1])
            for kind in ("openai", "plain")
            for wait in (({"Retry-After": "7"}, 7.0), ({"retry-after-ms": "1500"}, 1.5), ({}, None))
        ),
        ("openai", 429, {"error": {"code": "insufficient_quota"}}, {}, AuthFailed, "quota", None),
        ("openai", 401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, {}, AuthFailed)
        + ("unauthorised", None),
        (
            "openai",
            404,
            {"error": {"code": "model_not_found", "message": "x"}},
            {},
            AuthFailed,
            "not_found",
            None,
        ),
        ("openai", 400, {"error": {"code": "context_length_exceeded", "message": "too long"}}, {}, BadRequest)
        + ("bad_request", None),
        (
            "openai",
            500,
            {"error": {"message": "The server had an error"}},
            {},
            Overloaded,
            "server_error",
            None,
        ),
        ("openai", 307, b"", {"Location": "/elsewhere"}, BadRequest, "bad_request", None),
        ("anthropic", 429, _anthropic_error("rate_limit_error", "slow"), {"retry-after": "12"}, RateLimited)
        + ("rate_limited", 12.0),
        ("anthropic", 529, _anthropic_error("overloaded_error", "Overloaded"), {}, Overloaded)
        + ("server_error", None),
        ("anthropic", 401, _anthropic_error("authentication_error", "invalid x-api-key"), {}, AuthFailed)
        + ("unauthorised", None),
        ("anthropic", 400, _anthropic_error("invalid_request_error", "Your credit balance is too low"), {})
        + (AuthFailed, "quota", None),
        ("anthropic", 400, _anthropic_error("invalid_request_error", "max_tokens: required"), {}, BadRequest)
        + ("bad_request", None),
        ("google", 429, _google_error(429, "RESOURCE_EXHAUSTED", "Quota", _RETRY), {}, RateLimited)
        + ("rate_limited", 34.5),
        ("google", 429, _google_error(429, "RESOURCE_EXHAUSTED", "Quota", _DAILY), {}, AuthFailed)
        + ("quota", None),
        (
            "google",
            400,
            _google_error(400, "INVALID_ARGUMENT", "API key not valid.", _BAD_KEY),
            {},
            AuthFailed,
        )
        + ("unauthorised", None),
        ("google", 400, _google_error(400, "INVALID_ARGUMENT", "bad"), {}, BadRequest, "bad_request", None),
        (
            "google",
            503,
            _google_error(503, "UNAVAILABLE", "overloaded"),
            {},
            Overloaded,
            "server_error",
            None,
        ),
        ("google", 502, b"<html>Bad Gateway</html>", {}, Overloaded, "server_error", None),
    ],
)
def test_errors_have_the_kind_that_decides(kind, status, body, headers, expected, name, wait) -> None:
    with serve(Response(status, body, headers)) as server:
        failure = error(endpoint(kind, server))
        assert len(server.requests) == 1  # the packages' own retries are off
    assert (type(failure), failure.kind, failure.retry_after) == (expected, name, wait)
    assert failure.billed == "no"
    assert failure.fatal == (expected is AuthFailed)
    assert failure.retryable == (expected in (RateLimited, Overloaded))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (Response(body=b'{"id": "x", "choices": [{"mess'), Malformed),
        (Response(body=b"<html>welcome</html>"), Malformed),
        (Response(body={"object": "list"}), Malformed),
        (Response(body=[1, 2]), Malformed),
        (Response(body=b"[" * 100_000), Malformed),
        (Response(cut=True), Unreachable),
        (Response(drop=True), Unreachable),
        (Response(hang=3.0), CallTimeout),
    ],
    ids=["truncated", "html", "other shape", "list", "deep", "cut", "dropped", "slow"],
)
def test_a_lost_answer_may_have_been_billed_and_is_asked_for_once(
    kind: str, response: Response, expected
) -> None:
    if response.cut:
        response.body = body_of(kind)
    with serve(response) as server:
        failure = error(endpoint(kind, server, timeout=0.3 if response.hang else 5.0))
        assert len(server.requests) == 1
    assert isinstance(failure, expected), failure.reason
    assert (failure.billed, failure.retryable, failure.fatal) == ("unknown", True, False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_connection_is_not_billed(kind: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    failure = error(endpoint(kind, url))
    assert isinstance(failure, Unreachable)
    assert failure.billed == "no"
    assert "cannot reach" in failure.reason


def test_rate_limits_are_read_from_headers_of_answers_and_errors() -> None:
    headers = {
        "x-ratelimit-limit-requests": "500",
        "x-ratelimit-remaining-requests": "499",
        "x-ratelimit-reset-requests": "120ms",
        "x-ratelimit-limit-tokens": "30000",
        "x-ratelimit-remaining-tokens": "29000",
        "x-ratelimit-reset-tokens": "1m2.5s",
    }
    for kind in ("openai", "plain"):
        for status in (200, 429):
            with serve(Response(status, openai_body(), headers)) as server:
                at = endpoint(kind, server)
                limits = ask(at).limits if status == 200 else error(at).limits
            assert limits is not None
            assert limits.requests is not None
            assert limits.tokens is not None
            assert (limits.requests.limit, limits.requests.remaining) == (500, 499)
            assert limits.requests.reset == pytest.approx(0.12)
            assert limits.tokens.reset == pytest.approx(62.5)
    headers = {
        "anthropic-ratelimit-requests-limit": "50",
        "anthropic-ratelimit-requests-remaining": "49",
        "anthropic-ratelimit-requests-reset": "2020-01-01T00:00:00Z",
        "anthropic-ratelimit-output-tokens-limit": "8000",
        "anthropic-ratelimit-output-tokens-remaining": "oops",
    }
    with serve(Response(body=anthropic_body(), headers=headers)) as server:
        limits = ask(endpoint("anthropic", server)).limits
    assert limits is not None
    assert limits.requests == providers.Window(50, 49, 0.0)  # in the past: full again
    assert limits.output_tokens == providers.Window(8000, None, None)
    assert limits.tokens is None
    with serve(Response(body=google_body())) as server:
        assert ask(endpoint("google", server)).limits is None


def test_vertex_asks_its_own_path() -> None:
    with serve(Response(body=google_body())) as server:
        at = endpoint("google", server, api_key_env=None, project="my-project", location="europe-west4")
        assert ask(at).text == "Output (a)"
        (request,) = server.requests
    expected = "/projects/my-project/locations/europe-west4/publishers/google/models/fake:generateContent"
    assert request.path.endswith(expected)
    vertex = Endpoint(provider="google", model="m", project="p", location="l")
    assert vertex.identity == "https://aiplatform.googleapis.com"


@pytest.mark.parametrize(("provider", "package"), [("openai", "openai"), ("anthropic", "anthropic")])
def test_a_package_that_is_not_there_is_named_with_its_extra(provider, package, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    at = endpoint(provider, "http://127.0.0.1:1")
    with pytest.raises(EndpointError, match=rf"pip install 'laif_jax\[{package}\]'"):
        make_provider(at)
    if provider == "openai":  # local servers do without
        make_provider(endpoint("plain", "http://127.0.0.1:1"))


def test_google_without_its_package_or_key(monkeypatch) -> None:
    with pytest.raises(EndpointError, match="needs a key"):
        make_provider(Endpoint(provider="google", model="m"))
    with pytest.raises(EndpointError, match="needs a key"):
        make_provider(Endpoint(provider="anthropic", model="m"))
    monkeypatch.setitem(sys.modules, "google.genai", None)
    with pytest.raises(EndpointError, match=r"laif_jax\[google\]"):
        make_provider(endpoint("google", "http://127.0.0.1:1"))


def test_an_endpoint_without_a_key_sends_none() -> None:
    for kind in ("openai", "plain"):
        with serve(Response(body=openai_body())) as server:
            ask(endpoint(kind, server, api_key_env=None))
            assert "authorization" not in server.requests[0].headers


def test_nothing_is_retried_while_many_calls_are_in_flight() -> None:
    def answer(request: Request) -> Response:
        return Response(503, {"error": {"message": "busy"}})

    async def run(at: Endpoint) -> None:
        provider = make_provider(at)

        async def one(number: int) -> None:
            messages = ({"role": "user", "content": str(number)},)
            with contextlib.suppress(Overloaded):
                await provider.call(Call(at, messages, PARAMS), 0)

        await asyncio.gather(*(one(number) for number in range(20)))
        await provider.close()

    for kind in KINDS:
        with serve(answer) as server:
            asyncio.run(run(endpoint(kind, server, concurrency=20)))
            assert len(server.requests) == 20, kind
            assert len({json.dumps(request.json, sort_keys=True) for request in server.requests}) == 20
