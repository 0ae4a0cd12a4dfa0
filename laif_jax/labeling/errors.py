"""What can go wrong on the way to a label, by whom it must be mended."""

from typing import Any

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
        "unauthorised", "not_found", "non_json", "malformed", "empty_choices", "empty_answer", "no_logprobs", ...).
      retryable: another attempt of the same call may succeed.
      fatal: every other call to this endpoint would fail alike, so the job stops calling it.
      retry_after: seconds that the endpoint asked us to wait, or None.
      body: the start of what the endpoint sent, for the record.
    """

    def __init__(
        self,
        kind: str,
        reason: str,
        *,
        retryable: bool = False,
        fatal: bool = False,
        retry_after: float | None = None,
        body: Any = "",
    ) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.retryable = retryable
        self.fatal = fatal
        self.retry_after = retry_after
        self.body = (body if isinstance(body, str) else repr(body))[:2000]
