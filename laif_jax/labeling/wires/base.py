"""What all wire formats share: rate limits, waiting times, and errors by HTTP status."""

import datetime
import email.utils
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

from laif_jax.labeling.answers import Answer
from laif_jax.labeling.errors import (
    AuthFailed,
    BadRequest,
    CallError,
    Malformed,
    Overloaded,
    RateLimited,
)

if TYPE_CHECKING:
    from laif_jax.labeling.calls import Call

_BUSY = {408, 409, 425}
_FATAL = {
    401: ("unauthorised", "refused the key. Set the variable that `api_key_env` names to a valid key"),
    402: ("quota", "asks for payment. Mend the account's balance"),
    403: ("unauthorised", "forbids this key to use the model. Check the key's rights"),
    404: (
        "not_found",
        "knows no such address or model. Check `base_url` (it usually ends in /v1) and `model`",
    ),
}


@dataclass(frozen=True, slots=True)
class Window:
    """One limit: `limit` per minute, what `remaining` is, and in how many seconds it is full again (`reset`)."""

    limit: int | None = None
    remaining: int | None = None
    reset: float | None = None


@dataclass(frozen=True, slots=True)
class RateLimits:
    """Limits that the endpoint's headers tell. `tokens` counts input and output together, the others apart."""

    requests: Window | None = None
    tokens: Window | None = None
    input_tokens: Window | None = None
    output_tokens: Window | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) is not None for field in fields(self))


class Wire(Protocol):
    """A provider's wire format."""

    def check(self, params: Mapping[str, Any]) -> None:
        """Raises `EndpointError` for sampling parameters that the format does not have."""
        ...

    def body(self, call: "Call") -> dict[str, Any]:
        """The JSON body of a request."""
        ...

    def answers(self, body: Any, *, needs_logprobs: bool = False) -> tuple[Answer, ...]:
        """The answers in a decoded response body, at least one; raises `CallError` if there is none to use."""
        ...

    def limits(self, headers: Mapping[str, str]) -> RateLimits | None:
        """Rate limits in the headers (names in lower case)."""
        ...

    def error(self, url: str, status: int, headers: Mapping[str, str], text: str) -> CallError:
        """The error that a status other than 200 stands for."""
        ...


def status_error(
    url: str, status: int, headers: Mapping[str, str], text: str, *, retry_after: float | None = None
) -> CallError:
    """The error of an HTTP status, as all providers mean it. `retry_after`: from the body, where no header says."""
    wait = parse_retry_after(headers)
    wait = retry_after if wait is None else wait
    said = f"{url} answered {status}"
    if status == 429:
        return RateLimited(reason=f"{said}{detail(text)}", retry_after=wait, body=text)
    if status in _BUSY or status >= 500:
        return Overloaded(reason=f"{said}{detail(text)}", retry_after=wait, body=text)
    if status in _FATAL:
        kind, advice = _FATAL[status]
        return AuthFailed(kind, f"{said}: it {advice}{detail(text)}", body=text)
    return BadRequest(
        reason=f"{said}{detail(text)}. The request is not accepted as it stands (too long for the context, or a "
        "parameter that this endpoint does not have)",
        body=text,
    )


def quota_error(url: str, text: str) -> CallError:
    """An account that is used up: waiting does not help."""
    return AuthFailed(
        "quota", f"{url}: the account's quota is used up. Mend its balance{detail(text)}", body=text
    )


def key_error(url: str, status: int, text: str) -> CallError:
    """A key that is not valid, told with an unusual status."""
    kind, advice = _FATAL[401]
    return AuthFailed(kind, f"{url} answered {status}: it {advice}{detail(text)}", body=text)


def decode(url: str, text: str) -> Any:
    """The JSON of a body; raises `Malformed`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(
            "non_json", f"{url} answered something that is not JSON{detail(text)}", body=text
        ) from error


def error_of(text: str) -> dict[str, Any]:
    """The `error` object of a body, {} if there is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if isinstance(value, list) and value:  # Google, in a stream
        value = value[0]
    error = value.get("error") if isinstance(value, dict) else None
    return error if isinstance(error, dict) else {"message": error} if isinstance(error, str) else {}


def detail(text: str) -> str:
    """The endpoint's own words, shortened, for a message."""
    message = error_of(text).get("message")
    words = " ".join((message if isinstance(message, str) else text).split())[:300]
    return f" ({words})" if words else ""


def parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of `retry-after-ms` or `retry-after` (a number, or an HTTP date)."""
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    value = headers.get("retry-after")
    if not value:
        return None
    if (seconds := _number(value)) is not None:
        return seconds
    try:
        until = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return _seconds_until(until)


def window(
    headers: Mapping[str, str], limit: str, remaining: str, reset: str, *, dates: bool
) -> Window | None:
    """A window from three headers; `dates`: the reset is an RFC 3339 time, else a duration such as 1m30s or 120ms."""
    read = _date_seconds if dates else duration
    values = _count(headers.get(limit)), _count(headers.get(remaining)), read(headers.get(reset))
    return None if values == (None, None, None) else Window(*values)


def duration(value: str | None) -> float | None:
    """Seconds of "1h2m3.5s", "120ms", "34s" or "7"; None for anything else."""
    if not value:
        return None
    if (number := _number(value)) is not None:
        return number
    parts = re.findall(r"(\d{1,9}(?:\.\d{1,9})?)(ms|d|h|m|s)", value)
    if not parts or "".join(a + b for a, b in parts) != value.strip():
        return None
    units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    return sum(float(number) * units[unit] for number, unit in parts)


def _number(value: str | None) -> float | None:
    try:
        number = float(value or "")
    except ValueError:
        return None
    return max(0.0, number) if math.isfinite(number) else None


def _count(value: str | None) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _date_seconds(value: str | None) -> float | None:
    try:
        return _seconds_until(datetime.datetime.fromisoformat(value or ""))
    except ValueError:
        return None


def _seconds_until(until: datetime.datetime) -> float:
    if until.tzinfo is None:
        until = until.replace(tzinfo=datetime.UTC)
    return max(0.0, (until - datetime.datetime.now(datetime.UTC)).total_seconds())
