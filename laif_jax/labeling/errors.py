"""What can go wrong on the way to a label, by whom it must be mended."""

from typing import Any, ClassVar

from laif_jax.records import Usage
from laif_jax.records.errors import LaifError


class LabelError(LaifError):
    """Base of the labelling errors that a user can meet; the message says what, where and what to do."""


class StoreError(LabelError):
    """The store cannot be opened, is used by another service, or cannot be written."""


class CriticError(LabelError, ValueError):
    """A critic's folder is missing or malformed."""


class EndpointError(LabelError, ValueError):
    """An endpoint's description cannot be used (bad address, key not set, model file missing)."""


class LabelServiceError(LabelError):
    """The labelling service does not answer, died, or could not finish a job."""


class CallError(Exception):
    """One call to an endpoint did not give a usable answer. It becomes a state, never an answer.

    Attributes:
      kind: short name for counting ("unreachable", "timeout", "rate_limited", "server_error", "bad_request",
        "unauthorised", "not_found", "quota", "non_json", "malformed", "empty_choices", "empty_answer", "no_logprobs").
      retryable: another attempt of the same call may succeed.
      fatal: every other call to this endpoint would fail alike, so the job stops calling it.
      retry_after: seconds that the endpoint asked us to wait, or None.
      body: the start of what the endpoint sent, for the record.
      usage: what the failed call used, where the endpoint said so: it was paid for (an empty answer, for example).
      billed: what is known of its price: "no" (refused before any work), "yes" (an answer came, unusable), "unknown"
        (the request went out and the answer was lost: it may have been written, and counts as spent in full).
      limits: the endpoint's rate limits, `providers.base.RateLimits`, where it told them.
    """

    default_kind: ClassVar[str] = "failed"
    default_retryable: ClassVar[bool] = False
    default_fatal: ClassVar[bool] = False
    default_billed: ClassVar[str] = "no"

    def __init__(
        self,
        kind: str = "",
        reason: str = "",
        *,
        retryable: bool | None = None,
        fatal: bool | None = None,
        retry_after: float | None = None,
        body: Any = "",
        usage: Usage | None = None,
        billed: str | None = None,
        limits: Any = None,
    ) -> None:
        super().__init__(reason)
        self.kind = kind or self.default_kind
        self.reason = reason
        self.retryable = self.default_retryable if retryable is None else retryable
        self.fatal = self.default_fatal if fatal is None else fatal
        self.retry_after = retry_after
        self.body = (body if isinstance(body, str) else repr(body))[:2000]
        self.usage = usage
        self.billed = billed or self.default_billed
        self.limits = limits


class RateLimited(CallError):
    """HTTP 429: too many calls or tokens for now; `retry_after` says until when, where the endpoint does."""

    default_kind, default_retryable = "rate_limited", True


class Overloaded(CallError):
    """HTTP 5xx, 529, 408, 409, 425: the endpoint cannot answer now."""

    default_kind, default_retryable = "server_error", True


class CallTimeout(CallError):
    """No answer in time. The endpoint may go on working, and bill it."""

    default_kind, default_retryable, default_billed = "timeout", True, "unknown"


class Unreachable(CallError):
    """No connection, or one that broke; if it broke after the request had gone out, `billed` is "unknown"."""

    default_kind, default_retryable = "unreachable", True


class BadRequest(CallError):
    """The request is not accepted as it stands. Never tried again."""

    default_kind = "bad_request"


class AuthFailed(CallError):
    """The key, the account or the address is wrong ("unauthorised", "quota", "not_found"): stops the endpoint."""

    default_kind, default_fatal = "unauthorised", True


class Malformed(CallError):
    """What came is no answer ("non_json", "malformed", "empty_choices"): a truncated body, a proxy's page."""

    default_kind, default_retryable, default_billed = "malformed", True, "unknown"


class NoAnswer(CallError):
    """A well-formed answer that holds nothing usable ("empty_answer", "no_logprobs"). It was paid for."""

    default_kind, default_billed = "empty_answer", "yes"
