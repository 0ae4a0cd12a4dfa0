"""A web page that is open in the user's browser must not make the service send a key to an address of its choice."""

import httpx
import pytest

from laif_jax.labeling import start_service
from laif_jax.labeling.jobs import CompleteJob
from laif_jax.records import Prompt
from tests.labeling.helpers import Reply, at, chat, fake_endpoint


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with start_service(tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),  # what a page of any site may send unasked
        ({}, 415),
        ({"Content-Type": "application/json", "Origin": "http://evil.example"}, 403),
        # A name of the attacker's that resolves to this machine.
        (
            {
                "Content-Type": "application/json",
                "Origin": "http://evil.example:8080",
                "Host": "evil.example:8080",
            },
            403,
        ),
        ({"Content-Type": "application/json", "Origin": "null"}, 403),
        ({"Content-Type": "application/json"}, 202),
        ({"Content-Type": "application/json; charset=utf-8", "Origin": "http://127.0.0.1:8080"}, 202),
    ],
)
def test_jobs_are_not_taken_from_web_pages(service, headers, status) -> None:
    with fake_endpoint(lambda number, request: Reply(body=chat("yes"))) as server:
        job = CompleteJob(endpoint=at(server), prompts=(Prompt.from_text(f"Q {headers}"),), generator="g")
        request = httpx.Request(
            "POST", f"{service.url}/v1/jobs", content=job.model_dump_json(), headers=headers
        )
        with httpx.Client(trust_env=False) as client, service.client() as own:
            answer = client.send(request)
            assert answer.status_code == status, answer.text
            if status == 202:
                own.complete(at(server), job.prompts, generator="g")
        assert sum(server.calls.values()) == (status == 202)
