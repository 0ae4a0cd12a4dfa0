"""Any endpoint that speaks the OpenAI chat protocol, through the official package, or without it.

Measured with 1,500-character prompts against a server that answers after 50 ms, CPU time per call on one core:

    in flight                                      100      1,000
    httpx                                       10.0 ms    14.2 ms
    official package over httpx2                 0.8 ms     5.0 ms
    official package over aiohttp, typed         0.9 ms     1.0 ms
    official package over aiohttp, as it is      0.4 ms     0.5 ms   <- `client: sdk`
    aiohttp alone                                0.1 ms     0.1 ms   <- `client: plain`
    HTTP/1.1 alone (`local`)                     0.02 ms    0.02 ms  <- `client: plain`, to this machine

so the package is no bottleneck below 2,000 calls per second and core. The plain client stays for local servers, which
must work without the extra `openai`, and for whoever wants the last half millisecond.
"""

import json
from typing import TYPE_CHECKING, Any

from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.keys import Key
from laif_jax.labeling.providers.remote import Exchange, connection_error, is_loopback, require
from laif_jax.labeling.providers.sdk import SdkTransport, http_client

if TYPE_CHECKING:
    import aiohttp

PATH = "/chat/completions"
_ACCOUNT = ("OpenAI-Organization", "OpenAI-Project")


class OpenAITransport(SdkTransport):
    """The official package."""

    def __init__(self, endpoint: Endpoint, key: Key | None) -> None:
        sdk = require("openai", "openai", "openai")
        url = endpoint.base_url or ""
        # What the environment holds for OpenAI (key, organisation) must not be sent to another server.
        names = () if url.startswith("https://api.openai.com/") else _ACCOUNT
        hidden = {name: sdk.Omit() for name in (names if key else (*names, "Authorization"))}
        client = sdk.AsyncOpenAI(
            api_key=key.reveal() if key else "none",
            base_url=url,
            max_retries=0,
            timeout=endpoint.timeout,
            http_client=http_client(sdk, endpoint, url),
        )
        super().__init__(sdk, client, url, PATH, hidden)


class PlainTransport:
    """The same wire format over aiohttp."""

    def __init__(self, endpoint: Endpoint, key: Key | None) -> None:
        import aiohttp  # takes as long to import as all providers together: not before it is used

        self._aiohttp, self._endpoint, self._key = aiohttp, endpoint, key
        self.url = f"{endpoint.base_url}{PATH}"
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> "aiohttp.ClientSession":
        aiohttp = self._aiohttp
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key.reveal()}"
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._endpoint.concurrency),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=self._endpoint.timeout),
            trust_env=not is_loopback(self.url),
        )

    async def send(self, body: dict[str, Any]) -> Exchange:
        if self._session is None:  # needs the running loop
            self._session = self._open()
        content = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        try:
            async with self._session.post(self.url, data=content, allow_redirects=False) as response:
                headers = {name.lower(): value for name, value in response.headers.items()}
                return Exchange(response.status, headers, await response.read())
        except self._aiohttp.ClientError as error:
            raise connection_error(self.url, error) from error

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
