"""Real processes: an orderly stop, logs in JSON, and no key in anything that a run leaves behind."""

import concurrent.futures
import contextlib
import json
import logging
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from laif_jax.cli.main import main
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.client import LabelClient
from laif_jax.labeling.errors import LabelServiceError
from laif_jax.labeling.keys import Key
from laif_jax.labeling.store import Store
from laif_jax.labeling.transfer import export_store
from tests.labeling.face_server import TOKEN, served
from tests.labeling.helpers import Reply, at, chat, comparison, fake_endpoint

CANARY = "canary-sk-0123456789-abcdefghij"


def wait(until) -> None:
    end = time.monotonic() + 60
    while not until():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_orderly_stop_loses_nothing_and_is_no_failure(number: int, tmp_path: Path) -> None:
    """20 answers, then 4 calls that hang for a second: they are answered and stored before the process ends."""
    items = [comparison(i, 0.1, 0.9) for i in range(30)]
    with fake_endpoint(lambda n, _: Reply(body=chat("Output (b)"), hang=1.5 if n >= 20 else 0.0)) as server:
        endpoint = at(server, timeout=60.0, concurrency=4)
        with served(tmp_path / "store", "--token-env", "") as (url, process):
            client = LabelClient(url, patience=1.0)

            def ask() -> None:
                with pytest.raises(LabelServiceError, match="does not answer"):
                    client.judge(endpoint, "laif_basic", items)

            thread = threading.Thread(target=ask)
            thread.start()
            wait(lambda: server.in_flight == 4)
            process.send_signal(number)
            assert process.wait(60) == 0
            thread.join(60)
        calls = sum(server.calls.values())
        assert 24 <= calls < 60
        assert sum(server.answered.values()) == calls
        store = Store(tmp_path / "store")
        try:
            stats = store.stats()
            assert stats["requests"].get("ok") == calls  # every answer that came is stored
            assert "in_flight" not in stats["requests"]
            assert stats["jobs"] == {"interrupted": 1}
            assert store.account().reserved == 0
        finally:
            store.close()
        with served(tmp_path / "store", "--token-env", "") as (url, _), LabelClient(url) as client:
            assert len(client.judge(endpoint, "laif_basic", items)) == 30
        assert set(server.calls.values()) == {1}  # and none is asked twice


def test_what_does_not_answer_in_time_is_pending_again(tmp_path: Path) -> None:
    items = [comparison(i, 0.1, 0.9) for i in range(4)]
    with fake_endpoint(lambda n, _: Reply(body=chat("Output (b)"), hang=120.0)) as server:
        endpoint = at(server, timeout=600.0, concurrency=2, prompt_price=1.0, completion_price=1.0)
        with served(tmp_path / "store", "--token-env", "", "--budget", "1USD") as (url, process):
            client = LabelClient(url, patience=1.0)

            def ask() -> None:
                with pytest.raises(LabelServiceError, match="does not answer"):
                    client.judge(endpoint, "laif_basic", items)

            thread = threading.Thread(target=ask)
            thread.start()
            wait(lambda: server.in_flight == 2)
            process.terminate()
            assert process.wait(60) == 0
            thread.join(60)
        store = Store(tmp_path / "store")
        try:
            assert set(store.stats()["requests"]) == {"pending"}
            account = store.account()
            assert account.reserved == 0
            assert account.presumed > 0  # the two that were under way may be on the bill
        finally:
            store.close()


