"""The records that travel along the corridor: prompt -> completion -> comparison -> judgement -> preference (or
prompt -> completion -> rating)."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from laif_jax.records.hashing import content_id


class Record(BaseModel):
    """Base of all records: immutable, unknown fields refused, `to_row`/`from_row` for JSON lines."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_row(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return self.model_dump(mode="json")

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """The record from plain JSON values; raises `pydantic.ValidationError` for a malformed row."""
        return cls.model_validate(row)


class Message(Record):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Usage(Record):
    """Tokens that a call used. `cached_tokens`: those of `prompt_tokens` that the endpoint had cached."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Prompt(Record):
    """A conversation that waits for the assistant's next turn. `id` is a hash of `messages`."""

    messages: tuple[Message, ...]
    source: str = ""
    split: str = "train"
    meta: dict[str, Any] = Field(default_factory=dict)
    id: str = ""

    @model_validator(mode="before")
    @classmethod
    def _fill_id(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("id"):
            return data
        try:
            messages = [m.model_dump() if isinstance(m, Message) else m for m in data["messages"]]
            return {**data, "id": content_id([[m["role"], m["content"]] for m in messages])}
        except (KeyError, TypeError):
            return data  # malformed: the fields' own checks say how

    @model_validator(mode="after")
    def _check(self) -> Self:
        if all(message.role != "user" for message in self.messages):
            raise ValueError("a prompt needs at least one message with role `user`")
        return self

    @classmethod
    def from_text(cls, instruction: str, *, source: str = "", split: str = "train", **meta: Any) -> Self:
        """A single user turn."""
        return cls(
            messages=(Message(role="user", content=instruction),), source=source, split=split, meta=meta
        )

    @property
    def instruction(self) -> str:
        """The text of the last user turn, byte for byte."""
        return next(m.content for m in reversed(self.messages) if m.role == "user")


class Completion(Record):
    """A generator's answer to a prompt. `id` is a hash of prompt, generator, text and sample index."""

    prompt_id: str
    generator: str
    text: str
    finish_reason: str = (
        "stop"  # "stop": the model ended it; "length": cut by a limit; anything else: as told
    )
    sample_index: int = 0
    usage: Usage | None = None
    meta: dict[str, Any] = Field(default_factory=dict)
    id: str = ""

    @model_validator(mode="before")
    @classmethod
    def _fill_id(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("id"):
            return data
        try:
            key = [data["prompt_id"], data["generator"], data["text"], data.get("sample_index", 0)]
            return {**data, "id": content_id(key)}
        except (KeyError, TypeError):
            return data  # malformed: the fields' own checks say how


class Comparison(Record):
    """Two completions of one prompt, put to a critic. `id` is a hash of the prompt and both completions."""

    prompt: Prompt
    a: Completion
    b: Completion
    id: str = ""

    @model_validator(mode="after")
    def _fill_id(self) -> Self:
        if not self.id:
            object.__setattr__(self, "id", content_id([self.prompt.id, self.a.id, self.b.id]))
        return self

    @property
    def prompt_id(self) -> str:
        return self.prompt.id


class Status(StrEnum):
    """How a judgement ended. Only `ok` and `tie` carry a probability; a failure is never a preference."""

    OK = "ok"
    TIE = "tie"
    UNPARSABLE = "unparsable"
    REFUSED = "refused"
    FAILED = "failed"


class Judgement(Record):
    """A critic's verdict on a comparison, in one order or averaged over both.

    Attributes:
      order: "ab" (a was shown first), "ba" (b was shown first), or "both" (the re-aligned average).
      p_b: probability in [0, 1] that `b` is better, *already re-aligned* to the comparison's own a and b;
        None exactly when `status` is neither ok nor tie.
      raw: the answer text as it came. reason: why it is not ok. parts: the ids of the judgements averaged.
    """

    comparison_id: str
    critic: str
    critic_hash: str = ""
    order: Literal["ab", "ba", "both"]
    status: Status
    p_b: float | None = Field(default=None, ge=0.0, le=1.0)
    raw: str = ""
    reason: str = ""
    rationale: str = ""
    principle: str = ""
    usage: Usage | None = None
    cost: float | None = None  # US dollars
    latency: float | None = None  # seconds
    provider_fingerprint: str = ""
    date: str = ""
    parts: tuple[str, ...] = ()
    meta: dict[str, Any] = Field(default_factory=dict)  # e.g. probability mass outside the options
    id: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        has_p = self.status in (Status.OK, Status.TIE)
        if has_p != (self.p_b is not None):
            raise ValueError(f"a judgement with status {self.status} must{'' if has_p else ' not'} carry p_b")
        if not self.id:
            key = [
                self.comparison_id,
                self.critic,
                self.critic_hash,
                self.order,
                self.status,
                self.p_b,
                self.raw,
            ]
            object.__setattr__(self, "id", content_id(key))
        return self


class Rating(Record):
    """A critic's score of one completion, from 1 (awful) to 10 (perfect).

    Attributes:
      status: `ok`, `unparsable`, `refused` or `failed`; there are no ties.
      score: in [1, 10], None exactly when `status` is not ok. From log-probs: the expected score, sum of i * p[i - 1].
      p: probabilities of the scores 1 to 10, which sum to 1; None where the score was read from the answer's text.
      mass: probability that the ten together had before they were normalised. ambiguous: the part of it on a "1" of
        which the answer does not tell whether a "0" would have followed (see `laif_jax.labeling.rating`).
      raw: the answer text as it came. reason: why it is not ok.
    """

    completion_id: str
    prompt_id: str
    critic: str
    critic_hash: str = ""
    status: Status
    score: float | None = Field(default=None, ge=1.0, le=10.0)
    p: tuple[float, ...] | None = Field(default=None, min_length=10, max_length=10)
    mass: float | None = Field(default=None, ge=0.0, le=1.0)
    ambiguous: float | None = Field(default=None, ge=0.0, le=1.0)
    raw: str = ""
    reason: str = ""
    usage: Usage | None = None
    cost: float | None = None  # US dollars
    latency: float | None = None  # seconds
    provider_fingerprint: str = ""
    date: str = ""
    meta: dict[str, Any] = Field(default_factory=dict)
    id: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.status is Status.TIE:
            raise ValueError("a rating is of one completion: it cannot be a tie")
        if (self.status is Status.OK) != (self.score is not None):
            verb = "must" if self.status is Status.OK else "must not"
            raise ValueError(f"a rating with status {self.status} {verb} carry a score")
        if not self.id:
            key = [self.completion_id, self.critic, self.critic_hash, self.status, self.score, self.raw]
            object.__setattr__(self, "id", content_id(key))
        return self

    @property
    def reward(self) -> float | None:
        """The score on [-1, 1]: (score - 5.5) / 4.5."""
        return None if self.score is None else (self.score - 5.5) / 4.5


class Preference(Record):
    """A training row of preference optimisation.

    Attributes:
      p_chosen: probability in [0.5, 1] that `chosen` is the better one. It reaches the loss per example.
      judgement_ids: the judgements behind it, so that every training row can be traced.
    """

    prompt: Prompt
    chosen: Completion
    rejected: Completion
    p_chosen: float = Field(ge=0.0, le=1.0)
    judgement_ids: tuple[str, ...] = ()
    id: str = ""

    @model_validator(mode="after")
    def _fill_id(self) -> Self:
        if not self.id:
            key = [self.prompt.id, self.chosen.id, self.rejected.id, self.p_chosen, list(self.judgement_ids)]
            object.__setattr__(self, "id", content_id(key))
        return self
