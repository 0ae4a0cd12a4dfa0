"""A model as the stages pass it on: configuration, parameters and tokenizer, and the folder that holds all three."""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from transformers import PreTrainedTokenizerFast

from laif_jax.models import fetch, names
from laif_jax.models.arch import Head, ModelConfig
from laif_jax.models.config import from_hf
from laif_jax.models.gguf import GGUFFile
from laif_jax.models.specs import param_specs
from laif_jax.models.tokenizer import load_tokenizer, save_tokenizer
from laif_jax.models.weights import MAX_SHARD_BYTES, WeightsError, load_params, save_params

logger = logging.getLogger(__name__)

#: A tree of shardings, or a function that makes it for a configuration.
Shardings = Mapping[str, Any] | Callable[[ModelConfig], Mapping[str, Any]] | None


@dataclasses.dataclass(frozen=True)
class Model:
    """What a checkpoint holds.

    Attributes:
      cfg: the architecture. params: its parameter tree. tokenizer: a `transformers` fast tokenizer.
    """

    cfg: ModelConfig
    params: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerFast


def load_config(folder: epath.PathLike) -> ModelConfig:
    """Reads config.json of a folder; end-of-sequence ids of generation_config.json are added.

    Raises:
      WeightsError: config.json is missing or malformed.
      UnsupportedModelError: an architecture, or a field, that the decoder does not have.
    """
    path = epath.Path(folder) / "config.json"
    if not path.exists():
        raise WeightsError(
            f"{path}: no such file. A model folder holds config.json beside its weights; check the path."
        )
    cfg = from_hf(_read_object(path))
    generation = epath.Path(folder) / "generation_config.json"
    if not generation.exists():
        return cfg
    # Chat models end turns with tokens that only this file names (Gemma's <end_of_turn>, for example).
    more = _read_object(generation).get("eos_token_id") or []
    more = [more] if isinstance(more, int) else more
    return dataclasses.replace(cfg, eos_ids=tuple(dict.fromkeys((*cfg.eos_ids, *more))))


def _read_object(path: epath.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path}: not valid JSON ({error}). Copy the file again.") from error
    if not isinstance(value, dict):
        raise WeightsError(
            f"{path}: a JSON object is expected, found {type(value).__name__}. Copy the file again."
        )
    return value


def resolve(source: str) -> str:
    """The folder or `.gguf` file that a model source stands for; fetches it if it must.

    Args:
      source: a folder in Hugging Face layout (local or `gs://`), a `.gguf` file, a name that `laif fetch` knows, or a
        Hub id.

    Raises:
      WeightsError: nothing of this name is there. FetchError: it could not be fetched.
    """
    if source.endswith(".gguf") or epath.Path(source).is_dir():
        return source
    if source in fetch.KNOWN:
        result = fetch.fetch(source)
        for line in result.lines:
            logger.info("%s", line)
        return str(result.path)
    if fetch.is_hub_id(source):
        return str(fetch.from_hub(source))
    raise WeightsError(
        f"{source}: no such model: it is not a folder, a .gguf file, a Hub id (owner/name), or one of "
        f"{', '.join(fetch.KNOWN)}. Check the path."
    )


def load_model(
    source: str,
    *,
    dtype: Any = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    shardings: Shardings = None,
    tokenizer: str | None = None,
    head: Head = "lm",
) -> Model:
    """Loads a model, its weights straight into (sharded) arrays.

    Args:
      source: see `resolve`. dtype: of the parameters.
      mesh: parameters are sharded over it by the rules of `laif_jax.parallel`; or give
      shardings: a tree of shardings, or a function from the configuration to one. Neither: the default device.
      tokenizer: see `load_tokenizer`; None: the model's own.
      head: what is wanted; a reward model ("score") is no language model ("lm"), and the other way round.

    Raises:
      WeightsError, UnsupportedModelError, TokenizerError, FetchError: each says what, where and what to do.
    """
    path = resolve(source)
    file = GGUFFile(path) if path.endswith(".gguf") else None
    cfg = load_config(path) if file is None else file.config()
    if cfg.head != head:
        kinds = {"lm": "a language model", "score": "a reward model (a sequence classifier with one label)"}
        raise WeightsError(
            f"{source}: is {kinds[cfg.head]}, and {kinds[head]} is needed here. Check the path."
        )
    if mesh is not None:
        from laif_jax.parallel.rules import param_shardings

        tree = param_shardings(param_specs(cfg), mesh)
    else:
        tree = shardings(cfg) if callable(shardings) else shardings
    if tokenizer is not None:
        text = load_tokenizer(tokenizer)
    else:
        text = load_tokenizer(path) if file is None else file.tokenizer()
    text = matching_tokenizer(text, cfg, source)
    if file is None:
        params = load_params(path, cfg, dtype=dtype, shardings=tree)
    else:
        params = file.params(cfg, dtype=dtype, shardings=tree)
    count = sum(int(np.prod(leaf.shape)) for leaf in names.flatten(params).values())
    logger.info("loaded %s: %s, %.1f M parameters", source, cfg.family, count / 1e6)
    return Model(cfg, params, text)


def matching_tokenizer(
    tokenizer: PreTrainedTokenizerFast, cfg: ModelConfig, source: str
) -> PreTrainedTokenizerFast:
    """The tokenizer, if the model has an embedding for each of its tokens; else a WeightsError."""
    if len(tokenizer) > cfg.vocab_size:
        raise WeightsError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {cfg.vocab_size}. "
            "They do not belong together: give the model's own tokenizer."
        )
    return tokenizer


def save_model(
    directory: epath.PathLike, model: Model, *, dtype: Any = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Path | epath.Path:
    """Writes a folder in Hugging Face layout: tokenizer files, then weights and config.json. Returns the folder.

    Adapters are merged. On several hosts every process calls this; process 0 writes.

    Raises:
      OSError: the folder cannot be written; an earlier checkpoint in it is untouched.
    """
    if jax.process_index() == 0:
        save_tokenizer(directory, model.tokenizer)
    save_params(directory, model.params, model.cfg, dtype=dtype, max_shard_bytes=max_shard_bytes)
    return epath.Path(directory)
