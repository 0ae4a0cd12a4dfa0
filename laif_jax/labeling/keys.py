"""Keys of endpoints: read from the environment or from a file that only its owner can read, and shown nowhere.

A key never reaches a log, an error, a row of the store or a `repr`. `read_key` gives a `Key`, which hides its value,
and remembers the value so that `redact` can take it out of whatever an endpoint quotes back.
"""

import functools
import logging
import os
import re
import stat
import threading
from pathlib import Path
from typing import NoReturn, Protocol

from laif_jax.labeling.errors import EndpointError

HIDDEN = "[key]"
SHORTEST = 8  # a shorter "key" (EMPTY, none) is no secret, and taking it out would change answers
LONGEST = 4096

# How keys and tokens of known services look, for texts that are only shown: logs, errors, reports.
_SHAPES = re.compile(
    r"sk-[A-Za-z0-9_-]{16,}|AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9._-]{16,}|hf_[A-Za-z0-9]{20,}|gsk_[A-Za-z0-9]{20,}"
    r"|(?<=Bearer )[A-Za-z0-9._~+/=-]{8,}"
)
_known: set[str] = set()
_lock = threading.Lock()
_ESCAPES = re.compile(r"\\u00|\\/|%[0-9A-Fa-f]{2}")


@functools.cache
def _escaped(value: str) -> re.Pattern[str]:
    """Finds `value` however its characters are escaped: in JSON, in JSON inside a JSON text, or in an address. A body
    with such escapes holds the key as much as a plain one does."""
    forms = []
    for character in value:
        code = f"(?i:{ord(character):02x})"
        forms.append(rf"(?:\\{{0,4}}{re.escape(character)}|\\{{1,4}}u00{code}|%{code})")
    return re.compile("".join(forms))


class Key:
    """A secret that prints as `[key]`. Only `reveal()` gives it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value
        if len(value) >= SHORTEST:
            with _lock:
                _known.add(value)

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return HIDDEN

    __str__ = __repr__

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is not pickled")


class _HasKey(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def api_key_env(self) -> str | None: ...

    @property
    def api_key_file(self) -> str | None: ...


def read_key(endpoint: _HasKey) -> Key | None:
    """The endpoint's key; None if it names none.

    Raises:
      EndpointError: the variable is not set, or the file is missing, can be read by others, or holds no key.
    """
    if endpoint.api_key_env:
        value = os.environ.get(endpoint.api_key_env, "").strip()
        if not value:
            raise EndpointError(
                f"endpoint {endpoint.name}: the environment variable {endpoint.api_key_env} is not set where "
                "the labelling service runs. Set it and start the service again"
            )
        return Key(_checked(value, f"the environment variable {endpoint.api_key_env}"))
    if endpoint.api_key_file:
        return read_key_file(
            endpoint.api_key_file, f"endpoint {endpoint.name}: the key file", "Correct `api_key_file`"
        )
    return None


def read_key_file(file_name: str | Path, what: str, remedy: str) -> Key:
    """The key that stands alone in a file which only its owner can read.

    Args:
      what, remedy: for messages: what the file is, and what to do if it cannot be read.

    Raises:
      EndpointError: it is missing, can be read by others, or holds no key.
    """
    path = Path(file_name).expanduser()
    where = f"{what} {path}"
    try:
        # The open file is checked, not the path: it cannot be exchanged in between. A pipe is not waited for.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise EndpointError(f"{where} is no file. Give a text file that holds the key alone")
            if status.st_mode & 0o077:
                raise EndpointError(
                    f"{where} can be read by others (mode {stat.S_IMODE(status.st_mode):03o}). Do: chmod 600 {path}"
                )
            content = file.read(LONGEST + 1)
    except OSError as error:
        raise EndpointError(
            f"{where} cannot be read ({error.strerror}) where the labelling service runs. {remedy}"
        ) from error
    return Key(_checked(content.decode("utf-8", "replace").strip(), where))


def _checked(value: str, where: str) -> str:
    # One word: a file of several lines (a private key, a password list) is never sent to an endpoint by mistake.
    if not value or len(value) > LONGEST or not value.isascii() or not value.isprintable() or " " in value:
        raise EndpointError(
            f"{where} does not hold a key: one line of printable ASCII without spaces is expected"
        )
    return value


def redact(text: str, *, shapes: bool = False) -> str:
    """`text` without any key that this process has read.

    Args:
      shapes: also hide what only looks like a key. For logs and errors; an answer's own words are not changed so.
    """
    escapes = _ESCAPES.search(text) is not None
    for value in sorted(
        _known, key=len, reverse=True
    ):  # of one that begins like a shorter one nothing is left over
        if escapes or '"' in value or "\\" in value:  # first, lest half of an escaped backslash be left over
            text = _escaped(value).sub(HIDDEN, text)
        if value in text:
            text = text.replace(value, HIDDEN)
    return _SHAPES.sub(HIDDEN, text) if shapes else text


class RedactingFilter(logging.Filter):
    """Takes keys out of every record, its arguments and traceback included. Add it to a *handler*."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage(), shapes=True), None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redact(record.exc_text, shapes=True)
        return True
