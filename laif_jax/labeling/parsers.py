"""Parsers: from a judge's raw answer to a verdict. What cannot be read is `unparsable`, never a preference.

Each parser also has the inverse, `render`, with which a simulated judge writes an answer in the format that the
critic asks for; so simulated and real answers go through the same reading.
"""

import ast
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from laif_jax.labeling.answers import Answer, Rendered
from laif_jax.labeling.errors import CriticError
from laif_jax.labeling.listwise import ListwiseOptions, ListwiseParser
from laif_jax.labeling.rating import RatingOptions, RatingParser
from laif_jax.records import Status

MAX_TEXT = 20_000  # characters of an answer that are looked at


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an answer says, in the order shown.

    Attributes:
      p_second: probability that the second response shown is the better one; None unless `ok` or `tie`.
    """

    status: Status
    p_second: float | None = None
    reason: str = ""
    rationale: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


class Parser(Protocol):
    """Reads one critic's answers.

    `parse` never raises. `render(logit, coin)` writes the verdict `logit` (towards the second response shown);
    at logit 0 it writes a tie, or, if the format has none, names the second where `coin` is true.
    """

    needs_logprobs: bool

    def parse(self, answer: Answer) -> Verdict: ...

    def render(self, logit: float, coin: bool) -> Rendered: ...


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _unparsable(reason: str) -> Verdict:
    return Verdict(Status.UNPARSABLE, reason=reason)


def _verdict(p_second: float, **rest: Any) -> Verdict:
    status = Status.TIE if abs(p_second - 0.5) < 1e-12 else Status.OK
    return Verdict(status, 0.5 if status is Status.TIE else p_second, **rest)


def _log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


# ---- ab_logprob ------------------------------------------------------------------------------------------------


class LogprobOptions(_Options):
    """`tokens`: the two answers. `strip`: ignore white space and punctuation around a token. `search`: how many
    generated tokens are searched for the first sampled option. `min_mass`: least probability of the two together."""

    tokens: tuple[str, str]
    strip: bool = True
    search: int = Field(default=1, ge=1)
    min_mass: float = Field(default=0.0, ge=0.0, le=1.0)

    @field_validator("tokens")
    @classmethod
    def _differ(cls, tokens: tuple[str, str]) -> tuple[str, str]:
        if tokens[0] == tokens[1] or not all(tokens):
            raise ValueError("the two tokens must differ and not be empty")
        return tokens


class LogprobParser:
    """P(second) / (P(first) + P(second)) at the answer's token; an option absent from the top list counts as 0.

    The token read is the first sampled option among the first `search` tokens, else the first token of the answer.
    """

    needs_logprobs = True
    _MARKS = " \t\r\n()[]{}*.,:;\"'`"

    def __init__(self, options: LogprobOptions) -> None:
        self.options = options

    def _option(self, token: str) -> int | None:
        if self.options.strip:
            token = token.strip(self._MARKS)
        return self.options.tokens.index(token) if token in self.options.tokens else None

    def parse(self, answer: Answer) -> Verdict:
        if not answer.tokens:
            return _unparsable("the answer carries no log-probs")
        window = answer.tokens[: self.options.search]
        token = next((t for t in window if self._option(t.token) is not None), answer.tokens[0])
        mass = [0.0, 0.0]
        # The sampled token may be missing from the top list, or stand in it with another rounding; different tokens may
        # spell one option, with and without a space.
        for text, logprob in ({token.token: token.logprob} | dict(token.top)).items():
            option = self._option(text)
            if option is not None:
                mass[option] += math.exp(logprob)
        total = mass[0] + mass[1]
        names = " or ".join(self.options.tokens)
        if total <= 0.0:
            return _unparsable(f"neither {names} is among the top tokens of the answer")
        if total < self.options.min_mass:
            return _unparsable(
                f"{names} together have probability {total:.3g}, below {self.options.min_mass}"
            )
        if total > 1.05:
            return _unparsable(f"{names} together have probability {total:.3g}: not log-probabilities")
        return _verdict(mass[1] / total, meta={"mass": round(min(total, 1.0), 6)})

    def render(self, logit: float, coin: bool) -> Rendered:
        first, second = self.options.tokens
        rest = math.log(0.01)  # a real model leaves some probability to other tokens
        scale = math.log1p(-0.01)
        top = [(first, _log_sigmoid(-logit) + scale), (second, _log_sigmoid(logit) + scale), ("The", rest)]
        chosen = second if logit > 0 or (logit == 0 and coin) else first
        return Rendered(chosen, tuple(sorted(top, key=lambda pair: (pair[0] != chosen, -pair[1]))))


# ---- regex -----------------------------------------------------------------------------------------------------


class RegexOptions(_Options):
    """`first`, `second`, `tie`: patterns; `answer_*`: what a simulated judge writes."""

    first: str
    second: str
    tie: str | None = None
    answer_first: str
    answer_second: str
    answer_tie: str | None = None

    @field_validator("first", "second", "tie")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from error
        return pattern


class RegexParser:
    """The one pattern that matches; an answer that matches several, or none, is unparsable."""

    needs_logprobs = False

    def __init__(self, options: RegexOptions) -> None:
        self.options = options
        pairs = ((options.first, 0.0), (options.second, 1.0), (options.tie, 0.5))
        self._patterns = [(re.compile(pattern), p) for pattern, p in pairs if pattern is not None]

    def parse(self, answer: Answer) -> Verdict:
        text = answer.text[:MAX_TEXT]
        found = [p for pattern, p in self._patterns if pattern.search(text)]
        if len(found) != 1:
            return _unparsable(
                "the answer names more than one option" if found else "the answer names no option"
            )
        return _verdict(found[0])

    def render(self, logit: float, coin: bool) -> Rendered:
        if logit == 0 and self.options.answer_tie is not None:
            return Rendered(self.options.answer_tie)
        second = logit > 0 or (logit == 0 and coin)
        return Rendered(self.options.answer_second if second else self.options.answer_first)


# ---- ranking ---------------------------------------------------------------------------------------------------


class RankingOptions(_Options):
    """Names of the two responses in the list that the judge writes."""

    first: str = "model_1"
    second: str = "model_2"


class RankingParser:
    """A Python list of `{"model": name, "rank": 1 or 2}` (AlpacaEval's ranking format); equal ranks are a tie."""

    needs_logprobs = False

    def __init__(self, options: RankingOptions) -> None:
        self.options = options

    def parse(self, answer: Answer) -> Verdict:
        text = answer.text[:MAX_TEXT]
        start, end = text.find("["), text.rfind("]")
        if start < 0 or end < start:
            return _unparsable("the answer holds no list")
        try:
            rows = ast.literal_eval(text[start : end + 1].replace("\x00", ""))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return _unparsable("the answer's list is not a Python literal")
        ranks: dict[str, int] = {}
        for row in rows if isinstance(rows, list) else ():
            name, rank = (row.get("model"), row.get("rank")) if isinstance(row, dict) else (None, None)
            known = isinstance(name, str) and name in (self.options.first, self.options.second)
            if not known or type(rank) is not int or rank not in (1, 2) or name in ranks:
                return _unparsable(
                    "the answer's list does not rank the two models once each, with ranks 1 and 2"
                )
            ranks[name] = rank
        if len(ranks) != 2:
            return _unparsable("the answer's list does not rank both models")
        difference = ranks[self.options.first] - ranks[self.options.second]
        return _verdict(0.5 + 0.5 * difference)

    def render(self, logit: float, coin: bool) -> Rendered:
        ranks = (1, 1) if logit == 0 else (2, 1) if logit > 0 else (1, 2)
        rows = [
            {"model": name, "rank": rank}
            for name, rank in zip((self.options.first, self.options.second), ranks)
        ]
        return Rendered(repr(sorted(rows, key=lambda row: row["rank"])))


# ---- json ------------------------------------------------------------------------------------------------------


class JsonOptions(_Options):
    """`key`: the field of the verdict; `first`, `second`, `tie`: its values (compared without case and outer white
    space); `rationale`: the field of the reasons, kept with the label."""

    key: str = "winner"
    first: tuple[str, ...] = ("a",)
    second: tuple[str, ...] = ("b",)
    tie: tuple[str, ...] = ("tie",)
    rationale: str | None = None


class JsonParser:
    """A JSON object somewhere in the answer; several objects must agree."""

    needs_logprobs = False

    def __init__(self, options: JsonOptions) -> None:
        self.options = options
        values = ((options.first, 0.0), (options.second, 1.0), (options.tie, 0.5))
        self._values = {name.strip().lower(): p for names, p in values for name in names}

    def parse(self, answer: Answer) -> Verdict:
        objects = [value for value in _json_objects(answer.text[:MAX_TEXT]) if self.options.key in value]
        if not objects:
            return _unparsable(f"the answer holds no JSON object with the field {self.options.key!r}")
        found = set()
        for value in objects:
            word = value[self.options.key]
            if not isinstance(word, str) or word.strip().lower() not in self._values:
                return _unparsable(f"the field {self.options.key!r} is none of the allowed values")
            found.add(self._values[word.strip().lower()])
        if len(found) != 1:
            return _unparsable("the answer holds JSON objects that contradict each other")
        rationale = objects[-1].get(self.options.rationale) if self.options.rationale else None
        return _verdict(found.pop(), rationale=rationale if isinstance(rationale, str) else "")

    def render(self, logit: float, coin: bool) -> Rendered:
        names = self.options.tie if logit == 0 else self.options.second if logit > 0 else self.options.first
        value = {self.options.key: names[0]}
        if self.options.rationale:
            value = {self.options.rationale: "A simulated judge compared planted quality.", **value}
        return Rendered(json.dumps(value))


def _json_objects(text: str) -> Iterator[dict[str, Any]]:
    decoder = json.JSONDecoder()
    start, tries = text.find("{"), 0
    while start >= 0 and tries < 50:  # bounded: a wall of braces must not take quadratic time
        tries += 1
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            if isinstance(value, dict):
                yield value
        start = text.find("{", end)


# ---- registry --------------------------------------------------------------------------------------------------

RATING, LISTWISE = "rating", "listwise"
PARSERS: dict[str, tuple[type[BaseModel], Any]] = {
    "ab_logprob": (LogprobOptions, LogprobParser),
    "regex": (RegexOptions, RegexParser),
    "ranking": (RankingOptions, RankingParser),
    "json": (JsonOptions, JsonParser),
    RATING: (RatingOptions, RatingParser),
    LISTWISE: (ListwiseOptions, ListwiseParser),
}


def make_parser(name: str, options: dict[str, Any]) -> Any:
    """The parser of that name: of comparisons, `RatingParser` or `ListwiseParser`.

    Raises:
      CriticError: unknown parser, or options that it does not have.
    """
    if name not in PARSERS:
        raise CriticError(f"unknown parser {name!r}; the parsers are {', '.join(PARSERS)}")
    schema, parser = PARSERS[name]
    try:
        return parser(schema.model_validate(options))
    except ValidationError as error:
        raise CriticError(f"options of the parser {name!r}: {error}") from error
