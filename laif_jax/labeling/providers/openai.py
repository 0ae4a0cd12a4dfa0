"""Any endpoint that speaks the OpenAI chat protocol."""

import asyncio
import datetime
import email.utils
import ipaddress
import json
import os
from typing import Any
from urllib.parse import urlsplit

import httpx

from laif_jax.labeling.calls import Call, Endpoint
from laif_jax.labeling.errors import CallError, EndpointError

_RETRYABLE = {408, 409, 425, 429}
_FATAL = {
    401: ("unauthorised", "refused the key. Set the variable that `api_key_env` names to a valid key"),
    402: ("quota", "asks for payment. Mend the account's balance"),
    403: ("unauthorised", "forbids this key to use the model. Check the key's rights"),
    404: (
        "not_found",
        "knows no such address or model. Check `base_url` (it usually ends in /v1) and `model`",
    ),
}


def is_loopback(url: str) -> bool:
    """Whether the address is this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class OpenAIProvider:
    """POST `base_url`/chat/completions. The key is read from the environment here and goes nowhere else."""

    free = False

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.width = endpoint.concurrency
        self._key = ""
        headers = {"Accept": "application/json"}
        if endpoint.api_key_env:
            self._key = os.environ.get(endpoint.api_key_env, "").strip()
            if not self._key:
                raise EndpointError(
                    f"endpoint {endpoint.name}: the environment variable {endpoint.api_key_env} is not set where "
                    "the labelling service runs. Set it and start the service again"
                )
            headers["Authorization"] = f"Bearer {self._key}"
        limits = httpx.Limits(
            max_connections=endpoint.concurrency, max_keepalive_connections=endpoint.concurrency
        )
        # A proxy of the environment must not get calls to this machine.
        self._client = httpx.AsyncClient(
            headers=headers,
            limits=limits,
            timeout=httpx.Timeout(endpoint.timeout),
            trust_env=not is_loopback(endpoint.base_url or ""),
        )

    async def call(self, call: Call, attempt: int) -> dict[str, Any]:
        url = f"{self.endpoint.base_url}/chat/completions"
        content = json.dumps(call.body(), ensure_ascii=False).encode("utf-8", "replace")
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                response = await self._client.post(
                    url, content=content, headers={"Content-Type": "application/json"}
                )
        except (TimeoutError, httpx.TimeoutException) as error:
            raise CallError(
                "timeout", f"{url} did not answer within {self.endpoint.timeout:g} s", retryable=True
            ) from error
        except httpx.TransportError as error:
            raise CallError(
                "unreachable",
                f"cannot reach {url}: {self._clean(str(error)) or type(error).__name__}. Is the server running?",
                retryable=True,
            ) from error
        except httpx.DecodingError as error:
            raise CallError("malformed", f"{url}: {error}", retryable=True) from error
        return self._decode(url, response)

    def _decode(self, url: str, response: httpx.Response) -> dict[str, Any]:
        status, text = response.status_code, self._clean(response.text)
        if status == 429 and "insufficient_quota" in text:
            raise CallError(
                "quota", f"{url}: the account's quota is used up. Mend its balance", fatal=True, body=text
            )
        if status in _RETRYABLE or status >= 500:
            kind = "rate_limited" if status == 429 else "server_error"
            raise CallError(
                kind,
                f"{url} answered {status}{_detail(text)}",
                retryable=True,
                retry_after=_retry_after(response.headers.get("Retry-After")),
                body=text,
            )
        if status in _FATAL:
            kind, advice = _FATAL[status]
            raise CallError(
                kind, f"{url} answered {status}: it {advice}{_detail(text)}", fatal=True, body=text
            )
        if status != 200:
            raise CallError(
                "bad_request",
                f"{url} answered {status}{_detail(text)}. The request is not accepted as it stands (too long for "
                "the context, or a parameter that this endpoint does not have)",
                body=text,
            )
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CallError(
                "non_json",
                f"{url} answered something that is not JSON{_detail(text)}",
                retryable=True,
                body=text,
            ) from error

    def _clean(self, text: str) -> str:
        """Some endpoints quote the key back: it must reach neither the store nor a log."""
        return text.replace(self._key, "[key]") if self._key else text

    async def close(self) -> None:
        await self._client.aclose()


def _detail(text: str) -> str:
    """The endpoint's own words, shortened, for a message."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    error = value.get("error") if isinstance(value, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    words = " ".join((message if isinstance(message, str) else text).split())[:300]
    return f" ({words})" if words else ""


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (a number, or an HTTP date)."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            until = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        if until.tzinfo is None:
            until = until.replace(tzinfo=datetime.UTC)
        seconds = (until - datetime.datetime.now(datetime.UTC)).total_seconds()
    return max(0.0, seconds) if seconds < float("inf") else None
