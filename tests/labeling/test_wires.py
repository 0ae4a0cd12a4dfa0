"""Wire formats: whatever comes is an answer that was really given, or an error with a kind; never a crash."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.labeling.answers import Answer
from laif_jax.labeling.errors import CallError
from laif_jax.labeling.providers.batch_apis import _anthropic_row, _openai_row, read_lines
from laif_jax.labeling.wires import WIRES, RateLimits
from laif_jax.labeling.wires.base import decode, duration, parse_retry_after
from tests.labeling.wire_server import BODIES

KINDS = sorted(BODIES)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8)
names = st.sampled_from(
    [
        "choices",
        "message",
        "content",
        "text",
        "type",
        "usage",
        "logprobs",
        "candidates",
        "parts",
        "error",
        "token",
    ]
    + ["top_logprobs", "logprob", "refusal", "finish_reason", "stop_reason", "promptFeedback", "blockReason"]
    + ["logprobsResult", "chosenCandidates", "topCandidates", "details", "violations", "retryDelay", "code"]
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(names | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)
headers = st.dictionaries(
    st.sampled_from(
        ["retry-after", "retry-after-ms", "x-ratelimit-limit-requests", "x-ratelimit-remaining-tokens"]
        + [
            "x-ratelimit-reset-requests",
            "anthropic-ratelimit-requests-reset",
            "anthropic-ratelimit-tokens-limit",
        ]
    ),
    st.text(max_size=12) | st.from_regex(r"\d{1,6}(\.\d)?(ms|s|m|h)?", fullmatch=True),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path] if path else []
    for name, item in inner:
        found += places(item, (*path, name))
    return found


def damaged(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    body = copy.deepcopy(body)
    at = body
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    return body


def strings(value: Any) -> list[str]:
    """All strings inside, in order."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, str) else [text for item in inner for text in strings(item)]


def outcome(kind: str, body: Any, needs_logprobs: bool) -> tuple[Answer, ...] | CallError:
    try:
        return WIRES[kind].answers(body, needs_logprobs=needs_logprobs)
    except CallError as error:
        return error


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None)
@given(data=st.data(), value=anything, needs_logprobs=st.booleans())
def test_a_damaged_answer_is_an_error_or_holds_only_what_was_sent(kind, data, value, needs_logprobs) -> None:
    body = BODIES[kind]()
    body = damaged(body, data.draw(st.sampled_from(places(body))), value)
    answers = outcome(kind, body, needs_logprobs)
    if isinstance(answers, CallError):
        assert answers.kind
        assert answers.reason
        assert answers.billed in ("no", "yes", "unknown")
        return
    for answer in answers:
        assert answer.refusal or answer.text.strip() or answer.tokens
        rest = answer.text
        for part in strings(body):
            rest = rest.removeprefix(part)
        assert not rest
        assert not needs_logprobs or answer.refusal or answer.tokens
        for token in answer.tokens:
            assert token.logprob <= 0
            assert all(logprob <= 0 for _, logprob in token.top)
        if answer.usage is not None:
            assert (
                min(answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.cached_tokens)
                >= 0
            )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(body=anything, needs_logprobs=st.booleans())
def test_garbage_is_no_answer(kind, body, needs_logprobs) -> None:
    answers = outcome(kind, body, needs_logprobs)
    if isinstance(answers, CallError):
        return
    assert all(answer.text.strip() or answer.refusal or answer.tokens for answer in answers)
    assert answers


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(status=st.integers(100, 599).filter(lambda n: n != 200), body=anything, raw=st.text(), told=headers)
def test_every_error_has_a_kind(kind, status, body, raw, told) -> None:
    for text in (raw, json.dumps(body), json.dumps({"error": body}), json.dumps([{"error": body}])):
        error = WIRES[kind].error("http://h", status, told, text)
        assert error.kind
        assert str(status) in error.reason or error.kind == "quota"
        assert not (error.fatal and error.retryable)
        assert error.retry_after is None or error.retry_after >= 0
        assert len(error.body) <= 2000
        assert error.retryable == (status in (408, 409, 425, 429) or status >= 500) or error.fatal


@pytest.mark.parametrize("kind", KINDS)
@given(told=headers)
def test_rate_limits_are_numbers_or_nothing(kind, told) -> None:
    limits = WIRES[kind].limits(told)
    assert limits is None or limits
    for name in RateLimits.__slots__:
        window = getattr(limits, name, None)
        if window is not None:
            for value in (window.limit, window.remaining, window.reset):
                assert value is None or value >= 0


@given(st.text())
def test_durations_and_waits_are_never_negative(text: str) -> None:
    for value in (duration(text), parse_retry_after({"retry-after": text})):
        assert value is None or 0 <= value < float("inf")


def test_waits_in_all_their_forms() -> None:
    assert duration("1h2m3.5s") == pytest.approx(3723.5)
    assert duration("34s") == 34
    assert duration("6m0s") == 360
    assert duration("120ms") == pytest.approx(0.12)
    assert duration("7") == 7
    assert [duration(text) for text in ("", "soon", "1x", "s", None)] == [None] * 5
    assert parse_retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert parse_retry_after({"retry-after": "nan"}) is None
    assert parse_retry_after({"retry-after": "-5"}) == 0
    assert parse_retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25


@given(st.text() | st.binary().map(lambda data: data.decode("utf-8", "replace")))
def test_a_body_is_json_or_malformed(text: str) -> None:
    try:
        json.loads(text)
    except ValueError:
        with pytest.raises(CallError, match="not JSON"):
            decode("http://h", text)
    else:
        decode("http://h", text)


@given(st.binary(), anything)
def test_rows_of_batches_survive_anything(data: bytes, value: Any) -> None:
    assert all(isinstance(row, dict) for row in read_lines(data))
    _anthropic_row(value)
    if isinstance(value, dict):
        _openai_row(value)
    lines = b'{"a": 1}\n\n{"cut": \n[1]\n{"b": 2}'
    assert read_lines(lines) == [{"a": 1}, {"b": 2}]
