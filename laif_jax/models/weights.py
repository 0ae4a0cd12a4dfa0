"""Weights of a Hugging Face folder: safetensors in, straight into sharded arrays, and safetensors out."""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import AxisType, Mesh, NamedSharding

from laif_jax.models import names
from laif_jax.models.arch import ModelConfig
from laif_jax.models.names import LeafPlan, Path, Slices, WeightsError
from laif_jax.models.safetensors import DTYPES, SafetensorsFile, is_local, write_file

__all__ = [
    "Checkpoint",
    "WeightsError",
    "load_params",
    "part_on_host",
    "place",
    "save_params",
    "write_folder",
]

logger = logging.getLogger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000


# ---- in --------------------------------------------------------------------------------------------------------


class Checkpoint:
    """The weight files of a folder, opened: one `model.safetensors`, or the files that the index names.

    Attributes:
      files: the opened files. where: {tensor name: its file}.
    """

    def __init__(self, folder: epath.PathLike):
        self.folder = epath.Path(folder)
        if not self.folder.is_dir():
            raise WeightsError(f"{self.folder}: no such folder. Check the path.")
        paths = self._paths()
        self.files = [SafetensorsFile(path) for path in paths]
        self.where: dict[str, SafetensorsFile] = {}
        for file in self.files:
            for name in file.entries:
                if name in self.where:
                    raise WeightsError(
                        f"{self.folder}: {name} is both in {self.where[name].path.name} and in {file.path.name}. "
                        "Remove the file that is left from another checkpoint."
                    )
                self.where[name] = file

    def _paths(self) -> list[epath.Path]:
        if (self.folder / SINGLE).exists():
            return [self.folder / SINGLE]
        index = self.folder / INDEX
        if not index.exists():
            old = [path.name for path in self.folder.glob("*.bin")]
            hint = f" ({old[0]} is a pickle: convert it to safetensors)" if old else ""
            raise WeightsError(
                f"{self.folder}: has neither {SINGLE} nor {INDEX}{hint}. Check the path, or copy the weights there."
            )
        try:
            found = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index}: not a weight index ({error!r}). Copy the file again.") from error
        missing = [name for name in found if not (self.folder / name).exists()]
        if missing:
            raise WeightsError(
                f"{self.folder}: {len(missing)} of the {len(found)} weight files that {INDEX} names are missing: "
                f"{', '.join(missing[:6])}. Copy them there."
            )
        return [self.folder / name for name in found]

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data that were copied into memory so far."""
        return sum(file.bytes_read for file in self.files)

    def forget(self) -> None:
        """Frees what was kept of remote files."""
        for file in self.files:
            file.forget()

    def reader(self, cfg: ModelConfig) -> names.Reader:
        """A reader by the table's names, after checking that names and shapes are exactly the model's.

        Raises:
          WeightsError: missing tensors, tensors that are no part of the model, wrong shapes.
        """
        real = names.canonical_names(cfg, self.where)
        shapes = {full: self.where[name].entries[name].shape for full, name in real.items()}
        names.check(cfg, shapes, str(self.folder))

        def read(name: str, factored: tuple[int, ...], index: Slices) -> np.ndarray:
            return self.where[real[name]].read(real[name], factored, index)

        return read


def place(
    plan: LeafPlan,
    reader: names.Reader,
    dtype: Any,
    sharding: jax.sharding.Sharding | None,
    forget: Callable[[], None] | None = None,
) -> jax.Array:
    """One leaf as a (sharded) array; each process reads the slices that its own devices hold.

    One slice at a time is in host memory, whatever the size of the leaf. Devices that hold the same slice share one
    read.

    Args:
      forget: for files whose slices are cut from rows that `reader` keeps: frees those. Then all slices of this process
        are made together, tensor by tensor, so that nothing is fetched twice and one tensor's rows are kept at most.
    """
    if sharding is None:
        return jnp.asarray(plan.read(reader, (slice(None),) * len(plan.shape), dtype))
    holders: dict[tuple[tuple[int, ...], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(plan.shape).items():
        key = tuple(s.indices(n)[:2] for s, n in zip(index or (), plan.shape, strict=True))
        holders.setdefault(key, []).append(device)
    slices = [tuple(slice(*bounds) for bounds in key) for key in holders]
    if forget is None:
        parts = (plan.read(reader, index, dtype) for index in slices)
    else:
        parts = iter(plan.read_parts(reader, slices, dtype, forget))
    shards: list[jax.Array] = []
    for devices, part in zip(holders.values(), parts, strict=True):
        # Waited for: a copy that is still under way holds its memory, and the next slice would come on top.
        shards += jax.block_until_ready([jax.device_put(part, device) for device in devices])
    return jax.make_array_from_single_device_arrays(plan.shape, sharding, shards)


def load_params(
    source_dir: epath.PathLike, cfg: ModelConfig, *, dtype: Any = jnp.float32, shardings: Any = None
) -> dict[str, Any]:
    """Reads the weights of a folder in Hugging Face layout into a parameter tree.

    Args:
      source_dir: folder (local or `gs://`) with `model.safetensors`, or an index and the files it names.
      cfg: the model's; its `lora` is ignored (checkpoints hold merged weights).
      dtype: of the parameters, whatever the files hold (float16, bfloat16, float32, float64).
      shardings: the tree's shardings (a tree of the same form); None: the default device.

    Raises:
      WeightsError: a missing, cut short or malformed file; missing, unknown or misshapen tensors.
    """
    checkpoint = Checkpoint(source_dir)
    reader = checkpoint.reader(cfg)
    flat_shardings = {} if shardings is None else names.flatten(shardings)
    forget = None if all(is_local(file.path) for file in checkpoint.files) else checkpoint.forget
    flat: dict[Path, jax.Array] = {}
    for path, plan in names.plans(cfg).items():
        sharding = None if shardings is None else flat_shardings[path]
        flat[path] = place(plan, reader, np.dtype(dtype), sharding, forget)
        checkpoint.forget()
    logger.info("read %.1f MB of weights from %s", checkpoint.bytes_read / 1e6, source_dir)
    return names.unflatten(flat)


# ---- out -------------------------------------------------------------------------------------------------------


def _host(value: Any) -> np.ndarray:
    """The whole array on this host. On several hosts it is a collective that every process must enter."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


