"""Any model source into a folder in Hugging Face layout."""

from typing import Any

import jax
import numpy as np
from etils import epath

from laif_jax.models import names
from laif_jax.models.config import to_hf
from laif_jax.models.gguf import GGUFFile
from laif_jax.models.model import load_config, matching_tokenizer, resolve
from laif_jax.models.reward import is_reward_model, load_reward_model, save_reward_model
from laif_jax.models.tokenizer import load_tokenizer, save_tokenizer
from laif_jax.models.weights import MAX_SHARD_BYTES, Checkpoint, write_folder


def convert(
    source: str,
    dest: epath.PathLike,
    dtype: Any = np.float32,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    everywhere: bool = False,
) -> epath.Path:
    """Converts a model (folder, `.gguf`, known name, Hub id), or a reward model's folder, into `dest`. Returns it.

    A language model is converted one tensor at a time, whatever its size; the weights of a GGUF file are dequantised.

    Args:
      dtype: of the files: float32, float16 or bfloat16.
      everywhere: of several processes each converts the model, to a `dest` of its own; else process 0 alone does.

    Raises:
      WeightsError, UnsupportedModelError, TokenizerError, FetchError, OSError: say what, where and what to do.
    """
    path = resolve(source)
    dest = epath.Path(dest)
    if path.endswith(".gguf"):
        _convert_gguf(GGUFFile(path), dest, np.dtype(dtype), max_shard_bytes, everywhere)
    elif is_reward_model(path) or load_config(path).head == "score":
        save_reward_model(dest, load_reward_model(path, dtype=dtype), dtype=dtype)
    else:
        _convert_folder(path, dest, np.dtype(dtype), max_shard_bytes, everywhere)
    return dest


def _convert_folder(
    source: str, dest: epath.Path, dtype: np.dtype, max_shard_bytes: int, everywhere: bool
) -> None:
    cfg, checkpoint = load_config(source), Checkpoint(source)
    reader = checkpoint.reader(cfg)
    tokenizer = matching_tokenizer(load_tokenizer(source), cfg, source)
    if jax.process_index() != 0 and not everywhere:
        return
    save_tokenizer(dest, tokenizer)
    shapes = {name: parts[0][0].tensor_shape for name, parts in sorted(names.tensors(cfg).items())}

    def value(name: str) -> np.ndarray:
        checkpoint.forget()
        return reader(name, shapes[name], (slice(None),) * len(shapes[name])).astype(dtype)

    write_folder(
        dest,
        {**to_hf(cfg), "dtype": str(dtype)},
        {name: (shape, dtype) for name, shape in shapes.items()},
        value,
        max_shard_bytes=max_shard_bytes,
        everywhere=everywhere,
    )


def _convert_gguf(
    file: GGUFFile, dest: epath.Path, dtype: np.dtype, max_shard_bytes: int, everywhere: bool
) -> None:
    cfg = file.config()
    shapes = file.shapes()
    names.check(cfg, shapes, str(file.path))
    if jax.process_index() != 0 and not everywhere:
        return
    save_tokenizer(dest, file.tokenizer())
    described = {name: (shapes[name], dtype) for name in sorted(shapes)}
    config = {**to_hf(cfg), "dtype": str(dtype)}
    write_folder(
        dest,
        config,
        described,
        lambda name: file.tensor(name).astype(dtype),
        max_shard_bytes=max_shard_bytes,
        everywhere=everywhere,
    )
