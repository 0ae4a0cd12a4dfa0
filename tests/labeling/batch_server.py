"""Fake batch APIs of OpenAI, Anthropic and Gemini, in their wire formats. They lose nothing, so that a test can see
whether anything was sent twice."""

import datetime
import email.parser
import email.policy
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.labeling.wire_server import Request, Response, anthropic_body, google_body, openai_body


def _anthropic_fails(kind: str) -> dict[str, Any]:
    error = {"type": "error", "error": {"type": kind, "message": "no"}, "request_id": None}
    return {"type": "errored", "error": error}


class BatchApi:
    """Common parts. `fate(text)` says how a row ends: "ok", "expired", "bad" or "busy"; `done`: batches have ended."""

    def __init__(self) -> None:
        self.done = True
        self.fate: Callable[[str], str] = lambda text: "ok"
        self.batches: dict[str, dict[str, Any]] = {}
        self.asked: Counter[str] = Counter()  # rows sent, by their text
        self.before_answer: Callable[[], Response | None] = lambda: None  # after a batch was made
        self.polls = 0

    def make(self, **fields: Any) -> str:
        name = f"batch_{len(self.batches)}"
        self.batches[name] = {"made": datetime.datetime.now(datetime.UTC).isoformat(), **fields}
        return name

    def count(self, rows: list[str]) -> None:
        self.asked.update(rows)


class OpenAIBatchApi(BatchApi):
    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, str] = {}

    def __call__(self, request: Request) -> Response:
        path = request.path.partition("?")[0].removeprefix("/v1")
        if path == "/files":
            return self._upload(request)
        if path.startswith("/files/"):
            return Response(
                body=self.files[path.split("/")[2]], headers={"Content-Type": "application/binary"}
            )
        if path == "/batches" and request.method == "POST":
            name = self.make(**request.json)
            rows = [json.loads(line) for line in self.files[request.json["input_file_id"]].splitlines()]
            self.count([row["body"]["messages"][-1]["content"] for row in rows])
            return self.before_answer() or Response(body=self._batch(name))
        if path == "/batches":
            return Response(body={"data": [self._batch(name) for name in self.batches], "has_more": False})
        name = path.split("/")[2]
        if name not in self.batches:
            return Response(404, {"error": {"message": f"No batch found with id '{name}'"}})
        self.polls += 1
        return Response(body=self._batch(name))

    def _upload(self, request: Request) -> Response:
        head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
        parsed = email.parser.BytesParser(policy=email.policy.default).parsebytes(head + request.content)
        parts = {part.get_param("name", header="content-disposition"): part for part in parsed.iter_parts()}
        assert parts["purpose"].get_content().strip() == "batch"
        content = parts["file"].get_payload(decode=True)
        name = f"file-{len(self.files)}"
        self.files[name] = content.decode()
        return Response(body={"id": name, "object": "file", "purpose": "batch"})

    def _batch(self, name: str) -> dict[str, Any]:
        batch = self.batches[name]
        row = {
            "id": name,
            "object": "batch",
            "status": "completed" if self.done else "in_progress",
            "metadata": batch["metadata"],
            "created_at": 4102444800,
            "output_file_id": None,
            "error_file_id": None,
        }
        if self.done:
            answers, errors = [], []
            for line in self.files[batch["input_file_id"]].splitlines():
                sent = json.loads(line)
                assert sent["url"] == "/v1/chat/completions"
                text = sent["body"]["messages"][-1]["content"]
                fate, common = self.fate(text), {"id": "batch_req_1", "custom_id": sent["custom_id"]}
                if fate == "expired":
                    error = {"code": "batch_expired", "message": "This request could not be executed"}
                    errors.append({**common, "response": None, "error": error})
                    continue
                status = {"ok": 200, "bad": 400, "busy": 503}[fate]
                body = openai_body(f"re {text}") if fate == "ok" else {"error": {"message": "no"}}
                response = {"status_code": status, "request_id": "req_1", "body": body}
                (answers if fate == "ok" else errors).append({**common, "response": response, "error": None})
            for kind, rows in (("output_file_id", answers), ("error_file_id", errors)):
                row[kind] = f"{name}-{kind}"
                self.files[f"{name}-{kind}"] = "\n".join(map(json.dumps, rows)) + "\n"
        return row


