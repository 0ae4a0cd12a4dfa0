"""OpenAI's chat protocol to a server on this machine: HTTP/1.1 and no more (no TLS, no proxy, no redirects).

A call costs a fifth of what it costs over aiohttp (0.02 ms of CPU against 0.1), so that a server that answers thousands
of calls per second is not kept waiting. Connections are kept; as many are open as calls are in flight.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.keys import Key
from laif_jax.labeling.providers.remote import Exchange, is_loopback, unreachable
from laif_jax.records.hashing import json_writer

PATH = "/chat/completions"
MOST_HEAD = 1 << 16  # bytes
_json = json_writer()
_CLOSED = "the connection was closed before the answer was complete"


class BadAnswer(Exception):
    """What came is no HTTP response, or only a part of one."""


def is_local(url: str) -> bool:
    """Whether `LocalTransport` can go there."""
    return urlsplit(url).scheme == "http" and is_loopback(url)


class LocalTransport:
    """See the module's text."""

    def __init__(self, endpoint: Endpoint, key: Key | None) -> None:
        self.url = f"{endpoint.base_url}{PATH}"
        parts = urlsplit(self.url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        lines = [f"POST {parts.path} HTTP/1.1", f"Host: {parts.netloc}", "Accept: application/json"]
        lines += ["Content-Type: application/json"]
        lines += [f"Authorization: Bearer {key.reveal()}"] if key else []
        self._head = "\r\n".join([*lines, "Content-Length: "]).encode()
        self._free: list[_Connection] = []
        self._all: set[_Connection] = set()

    async def send(self, body: dict[str, Any]) -> Exchange:
        content = _json(body).encode("utf-8", "replace")
        connection = await self._connection()
        try:
            exchange = await connection.exchange(b"%b%d\r\n\r\n%b" % (self._head, len(content), content))
        except (BadAnswer, OSError) as error:
            connection.close()
            raise unreachable(self.url, error, sent=True) from error
        except BaseException:  # its answer, if it comes, belongs to nobody
            connection.close()
            raise
        if connection.reusable:
            self._free.append(connection)
        else:
            connection.close()
        return exchange

    async def _connection(self) -> "_Connection":
        while self._free:
            connection = (
                self._free.pop()
            )  # the one used last: those not needed any more time out at the server
            if connection.reusable:
                return connection
            connection.close()
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self._all), self._host, self._port
            )
        except OSError as error:
            raise unreachable(self.url, error, sent=False) from error
        return connection

    async def close(self) -> None:
        for connection in list(self._all):
            connection.close()


@dataclass(slots=True)
class _Head:
    """The start of a response. `length`: of the body; None: it is chunked, or ends with the connection."""

    status: int
    headers: dict[str, str]
    length: int | None
    chunked: bool
    keep: bool


class _Connection(asyncio.Protocol):
    """One connection, on which an exchange follows the other."""

    def __init__(self, everyone: set["_Connection"]) -> None:
        self._everyone = everyone
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[Exchange] | None = None
        self.reusable = True
        self._reset()

    def _reset(self) -> None:
        self._got = bytearray()
        self._head: _Head | None = None
        self._body = _Chunks()

    async def exchange(self, request: bytes) -> Exchange:
        """Sends a request and waits for its answer; raises `BadAnswer` or `OSError` if there is none."""
        if self._transport is None:
            raise BadAnswer(_CLOSED)
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._waiting

    def close(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.close()

    # ---- called by the event loop --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not asked whether it is an asyncio.Transport: uvloop's, which the service runs on, is none by inheritance.
        self._transport = cast(asyncio.Transport, transport)
        self._everyone.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport, self.reusable = None, False
        self._everyone.discard(self)
        head = self._head
        if head is not None and head.length is None and not head.chunked and exc is None:
            self._answer(head, bytes(self._got))  # the body ends where the connection does
        else:
            self._fail(exc if isinstance(exc, OSError) else BadAnswer(_CLOSED))

    def data_received(self, data: bytes) -> None:
        if self._waiting is None or self._waiting.done():  # nobody asked
            self.close()
            return
        self._got += data
        try:
            self._read()
        except BadAnswer as error:
            self.close()
            self._fail(error)

    # ---- reading -------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        while self._head is None:
            end = self._got.find(b"\r\n\r\n")
            if end < 0:
                if len(self._got) > MOST_HEAD:
                    raise BadAnswer("the answer's headers do not end")
                return
            head = _read_head(bytes(self._got[:end]))
            del self._got[: end + 4]
            self._head = head if head.status >= 200 else None  # before it: "100 Continue" and the like
        head = self._head
        if head.chunked:
            if self._body.read(self._got):
                self._answer(head, bytes(self._body.content))
        elif head.length is not None and len(self._got) >= head.length:
            body = bytes(self._got[: head.length])
            del self._got[: head.length]
            self._answer(head, body)

    def _answer(self, head: _Head, body: bytes) -> None:
        self.reusable = head.keep and self.reusable and not self._got
        self._reset()
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(Exchange(head.status, head.headers, body))

    def _fail(self, error: Exception) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error)


def _read_head(data: bytes) -> _Head:
    first, *lines = data.decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    status = rest[:3]
    if not version.startswith("HTTP/1.") or not status.isdecimal():
        raise BadAnswer(f"not an HTTP/1.1 answer: {first[:80]!r}")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    connection = headers.get("connection", "").lower()
    keep = "close" not in connection if version == "HTTP/1.1" else "keep-alive" in connection
    chunked = headers.get("transfer-encoding", "").lower().endswith("chunked")
    length: int | None = None
    if status in ("204", "304"):
        length, chunked = 0, False
    elif not chunked and (told := headers.get("content-length")) is not None:
        if not (told.isascii() and told.isdecimal() and len(told) < 19):
            raise BadAnswer(f"the answer's length is {told[:40]!r}")
        length = int(told)
    return _Head(int(status), headers, length, chunked, keep and (chunked or length is not None))


@dataclass(slots=True)
class _Chunks:
    """A body in chunks, as far as it came."""

    content: bytearray = field(default_factory=bytearray)
    _trailer: bool = False

    def read(self, got: bytearray) -> bool:
        """Takes from `got` what is complete; whether the body is."""
        while not self._trailer:
            end = got.find(b"\r\n")
            if end < 0:
                return False
            text = bytes(got[:end]).partition(b";")[0].strip()
            if not text or len(text) > 16 or text.strip(b"0123456789abcdefABCDEF"):
                raise BadAnswer(f"a chunk's size is {text[:40]!r}")
            size = int(text, 16)
            if size == 0:
                del got[: end + 2]
                self._trailer = True
            elif len(got) < end + 2 + size + 2:
                return False
            else:
                self.content += got[end + 2 : end + 2 + size]
                del got[: end + 2 + size + 2]
        while (end := got.find(b"\r\n")) >= 0:  # trailing headers, then an empty line
            del got[: end + 2]
            if end == 0:
                return True
        return False
