"""Gemini's generateContent, on the Gemini API and on Vertex AI."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from laif_jax.labeling.answers import Answer, Token, read_pair
from laif_jax.labeling.errors import CallError, Malformed, NoAnswer
from laif_jax.labeling.wires.base import (
    RateLimits,
    duration,
    error_of,
    key_error,
    quota_error,
    status_error,
)
from laif_jax.records import Usage

if TYPE_CHECKING:
    from laif_jax.labeling.calls import Call

_FINISH = {"STOP": "stop", "MAX_TOKENS": "length"}
_WITHHELD = {"SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE", "IMAGE_SAFETY"}
_PARAMS = {
    "temperature": "temperature",
    "top_p": "topP",
    "max_tokens": "maxOutputTokens",
    "seed": "seed",
    "n": "candidateCount",
    "top_logprobs": "logprobs",
    "stop": "stopSequences",
}


class GoogleWire:
    """POST .../models/MODEL:generateContent."""

    def check(self, params: Mapping[str, Any]) -> None:
        """Has all parameters that calls use."""

    def body(self, call: "Call") -> dict[str, Any]:
        """`options` of the endpoint go into `generationConfig`, except `safetySettings`, which stand beside it."""
        config: dict[str, Any] = {_PARAMS.get(name, name): value for name, value in call.params.items()}
        if isinstance(config.get("stopSequences"), str):
            config["stopSequences"] = [config["stopSequences"]]
        if call.needs_logprobs:
            config["responseLogprobs"] = True
        config |= call.endpoint.options
        safety = config.pop("safetySettings", None)
        system = [{"text": m["content"]} for m in call.messages if m["role"] == "system"]
        body: dict[str, Any] = {
            "contents": [
                {"role": "model" if m["role"] == "assistant" else "user", "parts": [{"text": m["content"]}]}
                for m in call.messages
                if m["role"] != "system"
            ],
            "systemInstruction": {"parts": system} if system else None,
            "generationConfig": {name: value for name, value in config.items() if value is not None},
            "safetySettings": safety,
        }
        return {name: value for name, value in body.items() if value is not None}

    def answers(self, body: Any, *, needs_logprobs: bool = False) -> tuple[Answer, ...]:
        if not isinstance(body, dict):
            raise Malformed(reason="the endpoint's JSON is not a generateContent response", body=body)
        usage, model = _usage(body.get("usageMetadata")), _string(body.get("modelVersion"))
        feedback = body.get("promptFeedback")
        if isinstance(feedback, dict) and feedback.get("blockReason"):
            reason = f"the prompt was blocked ({feedback['blockReason']})"
            return (Answer("", "content_filter", reason, (), usage, model, ""),)
        candidates = body.get("candidates")
        if not isinstance(candidates, list):
            raise Malformed(
                reason="the endpoint's JSON is not a generateContent response (no `candidates` list)",
                body=body,
            )
        if not candidates:
            raise Malformed(
                "empty_choices", "the endpoint answered with an empty `candidates` list", body=body
            )
        return tuple(
            _candidate(candidate, usage if position == 0 else None, model, needs_logprobs, body)
            for position, candidate in enumerate(candidates)
        )

    def limits(self, headers: Mapping[str, str]) -> RateLimits | None:
        """Google sends none."""
        return None

    def error(self, url: str, status: int, headers: Mapping[str, str], text: str) -> CallError:
        error = error_of(text)
        found = error.get("details")
        details = [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []
        if any(item.get("reason") in ("API_KEY_INVALID", "API_KEY_EXPIRED") for item in details):
            return key_error(url, status, text)
        if status == 429 and _daily(details):
            return quota_error(url, text)
        waits = [duration(_string(item.get("retryDelay"))) for item in details]
        wait = next((seconds for seconds in waits if seconds is not None), None)
        return status_error(url, status, headers, text, retry_after=wait)


def _daily(details: list[dict[str, Any]]) -> bool:
    """Whether a quota per day is used up."""
    for item in details:
        violations = item.get("violations")
        for violation in violations if isinstance(violations, list) else []:
            if isinstance(violation, dict) and "PerDay" in _string(violation.get("quotaId")):
                return True
    return False


def _candidate(candidate: Any, usage: Usage | None, model: str, needs_logprobs: bool, body: Any) -> Answer:
    if not isinstance(candidate, dict):
        raise Malformed(reason="the endpoint's candidate is no object", body=body, usage=usage)
    content = candidate.get("content")
    parts = content.get("parts") if isinstance(content, dict) else None
    text = "".join(
        _string(part.get("text"))
        for part in (parts if isinstance(parts, list) else [])
        if isinstance(part, dict) and not part.get("thought")
    )
    reason = _string(candidate.get("finishReason")) or "STOP"
    refusal = f"the endpoint withheld the answer ({reason})" if reason in _WITHHELD else ""
    tokens = _tokens(candidate.get("logprobsResult"))
    if needs_logprobs and not tokens and not refusal:
        raise NoAnswer(
            "no_logprobs",
            "the critic needs log-probs and this model gave none. Use a model that serves them, or a critic that "
            "reads text (regex, ranking, json)",
            body=body,
            usage=usage,
        )
    if not text.strip() and not refusal and not (needs_logprobs and tokens):
        hint = "; it ran into max_tokens, thinking included: raise it" if reason == "MAX_TOKENS" else ""
        raise NoAnswer(reason=f"the endpoint's answer is empty{hint}", body=body, usage=usage)
    return Answer(
        text="" if refusal else text,
        finish_reason="content_filter" if refusal else _FINISH.get(reason, reason.lower()),
        refusal=refusal,
        tokens=tokens,
        usage=usage,
        model=model,
        fingerprint="",
    )


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _usage(value: Any) -> Usage | None:
    """Thinking is billed as output."""
    if not isinstance(value, dict):
        return None

    def count(name: str) -> int:
        number = value.get(name)
        return number if type(number) is int and number >= 0 else 0

    return Usage(
        prompt_tokens=count("promptTokenCount"),
        completion_tokens=count("candidatesTokenCount") + count("thoughtsTokenCount"),
        cached_tokens=count("cachedContentTokenCount"),
    )


def _tokens(result: Any) -> tuple[Token, ...]:
    if not isinstance(result, dict):
        return ()
    chosen, tops = result.get("chosenCandidates"), result.get("topCandidates")
    if not isinstance(chosen, list) or not isinstance(tops, list) or len(chosen) != len(tops):
        return ()
    tokens = []
    for entry, top in zip(chosen, tops):
        sampled = read_pair(entry, "logProbability")
        alternatives = top.get("candidates") if isinstance(top, dict) else None
        if sampled is None or not isinstance(alternatives, list):
            return ()
        pairs = (read_pair(item, "logProbability") for item in alternatives)
        tokens.append(Token(sampled[0], sampled[1], tuple(pair for pair in pairs if pair is not None)))
    return tuple(tokens)
