"""The HTTP application: OpenAI's chat completions over one checkpoint."""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from fastapi import FastAPI

from laif_jax.data.chat import TemplateName, encode_prompt, end_of_turn_ids
from laif_jax.models.model import Model, load_model
from laif_jax.rollout.engine import Engine, Row, RowOutput
from laif_jax.serving.batcher import Batcher, ClosedError, DecodingError, QueueFullError, Ticket
from laif_jax.serving.http import fingerprint, http_app
from laif_jax.serving.protocol import (
    MAX_TOP_LOGPROBS,
    ApiError,
    ChatRequest,
    chat_response,
    choice,
    queue_full,
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

    @property
    def max_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.engine.max_length

    @property
    def queued(self) -> int:
        """Completions that wait."""
        return self.batcher.queued

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """While requests may come."""
        self.batcher.start()
        yield
        await asyncio.to_thread(self.batcher.close)

    async def chat(self, request: ChatRequest) -> dict[str, Any]:
        """Answers a request. Raises ApiError."""
        prompt = self._prompt(request)
        tickets = self._tickets(request, prompt)
        try:
            futures = self.batcher.submit(tickets)
        except QueueFullError as error:
            raise queue_full(str(error)) from error
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
        if len(tokens) >= self.max_length:
            raise ApiError(
                f"the messages have {len(tokens)} tokens, which leaves no room in this model's context of "
                f"{self.max_length}; shorten them",
                param="messages",
                code="context_length_exceeded",
            )
        return tokens

    def _tickets(self, request: ChatRequest, prompt: list[int]) -> list[Ticket]:
        n = request.n or 1
        if n > self.batcher.max_queue:
            raise ApiError(f"n: {n} completions at once are more than the queue holds", param="n")
        room = self.max_length - len(prompt)
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

    return http_app(service, "laif model server")
