"""Calls over a network: the parts that all remote providers share."""

import asyncio
import importlib
import ipaddress
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from laif_jax.labeling.calls import Call, Endpoint
from laif_jax.labeling.errors import CallError, CallTimeout, EndpointError, Unreachable
from laif_jax.labeling.keys import redact
from laif_jax.labeling.providers.base import Reply, read_reply
from laif_jax.labeling.wires import WIRES
from laif_jax.labeling.wires.base import decode


@dataclass(frozen=True, slots=True)
class Exchange:
    """An endpoint's answer as it came. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class Transport(Protocol):
    """Sends a request's JSON body to one endpoint.

    Attributes:
      url: where it goes, for messages.
    """

    url: str

    async def send(self, body: dict[str, Any]) -> Exchange:
        """The exchange, whatever its status; raises `CallError` if there is none."""
        ...

    async def close(self) -> None: ...


class RemoteProvider:
    """One endpoint behind a network: a wire format over a transport."""

    free = False

    def __init__(self, endpoint: Endpoint, transport: Transport) -> None:
        self.endpoint = endpoint
        self.width = endpoint.concurrency
        self.transport = transport
        self._wire = WIRES[endpoint.provider]

    async def call(self, call: Call, attempt: int) -> Reply:
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                exchange = await self.transport.send(utf8(call.body()))
        except TimeoutError as error:
            raise CallTimeout(
                reason=f"{self.transport.url} did not answer within {self.endpoint.timeout:g} s"
            ) from error
        return self.read(call, exchange)

    def read(self, call: Call, exchange: Exchange) -> Reply:
        """The reply in an exchange; raises `CallError`."""
        url, text = self.transport.url, redact(exchange.content.decode("utf-8", "replace"))
        limits = self._wire.limits(exchange.headers)
        try:
            if exchange.status != 200:
                raise self._wire.error(url, exchange.status, exchange.headers, text)
            return read_reply(call, decode(url, text), limits)
        except CallError as error:
            error.limits = limits
            raise

    async def close(self) -> None:
        await self.transport.close()


def utf8(value: Any) -> Any:
    """Without lone surrogates (half an emoji cut by truncation), which are no UTF-8."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8") if not value.isascii() else value
    if isinstance(value, dict):
        return {key: utf8(item) for key, item in value.items()}
    return [utf8(item) for item in value] if isinstance(value, list | tuple) else value


def require(package: str, extra: str, provider: str) -> Any:
    """An optional package.

    Raises:
      EndpointError: it is not installed; names the extra.
    """
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise EndpointError(
            f"`provider: {provider}` needs the package {package} ({error}). Install it where the labelling service "
            f"runs: pip install 'laif_jax[{extra}]'"
        ) from error
    # These log every address, and requests with their headers where somebody asks for debugging.
    for name in (
        "openai",
        "anthropic",
        "google_genai",
        "google.auth",
        "httpx",
        "httpx2",
        "httpcore",
        "httpcore2",
    ):
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING)
    return module


# The exceptions of aiohttp, httpx and httpx2 by name. What was raised first decides: the packages' aiohttp transports
# call a refused connection, and one that broke after the request had gone out, a time-out while connecting.
_NOT_SENT = ("ClientConnectorError", "ClientConnectorDNSError", "ConnectError", "PoolTimeout")
_NO_CONNECTION_IN_TIME = ("ConnectionTimeoutError", "ConnectTimeout")
_TIMEOUTS = ("ServerTimeoutError", "SocketTimeoutError", "ReadTimeout", "WriteTimeout", "TimeoutException")
_BROKEN = (
    "ServerDisconnectedError",
    "ClientOSError",
    "ClientPayloadError",
    "ReadError",
    "RemoteProtocolError",
)


def connection_error(url: str, error: BaseException) -> CallError:
    """What a failed connection means: whether the request can have gone out, and so be billed."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and len(chain) < 16:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for cause in reversed(chain):
        names = {kind.__name__ for kind in type(cause).__mro__}
        if names.intersection(_NO_CONNECTION_IN_TIME):
            return CallTimeout(reason=f"{url} took no connection in time", billed="no")
        if names.intersection(_NOT_SENT):
            return unreachable(url, cause, sent=False)
        if names.intersection(_TIMEOUTS):
            return CallTimeout(reason=f"{url} did not answer in time")
        if names.intersection(_BROKEN):
            return unreachable(url, cause, sent=True)
    return unreachable(url, error, sent=True)


def unreachable(url: str, error: BaseException, *, sent: bool) -> Unreachable:
    """No connection, or one that broke (`sent`: after the request may have gone out)."""
    words = redact(str(error), shapes=True) or type(error).__name__
    return Unreachable(
        reason=f"cannot reach {url}: {words}. Is the server running?", billed="unknown" if sent else "no"
    )


def is_loopback(url: str) -> bool:
    """Whether the address is this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
