"""The HTTP application: OpenAI's chat completions over one checkpoint."""

import asyncio
import hashlib
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from laif_jax.data.chat import TemplateName, encode_prompt, end_of_turn_ids
from laif_jax.models.model import Model, load_model
from laif_jax.rollout.engine import Engine, Row, RowOutput
from laif_jax.serving.batcher import Batcher, ClosedError, DecodingError, QueueFullError, Ticket
from laif_jax.serving.protocol import (
    MAX_TOP_LOGPROBS,
    ApiError,
    ChatRequest,
    chat_response,
    choice,
    token_entry,
)
from laif_jax.serving.text import TokenText, find_stop, tokens_before


@dataclass(frozen=True)
class Answer:
    """One completion as text. `tokens`: what it is made of, the EOS included where one was drawn."""

    text: str
    finish_reason: str
    tokens: list[int]


class ChatService:
    """A model that answers chat requests: prompt -> rows -> answers, no HTTP."""

    def __init__(
        self,
        model: Model,
        *,
        name: str,
        fingerprint: str,
        template: TemplateName = "model",
        dtype: Any = jnp.float32,
        max_length: int | None = None,
        max_batch: int = 16,
        max_queue: int = 512,
        window: float = 0.01,
    ) -> None:
        self.name, self.fingerprint, self.template = name, fingerprint, template
        self.text = TokenText(model.tokenizer)
        ends = dict.fromkeys((*model.cfg.eos_ids, *end_of_turn_ids(model.tokenizer, template)))
        self.engine = Engine(
            model.params,
            model.cfg,
            dtype=dtype,
            pad_id=model.cfg.pad_id,
            eos_ids=tuple(ends),
            max_length=max_length,
        )
        self.batcher = Batcher(self.engine, max_batch=max_batch, max_queue=max_queue, window=window)
        self._top = min(MAX_TOP_LOGPROBS, model.cfg.vocab_size)

    async def chat(self, request: ChatRequest) -> dict[str, Any]:
        """Answers a request. Raises ApiError."""
        if request.model not in (self.name, "default"):
            raise ApiError(
                f"the model `{request.model}` does not exist here; this server has `{self.name}`",
                status=404,
                param="model",
                code="model_not_found",
            )
        prompt = self._prompt(request)
        tickets = self._tickets(request, prompt)
        try:
            futures = self.batcher.submit(tickets)
        except QueueFullError as error:
            raise ApiError(
                str(error), status=429, kind="rate_limit_error", code="rate_limit_exceeded"
            ) from error
        except ClosedError as error:
            raise ApiError(str(error), status=503, kind="server_error", code="shutting_down") from error
        try:
            outputs = await asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
        except ClosedError as error:
            raise ApiError(str(error), status=503, kind="server_error", code="shutting_down") from error
        except DecodingError as error:
            raise ApiError(str(error), status=500, kind="server_error", code="decoding_failed") from error
        return self._response(request, prompt, outputs)

    # ---- in ----------------------------------------------------------------------------------------------------

    def _prompt(self, request: ChatRequest) -> list[int]:
        messages = [message.plain() for message in request.messages]
        try:
            with self.text.lock:
                tokens = list(
                    encode_prompt(self.text.tokenizer, messages, self.template, max_prompt_length=None)
                )
        except ValueError as error:  # the template refuses these messages
            raise ApiError(str(error), param="messages", code="invalid_template") from error
        if not tokens:
            raise ApiError("the messages give an empty prompt; write something", param="messages")
        if len(tokens) >= self.engine.max_length:
            raise ApiError(
                f"the messages have {len(tokens)} tokens, which leaves no room in this model's context of "
                f"{self.engine.max_length}; shorten them",
                param="messages",
                code="context_length_exceeded",
            )
        return tokens

    def _tickets(self, request: ChatRequest, prompt: list[int]) -> list[Ticket]:
        n = request.n or 1
        if n > self.batcher.max_queue:
            raise ApiError(f"n: {n} completions at once are more than the queue holds", param="n")
        room = self.engine.max_length - len(prompt)
        seed = request.seed if request.seed is not None else int.from_bytes(os.urandom(8), "little")
        rows = [
            Row(
                tokens=prompt,
                key=self.engine.seeded_key(seed, i),
                limit=min(request.limit or room, room),
                temperature=1.0 if request.temperature is None else request.temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                top_k=request.top_k or 0,
            )
            for i in range(n)
        ]
        # One compiled variant for all that want log-probs: the 20 best cost little beside a decode step.
        top = self._top if request.logprobs else None
        return [Ticket(row, top, self._halt(request.stops)) for row in rows]

    def _halt(self, stops: Sequence[str]) -> Callable[[RowOutput], bool] | None:
        if not stops:
            return None
        return lambda output: find_stop(self.text.decode(output.tokens), stops) is not None

    # ---- out ---------------------------------------------------------------------------------------------------

    def _answer(self, output: RowOutput, stops: Sequence[str]) -> Answer:
        text = self.text.decode(output.tokens)
        place = find_stop(text, stops)
        if place is None:
            return Answer(text, "stop" if output.stopped else "length", output.drawn)
        # Tokens drawn after the stop string, before the loop looked, are not part of the answer.
        stop = next(stop for stop in stops if text.startswith(stop, place))
        used = tokens_before(self.text.decode, output.tokens, place + len(stop))
        return Answer(text[:place], "stop", output.tokens[:used])

    def _response(
        self, request: ChatRequest, prompt: list[int], outputs: Sequence[RowOutput]
    ) -> dict[str, Any]:
        answers = [self._answer(output, request.stops) for output in outputs]
        choices = [
            choice(i, answer.text, answer.finish_reason, self._logprobs(request, answer, output))
            for i, (answer, output) in enumerate(zip(answers, outputs, strict=True))
        ]
        used = sum(len(answer.tokens) for answer in answers)
        return chat_response(self.name, choices, len(prompt), used, self.fingerprint)

    def _logprobs(
        self, request: ChatRequest, answer: Answer, output: RowOutput
    ) -> list[dict[str, Any]] | None:
        """Per token of the answer (an EOS included) its log-prob at temperature 1, and the best tokens'."""
        if not request.logprobs or output.raw_logps is None:
            return None
        entries = []
        for position, token in enumerate(answer.tokens):
            logp, best = output.raw_logps[position], []
            if output.top_ids is not None and output.top_values is not None:
                pairs = zip(
                    output.top_ids[position].tolist(), output.top_values[position].tolist(), strict=True
                )
                best = list(pairs)[: request.top_logprobs or 0]
                # To the last bit the same number in both places: clients merge equal entries.
                logp = dict(best).get(token, logp)
            entry = self._entry(token, logp)
            entries.append({**entry, "top_logprobs": [self._entry(i, value) for i, value in best]})
        return entries

    def _entry(self, token: int, logp: float) -> dict[str, Any]:
        return token_entry(self.text.string(token), self.text.bytes_of(token), logp)


