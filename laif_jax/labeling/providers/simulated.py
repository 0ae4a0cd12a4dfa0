"""Endpoints with planted truth: teachers of chosen skill, critics of chosen accuracy and bias.

They answer in the wire format of a real endpoint, so that everything after the call is the same code.

A critic's verdict has the logit (towards the response shown second)

    base + length_bias * (len(second) - len(first)) / max(len(first), len(second)) - position_bias

`base` is `sharpness` towards the truly better response with probability `accuracy`, `sharpness` towards the other one
otherwise, and 0 for a tie (equal quality, or with probability `tie_rate`). One draw per pair of texts decides it, in
whatever order they are shown: without bias both orders agree, noise included. In a log-prob format the logit is the
answer (sigmoid of it); in a text format its sign is. At logit exactly 0 a format with a word for a tie says it; one
without names the first or the second *place*, by one draw per pair, the same in both orders: averaged over the orders
that is a tie. Lengths are characters.

A rating critic gives the score i from 1 to 10 a probability proportional to

    exp(-sharpness * (i - target)^2 / 2),   target = 1 + 9 * quality + length_bias / sharpness * n / (n + 50)

with `n` the response's length in characters: a bell of variance 1 / sharpness around the truth, tilted by length_bias
per unit of relative length. With probability 1 - `accuracy`, one draw per text, the critic is as wrong as can be: its
target starts from 1 - quality. In a log-prob format the ten probabilities are the answer; in a text format the most
probable score is. `tie_rate` and `position_bias` have no meaning here.

A rationale holds the verdict's logit as `[leaning +4.000]`, drawn as above, and the verdict that is asked for on it has
that logit, position bias included: it is read from the messages, as a model would. A critic that is asked for the
worse response turns `base` and length bias round, not the position bias. `noise` is the standard deviation of what is
added to the logit of each verdict or rationale that is sampled (temperature above 0), afresh for each sample.

With probability `gullibility`, one draw per text and critic, a response that holds one of the shipped injections
(`canaries`) talks the critic into a verdict: the logit is `sharpness` towards that response, and it leads rankings.

A ranking sorts the responses by quality, each with its own draw: with probability 1 - `accuracy` a response counts as
1 - quality. `position_bias` adds `0.1 * position_bias` times its place from the end, in places of the list.

A critique names the quality of the response. A revision of the world "planted" moves it by `skill` of half the way to
1; one of the world "symbols" is the answer of a teacher of that skill.

Misbehaviour is drawn per attempt, in this order: failure (HTTP 500), rate limit (HTTP 429, with `Retry-After`), empty
(no choices), refusal, garbage (text that answers nothing), timeout, truncated (a body that breaks off), malformed (JSON
of another shape). Only these depend on the attempt; all draws depend on the seed, the model's name and the content
alone, never on time, order or concurrency.

Drift: a model that changes behind its name. From `version` 1 on, the draws of an item are made anew with probability
`drift`, otherwise they are those of version 0. The version is told by the fingerprint and is no part of a request's
key, as with real models: who wants to see drift must ask again.

A teacher of the world "symbols" carries out each step of an instruction with probability `skill`; its errors are
independent draws, or habits (`symbols.teacher_answer`). One of the world
"planted" writes `[quality 0.731] ...`: a quality drawn around its skill, which planted critics read back. Planted
critics otherwise read the completion's `meta.quality`.
"""

import asyncio
import hashlib
import math
import random
import re
import struct
from functools import lru_cache
from typing import Any

from laif_jax.labeling.answers import Rendered
from laif_jax.labeling.calls import Call, Endpoint, Truth
from laif_jax.labeling.canaries import holds_injection
from laif_jax.labeling.errors import BadRequest, CallTimeout, Malformed, Overloaded, RateLimited
from laif_jax.labeling.listwise import ListwiseParser
from laif_jax.labeling.providers.base import Reply, read_reply
from laif_jax.labeling.rating import SCORES, RatingParser
from laif_jax.worlds import symbols

_MARK = re.compile(r"^\[quality (\d\.\d+)\]")
_LEANING = re.compile(r"\[leaning ([+-]\d+\.\d+)\]")
_TASKS = {
    "rationale": "_rationale",
    "listwise": "_listwise",
    "critique": "_critique",
    "revision": "_revision",
}
_RATES = (
    *("failure_rate", "rate_limit_rate", "empty_rate", "refusal_rate", "garbage_rate", "timeout_rate"),
    *("truncated_rate", "malformed_rate"),
)
_REFUSAL = "I am sorry, but I cannot help with that request."
_GARBAGE = "zxq 8814 lorem?? --- ipsum 27"


_EIGHT = struct.Struct(">8Q")


def _draws(*content: Any) -> list[float]:
    """Eight uniform numbers in [0, 1), a pure function of the content."""
    digest = hashlib.blake2b(repr(content).encode("utf-8", "surrogatepass")).digest()
    return [number / 2**64 for number in _EIGHT.unpack(digest)]


@lru_cache(maxsize=65536)
def _symbols_quality(instruction: str, text: str) -> float:
    return symbols.quality(instruction, text)


