"""Keys come from the environment or a private file, and are found nowhere afterwards."""

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from unittest import mock
from urllib.parse import quote, unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.config.schema import EndpointSpec
from laif_jax.labeling import keys
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.errors import EndpointError
from laif_jax.labeling.keys import Key, RedactingFilter, read_key, redact
from tests.labeling.helpers import comparison, judge
from tests.labeling.wire_server import Response, serve

SECRET = "very-secret-0123456789"


def endpoint(**rest: object) -> Endpoint:
    return Endpoint.model_validate({"provider": "openai", "base_url": "http://h/v1", "model": "m", **rest})


def key_file(folder: Path, content: str = SECRET + "\n", mode: int = 0o600) -> str:
    path = folder / "key"
    path.write_text(content)
    path.chmod(mode)
    return str(path)


def test_a_private_file_gives_the_key(tmp_path: Path) -> None:
    key = read_key(endpoint(api_key_file=key_file(tmp_path)))
    assert key is not None
    assert key.reveal() == SECRET


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o622])
def test_a_file_that_others_can_read_is_refused(mode: int, tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match="chmod 600") as error:
        read_key(endpoint(api_key_file=key_file(tmp_path, mode=mode)))
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "content", ["", "\n", "-----BEGIN PRIVATE KEY-----\nabc\n", "two words", "ключ", "x" * 9000]
)
def test_a_file_that_holds_no_key_is_never_sent(content: str, tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match="does not hold a key") as error:
        read_key(endpoint(api_key_file=key_file(tmp_path, content)))
    assert "BEGIN" not in str(error.value)


def test_a_pipe_is_no_key_file_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(EndpointError, match="is no file"):
        read_key(endpoint(api_key_file=str(tmp_path / "pipe")))


@pytest.mark.parametrize(
    "options", [{"api_key": "x"}, {"extra": {"apiKey": "x"}}, {"list": [{"client_secret": "x"}]}]
)
def test_options_hold_no_secrets_at_any_depth(options: dict) -> None:
    with pytest.raises(ValueError, match="must not hold"):
        endpoint(options=options)


def test_missing_sources_are_explained(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(EndpointError, match="NO_KEY is not set"):
        read_key(endpoint(api_key_env="NO_KEY"))
    with pytest.raises(EndpointError, match="cannot be read"):
        read_key(endpoint(api_key_file=str(tmp_path / "none")))
    with pytest.raises(EndpointError, match=r"(no file|cannot be read)"):
        read_key(endpoint(api_key_file=str(tmp_path)))
    with pytest.raises(ValueError, match="one of"):
        endpoint(api_key_env="A", api_key_file="b")
    with pytest.raises(ValueError, match="one of"):
        EndpointSpec(provider="openai", base_url="http://h/v1", api_key_env="A", api_key_file="b")
    assert read_key(endpoint()) is None


def test_a_key_does_not_show_itself() -> None:
    key = Key(SECRET)
    shown = f"{key} {key!r} {[key]} { ({'k': key}) }" + repr(vars(type(key)).get("__dict__"))
    assert SECRET not in shown
    for copier in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError):
            copier(key)


@given(before=st.text(), after=st.text())
def test_a_known_key_is_taken_out_of_any_text(before: str, after: str) -> None:
    Key(SECRET)
    cleaned = redact(before + SECRET + after)
    assert SECRET not in cleaned
    assert redact(cleaned) == cleaned


@given(st.text())
def test_other_text_is_not_changed(text: str) -> None:
    if SECRET not in text:
        assert redact(text) == text


def written(key: str, forms: list[int]) -> str:
    """A key as an endpoint may write it into JSON: each character plain, or escaped in one of several ways."""
    found = []
    for character, form in zip(key, forms, strict=True):
        code = ord(character)
        plain = json.dumps(character)[1:-1]
        slash = "\\/" if character == "/" else plain
        found.append([plain, f"\\u{code:04x}", f"\\u{code:04X}", slash][form])
    return "".join(found)


@settings(deadline=None)
@given(
    st.text('abcABC019-_+/=."\\', min_size=8, max_size=40).flatmap(
        lambda key: st.tuples(
            st.just(key), st.lists(st.integers(0, 3), min_size=len(key), max_size=len(key)), st.booleans()
        )
    )
)
def test_a_known_key_is_found_however_it_is_escaped(drawn: tuple[str, list[int], bool]) -> None:
    key, forms, twice = drawn
    key = "k3y" + key
    with mock.patch.object(keys, "_known", set()):  # not the other examples' keys
        Key(key)
        check_escaped(key, forms, twice)


def test_a_key_that_ends_with_a_backslash_is_found_whole() -> None:
    with mock.patch.object(keys, "_known", set()):
        Key("k3yaaaaaaaa\\")
        check_escaped("k3yaaaaaaaa\\", [0] * 9, False)


