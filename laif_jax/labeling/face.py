"""Pages of the service: its dashboard, its description, its metrics. All of it without outside resources."""

import html
import json
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, Response

from laif_jax.labeling.metrics import CONTENT_TYPE, exposition
from laif_jax.labeling.overview import Observer, Overview
from laif_jax.labeling.problems import Problem, Refusal
from laif_jax.labeling.store import Store

_WEB = Path(__file__).parent / "web"
_FILES = {"page.css": "text/css", "dashboard.js": "text/javascript"}
_METHODS = ("get", "post", "put", "delete", "patch")


class _Live(Protocol):
    observer: Observer


def add_face(app: FastAPI, store: Store, live: _Live, *, needs_token: bool) -> None:
    """Adds `/`, `/docs`, `/web/...`, `/v1/overview` and `/metrics`."""

    @app.get("/", include_in_schema=False)
    async def dashboard() -> HTMLResponse:
        # The page holds no data: it asks `/v1/overview`, with the token where there is one.
        text = _page("dashboard.html").replace("{{needs_token}}", "yes" if needs_token else "no")
        return HTMLResponse(text)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(_page("docs.html").replace("{{content}}", describe(app.openapi())))

    @app.get("/web/{name}", include_in_schema=False)
    async def web(name: str) -> Response:
        if name not in _FILES:
            raise Refusal(404, "not_found", "no such page")
        return Response(_page(name), media_type=_FILES[name])

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)

    @app.get("/v1/overview", tags=["service"], summary="What the dashboard shows")
    async def overview() -> Overview:
        """Jobs with their pace and the time that is left, counts, errors, money, and the latest judgements. Counts
        are read as often as the store's size allows, so it may be asked every second."""
        return await live.observer.overview()

    @app.get(
        "/metrics",
        tags=["service"],
        summary="Metrics for Prometheus",
        response_class=Response,
        responses={
            200: {
                "description": "Prometheus' text format",
                "content": {"text/plain": {"schema": {"type": "string"}}},
            }
        },
    )
    async def metrics() -> Response:
        """Calls by endpoint and outcome, their time, calls in flight and waiting, requests, results and jobs by state,
        money. Scrape it with the token as `authorization.credentials`."""
        meters, gauges = live.observer.meters, await live.observer.gauges()
        return Response(exposition(meters, gauges), media_type=CONTENT_TYPE)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _schema(app, needs_token)
        return app.openapi_schema

    app.openapi = openapi


@cache
def _page(name: str) -> str:
    return (_WEB / name).read_text("utf-8")


