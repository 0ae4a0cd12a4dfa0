"""Who may speak to the service, how much and how often; and what an error looks like."""

import argparse
import concurrent.futures
import contextlib
import http.client
import socket
import time
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from laif_jax.labeling.access import (
    Bucket,
    Limits,
    add_access,
    is_loopback,
    limits_of,
    need_token,
    read_token,
)
from laif_jax.labeling.api import create_app
from laif_jax.labeling.client import LabelClient
from laif_jax.labeling.errors import LabelServiceError
from laif_jax.labeling.jobs import JudgeJob
from laif_jax.labeling.keys import Key
from laif_jax.labeling.problems import Problem
from laif_jax.labeling.service import serve_labels
from laif_jax.labeling.store import Store
from tests.labeling.face_server import TOKEN, served
from tests.labeling.helpers import planted, simulated

AUTH = {"Authorization": f"Bearer {TOKEN}"}
JSON = {"Content-Type": "application/json"}
HELD = [
    "/v1/jobs",
    "/v1/jobs/" + "0" * 16,
    f"/v1/jobs/{'0' * 16}/results",
    "/v1/stats",
    "/v1/overview",
    "/metrics",
]


@contextlib.contextmanager
def app(folder: Path, **rest) -> Generator[TestClient]:
    with TestClient(create_app(Store(folder), **rest), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True)]
    + [("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("example.org", False), ("", False)],
)
def test_only_this_machine_needs_no_token(host: str, own: bool, tmp_path: Path) -> None:
    assert is_loopback(host) == own
    if own:
        need_token(host, None)
        return
    with pytest.raises(LabelServiceError, match=r"LAIF_LABEL_TOKEN.*--token-file"):
        serve_labels(host, 0, tmp_path / "store")
    assert not (tmp_path / "store").exists()  # refused before anything is done
    need_token(host, Key(TOKEN))


def test_tokens_come_from_the_environment_or_a_private_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LAIF_LABEL_TOKEN", TOKEN)
    found = read_token()
    assert found is not None
    assert found.reveal() == TOKEN
    assert read_token("") is None
    file = tmp_path / "token"
    file.write_text(TOKEN + "x\n")
    file.chmod(0o600)
    found = read_token("LAIF_LABEL_TOKEN", str(file))
    assert found is not None
    assert found.reveal() == TOKEN + "x"
    file.chmod(0o644)
    with pytest.raises(LabelServiceError, match="chmod 600"):
        read_token(None, str(file))
    for bad in ("short", "two words are no token", "шестнадцать-букв"):
        monkeypatch.setenv("LAIF_LABEL_TOKEN", bad)
        with pytest.raises(LabelServiceError, match="16 characters") as error:
            read_token()
        assert bad not in str(error.value)


def test_everything_that_holds_data_asks_for_the_token(tmp_path: Path) -> None:
    with app(tmp_path, token=Key(TOKEN), limits=Limits(wrong=1000)) as client:
        for path in HELD:
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": TOKEN},
                {"Authorization": ""},
            ):
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401, path
                assert answer.headers["www-authenticate"] == "Bearer"
                assert Problem.model_validate(answer.json()).kind == "unauthorised"
                assert TOKEN not in answer.text
            assert client.get(path, headers=AUTH).status_code in (200, 404)
        assert client.post("/v1/jobs", json={}).status_code == 401
        # Every route that exists is either held back or known to hold no data.
        for path in client.get("/openapi.json").json()["paths"]:
            assert client.get(path).status_code in ({401} if path != "/health" else {200})
        for path in ("/", "/docs", "/openapi.json", "/health", "/web/page.css", "/web/dashboard.js"):
            answer = client.get(path)
            assert answer.status_code == 200
            assert str(tmp_path) not in answer.text
            assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_wrong_tokens_are_slowed_down(tmp_path: Path) -> None:
    with app(tmp_path, token=Key(TOKEN), limits=Limits(wrong=3)) as client:
        codes = [
            client.get("/v1/jobs", headers={"Authorization": f"Bearer {i}"}).status_code for i in range(5)
        ]
        assert codes == [401, 401, 401, 429, 429]
        answer = client.get("/v1/jobs", headers=AUTH)
        assert answer.status_code == 429  # or the right one could be told by the answer
        assert int(answer.headers["retry-after"]) >= 1


