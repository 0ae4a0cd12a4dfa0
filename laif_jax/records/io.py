"""Read and write rows: JSON lines (plain or gzip) and Parquet, on local and `gs://` paths alike."""

import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath

from laif_jax.records.types import Record

PathLike = str | epath.Path


class DataError(ValueError):
    """A data file is missing, empty or malformed; the message says which file, which row, and what to do."""


def _open_text(path: epath.Path) -> Any:
    raw = path.open("rb")
    if path.name.endswith(".gz"):
        return io.TextIOWrapper(gzip.GzipFile(fileobj=raw, mode="rb"), encoding="utf-8")
    return io.TextIOWrapper(raw, encoding="utf-8")


def read_jsonl(path: PathLike) -> Iterator[dict[str, Any]]:
    """Yields the objects of a `.jsonl` or `.jsonl.gz` file. Blank lines are skipped.

    Raises:
      DataError: no such file, a line that is not a JSON object (named by number), or a truncated gzip stream.
    """
    path = epath.Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file. Check the path (data.root=DIR sets the folder of the data).")
    number = 0
    try:
        with _open_text(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(
                        f"{path}, line {number}: a JSON object is expected, found {type(row).__name__}"
                    )
                yield row
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {number}: not valid JSON ({error.msg}). Mend or delete the line."
        ) from error
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}, after line {number}: {error}. The file is cut short or not what its name says."
        ) from error


def read_rows(path: PathLike) -> Iterator[dict[str, Any]]:
    """Yields rows of a JSONL(.gz), JSON (a list of objects) or Parquet file, by its name's ending."""
    path = epath.Path(path)
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow.parquet as pq

        if not path.exists():
            raise DataError(f"{path}: no such file. Check the path.")
        try:
            with path.open("rb") as file:
                for batch in pq.ParquetFile(file).iter_batches():
                    yield from batch.to_pylist()
        except Exception as error:
            if isinstance(error, (OSError, ValueError)):
                raise DataError(f"{path}: not a readable Parquet file ({error})") from error
            raise
    elif name.endswith(".json"):
        if not path.exists():
            raise DataError(f"{path}: no such file. Check the path.")
        with _open_text(path) as file:
            try:
                rows = json.load(file)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}: not valid JSON ({error})") from error
        if not isinstance(rows, list):
            raise DataError(f"{path}: a JSON list of objects is expected, found {type(rows).__name__}")
        yield from rows
    else:
        yield from read_jsonl(path)


def _write_atomically(path: PathLike, write: Callable[[Any], None]) -> None:
    """Writes through a temporary sibling, then renames: a reader never sees half a file."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp"
    try:
        with temporary.open("wb") as file:
            write(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"cannot write {path}: {error.strerror or error}. Free space or choose another folder; "
            "nothing written earlier was lost",
        ) from error
    temporary.replace(path)


def _dump(row: Any) -> str:
    return json.dumps(row.to_row() if isinstance(row, Record) else row, ensure_ascii=False)


def write_jsonl(path: PathLike, rows: Iterable[dict[str, Any] | Record]) -> int:
    """Writes rows as JSON lines (gzip if the name ends in `.gz`), atomically. Returns how many."""
    count = 0

    def write(file: Any) -> None:
        nonlocal count
        # mtime=0: the same rows give the same bytes.
        target = gzip.GzipFile(fileobj=file, mode="wb", mtime=0) if str(path).endswith(".gz") else file
        for row in rows:
            target.write((_dump(row) + "\n").encode("utf-8", "surrogatepass"))
            count += 1
        if target is not file:
            target.close()

    _write_atomically(path, write)
    return count


def append_jsonl(path: PathLike, row: dict[str, Any] | Record) -> None:
    """Appends one row to a JSON lines file and flushes it."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(_dump(row) + "\n")


def write_json(path: PathLike, value: Any) -> None:
    """Writes one JSON value, indented, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False) + "\n"
    _write_atomically(path, lambda file: file.write(text.encode("utf-8", "surrogatepass")))


def write_parquet(path: PathLike, rows: Iterable[dict[str, Any] | Record]) -> int:
    """Writes rows to one Parquet file, atomically. Returns how many."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = [row.to_row() if isinstance(row, Record) else row for row in rows]
    table = pa.Table.from_pylist(plain)
    _write_atomically(path, lambda file: pq.write_table(table, file))
    return len(plain)
