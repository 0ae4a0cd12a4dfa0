"""Who may speak to the service, how often, and how much at once: the gate before its HTTP API.

* Bound to loopback without a token, it answers requests that name this machine as their host, so that a page of another
  site whose name resolves to this machine learns nothing.
* With a token, everything but `OPEN` needs `Authorization: Bearer TOKEN`. Tokens are compared in constant time, and an
  address that gives wrong ones is soon told to wait.
* Bodies and requests per second are bounded, per address, before anything is read or computed.
"""

import argparse
import hashlib
import hmac
import ipaddress
import json
import math
import os
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from laif_jax.labeling.errors import EndpointError, LabelServiceError
from laif_jax.labeling.keys import Key, read_key_file

TOKEN_ENV = "LAIF_LABEL_TOKEN"
SHORTEST_TOKEN = 16
# Pages and health hold no data: the dashboard asks for the token and sends it with what it reads.
OPEN = frozenset({"/", "/docs", "/openapi.json", "/health", "/favicon.ico"})
OPEN_BELOW = "/web/"
BODY_MOST = 256 * 2**20
ADDRESSES_MOST = 4096  # of which the last requests are remembered


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(variable: str | None = TOKEN_ENV, file: str | None = None) -> Key | None:
    """The service's token from a file of mode 600 or from an environment variable; None if there is none.

    Raises:
      LabelServiceError: it is too short, no single word, or its file can be read by others.
    """
    value = os.environ.get(variable, "").strip() if variable else ""
    try:
        token = read_key_file(file, "the token file", "Correct `--token-file`") if file else None
    except EndpointError as error:
        raise LabelServiceError(str(error)) from error
    if token is None and value:
        token = Key(value)
    if token is None:
        return None
    text = token.reveal()
    if len(text) < SHORTEST_TOKEN or not text.isascii() or not text.isprintable() or " " in text:
        raise LabelServiceError(
            f"the token in {file or variable} cannot be used: it needs at least {SHORTEST_TOKEN} characters, without "
            "spaces. Make one with: openssl rand -hex 32"
        )
    return token


def need_token(host: str, token: Key | None) -> None:
    """Raises `LabelServiceError` if others could reach the service and there is no token."""
    if token is None and not is_loopback(host):
        raise LabelServiceError(
            f"refusing to listen on {host} without a token: whoever reaches the port could spend what the keys of this "
            f"machine pay for. Do: export {TOKEN_ENV}=$(openssl rand -hex 32), or give --token-file FILE (mode 600), "
            "and give clients the same token; or listen on 127.0.0.1"
        )


@dataclass
class Limits:
    """What one address may do.

    Attributes:
      body: bytes of a request. rate: requests per second, over time; burst: at once.
      wrong: wrong tokens per minute.
    """

    body: int = BODY_MOST
    rate: float = 200.0
    burst: int = 1000
    wrong: int = 10


def add_access(parser: argparse.ArgumentParser) -> None:
    """The options that `read_token`, `limits_of` and `serve_labels` read."""
    parser.add_argument(
        "--token-env",
        default=TOKEN_ENV,
        metavar="NAME",
        help=f"the environment variable that holds the token which requests must carry (default: {TOKEN_ENV})",
    )
    parser.add_argument("--token-file", metavar="FILE", help="a file of mode 600 that holds the token alone")
    who = parser.add_mutually_exclusive_group()
    who.add_argument(
        "--endpoints",
        metavar="FILE",
        help="with a token: a YAML file whose section `endpoints` lists all that jobs may ask (default: simulated "
        "ones only)",
    )
    who.add_argument(
        "--any-endpoint",
        action="store_true",
        help="with a token: its holders may name any address, key and file of this machine, as its user could",
    )
    parser.add_argument(
        "--max-body",
        type=float,
        default=BODY_MOST / 2**20,
        metavar="MIB",
        help="largest request (default: 256)",
    )
    parser.add_argument(
        "--max-rate",
        type=float,
        default=200.0,
        metavar="N",
        help="requests per second of one address (default: 200)",
    )
    parser.add_argument(
        "--proxy",
        metavar="ADDRESS",
        help="with a token: the proxy in front, whose X-Forwarded-For tells the address that a request comes from",
    )


def limits_of(options: argparse.Namespace) -> Limits:
    """Raises `LabelServiceError` for a limit that lets nothing through."""
    if not (0 < options.max_body < math.inf and 0 < options.max_rate < math.inf):
        raise LabelServiceError("--max-body and --max-rate must be positive numbers")
    return Limits(int(options.max_body * 2**20), options.max_rate, max(1, int(5 * options.max_rate)))


