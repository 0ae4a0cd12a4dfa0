"""The wire format: OpenAI's chat completions, as far as a checkpoint can answer them.

What would change the answer and is not supported is refused by name; it is never silently ignored.
"""

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_TOP_LOGPROBS = 20
LOWEST_LOGPROB = -9999.0  # JSON has no -inf; this is OpenAI's value for "as good as never"

# Said by clients, without effect on the answer of a single local model.
_HARMLESS = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier"}
# Not supported; accepted only at the value that means "off".
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
    "reasoning_effort": ("none",),
    "modalities": (["text"],),
}


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def queue_full(message: str) -> ApiError:
    """The error of a request that would wait behind too many others."""
    return ApiError(message, status=429, kind="rate_limit_error", code="rate_limit_exceeded")


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn. `name` has no effect on the prompt and is accepted as OpenAI does."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """{"role", "content"} with the roles of `laif_jax.records` and the parts joined."""
        content = (
            self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        )
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions. `top_k` is an extension (0: off)."""

    model_config = ConfigDict(extra="allow")

    model: str = "default"
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    seed: int | None = None

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        for name, value in (self.model_extra or {}).items():
            if name in _HARMLESS or (name in _NEUTRAL and (value is None or value in _NEUTRAL[name])):
                continue
            if name == "stream":
                raise ValueError(
                    "stream: this server answers in one piece; send `stream: false` or leave it out"
                )
            if name in _NEUTRAL:
                raise ValueError(f"{name}: not supported by this server; leave it out")
            raise ValueError(f"{name}: unrecognized request argument; leave it out")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs `logprobs: true`")
        if any(not text for text in self.stops):
            raise ValueError("stop: an empty stop string would end every answer at once; leave it out")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def limit(self) -> int | None:
        """Tokens at most; None: what the context leaves."""
        return self.max_completion_tokens or self.max_tokens


def token_entry(text: str, raw: bytes, logp: float) -> dict[str, Any]:
    """One token of `logprobs`."""
    return {"token": text, "logprob": max(logp, LOWEST_LOGPROB), "bytes": list(raw)}


def choice(
    index: int, text: str, finish_reason: str, logprobs: list[dict[str, Any]] | None
) -> dict[str, Any]:
    """One element of `choices`."""
    return {
        "index": index,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None},
        "finish_reason": finish_reason,
    }


def chat_response(
    model: str, choices: list[dict[str, Any]], prompt_tokens: int, completion_tokens: int, fingerprint: str
) -> dict[str, Any]:
    """The body of a successful answer."""
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
