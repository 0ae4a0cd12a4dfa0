"""Content hashes: the same thing made twice has the same id."""

import hashlib
import json
from typing import Any

from etils import epath

# `json.dumps` with options makes an encoder for each call.
canonical_json = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
).encode


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