# ---- HTTP ------------------------------------------------------------------------------------------------------


def create_app(
    checkpoint: str,
    *,
    model: Model | None = None,
    name: str | None = None,
    template: TemplateName = "model",
    dtype: str = "float32",
    max_length: int | None = None,
    max_batch: int = 16,
    max_queue: int = 512,
    window: float = 0.01,
) -> FastAPI:
    """The application over a checkpoint. The model is loaded before this returns: a bad one fails at once.

    Args:
      checkpoint: what `load_model` takes. model: an already loaded one, in its place.
      name: that clients see; None: the checkpoint's last path part. Clients may also say "default".
      template: "model" or "human_assistant", as in `ModelSpec`.
      dtype: of compute.
      max_length: prompt and answer together; None: the model's context.
      max_batch: rows decoded together. max_queue: rows that may wait. window: seconds a batch waits for company.

    Returns:
      A FastAPI application; its worker starts and stops with the application's lifespan. `app.state.service`.
    """
    loaded = model if model is not None else load_model(checkpoint, dtype=jnp.dtype(dtype))
    service = ChatService(
        loaded,
        name=name or Path(checkpoint).absolute().name,
        fingerprint=fingerprint(checkpoint),
        template=template,
        dtype=jnp.dtype(dtype),
        max_length=max_length,
        max_batch=max_batch,
        max_queue=max_queue,
        window=window,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        service.batcher.start()
        yield
        await asyncio.to_thread(service.batcher.close)

    app = FastAPI(title="laif model server", lifespan=lifespan)
    app.state.service = service
    add_errors(app)
    add_routes(app, service, service.engine.max_length, lambda: service.batcher.queued)
    return app


class Answers(Protocol):
    """What a server's routes need of what answers."""

    name: str
    fingerprint: str

    async def chat(self, request: ChatRequest) -> dict[str, Any]: ...


def add_routes(app: FastAPI, service: Answers, max_length: int, queued: Callable[[], int]) -> None:
    """The addresses that clients of the chat protocol use. max_length: tokens that the model takes."""

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest) -> dict[str, Any]:
        return await service.chat(request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": service.name, "object": "model", "created": 0, "owned_by": "laif_jax"}
        return {"object": "list", "data": [{**entry, "max_model_len": max_length}]}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "model": service.name,
            "fingerprint": service.fingerprint,
            "queued": queued(),
        }


def add_errors(app: FastAPI) -> None:
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
