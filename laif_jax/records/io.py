"""Read and write rows: JSON lines (plain or gzip), JSON and Parquet, on local and `gs://` paths alike."""

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from etils import epath

from laif_jax.records.errors import LaifError
from laif_jax.records.types import Record

PathLike = str | os.PathLike[str]

_UNREADABLE = (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError)
"""What a cut, damaged or misnamed text or gzip file raises while it is read."""

_JSON_COLUMNS = b"laif_json_columns"
"""Key of the Parquet schema's metadata that lists the columns whose values are stored as JSON text."""


class DataError(LaifError, ValueError):
    """A data file is missing, empty or malformed; the message says which file, which row, and what to do."""


# ---- reading ---------------------------------------------------------------------------------------------------


def _existing_file(path: PathLike) -> epath.Path:
    path = epath.Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file. Check the path (data.root=DIR sets the folder of the data).")
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file in it.")
    return path


@contextmanager
def _open_text(path: epath.Path) -> Generator[Any, None, None]:
    """The file as UTF-8 text, un-gzipped by its name; a byte order mark at the start is dropped."""
    with path.open("rb") as raw:
        if not path.name.endswith(".gz"):
            yield io.TextIOWrapper(raw, encoding="utf-8-sig")
            return
        # gzip reads zero bytes as an empty file, but no gzip writer leaves zero bytes: the file was cut.
        if not raw.read(1):
            raise DataError(f"{path}: empty, not a gzip file. It was cut short: copy or make it again.")
        raw.seek(0)
        with gzip.GzipFile(fileobj=raw, mode="rb") as unzipped:
            yield io.TextIOWrapper(unzipped, encoding="utf-8-sig")


def _cut_short(path: epath.Path, where: str, error: Exception) -> DataError:
    return DataError(
        f"{path}{where}: {error}. The file is cut short, damaged, or not what its name says: "
        "copy or make it again."
    )


def read_jsonl(path: PathLike) -> Iterator[dict[str, Any]]:
    """Yields the objects of a `.jsonl` or `.jsonl.gz` file. Blank lines are skipped.

    Raises:
      DataError: no such file, a line that is not a JSON object (named by number), or a truncated gzip stream.
    """
    for _, row in read_jsonl_numbered(path):
        yield row


