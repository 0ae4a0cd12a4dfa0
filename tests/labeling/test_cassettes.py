"""Recorded exchanges: in the providers' own wire formats, without keys, played back strictly."""

import asyncio
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from laif_jax.labeling.calls import Call, Endpoint
from laif_jax.labeling.errors import BadRequest, CallError, EndpointError, Malformed, Overloaded, RateLimited
from laif_jax.labeling.providers import Reply, make_provider
from laif_jax.records import Status
from tests.labeling.helpers import comparison, judge
from tests.labeling.wire_server import BODIES, Response, openai_body, serve

CASSETTES = Path(__file__).parent / "cassettes"
MODELS = {"openai": "gpt-4.1", "anthropic": "claude-sonnet-4-5", "google": "gemini-2.5-flash"}
KEY = "secret-key-0123456789"


def replay(provider: str, cassette: Path | None = None) -> Endpoint:
    values: dict[str, Any] = {"cassette": str(cassette or CASSETTES / f"{provider}.jsonl")}
    if provider == "openai":
        values["base_url"] = "https://api.openai.com/v1"
    return Endpoint(provider=provider, model=MODELS[provider], **values)


def ask(at: Endpoint, *texts: str) -> list[Reply | CallError]:
    async def run() -> list[Reply | CallError]:
        provider, found = make_provider(at), []
        for text in texts:
            messages = ({"role": "system", "content": "You judge."}, {"role": "user", "content": text})
            try:
                found.append(
                    await provider.call(Call(at, messages, {"temperature": 0.0, "max_tokens": 50}), 0)
                )
            except CallError as error:
                found.append(error)
        await provider.close()
        return found

    return asyncio.run(run())


@pytest.mark.parametrize("provider", list(MODELS))
def test_the_shipped_cassettes_are_played_back(provider: str) -> None:
    texts = (
        "Which is better?",
        "Something harmful",
        "Busy at first",
        "Busy at first",
        "Busy at first",
        "Broken",
    )
    better, harmful, busy, again, last, broken = ask(replay(provider), *texts)
    assert isinstance(better, Reply)
    assert better.text == "Output (b)"
    assert better.usage is not None
    assert (better.usage.prompt_tokens, better.usage.cached_tokens) == (1219, 1024)
    assert isinstance(harmful, Reply)
    assert harmful.refusal
    assert isinstance(busy, Overloaded if provider == "anthropic" else RateLimited)
    assert busy.retry_after == 2.0
    assert isinstance(again, Reply)
    assert isinstance(last, Reply)
    assert again.text == last.text == "Output (a)"
    assert isinstance(broken, Malformed)


def test_a_request_that_was_not_recorded_is_an_error_and_goes_nowhere() -> None:
    (error,) = ask(replay("openai"), "Something else")
    assert isinstance(error, BadRequest)
    assert "holds no answer" in error.reason
    assert "Something else" in error.reason


def test_what_was_played_back_never_passes_for_the_real_endpoint() -> None:
    real = Endpoint(provider="openai", model="gpt-4.1", base_url="https://api.openai.com/v1")
    assert replay("openai").key != real.key
    copied = Endpoint.model_validate(replay("openai").model_dump())
    assert copied.key == replay("openai").key


@pytest.mark.parametrize("provider", list(MODELS))
def test_recording_and_playing_back(provider: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    cassette = tmp_path / "made" / "here.jsonl"
    headers = {"Retry-After": "3", "Set-Cookie": "session=1", "X-Account": "acme"}
    answers = [
        Response(429, {"error": {"message": f"key {KEY} is over its limit"}}, headers),
        Response(body=BODIES[provider]("first")),
        Response(body=BODIES[provider]("second")),
    ]
    with serve(lambda request: answers[len(server.requests) - 1]) as server:
        url = f"{server.url}/v1" if provider == "openai" else server.url
        values = {"provider": provider, "model": "fake", "base_url": url, "cassette": str(cassette)}
        recorder = Endpoint.model_validate({**values, "cassette_mode": "record", "api_key_env": "MY_KEY"})
        recorded = ask(recorder, "x", "x", "y")
    assert stat.S_IMODE(cassette.stat().st_mode) == 0o600
    text = cassette.read_text()
    assert KEY not in text
    assert "[key] is over its limit" in text
    assert "session=1" not in text
    assert "acme" not in text
    # The server is gone, and there is no key.
    monkeypatch.delenv("MY_KEY")
    played = ask(Endpoint.model_validate({**values, "api_key_env": "MY_KEY"}), "x", "x", "y")
    assert isinstance(recorded[0], RateLimited)
    assert isinstance(played[0], RateLimited)
    assert played[0].retry_after == recorded[0].retry_after == 3.0
    assert played[1:] == recorded[1:]
    assert [reply.text for reply in played[1:] if isinstance(reply, Reply)] == ["first", "second"]


def test_a_body_that_is_not_text_is_kept(tmp_path: Path) -> None:
    cassette = tmp_path / "c.jsonl"
    with serve(Response(body=b"\xff\xfe\x00")) as server:
        values = {
            "provider": "openai",
            "model": "m",
            "base_url": f"{server.url}/v1",
            "cassette": str(cassette),
        }
        ask(Endpoint.model_validate({**values, "cassette_mode": "record"}), "x")
    (error,) = ask(Endpoint.model_validate(values), "x")
    assert isinstance(error, Malformed)


@pytest.mark.parametrize(
    "text", ["not json", "[1]", '{"request": {}}', '{"request": {"body": 1}, "response": {"status": "x"}}']
)
def test_a_broken_cassette_names_its_line(text: str, tmp_path: Path) -> None:
    cassette = tmp_path / "c.jsonl"
    cassette.write_text((CASSETTES / "openai.jsonl").read_text().splitlines()[0] + "\n\n" + text)
    with pytest.raises(EndpointError, match="line 3"):
        make_provider(replay("openai", cassette))
    with pytest.raises(EndpointError, match="cannot be read"):
        make_provider(replay("openai", tmp_path / "none.jsonl"))


def test_a_cassette_cannot_be_any_file() -> None:
    for path in ("/home/me/.bashrc", "tape.json"):
        with pytest.raises(ValueError, match=r"\.jsonl"):
            replay("openai", Path(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cassette_that_cannot_be_written_is_told_before_anything_is_asked(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    at = replay("openai", tmp_path / "c.jsonl").model_copy(update={"cassette_mode": "record"})
    with pytest.raises(EndpointError, match="cannot be written"):
        make_provider(at)


def test_a_whole_job_runs_from_a_cassette(tmp_path: Path) -> None:
    cassette = tmp_path / "judge.jsonl"
    items = [comparison(number, 0.1, 0.9) for number in range(3)]
    with serve(Response(body=openai_body("Output (b)"))) as server:
        values = {
            "provider": "openai",
            "model": "m",
            "base_url": f"{server.url}/v1",
            "cassette": str(cassette),
        }
        recorder = Endpoint.model_validate({**values, "cassette_mode": "record"})
        first = judge(tmp_path / "one", recorder, "laif_basic", items, order="seeded")
    second = judge(tmp_path / "two", Endpoint.model_validate(values), "laif_basic", items, order="seeded")
    assert [row.p_b for row in first] == [row.p_b for row in second]
    assert {row.status for row in second} == {Status.OK}
    assert len(cassette.read_text().splitlines()) == 3
    assert all("Authorization" not in line for line in cassette.read_text().splitlines())
    assert json.loads(cassette.read_text().splitlines()[0])["request"]["url"].endswith("/chat/completions")
