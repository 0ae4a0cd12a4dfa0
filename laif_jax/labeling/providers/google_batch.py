"""Batches of Gemini: requests within the call on the Gemini API, files in a bucket on Vertex AI."""

import json
from collections.abc import Awaitable, Sequence
from typing import Any

from etils import epath

from laif_jax.labeling.calls import Call, Endpoint
from laif_jax.labeling.errors import BadRequest, CallError, Malformed
from laif_jax.labeling.keys import Key, redact
from laif_jax.labeling.providers.batch import Progress
from laif_jax.labeling.providers.google import config_of, http_package, make_client
from laif_jax.labeling.providers.ledger import Batch
from laif_jax.labeling.providers.remote import Exchange, connection_error, utf8
from laif_jax.labeling.wires import WIRES

_ENDED = ("SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED", "PARTIALLY_SUCCEEDED")
_LABEL = "laif-key"  # a label of Vertex AI has 63 characters at most


class GoogleBatches:
    """Rows carry their key as metadata, or on Vertex AI as a label that comes back with the request."""

    max_rows, max_bytes = 10_000, 15 * 10**6  # requests within the call may have 20 MB

    def __init__(self, endpoint: Endpoint, key: Key | None) -> None:
        self._genai, self.client = make_client(endpoint, key)
        self._endpoint = endpoint
        self._folder = epath.Path(endpoint.batch_folder) if endpoint.batch_folder else None
        if self._folder is not None:
            self.max_bytes = 500 * 10**6

    def name(self, key: str) -> str:
        return key if self._folder is None else key[:63]

    async def _ask(self, request: Awaitable[Any]) -> Any:
        where = f"batches of {self._endpoint.name}"
        try:
            return await request
        except self._genai.errors.APIError as error:
            details = error.details
            told = details if isinstance(details, dict) and "error" in details else {"error": details}
            text = redact(json.dumps(told))
            raise WIRES["google"].error(where, int(error.code or 500), {}, text) from error
        except http_package().TransportError as error:
            raise connection_error(where, error) from error
        except ValueError as error:  # before it was sent: a field that the package does not have
            raise BadRequest(reason=redact(f"{where}: {error}")) from error

    async def submit(self, tag: str, calls: Sequence[Call]) -> str:
        source: Any
        config: dict[str, Any] = {"display_name": tag}
        if self._folder is None:
            bodies = [(call.key, utf8(call.body())) for call in calls]
            source = [
                {"contents": body["contents"], "config": config_of(body), "metadata": {"key": key}}
                for key, body in bodies
            ]
        else:
            lines = [
                json.dumps({"request": {**utf8(call.body()), "labels": {_LABEL: self.name(call.key)}}})
                for call in calls
            ]
            source = {"format": "jsonl", "gcs_uri": [self._write(tag, "\n".join(lines) + "\n")]}
            config["dest"] = {"format": "jsonl", "gcs_uri": str(self._folder / tag / "answers")}
        job = await self._ask(
            self.client.aio.batches.create(model=self._endpoint.model, src=source, config=config)
        )
        return str(job.name)

    def _write(self, tag: str, text: str) -> str:
        assert self._folder is not None
        path = self._folder / tag / "requests.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    async def find(self, batch: Batch, known: set[str]) -> list[str]:
        pager = await self._ask(self.client.aio.batches.list(config={"page_size": 100}))
        async for job in pager:
            if job.display_name == batch.tag:
                return [str(job.name)]
        return []

    async def poll(self, remote_id: str) -> Progress:
        try:
            job = await self._ask(self.client.aio.batches.get(name=remote_id))
        except CallError as error:
            if error.kind == "not_found":
                return Progress(ended=False, state="unknown", known=False)
            raise
        state = str(getattr(job.state, "name", job.state)).removeprefix("JOB_STATE_")
        return Progress(state in _ENDED, state)

    async def fetch(self, remote_id: str) -> dict[str, Exchange | None]:
        job = await self._ask(self.client.aio.batches.get(name=remote_id))
        if self._folder is not None:
            return self._read(job)
        found: dict[str, Exchange | None] = {}
        for row in getattr(job.dest, "inlined_responses", None) or []:
            key = (row.metadata or {}).get("key", "")
            if row.response is not None:
                found[key] = _exchange(200, _plain(row.response))
            elif row.error is not None:
                found[key] = _exchange(_status(row.error.code), {"error": _plain(row.error)})
            else:
                found[key] = None
        return found

    def _read(self, job: Any) -> dict[str, Exchange | None]:
        """The rows of the answers' files."""
        found: dict[str, Exchange | None] = {}
        uri = getattr(job.dest, "gcs_uri", None)
        if not uri:
            return found
        for path in sorted(epath.Path(uri).glob("*/*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                    key = row["request"]["labels"][_LABEL]
                except (ValueError, KeyError, TypeError) as error:
                    raise Malformed(reason=f"{path}: a row without its key ({error!r})", body=line) from error
                failed = row.get("status")
                body = {"error": {"message": str(failed)}} if failed else row.get("response")
                found[key] = _exchange(500 if failed else 200, body)
        return found

    async def cancel(self, remote_id: str) -> None:
        await self._ask(self.client.aio.batches.cancel(name=remote_id))

    async def close(self) -> None:
        await self.client.aio.aclose()


def _exchange(status: int, body: Any) -> Exchange:
    return Exchange(status, {}, json.dumps(body).encode())


def _plain(value: Any) -> Any:
    """A model of the package as the JSON that it was read from."""
    dump = getattr(value, "model_dump", None)
    return dump(mode="json", by_alias=True, exclude_none=True) if dump else value


_STATUS = {3: 400, 4: 504, 5: 404, 7: 403, 8: 429, 13: 500, 14: 503, 16: 401}  # of gRPC


def _status(code: int | None) -> int:
    if code is None:
        return 500
    return _STATUS.get(code, code if 400 <= code < 600 else 500)