class SimulatedProvider:
    """See the module's text."""

    def __init__(self, endpoint: Endpoint) -> None:
        assert endpoint.simulated is not None  # Endpoint checks it
        self.endpoint = endpoint
        self.spec = endpoint.simulated
        self.free = self.spec.retry_after == 0  # who asks for a waiting time wants it kept
        # Without latency, calls in flight have no meaning; many at once share one commit of the store.
        self.width = endpoint.concurrency if self.spec.latency else max(endpoint.concurrency, 256)
        self._misbehaves = any(getattr(self.spec, name) for name in _RATES)

    async def call(self, call: Call, attempt: int) -> Reply:
        if self.spec.latency:
            await asyncio.sleep(self.spec.latency)
        return read_reply(call, self._answer(call, attempt))

    def _answer(self, call: Call, attempt: int) -> dict[str, Any]:
        """The decoded body; raises `CallError`."""
        truth = call.truth
        if truth is None:
            raise BadRequest(reason="a simulated endpoint needs to be told what the call is about")
        if self._misbehaves and (body := self._misbehave(call, attempt)) is not None:
            return body
        try:
            if truth.task in _TASKS:
                answer = getattr(self, _TASKS[truth.task])(call, truth)
            elif truth.parser is None:
                return self._wire(call, {"role": "assistant", "content": self._complete(call, truth)})
            elif isinstance(truth.parser, RatingParser):
                answer = truth.parser.render(self._rating(truth))
            else:
                assert not isinstance(truth.parser, ListwiseParser)
                answer = truth.parser.render(*self._verdict(call, truth))
        except symbols.SymbolsError as error:
            raise BadRequest(reason=f'the world "symbols" cannot read this prompt: {error}') from error
        return self._wire(call, {"role": "assistant", "content": answer.text}, answer.top)

    def _misbehave(self, call: Call, attempt: int) -> dict[str, Any] | None:
        """What this attempt gives instead of an answer: a body, or a `CallError`; None: it is answered."""
        spec = self.spec
        draws = iter(_draws("attempt", spec.seed, call.key, attempt))
        if next(draws) < spec.failure_rate:
            raise Overloaded(reason="simulated failure (HTTP 500)")
        if next(draws) < spec.rate_limit_rate:
            raise RateLimited(reason="simulated rate limit (HTTP 429)", retry_after=spec.retry_after)
        if next(draws) < spec.empty_rate:
            return self._wire(call, None)
        if next(draws) < spec.refusal_rate:
            return self._wire(call, {"role": "assistant", "content": None, "refusal": _REFUSAL})
        if next(draws) < spec.garbage_rate:
            return self._wire(call, {"role": "assistant", "content": _GARBAGE}, (("zxq", -0.05), ("8", -4.0)))
        if next(draws) < spec.timeout_rate:
            raise CallTimeout(reason="simulated time-out")
        if next(draws) < spec.truncated_rate:
            body = '{"object": "chat.completion", "choices": [{"index": 0, "mess'
            raise Malformed("non_json", f"simulated body that breaks off ({body})", body=body)
        if next(draws) < spec.malformed_rate:
            return {"object": "error", "detail": "simulated body of another shape"}
        return None

    def _version(self, *content: Any) -> tuple[Any, ...]:
        """What an item's draws depend on beside its content: nothing, or the version if it drifted."""
        spec = self.spec
        if not spec.version or not spec.drift:
            return ()
        drifted = _draws("drift", spec.seed, self.endpoint.model, spec.version, *content)[0] < spec.drift
        return (spec.version,) if drifted else ()

    def _complete(self, call: Call, truth: Truth) -> str:
        spec, version = self.spec, self._version(truth.instruction, call.sample)
        seed = (spec.seed, self.endpoint.model, truth.instruction, call.sample, *version)
        if spec.world == "symbols":
            number = int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:8], "big")
            habits = f"{spec.seed}-{self.endpoint.model}" if spec.errors == "habitual" else None
            return symbols.teacher_answer(truth.instruction, spec.skill, random.Random(number), habits)
        draws = _draws("teacher", *seed)
        # Uniform within 0.2 of the skill, inside [0, 1].
        quality = min(max(spec.skill + 0.4 * (draws[0] - 0.5), 0.0), 1.0)
        return f"[quality {quality:.3f}] answer {draws[1]:.6f}"

    def _quality(self, text: str, planted: float | None, instruction: str) -> float:
        if self.spec.world == "symbols":
            return _symbols_quality(instruction, text)
        if planted is not None:
            return planted
        if mark := _MARK.match(text):
            return float(mark.group(1))
        raise BadRequest(
            reason='the world "planted" needs `meta.quality` in each completion, or a text that starts with '
            "[quality 0.5]",
        )

    def _verdict(self, call: Call, truth: Truth) -> tuple[float, bool]:
        """(logit towards the second shown, which place is named at logit 0)."""
        logit, coin = self._logit(truth)
        if truth.task == "verdict":
            marks = [mark for message in call.messages for mark in _LEANING.findall(message["content"])]
            if marks:
                logit = float(marks[-1])
        if self.spec.noise and call.params.get("temperature"):
            u, v, *_ = _draws("noise", self.spec.seed, call.key)
            logit += self.spec.noise * math.sqrt(-2 * math.log(1 - u)) * math.cos(2 * math.pi * v)
        return logit, coin

    def _rationale(self, call: Call, truth: Truth) -> Rendered:
        logit, _ = self._verdict(call, truth)
        return Rendered(f"The first response is shorter on detail than it could be. [leaning {logit:+.3f}]")

    def _listwise(self, call: Call, truth: Truth) -> Rendered:
        assert isinstance(truth.parser, ListwiseParser)
        spec, scores = self.spec, []
        for place, text in enumerate(truth.texts):
            quality = self._quality(text, truth.quality[place], truth.instruction)
            version = self._version(truth.instruction, text)
            right, *_ = _draws("listwise", spec.seed, self.endpoint.model, truth.instruction, text, *version)
            quality = quality if right < spec.accuracy else 1.0 - quality
            quality = 2.0 if self._talked_into(text, truth.instruction) else quality
            scores.append(quality + 0.1 * spec.position_bias * (len(truth.texts) - 1 - place))
        return truth.parser.render(scores)

    def _critique(self, call: Call, truth: Truth) -> Rendered:
        quality = self._quality(truth.first or "", truth.quality[0], truth.instruction)
        return Rendered(f"The response reaches {quality:.3f} of what was asked for.")

    def _revision(self, call: Call, truth: Truth) -> Rendered:
        if self.spec.world == "symbols":
            return Rendered(self._complete(call, truth))
        quality = self._quality(truth.first or "", truth.quality[0], truth.instruction)
        return Rendered(f"[quality {quality + self.spec.skill * (1 - quality) / 2:.3f}] revised answer")

    def _talked_into(self, text: str, instruction: str) -> bool:
        if not self.spec.gullibility or not holds_injection(text):
            return False
        return (
            _draws("injection", self.spec.seed, self.endpoint.model, instruction, text)[0]
            < self.spec.gullibility
        )

    def _logit(self, truth: Truth) -> tuple[float, bool]:
        """As `_verdict`, before rationales and noise."""
        spec, first, second = self.spec, truth.first or "", truth.second or ""
        difference = self._quality(second, truth.quality[1], truth.instruction) - self._quality(
            first, truth.quality[0], truth.instruction
        )
        pair = sorted((first, second))
        version = self._version(truth.instruction, *pair)
        right, tie, coin, *_ = _draws(
            "verdict", spec.seed, self.endpoint.model, truth.instruction, *pair, *version
        )
        base = 0.0
        if difference != 0 and tie >= spec.tie_rate:
            base = math.copysign(spec.sharpness, difference if right < spec.accuracy else -difference)
        longest = max(len(first), len(second), 1)
        base += spec.length_bias * (len(second) - len(first)) / longest
        fooled = [self._talked_into(text, truth.instruction) for text in (first, second)]
        if fooled[0] != fooled[1]:
            base = spec.sharpness if fooled[1] else -spec.sharpness
        elif truth.invert:
            base = -base
        return base - spec.position_bias, coin < 0.5

    def _rating(self, truth: Truth) -> list[float]:
        """Log-probabilities of the scores 1 to 10."""
        spec, text = self.spec, truth.first or ""
        quality = self._quality(text, truth.quality[0], truth.instruction)
        version = self._version(truth.instruction, text)
        right, *_ = _draws("rating", spec.seed, self.endpoint.model, truth.instruction, text, *version)
        if right >= spec.accuracy:
            quality = 1.0 - quality
        target = 1.0 + 9.0 * quality + spec.length_bias / spec.sharpness * len(text) / (len(text) + 50)
        logits = [-0.5 * spec.sharpness * (score - target) ** 2 for score in SCORES]
        most = max(logits)
        total = most + math.log(math.fsum(math.exp(logit - most) for logit in logits))
        return [logit - total for logit in logits]

    def _wire(
        self, call: Call, message: dict[str, Any] | None, top: tuple[tuple[str, float], ...] = ()
    ) -> dict[str, Any]:
        """A chat completion as an OpenAI endpoint writes it."""
        choices = []
        if message is not None:
            choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": "stop"}
            if call.needs_logprobs and top:
                alternatives = [{"token": token, "logprob": logprob} for token, logprob in top]
                choice["logprobs"] = {"content": [{**alternatives[0], "top_logprobs": alternatives}]}
            choices.append(choice)
        version = self.spec.version
        written = len(((message or {}).get("content") or "").split())
        return {
            "object": "chat.completion",
            "model": self.endpoint.model,
            "system_fingerprint": self.endpoint.identity + (f"-v{version}" if version else ""),
            "choices": choices,
            "usage": {
                "prompt_tokens": sum(len(m["content"].split()) for m in call.messages),
                "completion_tokens": written,
            },
        }

    async def close(self) -> None:
        return None
