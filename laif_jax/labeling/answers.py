"""An endpoint's answer, read from the OpenAI chat wire format. Anything else is a `CallError` that says what came."""

import math
from dataclasses import dataclass
from typing import Any

from laif_jax.labeling.errors import Malformed, NoAnswer
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


@dataclass(frozen=True, slots=True)
class Rendered:
    """A simulated answer: its text, and the log-probs of its first token where the critic asks for them."""

    text: str
    top: tuple[tuple[str, float], ...] = ()


def read_answer(body: Any, *, needs_logprobs: bool = False) -> Answer:
    """The first answer in a decoded chat completion; raises as `read_answers`."""
    return read_answers(body, needs_logprobs=needs_logprobs)[0]


def read_answers(body: Any, *, needs_logprobs: bool = False) -> tuple[Answer, ...]:
    """The answers in a decoded chat completion: one per choice; the usage of all is the first one's.

    Raises:
      CallError: no choices, no message, no text, or no log-probs where they are needed.
    """
    if not isinstance(body, dict) or not isinstance(body.get("choices"), list):
        raise Malformed(
            reason="the endpoint's JSON is not a chat completion (no `choices` list). Does base_url end at the API's "
            "root, for example .../v1?",
            body=body,
        )
    usage = _usage(body.get("usage"))
    if not body["choices"]:
        raise Malformed(
            "empty_choices", "the endpoint answered with an empty `choices` list", body=body, usage=usage
        )
    return tuple(
        _choice(choice, usage if position == 0 else None, needs_logprobs, body)
        for position, choice in enumerate(body["choices"])
    )


def _choice(choice: Any, usage: Usage | None, needs_logprobs: bool, body: dict[str, Any]) -> Answer:
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise Malformed(reason="the endpoint's choice holds no `message`", body=body, usage=usage)
    finish = str(choice.get("finish_reason") or "stop")
    text = _text(message.get("content"), body)
    refusal = message.get("refusal")
    refusal = refusal if isinstance(refusal, str) else ""
    if not refusal and not text and finish == "content_filter":
        refusal = "the endpoint's content filter withheld the answer"
    tokens = _tokens(choice.get("logprobs"))
    if needs_logprobs and not tokens and not refusal:
        raise NoAnswer(
            "no_logprobs",
            "the critic needs log-probs and the endpoint gave none. Use an endpoint that serves `logprobs` and "
            "`top_logprobs`, or a critic that reads text (regex, ranking, json; for ratings: rating_1_10_text)",
            body=body,
            usage=usage,
        )
    if not text.strip() and not refusal and not (needs_logprobs and tokens):
        hint = "; it ran into max_tokens: raise it" if finish == "length" else ""
        raise NoAnswer(reason=f"the endpoint's answer is empty{hint}", body=body, usage=usage)
    return Answer(
        text=text,
        finish_reason=finish,
        refusal=refusal,
        tokens=tokens,
        usage=usage,
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
        raise Malformed(reason="the message's `content` is not text", body=body)
    return content


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def _usage(value: Any) -> Usage | None:
    if not isinstance(value, dict):
        return None
    details = value.get("prompt_tokens_details")
    return Usage(
        prompt_tokens=_count(value.get("prompt_tokens")),
        completion_tokens=_count(value.get("completion_tokens")),
        cached_tokens=_count(details.get("cached_tokens") if isinstance(details, dict) else None),
    )


def read_pair(entry: Any, name: str = "logprob") -> tuple[str, float] | None:
    """(token, log-probability) of an entry whose log-probability stands under `name`; None if it is not one."""
    if not isinstance(entry, dict):
        return None
    token, logprob = entry.get("token"), entry.get(name)
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
        sampled = read_pair(entry)
        alternatives = entry.get("top_logprobs") if isinstance(entry, dict) else None
        if sampled is None or not isinstance(alternatives, list):
            return ()
        top = tuple(pair for pair in map(read_pair, alternatives) if pair is not None)
        tokens.append(Token(sampled[0], sampled[1], top))
    return tuple(tokens)