def test_a_worker_that_is_stopped_stores_what_is_under_way(tmp_path: Path) -> None:
    """Two calls of the service and two of the worker hang when the worker is told to end: none is lost."""
    items = [comparison(i, 0.1, 0.9) for i in range(30)]
    with (
        fake_endpoint(
            lambda n, _: Reply(body=chat("Output (b)"), hang=1.5 if 16 <= n < 20 else 0.05)
        ) as server,
        served(tmp_path / "store", "--token-env", "") as (url, _),
        LabelClient(url) as client,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        command = [sys.executable, "-m", "laif_jax.labeling", "work", "--store", str(tmp_path / "store")]
        with (tmp_path / "work.log").open("wb") as log:
            worker = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait(lambda: "takes part" in (tmp_path / "work.log").read_text())
            endpoint = at(server, timeout=60.0, concurrency=2)
            judging = pool.submit(client.judge, endpoint, "laif_basic", items, order="seeded")
            wait(lambda: server.in_flight == 4 or judging.done())
            assert not judging.done()
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(60) == 0
            assert len(judging.result(120)) == 30
        finally:
            worker.kill()
            worker.wait()
        assert set(server.calls.values()) == {1}
        assert client.stats()["requests"] == {"ok": 30}
    assert "Traceback" not in (tmp_path / "work.log").read_text()


def test_nothing_that_a_run_leaves_behind_holds_a_key_or_the_token(tmp_path: Path) -> None:
    """The endpoint quotes the key back in headers, errors and answers. Files, logs, exports, metrics and every
    answer of the API are searched for it."""
    left = tmp_path / "left"
    left.mkdir()
    quoting = {"X-Key": CANARY}
    shown: list[bytes] = []

    def reply(number: int, request: dict) -> Reply:
        if number % 4 == 0:
            return Reply(status=500, body={"error": {"message": f"{CANARY} crashed"}}, headers=quoting)
        if number % 4 == 1:
            return Reply(status=400, body={"error": {"message": f"bad {CANARY}"}}, headers=quoting)
        return Reply(body=chat(f"Output (a), said {CANARY}"), headers=quoting)

    with fake_endpoint(reply) as server:
        env = {"CANARY_KEY": CANARY, "LAIF_LABEL_TOKEN": TOKEN}
        entry: dict = {"provider": "openai", "base_url": server.url, "model": "fake"}
        entry |= {"api_key_env": "CANARY_KEY", "max_attempts": 2, "concurrency": 1}
        entry |= {"prompt_price": 1.0, "completion_price": 1.0}
        listed = tmp_path / "endpoints.yaml"
        listed.write_text(json.dumps({"endpoints": {"fake": entry}}))
        options = ("--host", "0.0.0.0", "--log", "json", "--budget", "5USD", "--endpoints", str(listed))
        with served(left / "store", *options, env=env) as (url, process):
            with LabelClient(url, token=Key(TOKEN)) as client:
                judgements = client.judge(
                    at(server), "laif_basic", [comparison(i, 0.1, 0.9) for i in range(8)]
                )
                job = client.last_job
            assert {str(j.status.value) for j in judgements} >= {"failed"}
            shown += [j.model_dump_json().encode() for j in judgements]
            headers = {"Authorization": f"Bearer {TOKEN}"}
            with httpx.Client(base_url=url, headers=headers) as raw:
                paths = [
                    "/",
                    "/docs",
                    "/openapi.json",
                    "/health",
                    "/metrics",
                    "/v1/overview",
                    "/v1/stats",
                    "/v1/jobs",
                ]
                paths += [f"/v1/jobs/{job}", f"/v1/jobs/{job}/results", f"/v1/jobs/{job}/results?parts=true"]
                for path in paths:
                    answer = raw.get(path)
                    assert answer.status_code == 200, path
                    shown += [answer.content, str(answer.headers).encode()]
                # Keys in the wrong place: refused, and not quoted.
                base = {"kind": "judge", "critic": "laif_basic", "comparisons": []}
                fields = {"provider": "openai", "base_url": server.url, "model": "fake"}
                for wrong in (
                    {**base, "endpoint": {**fields, "api_key_env": CANARY}},
                    {**base, "endpoint": {**fields, "api_key": CANARY}},
                    {**base, "endpoint": {**fields, "options": {CANARY: 1, "key": 2}}},
                    {**base, "endpoint": fields, "critic": CANARY},
                    {"kind": CANARY},
                ):
                    answer = raw.post("/v1/jobs", json=wrong)
                    assert answer.status_code in (403, 422)
                    shown.append(answer.content)
                shown.append(raw.get("/v1/jobs", headers={"Authorization": f"Bearer {CANARY}"}).content)
                shown.append(raw.get(f"/v1/jobs/{CANARY}").content)
            process.terminate()
            assert process.wait(60) == 0
    assert any(CANARY in headers.get("Authorization", "") for headers in server.headers)  # it was sent
    store = Store(left / "store")
    try:
        for name in ("export.jsonl", "export.parquet"):
            export_store(store, left / name)
        with contextlib.closing(sqlite3.connect(store.path)) as database:
            shown.append("\n".join(database.iterdump()).encode())
    finally:
        store.close()
    lines = (left / "store.log").read_text().splitlines()
    assert lines
    for line in lines:
        assert {"time", "level", "logger", "message"} <= set(json.loads(line))
    files = [path for path in left.rglob("*") if path.is_file()]
    assert {"labels.sqlite", "store.log", "export.jsonl", "export.parquet"} <= {path.name for path in files}
    for secret in (CANARY.encode(), TOKEN.encode()):
        for path in files:
            assert secret not in path.read_bytes(), path
        for text in shown:
            assert secret not in text
    assert b"[key]" in b"".join(shown)


def test_nothing_that_labelling_a_file_leaves_behind_holds_a_key(
    tmp_path: Path, monkeypatch, caplog, capsys
) -> None:
    """The same for the command line: labels, log, store, quality report, and what is printed. The key is written plain,
    and as JSON may write it."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("CANARY_KEY", CANARY)
    left = tmp_path / "left"
    left.mkdir()
    escaped = "".join(f"\\u{ord(character):04x}" for character in CANARY)

    def reply(number: int, request: dict) -> Reply:
        if number % 4 == 0:
            return Reply(status=400, body={"error": {"message": f"bad {CANARY}"}})
        body = json.dumps(chat(f"Output (b), said KEY, as model {number}") | {"model": "KEY"})
        return Reply(body=body.replace("KEY", CANARY if number % 2 else escaped).encode())

    with fake_endpoint(reply) as server:
        pairs = [{"prompt": f"Question {n}?", "a": f"no {n}", "b": f"yes {n}"} for n in range(8)]
        (left / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        entry = {"provider": "openai", "base_url": server.url, "model": "m", "api_key_env": "CANARY_KEY"}
        entry |= {"client": "plain"}
        config = {
            "pairs": {"path": str(left / "pairs.jsonl")},
            "labels": str(left / "labels.jsonl"),
            "endpoint": entry,
            "labeling": {"store": str(left / "store")},
        }
        (left / "label.yaml").write_text(json.dumps(config))
        assert main(["label", "run", str(left / "label.yaml")]) == 0
        assert main(["label", "stats", "--store", str(left / "store")]) == 0
        options = ["--out", str(left / "quality"), "--samples", "20"]
        assert main(["label", "quality", "--store", str(left / "store"), *options]) == 0
    assert any(CANARY in headers.get("Authorization", "") for headers in server.headers)
    printed = capsys.readouterr()
    files = [path for path in left.rglob("*") if path.is_file()]
    found = {path.name for path in files}
    assert {"labels.jsonl", "labels.sqlite", "service.log", "quality.html", "quality.json"} <= found
    assert (
        "[key]" in (left / "labels.jsonl").read_text()
        or b"[key]" in (left / "store/labels.sqlite").read_bytes()
    )
    for secret in (CANARY, escaped):
        assert secret not in printed.out + printed.err + caplog.text
        for path in files:
            assert secret.encode() not in path.read_bytes(), path


def test_a_service_for_others_does_not_start_without_a_token(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="LAIF_LABEL_TOKEN"),
        served(tmp_path / "store", "--host", "0.0.0.0", env={"LAIF_LABEL_TOKEN": ""}),
    ):
        pass


def test_an_endpoint_takes_the_name_of_a_variable_not_a_key() -> None:
    with pytest.raises(ValueError, match="name") as error:
        Endpoint(provider="openai", base_url=NOWHERE, api_key_env="sk-" + CANARY)
    assert CANARY not in str(error.value)


NOWHERE = "http://127.0.0.1:9/v1"
