"""The service as a process: jobs over HTTP, SIGKILL in the middle, a client that waits out a restart."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from laif_jax.config.schema import EndpointSpec, SimulatedSpec
from laif_jax.labeling import (
    CriticError,
    EndpointError,
    Failure,
    LabelClient,
    LabelServiceError,
    start_service,
    to_preferences,
)
from laif_jax.labeling.store import Store
from laif_jax.records import Prompt, Status
from tests.labeling.helpers import Reply, at, chat, comparison, fake_endpoint, planted, simulated, truth

SPEC = EndpointSpec(provider="simulated", simulated=SimulatedSpec(world="planted"))


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 20.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with start_service(tmp_path_factory.mktemp("store")) as running:
        yield running


def test_a_job_of_20000_items_is_accepted_and_reported(service) -> None:
    items = planted(20_000)
    seen = []
    with service.client() as client:
        judgements = client.judge(
            SPEC, "laif_basic", items, order="seeded", on_progress=lambda s: seen.append(s.done)
        )
        assert [j.comparison_id for j in judgements] == [item.id for item in items]
        assert all((j.p_b > 0.5) == (truth(item) == 1.0) for item, j in zip(items, judgements))
        assert seen == sorted(seen)
        assert seen[-1] == 20_000
        assert client.health()["status"] == "ok"
        # Pages of the results.
        url = f"{service.url}/v1/jobs/{client.last_job}/results"
        page = httpx.get(url, params={"offset": 7, "limit": 5}).text.splitlines()
        assert [json.loads(line)["comparison_id"] for line in page] == [item.id for item in items[7:12]]


def test_who_waits_may_let_others_ask_by_the_same_client(service) -> None:
    """What came last is what the caller's own job gave, not what was submitted last."""
    ours, theirs = planted(100)[60:], planted(60)
    asked: list[int] = []

    def elsewhere(seconds: float) -> None:
        if not asked:  # once, while the first job is under way
            asked.append(1)
            asked.append(len(client.judge(SPEC, "ab_logprob", theirs)))
        time.sleep(seconds)

    with service.client(sleep=elsewhere) as client:
        judged = client.judge(SPEC, "ab_logprob", ours)
        assert asked == [1, 60]
        assert {part for j in judged for part in j.parts} == {j.id for j in client.judgements()}


def test_a_second_run_asks_nothing(service) -> None:
    items = planted(50)
    with service.client() as client:
        first = client.judge(SPEC, "ab_logprob", items)
        asked = client.stats()["answers"]
        again = client.judge(SPEC, "ab_logprob", items)
        assert again == first
        status = client.status(client.last_job)
        assert (status.calls, status.cached) == (0, 100)
        assert client.stats()["answers"] == asked
        parts = client.judgements()
        assert len(parts) == 100
        ids = {part.id for part in parts}
        assert all(set(j.parts) <= ids for j in first)
        rows, counts = to_preferences(items, first)
        assert counts["preferences"] == len(rows) == 50


def test_completions_and_failures_come_back_typed(service) -> None:
    prompts = [Prompt.from_text(f"Q{i}") for i in range(30)]
    with service.client() as client:
        spec = simulated(skill=0.5, refusal_rate=0.3)
        results = client.complete(spec, prompts, generator="teacher", n=2)
        assert [r.prompt_id for r in results] == [p.id for p in prompts for _ in range(2)]
        failures = [r for r in results if isinstance(r, Failure)]
        assert 0 < len(failures) < 60
        assert {f.status for f in failures} == {Status.REFUSED}
        assert all(r.generator == "teacher" for r in results)


