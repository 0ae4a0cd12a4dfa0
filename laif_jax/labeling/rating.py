"""Ratings: from a judge's answer to the question "a SCORE from 1 to 10" to a score (d-RLAIF, Lee et al. 2023, 5.2).

From log-probs: the score is the expected one, sum of i * P(i) over the ten numbers, with their likelihoods normalised
over the ten. What the chat protocol tells, and what it does not:

* A number has several spellings ("8", " 8", "**8"): white space and marks around it are ignored, and the
  probabilities of all spellings are added.
* White space may be a token of its own. Then the answer is a tree: P(8) = P("8") + P(" ") P("8" after " "). The branch
  that was sampled is followed, with its probability.
* "10" is one token, or "1" followed by "0". Where "1" was sampled, the alternatives at the next position tell how its
  probability is divided: exact. Where "1" was only an alternative, nothing is told about what would have followed. If
  "10" stands in the same list as a token of its own, such a "1" is 1. Otherwise its probability is *ambiguous*: it is
  divided between 1 and 10 as their neighbours 2 and 9 stand to each other (left out if neither is there), and
  recorded. The same is recorded of a sampled "1" that ends the answer, which counts as 1.
* A number that is not among the top tokens counts as 0. The probability of everything that is not listed, and of white
  space that was not sampled, is recorded too (`unlisted`).

So the score is off by at most 9 * (ambiguous + unlisted) / (mass - ambiguous), and exact where both are 0.

An answer whose number is not one of the ten ("0", "85") is no rating, however probable the ten were beside it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from laif_jax.labeling.answers import Answer, Rendered, Token
from laif_jax.records import Status

SCORES = tuple(range(1, 11))
MAX_TEXT = 20_000  # characters of an answer that are looked at
# White space, punctuation, and what some servers show for white space in a token.
_MARKS = " \t\r\n()[]{}*_.,:;\"'`\u2581\u0120\u010a"
_OF_TEN = re.compile(r"(?<![\w.])(-?\d+(?:\.\d+)?)\s*(?:/|(?:out )?of)\s*10(?![\w.]*\d)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w%]|\.\d)")


class RatingOptions(BaseModel):
    """`read`: "logprobs" (expected score) or "text" (the number in the answer, for endpoints without log-probs).

    Of "logprobs": `search`: how many generated tokens are searched for the first that is a number; `min_mass`: least
    probability of the ten together, the ambiguous part not counted.
    Of "text": `pattern`: a regular expression whose first group is the number, for answers that hold other numbers too;
    None: the answer may hold one number only ("8", "8/10", "Score: 8").
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    read: Literal["logprobs", "text"] = "logprobs"
    search: int = Field(default=1, ge=1)
    min_mass: float = Field(default=0.0, ge=0.0, le=1.0)
    pattern: str | None = None

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from error
            if groups < 1:
                raise ValueError("needs a group, in parentheses, around the number")
        return pattern


@dataclass(frozen=True, slots=True)
class Score:
    """What an answer says. The fields are those of `records.Rating`; `score` is None unless `status` is ok."""

    status: Status
    score: float | None = None
    p: tuple[float, ...] | None = None
    mass: float | None = None
    ambiguous: float | None = None
    reason: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


class RatingParser:
    """Reads ratings; see the module's text. `parse` never raises."""

    def __init__(self, options: RatingOptions) -> None:
        self.options = options
        self.needs_logprobs = options.read == "logprobs"
        self._pattern = re.compile(options.pattern) if options.pattern else None

    def parse(self, answer: Answer) -> Score:
        return self._from_logprobs(answer) if self.needs_logprobs else self._from_text(answer.text[:MAX_TEXT])

    def render(self, logps: Sequence[float]) -> Rendered:
        """A simulated answer with the given log-probabilities of 1 to 10, as an endpoint writes it whose "10" is one
        token."""
        best = max(range(10), key=lambda i: (logps[i], -i))
        text = str(SCORES[best])
        if not self.needs_logprobs:
            return Rendered(f"Score: {text}")
        scale = math.log1p(-0.01)  # a real model leaves some probability to other tokens
        top = [(str(score), logp + scale) for score, logp in zip(SCORES, logps)] + [("The", math.log(0.01))]
        return Rendered(text, tuple(sorted(top, key=lambda pair: (pair[0] != text, -pair[1]))))

    # ---- from text -----------------------------------------------------------------------------------------------

    def _from_text(self, text: str) -> Score:
        if self._pattern is not None:
            found = {match.group(1) or "" for match in self._pattern.finditer(text)}
        else:
            found = set(_OF_TEN.findall(text)) | set(_NUMBER.findall(_OF_TEN.sub(" ", text)))
        try:
            values = {float(number) for number in found}
        except ValueError:
            return _unparsable("what the critic's `pattern` finds in the answer is not a number")
        if len(values) != 1:
            return _unparsable(
                "the answer names several numbers" if values else "the answer names no number from 1 to 10"
            )
        score = values.pop()
        if not 1.0 <= score <= 10.0:
            return _unparsable(f"the answer's number, {score:.12g}, is not from 1 to 10")
        return Score(Status.OK, score)

    # ---- from log-probs ------------------------------------------------------------------------------------------

    def _from_logprobs(self, answer: Answer) -> Score:
        if not answer.tokens:
            return _unparsable("the answer carries no log-probs")
        start, number = self._start(answer.tokens)
        if number is not None and number not in SCORES:
            return _unparsable(f"the answer's number, {number}, is not from 1 to 10")
        found = _walk(answer.tokens[start:], answer.finish_reason)
        told = sum(found.p)
        mass = told + found.ambiguous
        if mass > 1.05:
            return _unparsable(f"the ten numbers together have probability {mass:.3g}: not log-probabilities")
        if told <= 0.0 or told < self.options.min_mass:
            beside = f" (beside {found.ambiguous:.3g} on a 1 that may begin 10)" if found.ambiguous else ""
            return _unparsable(
                f"the numbers 1 to 10 together have probability {told:.3g} at the answer's token{beside}; more than "
                f"{self.options.min_mass} is asked for"
            )
        p = _divide(found)
        total = math.fsum(p)
        p = tuple(value / total for value in p)
        score = math.fsum(i * value for i, value in zip(SCORES, p))
        return Score(
            Status.OK,
            min(max(score, 1.0), 10.0),  # float rounding
            p,
            min(mass, 1.0),
            min(found.ambiguous + found.ended, 1.0),
            meta={"unlisted": round(max(found.unlisted, 0.0), 6)},
        )

    def _start(self, tokens: Sequence[Token]) -> tuple[int, int | None]:
        """(the position to read from, the number that was sampled there or None).

        It is the first sampled number among the first `search` tokens, with the white space before it; the answer's
        first token where there is none.
        """
        for position, token in enumerate(_unpadded(tokens, self.options.search)):
            digits = re.match(r"\d", token.token.strip(_MARKS))
            if digits is None:
                continue
            text = "".join(t.token for t in tokens[position:]).lstrip(_MARKS)
            match = re.match(r"\d{1,18}", text)
            while position > 0 and not tokens[position - 1].token.strip(_MARKS):
                position -= 1
            return position, int(match.group()) if match else None
        return 0, None


