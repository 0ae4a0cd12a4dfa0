"""Holders of a service's token are not its operator: what they send reads no file or variable, and goes nowhere new."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.config.load import ConfigError
from laif_jax.config.schema import EndpointSpec
from laif_jax.labeling.allowed import OPERATORS, SELECTS, Allowed, NotAllowedError, load_allowed
from laif_jax.labeling.api import create_app
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.client import LabelClient
from laif_jax.labeling.errors import LabelServiceError
from laif_jax.labeling.jobs import job_request
from laif_jax.labeling.keys import Key
from laif_jax.labeling.problems import Problem
from laif_jax.labeling.service import serve_labels
from laif_jax.labeling.store import Store
from laif_jax.records import Prompt
from tests.labeling.face_server import TOKEN, served
from tests.labeling.helpers import FakeEndpoint, Reply, chat, fake_endpoint, simulated

KEY, OTHER = "the-operators-key-0123456789", "another-secret-of-the-machine"
AUTH = {"Authorization": f"Bearer {TOKEN}"}
PRICES = {"prompt_price": 1.0, "completion_price": 2.0}


@pytest.fixture
def ours() -> Iterator[FakeEndpoint]:
    with fake_endpoint(lambda number, request: Reply(body=chat("fine"))) as server:
        yield server


@pytest.fixture
def theirs() -> Iterator[FakeEndpoint]:
    """The attacker's own server: nothing may ever arrive there."""
    with fake_endpoint(lambda number, request: Reply(body=chat("thank you"))) as server:
        yield server


