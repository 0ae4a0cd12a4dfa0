"""What the `openai` and `anthropic` packages have in common: both are built by one generator, over one HTTP package."""

import importlib.util
import inspect
import sys
from types import ModuleType
from typing import Any

from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.providers.remote import Exchange, connection_error, is_loopback


def http_client(sdk: Any, endpoint: Endpoint, url: str) -> Any:
    """The package's HTTP client over aiohttp, which costs a tenth of its default per call at 1,000 in flight."""
    http = http_package(sdk)
    limits = http.Limits(max_connections=endpoint.concurrency, max_keepalive_connections=endpoint.concurrency)
    kind = sdk.DefaultAioHttpClient if importlib.util.find_spec("aiohttp") else sdk.DefaultAsyncHttpxClient
    return kind(
        limits=limits,
        timeout=http.Timeout(endpoint.timeout),
        follow_redirects=False,
        # A proxy of the environment must not get calls to this machine.
        trust_env=not is_loopback(url),
    )


def http_package(sdk: Any) -> ModuleType:
    """The HTTP package that the installed release is built on: httpx2, or httpx before."""
    base = next(
        cls for cls in inspect.getmro(sdk.DefaultAsyncHttpxClient) if cls.__module__.startswith("httpx")
    )
    return sys.modules[base.__module__.partition(".")[0]]


class SdkTransport:
    """POSTs through a package's client. Its own retries are off, and it parses nothing.

    `client.post` with the HTTP package's response as its type is the packages' documented way to send a body as it is:
    half the cost of the typed methods, and what the endpoint said is kept byte for byte.
    """

    def __init__(
        self, sdk: Any, client: Any, base_url: str, path: str, headers: dict[str, Any] | None = None
    ) -> None:
        self.sdk, self.client, self._path = sdk, client, path
        self._headers = headers or {}
        self._http = http_package(sdk)
        self.url = f"{base_url.rstrip('/')}{path}"

    async def send(self, body: dict[str, Any]) -> Exchange:
        return await self.request("post", self._path, body=body)

    async def request(
        self, method: str, path: str, headers: dict[str, str] | None = None, **rest: Any
    ) -> Exchange:
        """Any request of the API; raises `CallError` only if there is no answer."""
        options = {"headers": {**self._headers, **(headers or {})}}
        sdk, url = self.sdk, f"{str(self.client.base_url).rstrip('/')}{path}"
        try:
            response = await getattr(self.client, method)(
                path, cast_to=self._http.Response, options=options, **rest
            )
        except sdk.APIStatusError as error:
            response = error.response
        except sdk.APIConnectionError as error:  # time-outs are a kind of it
            raise connection_error(url, error) from error
        lower = {name.lower(): value for name, value in response.headers.items()}
        return Exchange(response.status_code, lower, response.content)

    async def close(self) -> None:
        await self.client.close()
