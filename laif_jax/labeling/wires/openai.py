"""OpenAI's chat completions, as OpenAI, vLLM, SGLang, llama.cpp, Ollama, Together and `laif serve model` speak them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from laif_jax.labeling.answers import Answer, read_answers
from laif_jax.labeling.errors import CallError
from laif_jax.labeling.wires.base import RateLimits, error_of, quota_error, status_error, window

if TYPE_CHECKING:
    from laif_jax.labeling.calls import Call


class OpenAIWire:
    """POST /chat/completions."""

    def check(self, params: Mapping[str, Any]) -> None:
        """Has all parameters that calls use."""

    def body(self, call: "Call") -> dict[str, Any]:
        body = {"model": call.endpoint.model, "messages": list(call.messages), **call.params}
        if call.needs_logprobs:
            body["logprobs"] = True
        host = urlsplit(call.endpoint.base_url or "").hostname or ""
        if host.endswith(
            "api.openai.com"
        ):  # OpenAI's newer models refuse the older name; others know only that
            body["max_completion_tokens"] = body.pop("max_tokens", None)
        body |= call.endpoint.options
        return {name: value for name, value in body.items() if value is not None}

    def answers(self, body: Any, *, needs_logprobs: bool = False) -> tuple[Answer, ...]:
        return read_answers(body, needs_logprobs=needs_logprobs)

    def limits(self, headers: Mapping[str, str]) -> RateLimits | None:
        if not any(name.startswith("x-ratelimit-") for name in headers):  # local servers have none
            return None

        def of(what: str) -> Any:
            names = [f"x-ratelimit-{part}-{what}" for part in ("limit", "remaining", "reset")]
            return window(headers, *names, dates=False)

        return RateLimits(requests=of("requests"), tokens=of("tokens")) or None

    def error(self, url: str, status: int, headers: Mapping[str, str], text: str) -> CallError:
        error = error_of(text)
        if status == 429 and "insufficient_quota" in (error.get("code"), error.get("type")):
            return quota_error(url, text)
        return status_error(url, status, headers, text)
