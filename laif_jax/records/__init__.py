"""Data contracts that every room shares, and their reading and writing. No JAX here."""

from laif_jax.records.errors import LaifError
from laif_jax.records.hashing import content_id, file_sha256, fingerprint
from laif_jax.records.io import (
    DataError,
    append_bytes,
    append_jsonl,
    check_writable,
    is_remote,
    read_jsonl,
    read_rows,
    write_json,
    write_jsonl,
    write_parquet,
)
from laif_jax.records.types import (
    Comparison,
    Completion,
    Judgement,
    Message,
    Preference,
    Prompt,
    Rating,
    Status,
    Usage,
)

__all__ = [
    "Comparison",
    "Completion",
    "DataError",
    "Judgement",
    "LaifError",
    "Message",
    "Preference",
    "Prompt",
    "Rating",
    "Status",
    "Usage",
    "append_bytes",
    "append_jsonl",
    "check_writable",
    "content_id",
    "file_sha256",
    "fingerprint",
    "is_remote",
    "read_jsonl",
    "read_rows",
    "write_json",
    "write_jsonl",
    "write_parquet",
]
