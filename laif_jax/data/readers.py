"""Rows of every supported format, each with the place it came from: (place, row) pairs."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from laif_jax.config.schema import PromptSource
from laif_jax.records import DataError, read_rows
from laif_jax.records.io import read_jsonl_numbered

Placed = tuple[str, dict[str, Any]]
"""Where a row is ("train.jsonl, line 3"), and the row."""

_SUFFIXES = {
    "jsonl": (".jsonl", ".jsonl.gz", ".json", ".json.gz"),
    "parquet": (".parquet",),
    "arrayrecord": (".arrayrecord", ".array_record"),
}


def read_source(source: PromptSource, root: str | None) -> Iterator[Placed]:
    """All rows of a source that is not made on the fly, in its own order.

    Args:
      root: put before a relative `source.path`.

    Raises:
      DataError: nothing is there, or it is damaged or malformed; says what, where, and what to do.
    """
    if source.path is None:
        raise DataError(f"`kind: {source.kind}` needs `path`")
    path = resolve(source.path, root)
    if source.kind == "hf":
        return _read_hf(source.path, path, source.split)
    if source.kind == "tfds":
        return _read_tfds(source.path, path, source.split, root)
    files = _files(path, source.kind)
    read = _read_arrayrecord if source.kind == "arrayrecord" else _read_file
    return (placed for file in files for placed in read(file))


def resolve(path: str, root: str | None) -> epath.Path:
    """`path`, under `root` if it is relative. `~` is the home folder."""
    if path.startswith("~"):
        return epath.Path(path).expanduser()
    return epath.Path(root).expanduser() / path if root else epath.Path(path)


def _files(path: epath.Path, kind: str) -> list[epath.Path]:
    """The file itself, or a folder's or a pattern's (`*` in the last part) files of this kind, sorted by name."""
    suffixes = _SUFFIXES[kind]
    if "*" in path.name:
        found = sorted(path.parent.glob(path.name)) if path.parent.exists() else []
    elif path.is_dir():
        found = sorted(file for file in path.iterdir() if file.name.endswith(suffixes))
    else:
        if not path.exists():
            raise DataError(_missing(path))
        if kind != "arrayrecord" and not path.name.endswith(suffixes):
            fits = [name for name, ends in _SUFFIXES.items() if path.name.endswith(ends)]
            hint = f"Set `kind: {fits[0]}`." if fits else "Check `kind` and `path`."
            raise DataError(f"{path}: `kind: {kind}` reads {', '.join(suffixes)} files. {hint}")
        return [path]
    if not found:
        raise DataError(f"{path}: no {' or '.join(suffixes)} file there. Check the path and `kind`.")
    return found


def _missing(path: epath.Path) -> str:
    near = ""
    if path.parent.exists() and path.parent.is_dir():
        names = sorted(entry.name for entry in path.parent.iterdir())
        near = f" {path.parent} holds: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}."
    return f"{path}: no such file.{near} Check the path (data.root=DIR sets the folder of the data)."


def _read_file(path: epath.Path) -> Iterator[Placed]:
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        for number, row in read_jsonl_numbered(path):
            yield f"{path}, line {number}", row
    else:
        for number, row in enumerate(read_rows(path), 1):
            yield f"{path}, row {number}", row


# ---- ArrayRecord -----------------------------------------------------------------------------------------------


def _read_arrayrecord(path: epath.Path) -> Iterator[Placed]:
    """Each record is a JSON object in UTF-8."""
    import grain

    def damaged(error: Exception) -> DataError:
        reason = f" ({error})" if str(error) else ""
        return DataError(
            f"{path}: not a readable ArrayRecord file{reason}. It is cut short, damaged, or not what its name says: "
            "copy or make it again."
        )

    try:
        records = grain.sources.ArrayRecordDataSource(str(path))
        count = len(records)
    except (RuntimeError, OSError, ValueError) as error:
        raise damaged(error) from error
    for number in range(count):
        try:
            raw = records[number]
        except (RuntimeError, OSError, ValueError) as error:
            raise damaged(error) from error
        yield f"{path}, record {number + 1}", _json_object(raw, f"{path}, record {number + 1}")


def _json_object(raw: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not a JSON object in UTF-8 ({error}). Write records as JSON.") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: a JSON object is expected, found {type(row).__name__}")
    return row


# ---- Hugging Face datasets -------------------------------------------------------------------------------------


def _read_hf(name: str, path: epath.Path, split: str) -> Iterator[Placed]:
    """A folder written by `save_to_disk`, a folder of data files, or a Hub name (`owner/name`, `owner/name:config`)."""
    import datasets

    if path.exists():
        found = _load_local(path, split)
        label = str(path)
    else:
        if name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise DataError(_missing(path))
        repo, _, config = name.partition(":")
        label = f"Hub data set {name}"
        found = _guard(
            lambda: datasets.load_dataset(repo, config or None, split=split),
            f"{label} (no such folder either: {path})",
            "Check the name, `split` and the network; without a network, copy the data set with `save_to_disk` on a "
            "machine that has one and give the folder as `path`.",
        )
    return ((f"{label}, split {split}, row {i}", dict(row)) for i, row in enumerate(found, 1))


def _load_local(path: epath.Path, split: str) -> Any:
    import datasets

    advice = "Give a folder written by `save_to_disk`, or one of data files, and one of its splits."
    if not any((path / name).exists() for name in ("dataset_info.json", "state.json", "dataset_dict.json")):
        return _guard(lambda: datasets.load_dataset(str(path), split=split), str(path), advice)
    found = _guard(lambda: datasets.load_from_disk(str(path)), str(path), advice)
    if isinstance(found, Mapping):
        if split not in found:
            raise DataError(f"{path}: no split {split!r}; it has: {', '.join(map(str, found))}. Set `split`.")
        return found[split]
    return found


def _guard(load: Callable[[], Any], what: str, advice: str) -> Any:
    """Calls a third party's loader; whatever data, network or dependency error it raises becomes a DataError."""
    try:
        return load()
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise DataError(f"{what}: cannot be read: {reason} {advice}") from error


# ---- TensorFlow Datasets ---------------------------------------------------------------------------------------


def _read_tfds(name: str, path: epath.Path, split: str, root: str | None) -> Iterator[Placed]:
    """A prepared data set's folder (`.../name/version`), or a registered name (then `root` is TFDS's data folder).

    TensorFlow itself is not needed for data sets stored as ArrayRecord.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError("`kind: tfds` needs the `tfds` extra: pip install 'laif_jax[tfds]'") from error

    def load() -> Any:
        if (path / "dataset_info.json").exists():
            builder: Any = tfds.builder_from_directory(str(path))
            return builder.as_data_source(split)
        return tfds.data_source(name, split=split, data_dir=root)

    found = _guard(
        load,
        f"TFDS data set {name}",
        f"Check the name and `split`; a prepared data set's folder holds dataset_info.json (looked in {path}) and "
        "array_record files.",
    )
    return (
        (f"TFDS data set {name}, split {split}, row {i}", _decoded(row))
        for i, row in enumerate(_each(found), 1)
    )


def _each(source: Any) -> Iterable[Any]:
    return (source[i] for i in range(len(source)))


def _decoded(value: Any) -> Any:
    """TFDS gives text as bytes and sequences as arrays."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, dict):
        return {key: _decoded(inner) for key, inner in value.items()}
    if hasattr(value, "tolist"):
        return _decoded(value.tolist())
    if isinstance(value, list):
        return [_decoded(inner) for inner in value]
    return value