def _schema(app: FastAPI, needs_token: bool) -> dict[str, Any]:
    """FastAPI's description, with the job's definitions where its references point, and with the token."""
    schema = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        routes=app.routes,
        tags=app.openapi_tags,
    )
    parts = schema.setdefault("components", {}).setdefault("schemas", {})
    body = schema["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    for name, part in body.pop("$defs", {}).items():
        parts.setdefault(name, part)
    parts.setdefault("Problem", Problem.model_json_schema())
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which is never sent
        parts.pop(name, None)
    if needs_token:
        schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                operation["security"] = [] if path == "/health" else [{"token": []}]
    return schema


# ---- the description as a page -----------------------------------------------------------------------------------


def describe(schema: dict[str, Any]) -> str:
    """The API's description as HTML; everything is escaped."""
    parts = [f"<h1>{_text(schema['info']['title'])}</h1>", _prose(schema["info"].get("description", ""))]
    for tag in schema.get("tags", []):
        parts.append(f"<h2>{_text(tag['name'])}</h2><p>{_text(tag.get('description', ''))}</p>")
        for path, operations in schema["paths"].items():
            for method, operation in operations.items():
                if method in _METHODS and tag["name"] in operation.get("tags", []):
                    parts.append(_operation(method, path, operation))
    parts.append("<h2>schemas</h2>")
    for name, part in sorted(schema["components"]["schemas"].items()):
        parts.append(_definition(name, part))
    return "\n".join(parts)


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    lines = [
        f'<section class="card"><h3><span class="verb">{method.upper()}</span> <code>{_text(path)}</code></h3>',
        f"<p>{_text(operation.get('summary', ''))}. {_inline(operation.get('description', ''))}</p>",
    ]
    if parameters := operation.get("parameters"):
        rows = [
            f"<tr><td><code>{_text(p['name'])}</code></td>"
            f"<td>{_text(p['in'])}{'' if p.get('required') else ', optional'}</td>"
            f"<td>{_inline(p.get('description', ''))}</td></tr>"
            for p in parameters
        ]
        lines.append(f'<div class="scroll"><table><tbody>{"".join(rows)}</tbody></table></div>')
    for content in operation.get("requestBody", {}).get("content", {}).values():
        choices = [_link(choice) for choice in content["schema"].get("oneOf", [content["schema"]])]
        lines.append(f"<p>body: {' or '.join(choices)}</p>")
        for example in content.get("examples", {}).values():
            shown = json.dumps(example["value"], indent=2, ensure_ascii=False)
            lines.append(
                f"<details><summary>example: {_text(example['summary'])}</summary><pre>{_text(shown)}</pre></details>"
            )
    rows = [
        f"<tr><td>{_text(status)}</td><td>{_inline(answer.get('description', ''))}</td>"
        f"<td>{_answer_type(answer)}</td></tr>"
        for status, answer in operation["responses"].items()
    ]
    lines.append(f'<div class="scroll"><table><tbody>{"".join(rows)}</tbody></table></div></section>')
    return "".join(lines)


def _answer_type(answer: dict[str, Any]) -> str:
    shown = []
    for kind, content in answer.get("content", {}).items():
        part = content.get("schema", {})
        inner = part.get("items", part)
        shown.append(
            f"{'list of ' if 'items' in part else ''}{_link(inner)}" if "$ref" in inner else _text(kind)
        )
    return ", ".join(shown)


def _definition(name: str, part: dict[str, Any]) -> str:
    rows = [
        f"<tr><td><code>{_text(field)}</code></td><td>{_type(spec)}</td><td>{_inline(_default(spec))}</td></tr>"
        for field, spec in part.get("properties", {}).items()
    ]
    table = f'<div class="scroll"><table><tbody>{"".join(rows)}</tbody></table></div>' if rows else ""
    return (
        f'<details class="card" id="{_text(name)}"><summary><code>{_text(name)}</code></summary>'
        f'<p class="prose">{_inline(part.get("description", ""))}</p>{table}</details>'
    )


def _default(spec: dict[str, Any]) -> str:
    told = spec.get("description", "")
    if "default" in spec and spec["default"] not in (None, ""):
        told += f" (default: `{json.dumps(spec['default'])}`)"
    return told


def _type(spec: dict[str, Any]) -> str:
    if "$ref" in spec:
        return _link(spec)
    if "enum" in spec or "const" in spec:
        return _text(" | ".join(json.dumps(value) for value in spec.get("enum", [spec.get("const")])))
    for word in ("anyOf", "oneOf"):
        if word in spec:
            return " or ".join(_type(choice) for choice in spec[word])
    if spec.get("type") == "array" and isinstance(spec.get("items"), dict):
        return f"list of {_type(spec['items'])}"
    return _text(spec.get("type", "any"))


def _link(spec: dict[str, Any]) -> str:
    name = _text(spec.get("$ref", "").rpartition("/")[2])
    return f'<a href="#{name}"><code>{name}</code></a>' if name else _type(spec)


def _text(value: object) -> str:
    return html.escape(str(value))


def _inline(text: str) -> str:
    """Escaped, with `code` and **bold**."""
    parts = _text(text).split("`")
    marked = "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
    pieces = marked.split("**")
    return "".join(f"<strong>{piece}</strong>" if i % 2 else piece for i, piece in enumerate(pieces))


def _prose(text: str) -> str:
    return "".join(f"<p>{_inline(paragraph)}</p>" for paragraph in text.strip().split("\n\n"))