def test_large_bodies_are_refused_announced_or_not(tmp_path: Path) -> None:
    with app(tmp_path, limits=Limits(body=1000)) as client:
        small = client.post("/v1/jobs", content=b"{" + b" " * 900 + b"}", headers=JSON)
        assert small.status_code == 422
        for content in (b" " * 1001, iter([b" " * 600, b" " * 600])):
            answer = client.post("/v1/jobs", content=content, headers=JSON)
            assert answer.status_code == 413
            problem = Problem.model_validate(answer.json())
            assert (problem.kind, "--max-body" in problem.detail) == ("too_large", True)


def test_many_requests_are_refused_and_the_client_waits(tmp_path: Path) -> None:
    with app(tmp_path, limits=Limits(rate=0.1, burst=2)) as client:
        answers = [client.get("/v1/jobs") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
        assert Problem.model_validate(answers[3].json()).kind == "too_many_requests"
        assert 8 <= int(answers[3].headers["retry-after"]) <= 11


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
@pytest.mark.parametrize("option", ["--max-body", "--max-rate"])
def test_a_limit_that_is_none_is_refused(option: str, value: str) -> None:
    parser = argparse.ArgumentParser()
    add_access(parser)
    assert limits_of(parser.parse_args([])) == Limits()
    with pytest.raises(LabelServiceError, match="positive"):
        limits_of(parser.parse_args([f"{option}={value}"]))


def test_a_bucket_fills_with_time() -> None:
    bucket = Bucket(rate=2.0, most=3.0)
    bucket.fill(100.0)
    bucket.level -= 3.0
    assert bucket.wait() == pytest.approx(0.5)
    bucket.fill(100.25)
    assert bucket.wait() == pytest.approx(0.25)
    bucket.fill(200.0)
    assert (bucket.level, bucket.wait()) == (3.0, 0.0)


def test_another_name_for_this_machine_learns_nothing(tmp_path: Path) -> None:
    """A page of another site may make its own name resolve to this machine."""
    with app(tmp_path, host_names=frozenset({"127.0.0.1", "localhost"})) as client:
        assert client.get("/v1/jobs", headers={"Host": "localhost:8080"}).status_code == 200
        for host in ("evil.example", "127.0.0.1.evil.example", "", "[", "evil.example:8080"):
            answer = client.get("/v1/jobs", headers={"Host": host})
            assert answer.status_code == 403
            assert Problem.model_validate(answer.json()).kind == "wrong_host"


def test_errors_have_one_shape_and_do_not_quote_what_was_sent(tmp_path: Path) -> None:
    key = "sk-proj-" + "k" * 24
    with app(tmp_path) as client:
        job = {"kind": "judge", "critic": "laif_basic", "comparisons": []}
        endpoint = {"provider": "openai", "base_url": "http://127.0.0.1:9/v1"}
        answers = [
            client.get("/nowhere"),
            client.delete("/v1/jobs"),
            client.get("/v1/jobs/unknown"),
            client.get("/v1/jobs?limit=x"),
            client.get(f"/v1/jobs/{'0' * 16}/results?offset=99999999999999999999"),
            client.post("/v1/jobs", content=b"\xff\xfe", headers=JSON),
            client.post("/v1/jobs", content=b"[" * 100_000, headers=JSON),
            client.post("/v1/jobs", json={"kind": key}),
            client.post("/v1/jobs", json={**job, "endpoint": {**endpoint, key: 1}}),
            client.post("/v1/jobs", json={**job, "endpoint": {**endpoint, "api_key_env": key}}),
            client.post("/v1/jobs", json={**job, "endpoint": {**endpoint, "options": {"api_key": key}}}),
            client.post("/v1/jobs", json={**job, "endpoint": {**endpoint, "base_url": f"http://u:{key}@h/"}}),
            client.post("/v1/jobs", json={**job, "endpoint": endpoint, "critic": "../../etc"}),
        ]
        for answer in answers:
            assert 400 <= answer.status_code < 500, answer.text
            problem = Problem.model_validate(answer.json())
            assert problem.detail
            assert set(answer.json()) == {"detail", "kind", "problems"}
            assert key not in answer.text


def test_a_store_that_cannot_be_read_is_told_without_details(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with TestClient(create_app(store), raise_server_exceptions=False) as client:
        with store.engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE jobs RENAME TO gone")
        answer = client.get("/v1/jobs")
        assert answer.status_code == 503
        assert Problem.model_validate(answer.json()).kind == "store"
        assert "SELECT" not in answer.text
        with store.engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE gone RENAME TO jobs")


def test_a_real_service_behind_a_token(tmp_path: Path) -> None:
    with served(tmp_path / "store", "--host", "0.0.0.0", env={"LAIF_LABEL_TOKEN": TOKEN}) as (url, process):
        with LabelClient(url, token=Key(TOKEN)) as client:
            assert len(client.judge(simulated(), "laif_basic", planted(5))) == 5
        with LabelClient(url) as client, pytest.raises(LabelServiceError, match="token_env"):
            client.judge(simulated(), "laif_basic", planted(5))
        # A client that announces much and sends nothing is answered at once.
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=30) as raw:
            raw.sendall(f"POST /v1/jobs HTTP/1.1\r\nHost: h\r\nContent-Length: {10**12}\r\n".encode())
            raw.sendall(f"Authorization: Bearer {TOKEN}\r\n\r\n".encode())
            answer = http.client.HTTPResponse(raw)
            answer.begin()
            assert answer.status == 413
        process.terminate()
        assert process.wait(60) == 0
    assert TOKEN.encode() not in b"".join(f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())


def test_exact_counts_are_read_one_at_a_time(tmp_path: Path, monkeypatch) -> None:
    """Each reads the whole store: many at once would take the threads that answers are read with."""
    store, at_once, most = Store(tmp_path), [], []
    read = store.stats

    def slow():
        at_once.append(1)
        most.append(len(at_once))
        time.sleep(0.05)
        at_once.pop()
        return read()

    monkeypatch.setattr(store, "stats", slow)
    with TestClient(create_app(store)) as client, concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: client.get("/v1/stats").status_code, range(4)))
    assert answers == [200] * 4
    assert max(most) == 1


