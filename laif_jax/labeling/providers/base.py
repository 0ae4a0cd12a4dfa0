"""What a provider is, and what it gives back."""

from dataclasses import dataclass
from typing import Any, Protocol

from laif_jax.labeling.answers import Answer, Token
from laif_jax.labeling.calls import Call
from laif_jax.labeling.wires import WIRES, RateLimits
from laif_jax.records import Usage


@dataclass(frozen=True, slots=True)
class Reply:
    """A usable answer of an endpoint.

    Attributes:
      answers: one per sample asked for in the call (`n`); nearly always one.
      raw: the endpoint's JSON as it came, without keys; `read_reply` reads it again.
      limits: what the endpoint's headers tell of its rate limits; None if nothing.
    """

    answers: tuple[Answer, ...]
    raw: dict[str, Any]
    limits: RateLimits | None = None

    @property
    def answer(self) -> Answer:
        """The first answer."""
        return self.answers[0]

    @property
    def text(self) -> str:
        return self.answer.text

    @property
    def finish_reason(self) -> str:
        """ "stop", "length", "content_filter", or the provider's own word."""
        return self.answer.finish_reason

    @property
    def refusal(self) -> str:
        return self.answer.refusal

    @property
    def top_logprobs(self) -> tuple[Token, ...]:
        return self.answer.tokens

    @property
    def usage(self) -> Usage | None:
        return self.answer.usage

    @property
    def provider_fingerprint(self) -> str:
        """Model and fingerprint as the endpoint echoed them."""
        return "/".join(filter(None, (self.answer.model, self.answer.fingerprint)))


def read_reply(call: Call, raw: Any, limits: RateLimits | None = None) -> Reply:
    """The reply in a decoded body, fresh or from the store.

    Raises:
      CallError: there is no usable answer in it; `usage` says what it cost all the same.
    """
    answers = WIRES[call.endpoint.provider].answers(raw, needs_logprobs=call.needs_logprobs)
    return Reply(answers, raw, limits)


class Provider(Protocol):
    """Makes one attempt of one call.

    Attributes:
      free: calls cost nothing and cannot be overrun: no back-off between attempts, no early stop after many failures.
      width: calls in flight that make sense.
    """

    free: bool
    width: int

    async def call(self, call: Call, attempt: int) -> Reply:
        """One request, one answer; nothing is retried here.

        Args:
          attempt: 0, 1, ... over all jobs.

        Raises:
          CallError: no usable answer. `usage` and `billed` say what it cost, `limits` what the headers told.
        """
        ...

    async def close(self) -> None: ...
