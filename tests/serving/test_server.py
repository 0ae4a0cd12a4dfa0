"""A real server process: it comes up, answers, and on SIGTERM finishes what it began."""

import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from tests.serving.conftest import body

START = (
    "import sys; from laif_jax.serving import serve_model; serve_model(sys.argv[1], port=int(sys.argv[2]))"
)


@pytest.fixture
def server(checkpoint):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(checkpoint), str(port)], stderr=subprocess.PIPE, text=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            try:
                httpx.get(f"{url}/health", trust_env=False).raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def test_a_process_answers_and_sigterm_lets_it_finish(server):
    process, url = server
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny-symbols"
        answers = []

        def call():
            answers.append(client.post("/v1/chat/completions", json=body(max_tokens=30, logprobs=True)))

        first = threading.Thread(target=call)
        first.start()  # compiles: there is time to send the signal while it runs
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        first.join(120)
    assert [answer.status_code for answer in answers] == [200]
    assert answers[0].json()["choices"][0]["logprobs"]["content"]
    assert process.wait(60) in (0, -signal.SIGTERM)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health", trust_env=False)
