"""Where metrics go (JSON lines, TensorBoard, Weights & Biases when asked), and what the hardware could do."""

import importlib
import json
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from laif_jax.parallel import is_main
from laif_jax.records import append_bytes
from laif_jax.records.errors import LaifError

log = logging.getLogger(__name__)

# Dense bfloat16 FLOP/s per JAX device, by the start of `device_kind`; makers' data sheets. A device that is not here
# has no `perf/mfu`.
PEAK_FLOPS = {
    "TPU v3": 61.4e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, or None if unknown. The longest matching name counts."""
    found = [
        name for name in PEAK_FLOPS if device_kind == name or device_kind.startswith((name + " ", name + "-"))
    ]
    return PEAK_FLOPS[max(found, key=len)] if found else None


def flops_per_token(trainable: Any, frozen: Any) -> float:
    """Model FLOPs of training on one token: 6 per trained parameter that multiplies it, 4 per frozen one (no weight
    gradient). The embedding table counts once, as the head. Attention's quadratic part is left out, so `perf/mfu` is a
    lower bound (Chowdhery et al. 2022, appendix B)."""
    names = {jax.tree_util.keystr(path) for tree in (trainable, frozen) for path, _ in _leaves(tree)}
    untied = any("lm_head" in name for name in names)

    def count(tree: Any) -> int:
        return sum(
            x.size for path, x in _leaves(tree) if not (untied and "embedding" in jax.tree_util.keystr(path))
        )

    return 6.0 * count(trainable) + 4.0 * count(frozen)


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


class MetricsError(LaifError, RuntimeError):
    """Metrics cannot be written."""


class MetricsWriter:
    """Writes the metrics of one run, in process 0 only.

    Args:
      directory: of the run; gets `metrics.jsonl` and `tensorboard/`.
      wandb: arguments of `wandb.init` (project, name, ...), or None: Weights & Biases is not even imported.
    """

    def __init__(self, directory: str | epath.Path, wandb: Mapping[str, Any] | None = None):
        self.directory = epath.Path(directory)
        self.path = self.directory / "metrics.jsonl"
        self._wandb_options = wandb
        self._board: Any = None
        self._wandb: Any = None

    def resume(self, step: int) -> list[dict[str, Any]]:
        """Drops what was written after `step` (it will be done again), opens the writers; returns the rows kept."""
        rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        if not is_main():
            return rows
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self.directory / ".metrics.jsonl.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(self.path)
        if self._wandb_options is not None:
            self._wandb = _start_wandb(self._wandb_options, self.directory)
        import tensorboardX

        tensorboardX.record_writer.register_writer_factory("gs", _InBucket)
        folder = str(self.directory / "tensorboard")
        self._board = tensorboardX.SummaryWriter(folder, purge_step=step + 1 if rows else None, flush_secs=30)
        return rows

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Appends the rows of consecutive steps to `metrics.jsonl`, whole lines at once.

        Raises:
          MetricsError: the disk is full, or the folder not writable.
        """
        if is_main() and rows:
            try:
                append_bytes(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())
            except OSError as error:
                raise MetricsError(
                    f"cannot write {self.path}: {error.strerror or error}. Free space or make it writable, then "
                    "start the same command again: it resumes from its last checkpoint"
                ) from error

    def show(self, row: Mapping[str, Any]) -> None:
        """Sends one row, of `row["step"]`, to TensorBoard and Weights & Biases."""
        if self._board is None:
            return
        values = {k: v for k, v in row.items() if k != "step" and v is not None}
        for name, value in values.items():
            self._board.add_scalar(name, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(values, step=row["step"])

    def text(self, name: str, text: str, step: int) -> None:
        """Sends a text, such as a table of samples, to TensorBoard."""
        if self._board is not None:
            self._board.add_text(name, text, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class _InBucket:
    """A TensorBoard file in a bucket, where it is written anew at each flush. (The writer's own needs another client,
    with credentials of its own.)"""

    def __init__(self, path: str):
        self.path = epath.Path(path)
        self.written = bytearray()

    @classmethod
    def open(cls, path: str) -> "_InBucket":
        return cls(path)

    @staticmethod
    def directory_check(path: str) -> None:
        """A bucket has no folders to be made."""

    def write(self, data: bytes) -> None:
        self.written += data

    def flush(self) -> None:
        self.path.write_bytes(bytes(self.written))

    close = flush


def read_metrics(path: str | epath.Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line that a kill cut short is left out. No file: no rows."""
    path = epath.Path(path)
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s, line %d was cut short; it is left out", path, number)
    return rows


def clean(values: Mapping[str, Any]) -> dict[str, float | None]:
    """Numbers fit for JSON: what is not finite becomes None."""
    return {name: float(v) if math.isfinite(v) else None for name, v in values.items()}


def mean_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each metric over the rows that have it; `step`, `num_tokens`, `epoch` are the last row's."""
    out: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if row.get(name) is not None]
        if name in ("step", "num_tokens", "epoch"):
            out[name] = rows[-1].get(name)
        elif values:
            out[name] = sum(values) / len(values)
    return out


def _start_wandb(options: Mapping[str, Any], directory: epath.Path) -> Any:
    try:
        wandb: Any = importlib.import_module("wandb")
    except ImportError as error:
        raise ImportError(
            "metrics were to go to Weights & Biases, which is not installed: pip install 'laif_jax[wandb]'"
        ) from error
    return wandb.init(dir=str(directory), resume="allow", **options)
