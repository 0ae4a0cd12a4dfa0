"""Cassettes: real exchanges with an endpoint, recorded to a file of JSON lines and played back.

A line is

    {"request": {"url": ..., "body": {...}}, "response": {"status": 200, "headers": {...}, "body": "..."}}

Keys are neither in the body nor among the headers that are kept; whatever the endpoint quotes back is taken out.
Playing back is strict: a request that was not recorded is an error, and nothing goes out. A request that was recorded
several times gives its answers in that order, and the last one from then on.
"""

import base64
import hashlib
import json
import os
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.errors import BadRequest, EndpointError
from laif_jax.labeling.keys import redact
from laif_jax.labeling.providers.remote import Exchange, Transport

# Headers of a response that say something about it. Others may tell of the account.
_KEPT = ("content-type", "retry-after", "retry-after-ms", "x-ratelimit-", "anthropic-ratelimit-", "location")


def request_id(body: Any) -> str:
    """Hash of a request's body, whatever the order of its fields."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


class RecordTransport:
    """Sends through another transport and adds each exchange to a file (mode 600, appended to)."""

    def __init__(self, path: str, inner: Transport) -> None:
        self._path, self._inner = Path(path).expanduser(), inner
        self.url = inner.url
        self._lock = threading.Lock()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        except OSError as error:
            raise EndpointError(f"cassette {path}: cannot be written ({error.strerror})") from error

    async def send(self, body: dict[str, Any]) -> Exchange:
        exchange = await self._inner.send(body)
        text = exchange_line(self.url, body, exchange)
        # One write of one line: services that share a cassette do not mix their lines.
        with self._lock, self._path.open("ab") as file:
            file.write(text.encode("utf-8", "replace"))
        return exchange

    async def close(self) -> None:
        await self._inner.close()


def exchange_line(url: str, body: dict[str, Any], exchange: Exchange) -> str:
    """An exchange as a line of a cassette, without keys."""
    headers = {name: value for name, value in exchange.headers.items() if name.startswith(_KEPT)}
    response: dict[str, Any] = {"status": exchange.status, "headers": headers}
    try:
        response["body"] = exchange.content.decode("utf-8")
    except UnicodeDecodeError:
        response["body_base64"] = base64.b64encode(exchange.content).decode()
    line = {"request": {"url": url, "body": body}, "response": response}
    return redact(json.dumps(line, ensure_ascii=False)) + "\n"


class ReplayTransport:
    """Answers from a cassette.

    Raises:
      EndpointError: the file is not there, or not a cassette.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._path = Path(endpoint.cassette or "").expanduser()
        self.url = f"cassette {self._path}"
        self._exchanges: dict[str, list[Exchange]] = defaultdict(list)
        self._played: dict[str, int] = defaultdict(int)
        try:
            lines = self._path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise EndpointError(f"cassette {self._path}: cannot be read ({error})") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                request, exchange = _read_line(self._path, number, line)
                self._exchanges[request].append(exchange)

    async def send(self, body: dict[str, Any]) -> Exchange:
        request = request_id(json.loads(redact(json.dumps(body))))
        recorded = self._exchanges.get(request)
        if not recorded:
            shown = json.dumps(body, ensure_ascii=False)[:300]
            raise BadRequest(
                reason=f"{self.url} holds no answer to this request, and nothing else is asked: {shown}. Record it "
                "with `cassette_mode: record`"
            )
        position = self._played[request]
        self._played[request] += 1
        return recorded[min(position, len(recorded) - 1)]

    async def close(self) -> None:
        return None


def _read_line(path: Path, number: int, line: str) -> tuple[str, Exchange]:
    try:
        value = json.loads(line)
        response = value["response"]
        if "body_base64" in response:
            content = base64.b64decode(response["body_base64"])
        else:
            body = response["body"]
            content = (body if isinstance(body, str) else json.dumps(body)).encode()
        headers = {str(name).lower(): str(text) for name, text in response.get("headers", {}).items()}
        return request_id(value["request"]["body"]), Exchange(int(response["status"]), headers, content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EndpointError(f"cassette {path}, line {number}: no exchange ({error!r})") from error
