"""What every server here is over HTTP: the addresses of the chat protocol, errors in OpenAI's shape, the lifespan."""

import hashlib
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from laif_jax.serving.protocol import ApiError, ChatRequest


class Service(Protocol):
    """What answers behind the addresses.

    Attributes:
      name: that clients ask for; they may also say "default". fingerprint: names the weights, see `fingerprint`.
    """

    name: str
    fingerprint: str

    @property
    def max_length(self) -> int:
        """Tokens that the model takes."""
        ...

    @property
    def queued(self) -> int:
        """What waits to be answered."""
        ...

    def running(self) -> AbstractAsyncContextManager[None]:
        """While requests may come."""
        ...

    async def chat(self, request: ChatRequest) -> dict[str, Any]:
        """The answer to a request for this model. Raises ApiError."""
        ...


def http_app(service: Service, title: str) -> FastAPI:
    """The application over a service, which is its `app.state.service`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        async with service.running():
            yield  # uvicorn answers the requests in flight before it ends the lifespan

    app = FastAPI(title=title, lifespan=lifespan)
    app.state.service = service
    _add_errors(app)
    _add_routes(app, service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest) -> dict[str, Any]:
        if request.model not in (service.name, "default"):
            raise ApiError(
                f"the model `{request.model}` does not exist here; this server has `{service.name}`",
                status=404,
                param="model",
                code="model_not_found",
            )
        return await service.chat(request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": service.name, "object": "model", "created": 0, "owned_by": "laif_jax"}
        return {"object": "list", "data": [{**entry, "max_model_len": service.max_length}]}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "model": service.name,
            "fingerprint": service.fingerprint,
            "queued": service.queued,
        }


def _add_errors(app: FastAPI) -> None:
    """Every error leaves in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        message = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "json_invalid":
            place, message = "", f"the body is not valid JSON ({message})"
        elif first["type"] == "model_attributes_type":
            message = "the body must be a JSON object, sent with the header content-type: application/json"
        elif not place:
            place = message.split(":")[0] if ":" in message else ""
        else:
            message = f"{place}: {message}"
        return JSONResponse(ApiError(message, param=place or None).body, 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(message).body, error.status_code)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        body = ApiError(f"{type(error).__name__}: {error}", kind="server_error").body
        return JSONResponse(body, 500)


def fingerprint(checkpoint: str) -> str:
    """Names the weights that answer: a hash of the files' names and sizes and of the end of each (at most 1 MiB)."""
    path = Path(checkpoint)
    if path.is_dir():
        found = [
            *path.iterdir(),
            *path.glob("member-*/*"),
        ]  # an ensemble of reward models has a folder per member
        files = sorted(p for p in found if p.suffix in (".safetensors", ".json", ".jinja"))
    else:
        files = [path] if path.is_file() else []
    digest = hashlib.sha256(checkpoint.encode() if not files else b"")
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as handle:
            handle.seek(max(0, size - (1 << 20)))
            digest.update(handle.read())
    return f"laif-{digest.hexdigest()[:12]}"
