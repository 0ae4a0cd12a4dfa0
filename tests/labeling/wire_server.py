"""A local HTTP server that speaks whatever a test tells it, and real-looking bodies of the three providers."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Request:
    """What came. Header names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


@dataclass
class Response:
    """What goes out. `cut`: the connection ends in the middle of the body. `hang`: seconds before anything goes out."""

    status: int = 200
    body: Any = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    hang: float = 0.0
    cut: bool = False
    drop: bool = False  # no answer at all

    @property
    def content(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        return self.body.encode() if isinstance(self.body, str) else json.dumps(self.body).encode()


class _Server(ThreadingHTTPServer):
    request_queue_size = 256  # connections of many calls at once


class WireServer:
    def __init__(self, answer: Callable[[Request], Response]) -> None:
        self.requests: list[Request] = []
        self.release = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _do(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.command, self.path, headers, content)
                outer.requests.append(request)
                response = answer(request)
                if response.hang:
                    outer.release.wait(response.hang)
                if response.drop:
                    self.close_connection = True
                    return
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.send_response(response.status)
                    for name, value in {"Content-Type": "application/json", **response.headers}.items():
                        self.send_header(name, value)
                    extra = 100 if response.cut else 0
                    self.send_header("Content-Length", str(len(response.content) + extra))
                    self.end_headers()
                    self.wfile.write(response.content)
                self.close_connection = self.close_connection or response.cut

            do_POST = do_GET = _do

            def log_message(self, *_: Any) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def serve(answer: Callable[[Request], Response] | Response) -> Iterator[WireServer]:
    server = WireServer(answer if callable(answer) else lambda _: answer)
    try:
        yield server
    finally:
        server.close()


def openai_body(text: str | None = "Output (a)", **message: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT",
        "object": "chat.completion",
        "created": 1741569952,
        "model": "gpt-4.1-2025-04-14",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": text,
                    "refusal": None,
                    "annotations": [],
                    **message,
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 1219,
            "completion_tokens": 10,
            "total_tokens": 1229,
            "prompt_tokens_details": {"cached_tokens": 1024, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "accepted_prediction_tokens": 0},
        },
        "service_tier": "default",
        "system_fingerprint": "fp_b376dfbbd5",
    }


def anthropic_body(text: str = "Output (a)", stop_reason: str = "end_turn") -> dict[str, Any]:
    return {
        "id": "msg_01XFDUDYJgAACzvnptvVoYEL",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-4-5-20250929",
        "content": [
            {"type": "thinking", "thinking": "Let me compare.", "signature": "EuY"},
            {"type": "text", "text": text},
        ],
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": {
            "input_tokens": 195,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 1024,
            "output_tokens": 10,
            "service_tier": "standard",
        },
    }


def google_body(text: str = "Output (a)", finish: str = "STOP") -> dict[str, Any]:
    return {
        "candidates": [
            {
                "content": {
                    "parts": [{"text": "Let me compare.", "thought": True}, {"text": text}],
                    "role": "model",
                },
                "finishReason": finish,
                "index": 0,
                "avgLogprobs": -0.01,
                "logprobsResult": {
                    "chosenCandidates": [{"token": "A", "tokenId": 236776, "logProbability": -0.105}],
                    "topCandidates": [
                        {
                            "candidates": [
                                {"token": "A", "tokenId": 236776, "logProbability": -0.105},
                                {"token": "B", "tokenId": 236799, "logProbability": -2.303},
                            ]
                        }
                    ],
                },
            }
        ],
        "usageMetadata": {
            "promptTokenCount": 1219,
            "cachedContentTokenCount": 1024,
            "candidatesTokenCount": 4,
            "thoughtsTokenCount": 6,
            "totalTokenCount": 1229,
            "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 1219}],
        },
        "modelVersion": "gemini-2.5-flash",
        "responseId": "mAitaLmkHPPlz7IPvtfUqQ4",
    }


BODIES = {"openai": openai_body, "anthropic": anthropic_body, "google": google_body}
PATHS = {
    "openai": "/v1/chat/completions",
    "anthropic": "/v1/messages",
    "google": "/models/fake:generateContent",
}