class AnthropicBatchApi(BatchApi):
    def __call__(self, request: Request) -> Response:
        path = request.path.partition("?")[0].removeprefix("/v1/messages/batches")
        if request.method == "POST" and not path:
            rows = request.json["requests"]
            assert all(re.fullmatch("[a-zA-Z0-9_-]{1,64}", row["custom_id"]) for row in rows)
            name = self.make(rows=rows)
            self.count([row["params"]["messages"][-1]["content"] for row in rows])
            return self.before_answer() or Response(body=self._batch(name))
        if not path:
            data = [self._batch(name) for name in reversed(self.batches)]
            return Response(body={"data": data, "has_more": False})
        name, _, rest = path.removeprefix("/").partition("/")
        if name not in self.batches:
            error = {"type": "error", "error": {"type": "not_found_error", "message": "Not found"}}
            return Response(404, error)
        if rest == "results":
            rows = [
                {"custom_id": row["custom_id"], "result": self._result(row)}
                for row in self.batches[name]["rows"]
            ]
            return Response(
                body="\n".join(map(json.dumps, rows)), headers={"Content-Type": "application/x-jsonl"}
            )
        self.polls += 1
        return Response(body=self._batch(name))

    def _result(self, row: dict[str, Any]) -> dict[str, Any]:
        text = row["params"]["messages"][-1]["content"]
        fate = self.fate(text)
        if fate == "ok":
            return {"type": "succeeded", "message": anthropic_body(f"re {text}")}
        kinds = {"bad": "invalid_request_error", "busy": "overloaded_error"}
        return {"type": "expired"} if fate == "expired" else _anthropic_fails(kinds[fate])

    def _batch(self, name: str) -> dict[str, Any]:
        rows = len(self.batches[name]["rows"])
        kinds = ("processing", "succeeded", "errored", "canceled", "expired")
        counts = dict.fromkeys(kinds, 0) | {"succeeded" if self.done else "processing": rows}
        return {
            "id": name,
            "type": "message_batch",
            "processing_status": "ended" if self.done else "in_progress",
            "request_counts": counts,
            "created_at": self.batches[name]["made"],
            "expires_at": self.batches[name]["made"],
            "results_url": None,
        }


class GoogleBatchApi(BatchApi):
    def __call__(self, request: Request) -> Response:
        path = request.path.partition("?")[0]
        if path.endswith(":batchGenerateContent"):
            batch = request.json["batch"]
            rows = batch["inputConfig"]["requests"]["requests"]
            name = self.make(rows=rows, display=batch["displayName"])
            self.count([row["request"]["contents"][-1]["parts"][0]["text"] for row in rows])
            return self.before_answer() or Response(body=self._batch(name))
        name = path.rpartition("/")[2]
        if name == "batches":
            return Response(body={"operations": [self._batch(name) for name in self.batches]})
        if name not in self.batches:
            return Response(404, {"error": {"code": 404, "message": "gone", "status": "NOT_FOUND"}})
        self.polls += 1
        return Response(body=self._batch(name))

    def _batch(self, name: str) -> dict[str, Any]:
        batch = self.batches[name]
        state = "BATCH_STATE_SUCCEEDED" if self.done else "BATCH_STATE_RUNNING"
        value: dict[str, Any] = {
            "name": f"batches/{name}",
            "metadata": {"model": "models/fake", "displayName": batch["display"], "state": state},
        }
        if self.done:
            rows = [{"metadata": row["metadata"], **self._result(row)} for row in batch["rows"]]
            output = {"inlinedResponses": {"inlinedResponses": rows}}
            value |= {"done": True, "response": output}
            value["metadata"]["output"] = output
        return value

    def _result(self, row: dict[str, Any]) -> dict[str, Any]:
        text = row["request"]["contents"][-1]["parts"][0]["text"]
        fate = self.fate(text)
        if fate == "ok":
            return {"response": google_body(f"re {text}")}
        codes = {"bad": (3, "no"), "busy": (14, "no")}
        if fate == "expired":
            return {}
        code, message = codes[fate]
        return {"error": {"code": code, "message": message}}


APIS = {"openai": OpenAIBatchApi, "anthropic": AnthropicBatchApi, "google": GoogleBatchApi}