@pytest.fixture(autouse=True)
def secrets(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("THE_KEY", KEY)
    monkeypatch.setenv("OTHER_SECRET", OTHER)
    file = tmp_path / "secret"
    file.write_text(OTHER)
    file.chmod(0o600)
    return file


def listed(server: FakeEndpoint, **rest: Any) -> EndpointSpec:
    fields = {"provider": "openai", "base_url": server.url, "model": "m", "api_key_env": "THE_KEY"}
    return EndpointSpec.model_validate({**fields, "client": "plain", **rest})


def sent(server: FakeEndpoint, **rest: Any) -> dict[str, Any]:
    return {"provider": "openai", "base_url": server.url, "model": "m", **rest}


def job(endpoint: dict[str, Any]) -> dict[str, Any]:
    prompt = Prompt.from_text("What is 2 + 2?").model_dump(mode="json")
    return {"kind": "complete", "generator": "g", "prompts": [prompt], "endpoint": endpoint}


class Service:
    """An application whose operator lists one endpoint at `ours`."""

    def __init__(self, folder: Path, allowed: Allowed) -> None:
        self.store = Store(folder)
        app = create_app(self.store, token=Key(TOKEN), allowed=allowed)
        self.client = TestClient(app, headers=AUTH)

    def __enter__(self) -> "Service":
        self.client.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.client.__exit__(*error)

    def submit(self, endpoint: dict[str, Any]) -> Any:
        return self.client.post("/v1/jobs", json=job(endpoint))

    def finish(self, job_id: str) -> dict[str, Any]:
        end = time.monotonic() + 60
        while (status := self.client.get(f"/v1/jobs/{job_id}").json())["state"] == "running":
            assert time.monotonic() < end
            time.sleep(0.01)
        return status


def refused(answer: Any) -> Problem:
    assert answer.status_code == 403, answer.text
    problem = Problem.model_validate(answer.json())
    assert problem.kind == "endpoint_not_allowed"
    for secret in (KEY, OTHER, "THE_KEY"):
        assert secret not in answer.text
    return problem


def test_a_listed_endpoint_is_asked_with_the_operators_key(tmp_path: Path, ours: FakeEndpoint) -> None:
    with Service(tmp_path / "store", Allowed({"m": listed(ours)})) as service:
        answer = service.submit(sent(ours))
        assert answer.status_code == 202, answer.text
        assert service.finish(answer.json()["id"])["counts"] == {"ok": 1}
    assert [headers["Authorization"] for headers in ours.headers] == [f"Bearer {KEY}"]


def attacks(ours: FakeEndpoint, theirs: FakeEndpoint, folder: Path) -> dict[str, dict[str, Any]]:
    file = {"api_key_file": str(folder / "secret")}
    google = {"provider": "google", "model": "m", "base_url": theirs.url}
    return {
        "a variable, to an address of theirs": sent(theirs, api_key_env="OTHER_SECRET"),
        "the operator's variable, to an address of theirs": sent(theirs, api_key_env="THE_KEY"),
        "a file, to an address of theirs": sent(theirs, **file),
        "nothing, to an address of theirs": sent(theirs),
        "a variable, to the listed address": sent(ours, api_key_env="OTHER_SECRET"),
        "a file, to the listed address": sent(ours, **file),
        "a file that is not there": sent(ours, api_key_file=str(folder / "none")),
        "another model at the operator's expense": sent(ours, model="dearer"),
        "fields that cost more": sent(ours, options={"service_tier": "priority"}),
        "a batch": sent(ours, batch=True),
        "a price of nothing": sent(ours, prompt_price=0.0, completion_price=0.0),
        "a discount": sent(ours, **PRICES, batch_discount=1.0),
        "a file of ours that is written": sent(
            ours, cassette=f"{folder}/new/x.jsonl", cassette_mode="record"
        ),
        "a file of ours that is read": sent(ours, cassette=str(folder / "lines.jsonl")),
        "answers under another's name": sent(ours, identity="https://api.openai.com/v1"),
        "answers that count as a local model's": sent(ours, identity="gguf:" + "0" * 32),
        "a path below the listed one": {**sent(ours), "base_url": ours.url + "/../x"},
        "the listed host as a user": {
            **sent(ours),
            "base_url": theirs.url.replace("127.", "127.0.0.1.x@127."),
        },
        "a service of this machine alone": sent(ours, base_url="http://127.0.0.1:1/v1"),
        "the cloud's metadata": sent(ours, base_url="http://169.254.169.254/latest"),
        "Google's credentials, to an address of theirs": {**google, "project": "p", "location": "l"},
        "files in a bucket": {**google, "project": "p", "batch": True, "batch_folder": "gs://theirs/x"},
        "another provider's key": {"provider": "anthropic", "model": "m", "api_key_env": "THE_KEY"},
    }


def test_nothing_else_gets_out(tmp_path: Path, ours: FakeEndpoint, theirs: FakeEndpoint, caplog) -> None:
    (tmp_path / "lines.jsonl").write_text(f'{{"request": "{OTHER}"}}\n')
    before = {path: path.stat().st_mode for path in tmp_path.rglob("*")}
    with Service(tmp_path / "store", Allowed({"m": listed(ours, **PRICES)})) as service:
        for name, endpoint in attacks(ours, theirs, tmp_path).items():
            answer = service.submit(endpoint)
            if "as a user" in name:  # no address at all
                assert answer.status_code == 422, name
            else:
                problem = refused(answer)
                assert str(tmp_path) not in problem.detail, name
        assert service.client.get("/v1/jobs").json() == []
        assert service.client.get("/v1/stats").json()["requests"] == {}
    assert not theirs.calls
    assert not ours.calls
    left = {path for path in tmp_path.rglob("*") if (tmp_path / "store") not in (path, *path.parents)}
    assert left == set(before)
    for path in (tmp_path / "store").rglob("*"):
        assert not path.is_file() or OTHER.encode() not in path.read_bytes()
    assert OTHER not in caplog.text


def test_a_refusal_does_not_tell_what_is_there(tmp_path: Path, ours: FakeEndpoint) -> None:
    """The same words for a file that is there and one that is not, for a variable that is set and one that is not."""
    (tmp_path / "lines.jsonl").write_text("no cassette\n")
    pairs = [
        ({"api_key_file": str(tmp_path / "secret")}, {"api_key_file": str(tmp_path / "none")}),
        ({"api_key_env": "OTHER_SECRET"}, {"api_key_env": "NOT_SET_ANYWHERE"}),
        ({"cassette": str(tmp_path / "lines.jsonl")}, {"cassette": str(tmp_path / "none.jsonl")}),
    ]
    with Service(tmp_path / "store", Allowed({"m": listed(ours)})) as service:
        for there, not_there in pairs:
            answers = [refused(service.submit(sent(ours, **fields))).detail for fields in (there, not_there)]
            assert answers[0] == answers[1]


def test_without_a_list_only_simulated_endpoints_are_asked(tmp_path: Path, theirs: FakeEndpoint) -> None:
    with Service(tmp_path / "store", Allowed({})) as service:
        assert "none but simulated" in refused(service.submit(sent(theirs))).detail
        assert service.submit(simulated().model_dump(mode="json")).status_code == 202
        for odd in (
            {"base_url": theirs.url, "api_key_file": str(tmp_path / "secret")},
            {"cassette": str(tmp_path / "new.jsonl"), "cassette_mode": "record"},
            {"prompt_price": 1e6, "completion_price": 1e6},  # would use up the budget of all
        ):
            refused(service.submit(simulated().model_dump(mode="json") | odd))
    assert not theirs.calls
    assert not (tmp_path / "new.jsonl").exists()


def test_workers_of_the_store_find_the_operators_entry(tmp_path: Path) -> None:
    """A worker reads the job from the store: there it must stand as it was admitted."""
    with fake_endpoint(lambda number, request: Reply(body=chat("late"), hang=60.0)) as server:
        entry = listed(server, concurrency=3, timeout=70.0, **PRICES)
        with Service(tmp_path / "store", Allowed({"m": entry})) as service:
            answer = service.submit(sent(server, concurrency=500, timeout=9000.0, max_attempts=99))
            end, body = time.monotonic() + 60, None
            while body is None:
                assert time.monotonic() < end
                body = service.store.job_body(answer.json()["id"])
            server.release.set()
            service.finish(answer.json()["id"])
    found = job_request.validate_json(body).endpoint
    assert found == Endpoint.from_spec(entry)
    assert (found.concurrency, found.timeout, found.prompt_price) == (3, 70.0, 1.0)


def test_the_operators_prices_count(tmp_path: Path, ours: FakeEndpoint) -> None:
    with Service(tmp_path / "store", Allowed({"m": listed(ours, **PRICES)})) as service:
        service.finish(service.submit(sent(ours)).json()["id"])
        assert service.client.get("/v1/stats").json()["cost"] == pytest.approx((11 * 1.0 + 2 * 2.0) / 1e6)


def test_a_cassette_of_the_operators_is_played_to_who_knows_nothing_of_it(tmp_path: Path, ours) -> None:
    tape = tmp_path / "tape.jsonl"
    tape.write_text("")
    entry = Endpoint.from_spec(listed(ours, cassette=str(tape)))
    allowed = Allowed({"m": listed(ours, cassette=str(tape))})
    assert allowed.admit(Endpoint.model_validate(sent(ours))) == entry
    assert allowed.admit(entry) == entry


VALUES = {
    "provider": st.sampled_from(["openai", "anthropic", "google"]),
    "model": st.sampled_from(["m", "other"]),
    "base_url": st.sampled_from(["http://h/v1", "http://evil/v1"]),
    "project": st.sampled_from([None, "p"]),
    "location": st.sampled_from([None, "l"]),
    "options": st.sampled_from([{}, {"a": 1}]),
    "batch": st.booleans(),
    "identity": st.sampled_from(["", "http://h/v1", "https://api.openai.com/v1", "gguf:0"]),
    "api_key_env": st.sampled_from([None, "THE_KEY", "OTHER_SECRET"]),
    "cassette": st.sampled_from([None, "/tmp/x.jsonl"]),
    "batch_folder": st.sampled_from([None, "gs://x/y"]),
    "prompt_price": st.sampled_from([None, 0.0, 1.0]),
    "concurrency": st.sampled_from([1, 10**6]),
}


@settings(deadline=None)
@given(st.fixed_dictionaries(VALUES))
def test_what_is_admitted_is_always_an_entry(fields: dict[str, Any]) -> None:
    specs = {
        "a": EndpointSpec(provider="openai", base_url="http://h/v1", model="m"),
        "b": EndpointSpec(provider="openai", base_url="http://h/v1", model="m", options={"a": 1}),
    }
    entries = [Endpoint.from_spec(spec) for spec in specs.values()]
    endpoint = Endpoint.model_validate(fields | {"completion_price": fields["prompt_price"]})
    try:
        found = Allowed(specs).admit(endpoint)
    except NotAllowedError:
        return
    assert found in entries
    assert all(getattr(found, name) == getattr(endpoint, name) for name in SELECTS)


def test_every_field_of_an_endpoint_has_its_rule() -> None:
    """Whoever adds a field must say here whose it is."""
    entrys = {"client", "concurrency", "timeout", "max_attempts"}
    assert set(Endpoint.model_fields) == {*SELECTS, *OPERATORS, *entrys, "identity", "simulated"}


# ---- the operator's file -----------------------------------------------------------------------------------------


def write(folder: Path, text: str) -> Path:
    path = folder / "endpoints.yaml"
    path.write_text(text)
    return path


def test_a_studys_file_can_be_the_list(tmp_path: Path) -> None:
    text = "name: study\nendpoints:\n  gpt: {provider: openai, base_url: 'http://h/v1', model: m}\n"
    for name in ("weak", "strong"):  # these need no entry, and are none
        text += f"  {name}: {{provider: simulated, simulated: {{world: planted}}}}\n"
    assert load_allowed(write(tmp_path, text)).describe() == "gpt (m at http://h/v1)"
    assert len(load_allowed(None)) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\n", "endpoints: this key is required"),
        ("endpoints: {}\n", "endpoints"),
        ("endpoints: {a: {provider: openai}}\n", "needs `base_url`"),
        ("endpoints: {a: {provider: openai, base_url: 'http://h', nam: b}}\n", "unknown key"),
        ("endpoints: {a: {provider: llama_cpp, gguf: x.gguf}}\n", "starts no model servers"),
        (
            "endpoints:\n  a: {provider: openai, base_url: 'http://h', concurrency: 2}\n"
            "  b: {provider: openai, base_url: 'http://h/'}\n",
            "endpoints.a and endpoints.b ask the same",
        ),
        (
            "endpoints: {a: {provider: openai, base_url: 'http://h', api_key_env: NOT_SET_ANYWHERE}}\n",
            "NOT_SET_ANYWHERE is not set",
        ),
    ],
)
def test_a_list_that_cannot_be_used_is_told_at_the_start(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises((ConfigError, LabelServiceError), match=message):
        load_allowed(write(tmp_path, text))


def test_the_options_need_a_token(tmp_path: Path) -> None:
    with pytest.raises(LabelServiceError, match="no effect without a token"):
        serve_labels("127.0.0.1", 0, tmp_path / "store", endpoints=tmp_path / "none.yaml")
    with pytest.raises(LabelServiceError, match="no effect without a token"):
        serve_labels("127.0.0.1", 0, tmp_path / "store", any_endpoint=True)
    assert not (tmp_path / "store").exists()


# ---- real processes: what a training run on another machine does --------------------------------------------------


def test_a_remote_service_answers_a_run_that_holds_no_key(tmp_path: Path, ours: FakeEndpoint, theirs) -> None:
    """The documented way: the operator's file has the key's name; the study's has provider, model and address."""
    tree = {
        "endpoints": {
            "gpt": listed(ours).model_dump(mode="json", include={*SELECTS, "api_key_env", "client"})
        }
    }
    for name in ("project", "location"):
        del tree["endpoints"]["gpt"][name]
    file = write(tmp_path, json.dumps(tree))
    env = {"LAIF_LABEL_TOKEN": TOKEN, "THE_KEY": KEY}
    options = ("--host", "0.0.0.0", "--endpoints", str(file))
    with (
        served(tmp_path / "store", *options, env=env) as (url, _),
        LabelClient(url, token=Key(TOKEN)) as client,
    ):
        spec = EndpointSpec(provider="openai", base_url=ours.url, model="m")
        found = client.complete(spec, [Prompt.from_text("Q")], generator="g")
        assert [completion.model_dump()["text"] for completion in found] == ["fine"]
        foreign = EndpointSpec(provider="openai", base_url=theirs.url, model="m", api_key_env="THE_KEY")
        with pytest.raises(LabelServiceError, match=r"403.*gpt"):
            client.complete(foreign, [Prompt.from_text("Q")], generator="g")
    assert ours.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert not theirs.calls


def test_a_token_on_this_machine_restricts_too_unless_its_holders_are_trusted(tmp_path: Path, theirs) -> None:
    """A proxy with TLS stands before a service that listens on this machine alone."""
    endpoint = EndpointSpec(provider="openai", base_url=theirs.url, model="m", api_key_env="OTHER_SECRET")
    env = {"LAIF_LABEL_TOKEN": TOKEN}
    for options, trusted in (((), False), (("--any-endpoint",), True)):
        store = tmp_path / f"store-{trusted}"
        with served(store, *options, env=env) as (url, _), LabelClient(url, token=Key(TOKEN)) as client:
            if trusted:
                assert len(client.complete(endpoint, [Prompt.from_text("Q")], generator="g")) == 1
            else:
                with pytest.raises(LabelServiceError, match="403"):
                    client.complete(endpoint, [Prompt.from_text("Q")], generator="g")
        assert len(theirs.headers) == int(trusted)
        assert ("--any-endpoint" in store.with_name(store.name + ".log").read_text()) == trusted