def read_jsonl_numbered(path: PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `read_jsonl`, with each object's line number, counted from 1."""
    path = _existing_file(path)
    number = 0
    try:
        with _open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _parse_object(line, path, number)
    except _UNREADABLE as error:
        raise _cut_short(path, f", after line {number}", error) from error


def _parse_object(line: str, path: epath.Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also integers of over 4300 digits
        what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(
            f"{path}, line {number}: not valid JSON ({what}). Mend or delete the line."
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: a JSON object is expected, found {type(row).__name__}")
    return row


def _read_json(path: PathLike) -> Iterator[dict[str, Any]]:
    path = _existing_file(path)
    try:
        with _open_text(path) as file:
            rows = json.load(file)
    except _UNREADABLE as error:
        raise _cut_short(path, "", error) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not valid JSON ({error}). Mend the file.") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: a JSON list of objects is expected, found {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: a JSON object is expected, found {type(row).__name__}")
        yield row


def _read_parquet(path: PathLike) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = _existing_file(path)
    with path.open("rb") as raw:
        try:
            file = pq.ParquetFile(raw)
            coded = json.loads((file.schema_arrow.metadata or {}).get(_JSON_COLUMNS, b"[]"))
            batches = file.iter_batches()
            while (batch := next(batches, None)) is not None:
                for row in batch.to_pylist():
                    yield {
                        key: json.loads(value) if key in coded and value is not None else value
                        for key, value in row.items()
                    }
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: not a readable Parquet file ({error}). It is cut short, damaged, or not what its name "
                "says: copy or make it again."
            ) from error


def read_rows(path: PathLike) -> Iterator[dict[str, Any]]:
    """Yields rows of a JSONL(.gz), JSON(.gz) (a list of objects) or Parquet file, by its name's ending.

    Raises:
      DataError: as `read_jsonl`; also for a file that is not what its name says.
    """
    name = epath.Path(path).name
    if name.endswith(".parquet"):
        return _read_parquet(path)
    if name.removesuffix(".gz").endswith(".json"):
        return _read_json(path)
    return read_jsonl(path)


# ---- writing ---------------------------------------------------------------------------------------------------


def _write_atomically(path: PathLike, write: Callable[[Any], None]) -> None:
    """Writes through a temporary sibling, then renames: a reader never sees half a file."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp"
    try:
        with temporary.open("wb") as file:
            write(file)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(
                error.errno,
                f"cannot write {path}: {error.strerror or error}. Free space or choose another folder; "
                "nothing earlier was lost",
            ) from error
        raise


def _dump(row: Any) -> bytes:
    """One row as JSON in UTF-8. Lone surrogates, which have no UTF-8 form, are written as `\\ud8..` escapes."""
    value = row.to_row() if isinstance(row, Record) else row
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


def write_jsonl(path: PathLike, rows: Iterable[dict[str, Any] | Record]) -> int:
    """Writes rows as JSON lines (gzip if the name ends in `.gz`), atomically. Returns how many.

    Raises:
      OSError: the file cannot be written (a full disk, no permission); what was there before is untouched.
    """
    count = 0

    def write_all(file: Any) -> None:
        nonlocal count
        for row in rows:
            file.write(_dump(row) + b"\n")
            count += 1

    def write(file: Any) -> None:
        if not str(path).endswith(".gz"):
            return write_all(file)
        # No name and mtime=0: the same rows give the same bytes.
        with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as zipped:
            return write_all(zipped)

    _write_atomically(path, write)
    return count


def is_remote(path: PathLike) -> bool:
    """Whether a path is in a bucket, which has no folders, no renames and no append."""
    return "://" in str(path)


def append_bytes(path: PathLike, data: bytes) -> None:
    """Appends to a file; in a bucket, by writing the object anew, which readers see whole, before or after."""
    path = epath.Path(path)
    if is_remote(path):
        path.write_bytes((path.read_bytes() if path.exists() else b"") + data)
    else:
        with path.open("ab") as file:
            file.write(data)


def append_jsonl(path: PathLike, row: dict[str, Any] | Record) -> None:
    """Appends one row to a JSON lines file and flushes it. A last line that an earlier writer did not finish is
    closed first, so that it does not swallow this row.

    Raises:
      OSError: the row cannot be written; rows before it are untouched.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = _dump(row) + b"\n"
    if path.exists() and path.stat().length:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
    append_bytes(path, line)


def check_writable(folder: PathLike) -> None:
    """Writes a file into a folder, or a bucket, and removes it again, so that what is wrong there is told before hours
    of work.

    Raises:
      OSError: naming the folder.
    """
    folder = epath.Path(folder)
    probe = folder / ".laif-can-write"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except Exception as error:
        # Clients of buckets raise what they like: no credentials, no permission, no bucket, no client.
        if is_remote(folder):
            raise OSError(
                f"cannot write to {folder}: {type(error).__name__}: {error}. Check that the bucket exists, that this "
                "machine's service account may create, read and delete objects in it, and that `laif_jax[gcp]` is "
                "installed; or set `out` to another folder"
            ) from error
        if isinstance(error, OSError):
            raise OSError(
                error.errno,
                f"cannot write to {folder}: {error.strerror or error}. Make it writable, or set `out` elsewhere",
            ) from error
        raise


def write_json(path: PathLike, value: Any) -> None:
    """Writes one JSON value, indented, atomically."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2).encode()
    _write_atomically(path, lambda file: file.write(text + b"\n"))


def write_parquet(path: PathLike, rows: Iterable[dict[str, Any] | Record]) -> int:
    """Writes rows to one Parquet file, atomically. Returns how many.

    Columns that hold objects are stored as JSON text, and marked so in the schema: Parquet has no form for an empty
    object, and would give every row the union of all rows' keys. `read_rows` turns them back.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = [row.to_row() if isinstance(row, Record) else row for row in rows]
    coded = sorted({key for row in plain for key, value in row.items() if isinstance(value, dict)})
    columns = list(dict.fromkeys(key for row in plain for key in row))
    table = pa.table(
        {name: [_cell(row.get(name), as_json=name in coded) for row in plain] for name in columns}
    )
    if coded:
        table = table.replace_schema_metadata({_JSON_COLUMNS: json.dumps(coded).encode()})
    _write_atomically(path, lambda file: pq.write_table(table, file))
    return len(plain)


def _cell(value: Any, as_json: bool) -> Any:
    return json.dumps(value) if as_json and value is not None else value
