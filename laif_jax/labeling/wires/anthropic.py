"""Anthropic's messages."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from laif_jax.labeling.answers import Answer
from laif_jax.labeling.errors import CallError, EndpointError, Malformed, NoAnswer
from laif_jax.labeling.wires.base import RateLimits, error_of, quota_error, status_error, window
from laif_jax.records import Usage

if TYPE_CHECKING:
    from laif_jax.labeling.calls import Call

_FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
}


class AnthropicWire:
    """POST /v1/messages."""

    def check(self, params: Mapping[str, Any]) -> None:
        if "top_logprobs" in params:
            raise EndpointError(
                "Anthropic's models give no log-probs, and this critic reads them. Use a critic that reads text "
                "(parser regex, ranking or json), or an endpoint with `logprobs`"
            )
        if params.get("n", 1) != 1:
            raise EndpointError(
                "Anthropic answers a request once: it has no `n`. Ask for several samples instead"
            )
        if (params.get("temperature") or 0.0) > 1.0:
            raise EndpointError(
                f"Anthropic's temperature ends at 1.0, this call asks for {params['temperature']}. Lower it"
            )

    def body(self, call: "Call") -> dict[str, Any]:
        """System messages become `system`. `seed` is left out: Anthropic has none; samples differ all the same."""
        params = dict(call.params)
        for name in ("seed", "n"):
            params.pop(name, None)
        stop = params.pop("stop", None)
        body: dict[str, Any] = {
            "model": call.endpoint.model,
            "max_tokens": params.pop("max_tokens", 1024),
            "messages": [message for message in call.messages if message["role"] != "system"],
            "system": "\n\n".join(m["content"] for m in call.messages if m["role"] == "system") or None,
            "stop_sequences": [stop] if isinstance(stop, str) else stop,
            **params,
        }
        body |= call.endpoint.options
        return {name: value for name, value in body.items() if value is not None}

    def answers(self, body: Any, *, needs_logprobs: bool = False) -> tuple[Answer, ...]:
        if not isinstance(body, dict) or not isinstance(body.get("content"), list):
            raise Malformed(reason="the endpoint's JSON is not a message (no `content` list)", body=body)
        blocks = [block for block in body["content"] if isinstance(block, dict)]
        texts = [block.get("text") for block in blocks if block.get("type") == "text"]
        text = "".join(part for part in texts if isinstance(part, str))
        reason = str(body.get("stop_reason") or "end_turn")
        refusal = ""
        if reason == "refusal":
            refusal = text.strip() or "the model declined (stop_reason: refusal)"
        usage = _usage(body.get("usage"))
        if needs_logprobs and not refusal:
            raise NoAnswer("no_logprobs", "Anthropic's models give no log-probs", body=body, usage=usage)
        if not text.strip() and not refusal:
            hint = "; it ran into max_tokens: raise it" if _FINISH.get(reason) == "length" else ""
            raise NoAnswer(reason=f"the endpoint's answer is empty{hint}", body=body, usage=usage)
        model = body.get("model")
        return (
            Answer(
                text=text,
                finish_reason=_FINISH.get(reason, reason),
                refusal=refusal,
                tokens=(),
                usage=usage,
                model=model if isinstance(model, str) else "",
                fingerprint="",
            ),
        )

    def limits(self, headers: Mapping[str, str]) -> RateLimits | None:
        def of(what: str) -> Any:
            names = [f"anthropic-ratelimit-{what}-{part}" for part in ("limit", "remaining", "reset")]
            return window(headers, *names, dates=True)

        kinds = ("requests", "tokens", "input-tokens", "output-tokens")
        return RateLimits(*(of(kind) for kind in kinds)) or None

    def error(self, url: str, status: int, headers: Mapping[str, str], text: str) -> CallError:
        error = error_of(text)
        message = str(error.get("message", ""))
        if error.get("type") == "billing_error" or (status == 400 and "credit balance" in message):
            return quota_error(url, text)
        return status_error(url, status, headers, text)


def _usage(value: Any) -> Usage | None:
    """`input_tokens` are only those that no cache held."""
    if not isinstance(value, dict):
        return None

    def count(name: str) -> int:
        number = value.get(name)
        return number if type(number) is int and number >= 0 else 0

    cached = count("cache_read_input_tokens")
    return Usage(
        prompt_tokens=count("input_tokens") + count("cache_creation_input_tokens") + cached,
        completion_tokens=count("output_tokens"),
        cached_tokens=cached,
    )