def _unparsable(reason: str) -> Score:
    return Score(Status.UNPARSABLE, reason=reason)


def _unpadded(tokens: Sequence[Token], search: int) -> list[Token]:
    """The first tokens, of which `search` are more than white space."""
    count = seen = 0
    while count < len(tokens) and seen < search:
        seen += bool(tokens[count].token.strip(_MARKS))
        count += 1
    return list(tokens[:count])


@dataclass
class _Found:
    """Probabilities of 1 to 10 as far as they are told; of a "1" that may begin "10" (`ambiguous`), or that ended the
    answer (`ended`, part of p); of what is not listed."""

    p: list[float] = field(default_factory=lambda: [0.0] * 10)
    ambiguous: float = 0.0
    ended: float = 0.0
    unlisted: float = 0.0


def _walk(tokens: Sequence[Token], finish_reason: str) -> _Found:
    """Follows the sampled branch to the end of its number, and adds up the numbers that the others spell."""
    found, weight = _Found(), 1.0
    for position, token in enumerate(tokens):
        listed = _alternatives(token)
        found.unlisted += weight * max(0.0, 1.0 - math.fsum(p for _, p in listed))
        has_ten = any(_number(text) == 10 for text, _ in listed)
        for text, p in listed:
            number = _number(text)
            if number is None:
                # White space that was not sampled: what would have followed is not told.
                found.unlisted += weight * p if text != token.token and not text.strip(_MARKS) else 0.0
            elif number > 1 or not text.endswith("1"):
                found.p[number - 1] += weight * p
            elif text == token.token and position + 1 < len(tokens):
                _after_one(found, weight * p, tokens[position + 1])
            elif has_ten:
                found.p[0] += weight * p
            elif text == token.token and finish_reason != "length":
                # The answer is 1; how likely a "0" was at its end, endpoints do not tell.
                found.p[0] += weight * p
                found.ended += weight * p
            else:
                found.ambiguous += weight * p
        if token.token.strip(_MARKS):
            break
        weight *= math.fsum(p for text, p in listed if text == token.token)
    return found


def _after_one(found: _Found, mass: float, following: Token) -> None:
    """Divides the probability of a sampled "1" by what the next position says."""
    listed = _alternatives(following)
    ambiguous = max(0.0, 1.0 - math.fsum(p for _, p in listed))
    found.ambiguous += mass * ambiguous
    for text, p in listed:
        if not text[:1].isdigit():
            found.p[0] += mass * p
        elif text[0] == "0" and not text[1:2].isdigit():
            found.p[9] += mass * p  # other digits: 15, 100: none of the ten


def _alternatives(token: Token) -> list[tuple[str, float]]:
    """Texts and probabilities at one position. Different tokens may have one text: each counts. The sampled token may
    be missing from the top list."""
    top = [(text, math.exp(logp)) for text, logp in token.top]
    if all(text != token.token for text, _ in top):
        top.append((token.token, math.exp(token.logprob)))
    return top


def _number(text: str) -> int | None:
    """Which of the ten a token spells."""
    text = text.strip(_MARKS)
    if not 1 <= len(text) <= 2 or not text.isdecimal() or text[0] == "0":
        return None
    return int(text) if int(text) in SCORES else None


def _divide(found: _Found) -> list[float]:
    """Probabilities of 1 to 10 with the ambiguous part divided as the neighbours 2 and 9 stand to each other."""
    p, low, high = list(found.p), found.p[1], found.p[8]
    if low + high > 0.0:
        p[0] += found.ambiguous * low / (low + high)
        p[9] += found.ambiguous * high / (low + high)
    return p