def test_strangers_learn_nothing_of_the_stores_place(tmp_path: Path) -> None:
    store = Store(tmp_path / "secret-place")
    with TestClient(create_app(store, token=Key(TOKEN))) as client:
        store._writer.stalled = f"store {tmp_path}: no space"
        answer = client.get("/health")
        assert answer.json()["stalled"] == "the store cannot be written at present"
        assert str(tmp_path) not in answer.text
        assert str(tmp_path) in client.get("/v1/overview", headers=AUTH).json()["stalled"]
        store._writer.stalled = ""
        assert client.get("/health").json()["stalled"] == ""


def test_behind_a_proxy_limits_count_for_each_client(tmp_path: Path) -> None:
    """One client's wrong tokens must not lock out the others; and nobody but the proxy may say who he is."""

    def get(url: str, token: str, address: str) -> int:
        headers = {"Authorization": f"Bearer {token}", "X-Forwarded-For": address}
        return httpx.get(f"{url}/v1/jobs", headers=headers).status_code

    env = {"LAIF_LABEL_TOKEN": TOKEN}
    with served(tmp_path / "a", "--proxy", "127.0.0.1", env=env) as (url, _):
        assert [get(url, "wrong", "10.0.0.1") for _ in range(11)] == [401] * 10 + [429]
        assert get(url, TOKEN, "10.0.0.2") == 200
        assert (
            get(url, TOKEN, "10.0.0.2, 10.0.0.1") == 429
        )  # the last one is the proxy's word, others are the client's
    with served(tmp_path / "b", env=env) as (url, _):
        codes = [get(url, "wrong", f"10.0.0.{number}") for number in range(11)]
        assert codes == [401] * 10 + [429]
    for proxy, token in (("127.0.0.1", None), ("everybody", Key(TOKEN))):
        with pytest.raises(LabelServiceError, match="--proxy"):
            serve_labels("127.0.0.1", 0, tmp_path / "c", token=token, proxy=proxy)


def test_jobs_may_come_from_elsewhere_with_the_token(tmp_path: Path) -> None:
    job = JudgeJob(endpoint=simulated(), critic="laif_basic", comparisons=tuple(planted(2)))
    headers = {**JSON, **AUTH, "Origin": "https://labels.example"}
    with app(tmp_path, token=Key(TOKEN)) as client:
        assert client.post("/v1/jobs", content=job.model_dump_json(), headers=headers).status_code == 202
