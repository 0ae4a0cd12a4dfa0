"""Planted comparisons, an in-process runner, and a real HTTP endpoint that misbehaves on demand."""

import asyncio
import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from laif_jax.config.schema import SimulatedSpec
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.jobs import Job, JobStatus, JudgeJob
from laif_jax.labeling.runner import Runner
from laif_jax.labeling.store import Store
from laif_jax.records import Comparison, Completion, Judgement, Prompt


def comparison(
    number: int, quality_a: float, quality_b: float, *, pad_a: int = 0, pad_b: int = 0
) -> Comparison:
    prompt = Prompt.from_text(f"Question {number}: what is {number} + {number}?")

    def completion(name: str, quality: float, pad: int) -> Completion:
        text = f"answer {name} of {number}" + "." * pad
        return Completion(prompt_id=prompt.id, generator=name, text=text, meta={"quality": quality})

    return Comparison(prompt=prompt, a=completion("a", quality_a, pad_a), b=completion("b", quality_b, pad_b))


def planted(count: int) -> list[Comparison]:
    """Comparisons whose better side alternates irregularly; never equal."""
    return [comparison(i, *((0.9, 0.2) if (i * 7) % 5 < 2 else (0.3, 0.8))) for i in range(count)]


def truth(item: Comparison) -> float:
    """1 if b is truly better, 0 if a is, 0.5 if they are equal."""
    difference = item.b.meta["quality"] - item.a.meta["quality"]
    return 0.5 if difference == 0 else float(difference > 0)


def simulated(max_attempts: int = 6, concurrency: int = 8, **spec: Any) -> Endpoint:
    return Endpoint(
        provider="simulated",
        simulated=SimulatedSpec(**{"world": "planted", **spec}),
        max_attempts=max_attempts,
        concurrency=concurrency,
    )


def run_job(folder: Path, job: Job) -> tuple[JobStatus, list[dict], list[dict]]:
    """Runs a job in this process; returns its status, final results and single-order results."""

    async def run() -> tuple[JobStatus, list[dict], list[dict]]:
        store = Store(folder)
        runner = Runner(store)
        try:
            status = runner.submit(job.work())
            while status.state == "running":
                await asyncio.sleep(0.005)
                current = await runner.status(status.id)
                assert current is not None
                status = current
            final = [json.loads(line) for line in store.job_results(status.id)]
            parts = [json.loads(line) for line in store.job_results(status.id, parts=True)]
            return status, final, parts
        finally:
            await runner.close()
            store.close()

    return asyncio.run(run())


def judge(
    folder: Path, endpoint: Endpoint, critic: Any, items: Sequence[Comparison], **rest: Any
) -> list[Judgement]:
    """The final judgements of a job that must end well."""
    job = JudgeJob(endpoint=endpoint, critic=critic, comparisons=tuple(items), **rest)
    status, final, _ = run_job(folder, job)
    assert status.state == "done", status.reason
    return [Judgement.from_row(row) for row in final]


@dataclass
class Reply:
    """What the fake endpoint does with one request."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    hang: float = 0.0
    cut: bool = False  # close the connection in the middle of the body


def chat(text: str | None, *, top: dict[str, float] | None = None, **message: Any) -> dict[str, Any]:
    """A well-formed chat completion."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": text, **message},
        "finish_reason": "stop",
    }
    if top is not None:
        entries = [{"token": token, "logprob": logprob} for token, logprob in top.items()]
        choice["logprobs"] = {"content": [{**entries[0], "top_logprobs": entries}]}
    return {
        "choices": [choice],
        "model": "fake-1",
        "system_fingerprint": "fp_fake",
        "usage": {"prompt_tokens": 11, "completion_tokens": 2},
    }


class FakeEndpoint:
    """A real HTTP server. `reply(number, request)` decides; `calls` counts requests by content, `answered` those whose
    answer was sent."""

    def __init__(self, reply: Callable[[int, dict[str, Any]], Reply]) -> None:
        self.reply = reply
        self.calls: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.in_flight = self.most_in_flight = 0
        self.release = threading.Event()  # ends all hanging at once
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    endpoint._answer(self, json.loads(raw))

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def _answer(self, handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        key = request["messages"][-1]["content"]
        with self._lock:
            number = sum(self.calls.values())
            self.calls[key] += 1
            self.headers.append({name.title(): value for name, value in handler.headers.items()})
            self.bodies.append(request)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            reply = self.reply(number, request)
            if reply.hang:
                self.release.wait(reply.hang)
            body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        finally:
            # Before the answer goes out: the client may send the next request the moment it has this one.
            with self._lock:
                self.in_flight -= 1
        handler.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body) + (100 if reply.cut else 0)))
        handler.end_headers()
        handler.wfile.write(body)
        handler.wfile.flush()
        if reply.cut:
            handler.close_connection = True
            return
        with self._lock:
            self.answered[key] += 1

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def fake_endpoint(reply: Callable[[int, dict[str, Any]], Reply] | dict[str, Any]) -> Iterator[FakeEndpoint]:
    server = FakeEndpoint(reply if callable(reply) else lambda number, request: Reply(body=reply))
    try:
        yield server
    finally:
        server.close()


def at(server: FakeEndpoint, **rest: Any) -> Endpoint:
    return Endpoint(provider="openai", base_url=server.url, model="fake", **{"timeout": 5.0, **rest})