def check_escaped(key: str, forms: list[int], twice: bool) -> None:
    text = f'{{"error": "the key {written(key, [0, 0, 0, *forms])} is wrong, at https://h/?q={quote(key, safe="")}"}}'
    assert key in json.loads(text)["error"]
    if twice:  # JSON as a text in JSON, as proxies wrap what they got
        text = json.dumps({"upstream": text})
    said = json.loads(redact(text))
    said = json.loads(said["upstream"]) if twice else said
    assert key not in said["error"]
    assert key not in unquote(said["error"])
    assert said["error"].endswith("=[key]")


def test_a_key_that_begins_like_another_leaves_nothing_over() -> None:
    keys = ["prefix-of-keys" + "0" * n for n in range(12)]
    for key in keys:
        Key(key)
    for key in keys:
        assert redact(f"Bearer {key}.") == "Bearer [key]."


def test_short_values_are_no_secrets() -> None:
    Key("EMPTY")
    assert redact("EMPTY answers stay") == "EMPTY answers stay"


@pytest.mark.parametrize(
    "secret",
    [
        "sk-proj-abcdefghijklmnop1234",
        "sk-ant-api03-abcdefghijklmnop",
        "AIza" + "Sy" + "a" * 33,
        "hf_" + "a" * 30,
        "ya29.a0AfH6SMBxabcdefghij",
    ],
)
def test_what_looks_like_a_key_is_not_shown(secret: str) -> None:
    assert secret not in redact(f"failed with {secret}.", shapes=True)
    assert secret not in redact(f"Authorization: Bearer {secret}", shapes=True)
    # A model's own words stay as they are.
    assert redact(secret) == secret


def test_logs_are_cleaned(capsys) -> None:
    Key(SECRET)
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(RedactingFilter())
    log = logging.Logger("test")
    log.addHandler(handler)
    log.warning("calling with %s and %d", SECRET, 3)
    try:
        raise ValueError(SECRET)
    except ValueError:
        log.exception("it failed")
    shown = capsys.readouterr().err
    assert SECRET not in shown
    assert "calling with [key] and 3" in shown
    assert "Traceback" in shown


@pytest.mark.parametrize("where", ["thread", "main"])
def test_what_crashes_is_logged_without_keys(where: str) -> None:
    """Python itself would print the traceback past the log."""
    code = (
        "import threading\n"
        "from laif_jax.labeling.keys import Key\n"
        "from laif_jax.labeling.logs import set_up\n"
        f"set_up('json')\nKey({SECRET!r})\n"
        f"def crash(): raise ValueError('it said {SECRET}')\n"
        "if MAIN: crash()\n"
        "thread = threading.Thread(target=crash)\nthread.start()\nthread.join()\n"
    ).replace("MAIN", str(where == "main"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == (1 if where == "main" else 0)
    assert SECRET not in done.stderr
    (line,) = map(json.loads, done.stderr.splitlines())
    assert line["level"] == "CRITICAL"
    assert "it said [key]" in line["exception"]


def test_nothing_that_a_run_leaves_behind_holds_the_key(tmp_path: Path, caplog) -> None:
    """The endpoint quotes the key back in headers, errors and answers; files and logs are searched for it."""
    caplog.set_level(logging.DEBUG)
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    file = key_file(secrets)
    quoting = {"X-Key": SECRET}
    seen = []

    def answer(request) -> Response:
        seen.append(request.headers.get("authorization", request.headers.get("x-api-key", "")))
        if len(seen) % 3 == 0:
            return Response(500, {"error": {"message": f"{SECRET} crashed"}}, quoting)
        if len(seen) % 3 == 1:
            return Response(400, {"error": {"message": f"bad {SECRET}"}}, quoting)
        text = f"Output (a), your key is {SECRET}"
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return Response(
            200, {"choices": [choice], "model": SECRET, "content": [{"type": "text", "text": text}]}
        )

    left = tmp_path / "left"
    with serve(answer) as server:
        for provider, url in (("openai", f"{server.url}/v1"), ("anthropic", server.url)):
            at = Endpoint.model_validate(
                {"provider": provider, "base_url": url, "model": "m", "api_key_file": file, "max_attempts": 2}
                | {"cassette": str(left / f"{provider}.jsonl"), "cassette_mode": "record"}
            )
            items = [comparison(number, 0.1, 0.9) for number in range(4)]
            for row in judge(left / provider, at, "laif_basic", items):
                assert SECRET not in row.model_dump_json()
    assert any(SECRET in header for header in seen)
    files = [path for path in left.rglob("*") if path.is_file()]
    assert len(files) >= 4
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in caplog.text


def test_nothing_optional_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, laif_jax.labeling.providers\n"
        "loaded = {'openai', 'anthropic', 'google.genai', 'jax', 'psycopg'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
