"""The batch APIs of OpenAI, Anthropic and Google."""

import datetime
import json
from collections.abc import Sequence
from typing import Any

from laif_jax.labeling.calls import Call, Endpoint
from laif_jax.labeling.errors import CallError, EndpointError, Malformed
from laif_jax.labeling.keys import Key, redact
from laif_jax.labeling.providers.anthropic import AnthropicTransport
from laif_jax.labeling.providers.batch import BatchTransport, Progress
from laif_jax.labeling.providers.google_batch import GoogleBatches
from laif_jax.labeling.providers.ledger import Batch
from laif_jax.labeling.providers.openai import OpenAITransport
from laif_jax.labeling.providers.remote import Exchange, utf8
from laif_jax.labeling.providers.sdk import SdkTransport
from laif_jax.labeling.wires import WIRES
from laif_jax.labeling.wires.base import decode

MEGABYTE = 10**6
_SLACK = datetime.timedelta(minutes=2)  # clocks differ


def make_batches(endpoint: Endpoint, key: Key | None) -> BatchTransport:
    """The batch API of an endpoint; raises `EndpointError` if it has none."""
    if endpoint.provider == "openai":
        return OpenAIBatches(endpoint, key)
    if endpoint.provider == "anthropic":
        return AnthropicBatches(endpoint, key)
    if endpoint.provider == "google":
        return GoogleBatches(endpoint, key)
    raise EndpointError(f"endpoint {endpoint.name}: `provider: {endpoint.provider}` has no batches")


class _Batches:
    """What the two have in common: JSON over one transport."""

    def __init__(self, endpoint: Endpoint, transport: SdkTransport) -> None:
        self._transport, self._wire = transport, WIRES[endpoint.provider]

    def name(self, key: str) -> str:
        return key

    async def _json(self, method: str, path: str, **rest: Any) -> dict[str, Any]:
        exchange = await self._transport.request(method, path, **rest)
        text = redact(exchange.content.decode("utf-8", "replace"))
        if exchange.status != 200:
            raise self._wire.error(path, exchange.status, exchange.headers, text)
        value = decode(path, text)
        if not isinstance(value, dict):
            raise Malformed(reason=f"{path}: not a JSON object", body=text)
        return value

    async def _lines(self, path: str) -> list[dict[str, Any]]:
        """JSON lines; a line that cannot be read is left out: its row counts as unanswered."""
        exchange = await self._transport.request("get", path)
        if exchange.status != 200:
            text = redact(exchange.content.decode("utf-8", "replace"))
            raise self._wire.error(path, exchange.status, exchange.headers, text)
        return read_lines(exchange.content)

    async def close(self) -> None:
        await self._transport.close()


def _id(value: dict[str, Any]) -> str:
    name = value.get("id")
    if not isinstance(name, str) or not name:
        raise Malformed(reason="the provider named no id", body=value)
    return name