def test_bad_requests_are_explained(service, monkeypatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with service.client() as client:
        with pytest.raises(CriticError, match="laif_basic"):
            client.judge(SPEC, "no_such_critic", planted(1))
        keyed = EndpointSpec(provider="openai", base_url="http://127.0.0.1:1/v1", api_key_env="NO_SUCH_KEY")
        with pytest.raises(LabelServiceError, match="NO_SUCH_KEY"):
            client.judge(keyed, "laif_basic", planted(1))
        with pytest.raises(EndpointError, match="running"):
            client.judge(EndpointSpec(provider="llama_cpp", gguf="x.gguf"), "laif_basic", planted(1))
        with pytest.raises(LabelServiceError, match="no job"):
            client.status("0" * 16)
    url, kind = f"{service.url}/v1/jobs", {"Content-Type": "application/json"}
    response = httpx.post(url, content=b'{"kind": "judge", "colour": 1}', headers=kind)
    assert response.status_code == 422
    assert "colour" in response.text
    assert httpx.post(url, content=b"not json", headers=kind).status_code == 422
    assert httpx.get(f"{service.url}/openapi.json").status_code == 200


def test_an_empty_job_is_done_at_once(service) -> None:
    with service.client() as client:
        assert client.judge(SPEC, "laif_basic", []) == []


def test_sigkill_in_mid_job_loses_no_answer_and_asks_none_twice(tmp_path) -> None:
    items = [comparison(i, 0.1, 0.9) for i in range(30)]
    block = True

    def reply(number: int, request: dict) -> Reply:
        # The first 20 calls are answered; then the endpoint hangs, so that the kill meets calls in flight.
        hang = 60.0 if block and number >= 20 else 0.0
        return Reply(body=chat("Output (b)"), hang=hang)

    with fake_endpoint(reply) as server:
        endpoint = at(server, timeout=120.0, concurrency=4)
        with start_service(tmp_path / "store") as service:
            client = service.client()

            def submit() -> None:
                with pytest.raises(LabelServiceError, match="killed by signal 9"):
                    client.judge(endpoint, "laif_basic", items)

            thread = threading.Thread(target=submit)
            thread.start()
            wait_for(lambda: client_answers(service.url) == 20 and server.in_flight == 4)
            os.kill(service.pid, signal.SIGKILL)
            thread.join(20)
            assert not thread.is_alive()
        answered = dict(server.answered)
        assert sum(answered.values()) == 20
        block = False
        with start_service(tmp_path / "store") as service, service.client() as client:
            judgements = client.judge(endpoint, "laif_basic", items)
            assert [j.comparison_id for j in judgements] == [item.id for item in items]
            assert {j.status for j in judgements} == {Status.TIE}
            status = client.status(client.last_job)
            assert (status.calls, status.cached) == (40, 20)
        for key in answered:
            assert server.calls[key] == 1
        # 60 calls, and once more those four that were in flight and unanswered.
        assert sum(server.calls.values()) == 64
    store = Store(tmp_path / "store")
    stats = store.stats()
    assert stats["requests"] == {"ok": 60}
    assert stats["results"] == {"ok": 60, "tie": 30}
    store.close()


def client_answers(url: str) -> int:
    return httpx.get(f"{url}/v1/stats").json()["answers"]


def test_sigterm_stores_the_answers_under_way_and_the_client_goes_on_after_a_restart(tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    items = planted(60)
    with fake_endpoint(lambda number, request: Reply(body=chat("Output (b)"), hang=0.1)) as server:
        results: list = []
        client = LabelClient(f"http://127.0.0.1:{port}", poll=0.05, patience=30.0)
        with start_service(tmp_path / "store", port=port) as first:
            thread = threading.Thread(
                target=lambda: results.extend(client.judge(at(server, concurrency=4), "laif_basic", items))
            )
            thread.start()
            wait_for(lambda: client_answers(first.url) > 10)
        assert thread.is_alive()
        with start_service(tmp_path / "store", port=port):
            thread.join(30)
            assert not thread.is_alive()
        assert len(results) == 60
        assert {j.status for j in results} == {Status.TIE}
        assert sum(server.calls.values()) == 120  # nothing twice: what was under way was waited for


def test_the_service_ends_with_its_parent(tmp_path) -> None:
    code = (
        "import sys, time\n"
        "from laif_jax.labeling import start_service\n"
        f"with start_service({str(tmp_path / 'store')!r}) as service:\n"
        "    sys.stdout.write(f'{service.pid}\\n'); sys.stdout.flush(); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for(lambda: not alive(pid))


def test_a_service_that_cannot_start_says_why(tmp_path) -> None:
    store = Store(tmp_path)
    with (
        pytest.raises(LabelServiceError, match="another labelling service"),
        start_service(tmp_path, patience=0.2),
    ):
        pass
    store.close()


def test_a_service_waits_for_the_last_one_to_let_go_of_the_store(tmp_path) -> None:
    store = Store(tmp_path)
    ending = threading.Timer(2.0, store.close)
    ending.start()
    with start_service(tmp_path) as service, service.client() as client:
        assert client.health()
    ending.join()


def test_an_unreachable_service_is_reported(tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with (
        LabelClient(url, patience=0.2) as client,
        pytest.raises(LabelServiceError, match="laif serve labels"),
    ):
        client.judge(SPEC, "laif_basic", planted(1))
