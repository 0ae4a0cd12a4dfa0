"""Safetensors files, by byte range: headers are parsed here, and only the bytes that are asked for are read.

Layout of a file: 8 bytes (little-endian length of the header), the header (JSON: tensor name -> dtype, shape,
data_offsets), the data.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from laif_jax.models.names import Slices, WeightsError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
_COPY_AGAIN = "Copy or download the file again."


class Entry(NamedTuple):
    """A tensor of a file: its type's name, shape, and byte range from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def is_local(path: epath.Path) -> bool:
    """Whether the file can be memory-mapped."""
    return "://" not in str(path)


def _read_header(path: epath.Path) -> tuple[dict[str, Any], int, int]:
    """(header, where the data starts, size of the file)."""
    size = path.stat().length
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or not 2 <= length <= _MAX_HEADER:
            raise WeightsError(
                f"{path}: not a safetensors file (its first 8 bytes name no header). {_COPY_AGAIN}"
            )
        if 8 + length > size:
            raise WeightsError(
                f"{path}: the file is cut short: its header needs {8 + length} bytes, it has {size}. {_COPY_AGAIN}"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise WeightsError(
            f"{path}: the safetensors header is not valid JSON ({error}). {_COPY_AGAIN}"
        ) from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: the safetensors header is not a JSON object. {_COPY_AGAIN}")
    return header, 8 + length, size


def _entry(path: epath.Path, name: str, raw: Any, base: int, size: int) -> Entry:
    try:
        dtype, shape = str(raw["dtype"]), tuple(int(n) for n in raw["shape"])
        begin, end = (int(n) for n in raw["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: the header's entry for {name} is malformed. {_COPY_AGAIN}") from error
    if begin < 0 or end < begin:
        raise WeightsError(f"{path}: the byte range of {name} is malformed. {_COPY_AGAIN}")
    if base + end > size:
        raise WeightsError(
            f"{path}: the file is cut short: {name} ends at byte {base + end}, the file has {size}. {_COPY_AGAIN}"
        )
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise WeightsError(
            f"{path}: {name} of shape {shape} and type {dtype} does not fit its byte range of {end - begin}. "
            + _COPY_AGAIN
        )
    return Entry(dtype, shape, base + begin, base + end)


class SafetensorsFile:
    """One file, opened for reading slices.

    Local files are memory-mapped. Files elsewhere (`gs://`) are read by ranges of whole rows, which are kept until
    `forget()`, so that device shards that cut columns do not fetch the same rows again.

    Attributes:
      entries: {tensor name: Entry}. bytes_read: bytes copied out of the file so far, without the header.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        if not self.path.exists():
            raise WeightsError(f"{self.path}: no such file. {_COPY_AGAIN}")
        header, base, size = _read_header(self.path)
        header.pop("__metadata__", None)
        self.entries = {name: _entry(self.path, name, raw, base, size) for name, raw in header.items()}
        self.bytes_read = 0
        self._map: np.memmap | None = None
        self._rows: dict[tuple[int, int], np.ndarray] = {}

    def read(self, name: str, factored: tuple[int, ...], index: Slices) -> np.ndarray:
        """`tensor.reshape(factored)[index]`, in the tensor's own type. Slices have a step of 1.

        Raises:
          WeightsError: a type that holds no plain floating-point weights (for example, 8-bit ones).
        """
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise WeightsError(
                f"{self.path}: {name} has type {entry.dtype}; weights of type {', '.join(DTYPES)} can be read. "
                "Convert the checkpoint to one of these types first."
            )
        dtype = DTYPES[entry.dtype]
        if math.prod(factored) == 0:
            return np.empty(factored, dtype)[index]
        if is_local(self.path):
            if self._map is None:
                self._map = np.memmap(self.path, dtype=np.uint8, mode="r")
            part = self._map[entry.start : entry.stop].view(dtype).reshape(factored)[index]
            self.bytes_read += part.nbytes
            return np.asarray(part)
        rows = index[0].indices(factored[0])
        width = (entry.stop - entry.start) // factored[0]
        block = self._fetch(entry.start + rows[0] * width, entry.start + rows[1] * width)
        return block.view(dtype).reshape(rows[1] - rows[0], *factored[1:])[(slice(None), *index[1:])]

    def _fetch(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of the file, from memory if they were read before."""
        if (start, stop) not in self._rows:
            with self.path.open("rb") as file:
                file.seek(start)
                raw = file.read(stop - start)
            if len(raw) != stop - start:
                raise WeightsError(
                    f"{self.path}: {len(raw)} of bytes {start} to {stop} came back. The file changed or was cut short. "
                    + _COPY_AGAIN
                )
            self.bytes_read += len(raw)
            self._rows[start, stop] = np.frombuffer(raw, np.uint8)
        return self._rows[start, stop]

    def forget(self) -> None:
        """Frees rows that were read from elsewhere."""
        self._rows.clear()


def write_file(
    path: epath.PathLike,
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    values: Iterator[tuple[str, np.ndarray]],
) -> int:
    """Writes a safetensors file, one tensor in memory at a time. Returns its size in bytes.

    Args:
      shapes: {name: (shape, dtype)}, in the order of `values`.
    """
    path = epath.Path(path)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    offset = 0
    for name, (shape, dtype) in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # data starts at a multiple of 8
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, value in values:
            shape, dtype = shapes[name]
            if value.shape != shape or value.dtype != dtype:
                raise ValueError(f"{name}: promised {shape} {dtype}, got {value.shape} {value.dtype}")
            file.write(np.ascontiguousarray(value).view(np.uint8).data if value.size else b"")
        file.flush()
        if is_local(path):
            os.fsync(file.fileno())
    return 8 + len(raw) + offset