def read_lines(content: bytes) -> list[dict[str, Any]]:
    """The JSON objects among the lines."""
    found = []
    for line in content.splitlines():
        try:
            value = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def as_exchange(status: int, body: Any) -> Exchange:
    """A row of a batch's results as the answer to a call of its own, which a wire can read."""
    return Exchange(status, {}, json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"))


class OpenAIBatches(_Batches):
    """A file of requests, a batch over it, a file of answers and one of errors."""

    max_rows, max_bytes = 50_000, 150 * MEGABYTE

    def __init__(self, endpoint: Endpoint, key: Key | None) -> None:
        super().__init__(endpoint, OpenAITransport(endpoint, key))

    async def submit(self, tag: str, calls: Sequence[Call]) -> str:
        lines = [
            json.dumps(
                {
                    "custom_id": call.key,
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": utf8(call.body()),
                },
                ensure_ascii=False,
            )
            for call in calls
        ]
        content = "\n".join(lines).encode("utf-8", "replace")
        try:
            file = _id(
                await self._json(
                    "post",
                    "/files",
                    body={"purpose": "batch"},
                    files={"file": (f"{tag}.jsonl", content)},
                    headers={"Content-Type": "multipart/form-data"},
                )
            )
        except CallError as error:
            error.billed = "no"  # a file alone costs nothing
            raise
        batch = await self._json(
            "post",
            "/batches",
            body={
                "input_file_id": file,
                "endpoint": "/v1/chat/completions",
                "completion_window": "24h",
                "metadata": {"laif": tag},
            },
        )
        return _id(batch)

    async def find(self, batch: Batch, known: set[str]) -> list[str]:
        path, after = "/batches?limit=100", ""
        while True:
            page = await self._json("get", path + after)
            rows = [row for row in page.get("data") or [] if isinstance(row, dict)]
            for row in rows:
                if (row.get("metadata") or {}).get("laif") == batch.tag:
                    return [str(row["id"])]
            since = (batch.created - _SLACK).timestamp()
            if not rows or not page.get("has_more") or rows[-1].get("created_at", 0) < since:
                return []
            after = f"&after={rows[-1]['id']}"

    async def poll(self, remote_id: str) -> Progress:
        try:
            row = await self._json("get", f"/batches/{remote_id}")
        except CallError as error:
            if error.kind == "not_found":
                return Progress(ended=False, state="unknown", known=False)
            raise
        state = str(row.get("status"))
        return Progress(state in ("completed", "failed", "expired", "cancelled"), state)

    async def fetch(self, remote_id: str) -> dict[str, Exchange | None]:
        batch = await self._json("get", f"/batches/{remote_id}")
        found: dict[str, Exchange | None] = {}
        for name in ("output_file_id", "error_file_id"):
            if batch.get(name):
                for row in await self._lines(f"/files/{batch[name]}/content"):
                    found[str(row.get("custom_id"))] = _openai_row(row)
        return found

    async def cancel(self, remote_id: str) -> None:
        await self._json("post", f"/batches/{remote_id}/cancel")


def _openai_row(row: dict[str, Any]) -> Exchange | None:
    response = row.get("response")
    if isinstance(response, dict) and isinstance(response.get("status_code"), int):
        return as_exchange(response["status_code"], response.get("body"))
    error = row.get("error")
    if isinstance(error, dict) and error.get("code") not in ("batch_expired", "batch_cancelled"):
        return as_exchange(500, {"error": error})
    return None


_ANTHROPIC_STATUS = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "timeout_error": 504,
    "overloaded_error": 529,
}


class AnthropicBatches(_Batches):
    """Message batches. They have no names of ours."""

    max_rows, max_bytes = 100_000, 200 * MEGABYTE

    def __init__(self, endpoint: Endpoint, key: Key | None) -> None:
        super().__init__(endpoint, AnthropicTransport(endpoint, key))

    async def submit(self, tag: str, calls: Sequence[Call]) -> str:
        rows = [{"custom_id": call.key, "params": utf8(call.body())} for call in calls]
        batch = await self._json("post", "/v1/messages/batches", body={"requests": rows})
        return _id(batch)

    async def find(self, batch: Batch, known: set[str]) -> list[str]:
        page = await self._json("get", "/v1/messages/batches?limit=100")
        found = []
        for row in page.get("data") or []:
            counts = row.get("request_counts") or {}
            created = datetime.datetime.fromisoformat(str(row["created_at"]))
            near = batch.created - _SLACK <= created <= batch.created + 5 * _SLACK
            if near and sum(counts.values()) == batch.rows and row["id"] not in known:
                found.append(str(row["id"]))
        return found

    async def poll(self, remote_id: str) -> Progress:
        try:
            row = await self._json("get", f"/v1/messages/batches/{remote_id}")
        except CallError as error:
            if error.kind == "not_found":
                return Progress(ended=False, state="unknown", known=False)
            raise
        state = str(row.get("processing_status"))
        return Progress(state == "ended", f"{state}, {json.dumps(row.get('request_counts'))}")

    async def fetch(self, remote_id: str) -> dict[str, Exchange | None]:
        found: dict[str, Exchange | None] = {}
        for row in await self._lines(f"/v1/messages/batches/{remote_id}/results"):
            found[str(row.get("custom_id"))] = _anthropic_row(row.get("result"))
        return found

    async def cancel(self, remote_id: str) -> None:
        await self._json("post", f"/v1/messages/batches/{remote_id}/cancel")


def _anthropic_row(result: Any) -> Exchange | None:
    if not isinstance(result, dict):
        return None
    if result.get("type") == "succeeded":
        return as_exchange(200, result.get("message"))
    if result.get("type") == "errored":
        body = result.get("error")
        error = body.get("error") if isinstance(body, dict) else None
        kind = error.get("type") if isinstance(error, dict) else ""
        return as_exchange(_ANTHROPIC_STATUS.get(str(kind), 500), body)
    return None  # canceled, expired