@dataclass
class Bucket:
    """Tokens that flow in at `rate` per second, up to `most`."""

    rate: float
    most: float
    level: float = field(init=False)
    at: float = 0.0

    def __post_init__(self) -> None:
        self.level = self.most

    def fill(self, now: float) -> None:
        if self.at:
            self.level = min(self.most, self.level + (now - self.at) * self.rate)
        self.at = now

    def wait(self) -> float:
        """Seconds until one can be taken."""
        return 0.0 if self.level >= 1.0 else (1.0 - self.level) / self.rate


class Gate:
    """ASGI middleware; see the module's text.

    Args:
      token: None: none is asked for, and `host_names` are checked instead, unless they are None.
    """

    def __init__(
        self,
        app: Any,
        token: Key | None = None,
        limits: Limits | None = None,
        host_names: frozenset[str] | None = None,
    ) -> None:
        self.app, self.token, self.limits, self.host_names = app, token, limits or Limits(), host_names
        self._requests: OrderedDict[str, Bucket] = OrderedDict()
        self._wrong: OrderedDict[str, Bucket] = OrderedDict()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        problem = self._refusal(scope, headers)
        if problem is not None:
            await _answer(send, *problem)
            return
        limited = _Limited(receive, self.limits.body)
        started = False

        async def sending(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", []), *SAFE_HEADERS]
            await send(message)

        try:
            await self.app(scope, limited, sending)
        except BodyTooLargeError:
            if started:
                raise
            await _answer(send, 413, "too_large", _too_large(self.limits.body))

    def _refusal(self, scope: Any, headers: dict[str, str]) -> tuple[Any, ...] | None:
        address, now = (scope.get("client") or ("?", 0))[0], time.monotonic()
        bucket = _bucket(self._requests, address, self.limits.rate, self.limits.burst, now)
        if wait := bucket.wait():
            return 429, "too_many_requests", _slow_down(self.limits), wait
        bucket.level -= 1.0
        if self.token is None and self.host_names is not None:
            name = _host_name(headers.get("host", ""))
            if name not in self.host_names:
                return 403, "wrong_host", f"this service answers to {', '.join(sorted(self.host_names))} only"
        if self.token is not None and not _is_open(scope["path"]):
            wrong = _bucket(self._wrong, address, self.limits.wrong / 60.0, self.limits.wrong, now)
            if wait := wrong.wait():
                return 429, "too_many_requests", "too many wrong tokens came from your address", wait
            if not self._admits(headers.get("authorization", "")):
                wrong.level -= 1.0
                return 401, "unauthorised", f"send the service's token: Authorization: Bearer ${TOKEN_ENV}"
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length) > self.limits.body:
            return 413, "too_large", _too_large(self.limits.body)
        return None

    def _admits(self, authorization: str) -> bool:
        assert self.token is not None
        kind, _, given = authorization.partition(" ")
        # Digests have one length, so that the time tells not even how long the token is.
        same = hmac.compare_digest(_digest(given.strip()), _digest(self.token.reveal()))
        return same and kind.lower() == "bearer"


SAFE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
)


class BodyTooLargeError(Exception):
    """More came than the limit allows, without having been announced."""


class _Limited:
    """`receive` that stops reading at the limit."""

    def __init__(self, receive: Any, most: int) -> None:
        self.receive, self.left = receive, most

    async def __call__(self) -> Any:
        message = await self.receive()
        if message["type"] == "http.request":
            self.left -= len(message.get("body", b""))
            if self.left < 0:
                raise BodyTooLargeError
        return message


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def _is_open(path: str) -> bool:
    return path in OPEN or path.startswith(OPEN_BELOW)


def _host_name(header: str) -> str:
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def _bucket(buckets: OrderedDict[str, Bucket], address: str, rate: float, most: float, now: float) -> Bucket:
    bucket = buckets.get(address)
    if bucket is None:
        bucket = buckets[address] = Bucket(rate, most)
        while len(buckets) > ADDRESSES_MOST:
            buckets.popitem(last=False)
    else:
        buckets.move_to_end(address)
    bucket.fill(now)
    return bucket


def _too_large(most: int) -> str:
    return (
        f"the request is larger than {most / 2**20:g} MiB. Divide the job into several, "
        "which share their answers, or start the service with a larger --max-body"
    )


def _slow_down(limits: Limits) -> str:
    return f"more than {limits.rate:g} requests per second came from your address; wait as Retry-After says"


async def _answer(send: Any, status: int, kind: str, detail: str, wait: float = 0.0) -> None:
    body = json.dumps({"detail": detail, "kind": kind, "problems": []}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *SAFE_HEADERS,
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 429:
        headers.append((b"retry-after", str(max(1, round(wait + 0.5))).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