def part_on_host(array: Any, place: tuple[int, ...]) -> np.ndarray:
    """`array[place]` on this host: one layer of a stacked leaf, one expert of a layer, or one row of a table. No more
    than that leaves the devices, and one compiled program serves all places. On several hosts all must enter it."""
    if not isinstance(array, jax.Array) or not place:
        return _host(array[place])
    sharding = array.sharding
    if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
        # An index into a split axis has no type on a mesh of explicit axes. The same arrays, with automatic ones:
        mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
        array = jax.device_put(array, NamedSharding(mesh, sharding.spec))
    return _host(_at(array, np.asarray(place, np.int32)))


@jax.jit
def _at(array: jax.Array, place: jax.Array) -> jax.Array:
    for axis in range(place.shape[0]):
        array = jax.lax.dynamic_index_in_dim(array, place[axis], keepdims=False)
    return array


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Tensors in order, cut into files of at most `limit` bytes (a larger tensor gets a file of its own)."""
    groups: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if groups[-1] and total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return groups


def _remove_unfinished(folder: epath.Path) -> None:
    for pattern in (".model*.tmp", ".config.json.tmp"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _space(folder: epath.Path) -> Generator[None]:
    """Turns a failed write into a message that says where and what to do; removes the unfinished files."""
    try:
        yield
    except OSError as error:
        _remove_unfinished(folder)
        raise OSError(
            error.errno,
            f"cannot write the weights to {folder}: {error.strerror or error}. Free space or choose another folder; "
            "a checkpoint that was there before is untouched",
        ) from error


def write_folder(
    directory: epath.PathLike,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    value: Callable[[str], np.ndarray],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    everywhere: bool = False,
) -> None:
    """Writes config.json and the tensors of a model, in order, each made by `value(name)` when its turn comes.

    Files are written under temporary names and renamed when all are complete. On several hosts every process calls
    `value` for every tensor (it may be a collective); process 0 writes, or with `everywhere` each, a folder of its own.
    """
    folder = epath.Path(directory)
    unknown = {str(dtype) for _, dtype in shapes.values()} - {str(dtype) for dtype in DTYPES.values()}
    if unknown:
        raise WeightsError(
            f"{folder}: weights of type {', '.join(unknown)} cannot be written; choose float32, float16 or bfloat16"
        )
    if jax.process_index() != 0 and not everywhere:
        for name in shapes:
            value(name)
        return
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in shapes.items()}
    groups = _shards(sizes, max_shard_bytes)
    total = len(groups)
    files = (
        [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)] if total > 1 else [SINGLE]
    )
    texts = {"config.json": config}
    if total > 1:
        weight_map = {name: file for file, group in zip(files, groups) for name in group}
        texts[INDEX] = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    with _space(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file, group in zip(files, groups):
            own = {name: shapes[name] for name in group}
            write_file(folder / f".{file}.tmp", own, ((name, value(name)) for name in group))
        for file, content in texts.items():
            (folder / f".{file}.tmp").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        for file in (*files, *texts):
            (folder / f".{file}.tmp").replace(folder / file)
    _remove_unfinished(folder)  # of a save that was killed
    kept = {*files, *texts}
    for pattern in ("model*.safetensors", INDEX):
        for path in folder.glob(pattern):
            if path.name not in kept:  # of an earlier checkpoint cut into other files
                path.unlink()


def save_params(
    directory: epath.PathLike,
    params: Mapping[str, Any],
    cfg: ModelConfig,
    *,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes config.json and safetensors that `transformers` loads; adapters are merged into the weights.

    One tensor at a time is gathered to the host. Files get their names when all are complete, so that an
    interrupted save leaves an earlier checkpoint as it was. On several hosts every process calls this; process 0
    writes.

    Args:
      dtype: of the files (float32, float16, bfloat16); None keeps the parameters'.
      max_shard_bytes: above it, several files and an index are written.

    Raises:
      OSError: the folder cannot be written (disk full, no permission); says where.
    """
    from laif_jax.models.config import to_hf

    want = None if dtype is None else np.dtype(dtype)
    if cfg.lora is not None:
        from laif_jax.models.lora import merge_lora

        params = merge_lora(params, cfg, dtype=want)
    flat = names.flatten(params)

    def dtype_of(parts: list[tuple[LeafPlan, int]]) -> np.dtype:
        return want or np.dtype(flat[parts[0][0].path].dtype)

    def value(parts: list[tuple[LeafPlan, int]]) -> np.ndarray:
        def leaf(plan: LeafPlan, number: int) -> np.ndarray:
            return part_on_host(flat[plan.path], plan.place(number))

        return names.tensor_value(parts, leaf).astype(dtype_of(parts), copy=False)

    table = dict(sorted(names.tensors(cfg).items()))
    shapes = {name: (parts[0][0].tensor_shape, dtype_of(parts)) for name, parts in table.items()}
    config = {**to_hf(cfg), "dtype": str(dtype_of(table[next(iter(table))]))}
    write_folder(directory, config, shapes, lambda name: value(table[name]), max_shard_bytes=max_shard_bytes)
