"""Content hashes: the same thing made twice has the same id."""

import hashlib
import json
from collections.abc import Callable
from json import encoder
from typing import Any

from etils import epath


def json_writer(
    *, sort_keys: bool = False, separators: tuple[str, str] = (", ", ": "), allow_nan: bool = True
) -> Callable[[Any], str]:
    """`json.dumps` with these options and `ensure_ascii=False`, prepared once: for values that are written by the
    thousand. (`dumps` makes its encoder anew for each value, which takes as long as writing a short one.)"""
    plain = json.JSONEncoder(
        sort_keys=sort_keys,
        separators=separators,
        allow_nan=allow_nan,
        ensure_ascii=False,
        check_circular=False,
    )
    make: Any = getattr(encoder, "c_make_encoder", None)
    if make is None:  # a Python without the compiled one
        return plain.encode
    item, key = separators
    write = make(None, plain.default, encoder.encode_basestring, None, key, item, sort_keys, False, allow_nan)
    return lambda value: "".join(write(value, 0))


_canonical = json_writer(sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical_json(value: Any) -> str:
    """The one text of a JSON-able value: keys sorted, no spaces; raises as `fingerprint` does."""
    return _canonical(value)


def fingerprint(value: Any) -> str:
    """Full SHA-256 (hex) of a JSON-able value, in canonical form (sorted keys, no spaces, UTF-8).

    Raises:
      TypeError: `value` holds something that is not JSON.
      ValueError: `value` holds NaN or an infinity, which have no canonical JSON form.
    """
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()


def content_id(value: Any) -> str:
    """First 16 hex digits of `fingerprint(value)`: 64 bits, enough for billions of records in one study."""
    return fingerprint(value)[:16]


def file_sha256(path: str | epath.Path, chunk: int = 1 << 22) -> str:
    """SHA-256 (hex) of a file's bytes, read in chunks of `chunk` bytes."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while block := file.read(chunk):
            digest.update(block)
    return digest.hexdigest()
