"""The API under `schemathesis`: nothing that is sent gives a 500, and every error has the documented shape."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from laif_jax.labeling.problems import Problem
from tests.labeling.face_server import served

schemathesis = pytest.importorskip("schemathesis", reason="the test extra brings schemathesis along")

from schemathesis.checks import not_a_server_error  # noqa: E402 (only where it is installed)
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

NOWHERE = "http://127.0.0.1:9/v1"  # nobody listens there
CALM = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    store = tmp_path_factory.mktemp("fuzz") / "store"
    with served(store, "--token-env", "", "--max-rate", "100000") as (address, _):
        yield address
    assert "Traceback" not in store.with_name("store.log").read_text()


def tame(value: Any) -> Any:
    """The API is tested, not the network: a job that is accepted reaches nobody, and touches no file."""
    if isinstance(value, list):
        return [tame(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {name: tame(item) for name, item in value.items()}
    if "provider" in value:
        for name in ("cassette", "api_key_file", "project", "batch", "batch_folder"):
            value.pop(name, None)
        value |= {"max_attempts": 1, "timeout": 1.0}
        value |= {} if value["provider"] == "simulated" else {"base_url": NOWHERE, "client": "plain"}
    return value


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


def check(status: int, text: str) -> None:
    assert status < 500, text
    if status >= 400:
        problem = Problem.model_validate_json(text)
        assert problem.detail
        assert problem.kind


OPERATIONS = [
    ("POST", "/v1/jobs"),
    ("GET", "/v1/jobs"),
    ("GET", "/v1/jobs/{job_id}"),
    ("POST", "/v1/jobs/{job_id}/stop"),
    ("GET", "/v1/jobs/{job_id}/results"),
    ("GET", "/health"),
    ("GET", "/v1/stats"),
    ("GET", "/v1/overview"),
    ("GET", "/metrics"),
]


def test_every_operation_is_fuzzed(url: str) -> None:
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    assert {(method.upper(), path) for path in paths for method in paths[path]} == set(OPERATIONS)


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_what_the_description_allows_and_what_it_does_not(
    url: str, method: str, path: str, mode: Any
) -> None:
    operation = schemathesis.openapi.from_url(f"{url}/openapi.json")[path][method]
    takes_something = operation.body or operation.path_parameters or operation.query
    if mode is schemathesis.GenerationMode.NEGATIVE and not takes_something:
        pytest.skip("it takes nothing that could be wrong")

    @CALM
    @given(case=operation.as_strategy(generation_mode=mode))
    def fuzz(case: Any) -> None:
        case.body = tame(case.body)
        response = case.call(timeout=30)
        case.validate_response(response, checks=CHECKS)
        check(response.status_code, response.text)

    fuzz()


@CALM
@given(
    body=st.one_of(
        st.binary(max_size=300),
        st.text(max_size=100).map(lambda text: f'{{"kind": "{text}"}}'.encode("utf-8", "replace")),
    )
)
def test_bodies_that_are_no_jobs(url: str, body: bytes) -> None:
    answer = httpx.post(f"{url}/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (415, 422)
    check(answer.status_code, answer.text)


HUGE: list[dict[str, Any]] = [
    {"endpoint": {"prompt_price": 1e300, "completion_price": 1e300}},
    {"endpoint": {"prompt_price": float("inf"), "completion_price": 1.0}},
    {"endpoint": {"prompt_price": 1.0}},  # half a price
    {"endpoint": {"timeout": float("inf")}},
    {"endpoint": {"simulated": {"world": "planted", "latency": float("inf")}}},
    {"endpoint": {"simulated": {"world": "planted", "noise": float("nan")}}},
    {"endpoint": {"options": {"max_tokens": 10**30}}},
    {"budget": "99999999999999999USD"},
    {"max_tokens": 10**30},
    {"n": 10**30},
]


@pytest.mark.parametrize("change", HUGE, ids=lambda change: json.dumps(change)[:60])
def test_numbers_that_no_database_holds_are_refused(url: str, change: dict[str, Any]) -> None:
    """Before anything runs: an integer of more than 64 bits would otherwise end a job in the middle."""
    endpoint = {"provider": "simulated", "simulated": {"world": "planted"}, **change.pop("endpoint", {})}
    prompt = {"messages": [{"role": "user", "content": "What is 1 + 1?"}]}
    job = {"kind": "complete", "generator": "g", "prompts": [prompt], "endpoint": endpoint, **change}
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{url}/v1/jobs", content=json.dumps(job), headers=headers)
    assert answer.status_code == 422
    check(answer.status_code, answer.text)


def test_the_largest_numbers_that_are_taken_fit(url: str) -> None:
    prices = dict.fromkeys(("prompt_price", "cached_prompt_price", "completion_price"), 1e6)
    endpoint = {"provider": "simulated", "simulated": {"world": "planted"}, "timeout": 1e6, **prices}
    prompt = {"messages": [{"role": "user", "content": "What is 1 + 1?"}]}
    job: dict[str, Any] = {"kind": "complete", "generator": "g", "prompts": [prompt], "endpoint": endpoint}
    job |= {"budget": "1000000000USD", "max_tokens": 10**8}
    status = httpx.post(f"{url}/v1/jobs", json=job).json()
    end = time.monotonic() + 60
    while (found := httpx.get(f"{url}/v1/jobs/{status['id']}").json())["state"] == "running":
        assert time.monotonic() < end
        time.sleep(0.02)
    assert (found["state"], found["counts"]) == ("done", {"ok": 1})


@CALM
@given(
    path=st.text(st.characters(codec="utf-8"), max_size=40),
    query=st.text(st.characters(codec="utf-8"), max_size=40),
)
def test_paths_and_queries(url: str, path: str, query: str) -> None:
    for start in ("/", "/v1/jobs/", "/web/"):
        # Every character is sent as it is meant, slashes and dots included.
        target = httpx.URL(url, raw_path=(start.encode() + quoted(path) + b"?" + quoted(query)))
        answer = httpx.get(target)
        check(answer.status_code, answer.text)
        assert answer.status_code in (200, 204, 404, 405, 422)


def quoted(text: str) -> bytes:
    return "".join(f"%{byte:02X}" for byte in text.encode()).encode()


def test_a_job_with_odd_texts_is_labelled_or_refused(url: str) -> None:
    """Texts that databases and JSON have trouble with."""
    for text in (
        "\x00",
        "\ud800",
        "\U0010ffff",
        "a" * 100_000,
        "\r\n\x1b[2J",
        "'; DROP TABLE jobs; --",
        "{output_2}",
    ):
        prompt = {"messages": [{"role": "user", "content": text}]}
        job = {
            "kind": "complete",
            "generator": text,
            "prompts": [prompt],
            "endpoint": {"provider": "simulated", "simulated": {"world": "planted"}, "model": text},
        }
        answer = httpx.post(
            f"{url}/v1/jobs", content=json.dumps(job), headers={"Content-Type": "application/json"}
        )
        check(answer.status_code, answer.text)
        assert answer.status_code in (202, 422)
        for path in ("/v1/jobs", "/v1/overview", "/metrics", "/v1/stats"):
            assert httpx.get(url + path).status_code == 200
