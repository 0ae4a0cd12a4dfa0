"""An endpoint's answer, read from the OpenAI chat wire format. Anything else is a `CallError` that says what came."""

import math
from dataclasses import dataclass
from typing import Any

from laif_jax.labeling.errors import CallError
from laif_jax.records import Usage


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token: what was sampled, and the alternatives with their natural-log probabilities."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """A usable answer.

    Attributes:
      text: the message, byte for byte. refusal: the endpoint's refusal, "" if none.
      tokens: log-probs of the generated tokens; empty if the endpoint gave none.
      model, fingerprint: as the endpoint echoed them.
    """

    text: str
    finish_reason: str
    refusal: str
    tokens: tuple[Token, ...]
    usage: Usage | None
    model: str
    fingerprint: str


def read_answer(body: Any, *, needs_logprobs: bool = False) -> Answer:
    """The answer in a decoded response body.

    Raises:
      CallError: no choices, no message, no text, or no log-probs where they are needed.
    """
    if not isinstance(body, dict) or not isinstance(body.get("choices"), list):
        raise CallError(
            "malformed",
            "the endpoint's JSON is not a chat completion (no `choices` list). Does base_url end at the API's "
            "root, for example .../v1?",
            retryable=True,
            body=body,
        )
    if not body["choices"]:
        raise CallError(
            "empty_choices", "the endpoint answered with an empty `choices` list", retryable=True, body=body
        )
    choice = body["choices"][0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise CallError("malformed", "the endpoint's choice holds no `message`", retryable=True, body=body)
    finish = str(choice.get("finish_reason") or "stop")
    text = _text(message.get("content"), body)
    refusal = message.get("refusal")
    refusal = refusal if isinstance(refusal, str) else ""
    if not refusal and not text and finish == "content_filter":
        refusal = "the endpoint's content filter withheld the answer"
    tokens = _tokens(choice.get("logprobs"))
    if needs_logprobs and not tokens and not refusal:
        raise CallError(
            "no_logprobs",
            "the critic needs log-probs and the endpoint gave none. Use an endpoint that serves `logprobs` and "
            "`top_logprobs`, or a critic that reads text (regex, ranking, json)",
            body=body,
        )
    if not text.strip() and not refusal and not (needs_logprobs and tokens):
        hint = "; it ran into max_tokens: raise it" if finish == "length" else ""
        raise CallError("empty_answer", f"the endpoint's answer is empty{hint}", body=body)
    return Answer(
        text=text,
        finish_reason=finish,
        refusal=refusal,
        tokens=tokens,
        usage=_usage(body.get("usage")),
        model=_string(body.get("model")),
        fingerprint=_string(body.get("system_fingerprint")),
    )


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _text(content: Any, body: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, list):  # content parts
        content = "".join(_string(part.get("text")) for part in content if isinstance(part, dict))
    if not isinstance(content, str):
        raise CallError("malformed", "the message's `content` is not text", retryable=True, body=body)
    return content


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def _usage(value: Any) -> Usage | None:
    if not isinstance(value, dict):
        return None
    return Usage(
        prompt_tokens=_count(value.get("prompt_tokens")),
        completion_tokens=_count(value.get("completion_tokens")),
    )


def _pair(entry: Any) -> tuple[str, float] | None:
    if not isinstance(entry, dict):
        return None
    token, logprob = entry.get("token"), entry.get("logprob")
    number = isinstance(logprob, (int, float)) and not isinstance(logprob, bool)
    # Above 0 it is no log-probability (the margin is float rounding); minus infinity means probability 0.
    if not isinstance(token, str) or not number or math.isnan(logprob) or logprob > 1e-3:
        return None
    return token, min(float(logprob), 0.0)


def _tokens(logprobs: Any) -> tuple[Token, ...]:
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list):
        return ()
    tokens = []
    for entry in content:
        sampled = _pair(entry)
        alternatives = entry.get("top_logprobs") if isinstance(entry, dict) else None
        if sampled is None or not isinstance(alternatives, list):
            return ()
        top = tuple(pair for pair in map(_pair, alternatives) if pair is not None)
        tokens.append(Token(sampled[0], sampled[1], top))
    return tuple(tokens)
