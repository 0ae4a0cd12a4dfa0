"""A reward model trained with adapters, as a view of base weights that are in memory anyway (the policy's)."""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from laif_jax.config.schema import LoraSpec
from laif_jax.models import names
from laif_jax.models.arch import ModelConfig
from laif_jax.models.decoder import Params
from laif_jax.models.reward import ADAPTERS, FORMAT, RewardModel
from laif_jax.models.safetensors import DTYPES, SafetensorsFile, write_file
from laif_jax.models.weights import WeightsError, part_on_host
from laif_jax.parallel.distributed import gather_to_host

_TENSORS, _ABOUT = "adapters.safetensors", "adapters.json"
_ROWS = ("embed", "rows")


@dataclasses.dataclass(frozen=True, eq=False)
class RewardAdapters:
    """What a reward model has beside its base.

    Attributes:
      lora: of the adapters. members: K; above 1, every leaf of `tree` has a leading axis [K].
      tree: the leaves "lora_a", "lora_b" and the scalar head, float32, at their paths.
      base: `base_fingerprint` of the weights that they belong to.
      rows: {token id: its embedding [D]} of tokens that the base does not have.
    """

    lora: LoraSpec
    members: int
    tree: Params
    base: str
    rows: dict[int, np.ndarray]

    def fits(self, params: Params) -> bool:
        """Whether they were trained over these weights (a language model's, with or without adapters of its own)."""
        return base_fingerprint(params) == self.base

    def over(self, params: Params, cfg: ModelConfig) -> tuple[ModelConfig, dict[str, Any]]:
        """(configuration, parameters) of the reward model over base weights, which are shared, not copied (but for the
        embedding, if the reward model has tokens of its own). Traceable; ask `fits` first.

        Args:
          params, cfg: of the language model; adapters of its own are left out.
        """
        table = params["embed"]["embedding"]
        size = max((cfg.vocab_size, *(token + 1 for token in self.rows)))
        if self.rows:
            table = jnp.pad(table, ((0, size - table.shape[0]), (0, 0)))
            values = jnp.asarray(np.stack(list(self.rows.values())), table.dtype)
            table = table.at[jnp.asarray(list(self.rows))].set(values)
        flat = {path: leaf for path, leaf in names.flatten(params).items() if _of_trunk(path)}
        flat |= {("embed", "embedding"): table} | names.flatten(self.tree)
        new = dataclasses.replace(cfg, head="score", lora=self.lora, vocab_size=size)
        return new, names.unflatten(flat)


def _of_trunk(path: names.Path) -> bool:
    """Whether a leaf belongs to what models of one base share: all but embedding, heads and adapters."""
    return path[0] in ("layers", "final_norm") and not path[-1].startswith("lora_")


def base_fingerprint(params: Params) -> str:
    """SHA-256 of a model's blocks and final norm, rounded to bfloat16 (as adapters' frozen base may be), without
    adapters, heads and the embedding (which a reward model's own tokens extend)."""
    digest = hashlib.sha256()
    for path, leaf in sorted(names.flatten(params).items()):
        if not _of_trunk(path):
            continue
        digest.update(f"{'/'.join(path)}{leaf.shape}".encode())
        for i in (
            range(leaf.shape[0]) if path[0] == "layers" else (...,)
        ):  # a whole leaf is too much for a host
            part = np.asarray(gather_to_host(leaf[i])).astype(jnp.bfloat16)
            digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    return digest.hexdigest()


def save_adapters(folder: epath.PathLike, model: RewardModel) -> None:
    """Writes the adapters and scalar heads of a reward model whose base was frozen."""
    root = epath.Path(folder)
    assert model.cfg.lora is not None
    flat = names.flatten(model.params)
    base = base_fingerprint(model.params)
    parts: dict[str, np.ndarray] = {}
    for path, leaf in sorted(flat.items()):
        if path[0] == "score" or path[-1].startswith("lora_"):
            parts["/".join(path)] = np.asarray(gather_to_host(leaf), np.float32)
    rows = [model.end_of_context] if model.end_of_context in model.added else []
    if rows:
        # Row by row: the table of a large vocabulary is gigabytes.
        table = [part_on_host(flat["embed", "embedding"], (row,)) for row in rows]
        parts["/".join(_ROWS)] = np.asarray(table, np.float32)
    if jax.process_index() != 0:
        return
    root.mkdir(parents=True, exist_ok=True)
    about = {
        "format": FORMAT,
        "members": model.members,
        "base": base,
        "rows": rows,
        "lora": model.cfg.lora.resolved(),
    }
    shapes = {name: (value.shape, value.dtype) for name, value in parts.items()}
    write_file(root / f".{_TENSORS}.tmp", shapes, iter(parts.items()))
    (root / f".{_ABOUT}.tmp").write_text(json.dumps(about, indent=2) + "\n")
    for name in (_TENSORS, _ABOUT):
        (root / f".{name}.tmp").replace(root / name)


def load_reward_adapters(folder: epath.PathLike) -> RewardAdapters | None:
    """The adapters of a reward model's folder; None where it was trained without.

    Raises:
      WeightsError: they are malformed; says what to do.
    """
    root = epath.Path(folder) / ADAPTERS
    if not (root / _ABOUT).exists():
        return None
    try:
        about = json.loads((root / _ABOUT).read_text())
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}, this version reads {FORMAT}")
        lora, members, base = LoraSpec(**about["lora"]), int(about["members"]), str(about["base"])
        ids = [int(token) for token in about["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{root / _ABOUT}: not a reward model's adapters ({error!r}). Copy it again."
        ) from error
    file = SafetensorsFile(root / _TENSORS)
    flat: dict[names.Path, Any] = {}
    for name, entry in file.entries.items():
        whole = (slice(None),) * len(entry.shape)
        flat[tuple(name.split("/"))] = np.array(file.read(name, entry.shape, whole), DTYPES["F32"])
    rows = flat.pop(_ROWS, np.zeros((0, 0), np.float32))
    if len(rows) != len(ids):
        raise WeightsError(f"{root}: {len(ids)} tokens but {len(rows)} embeddings. Copy the folder again.")
    tree = jax.tree.map(jnp.asarray, names.unflatten(flat))
    return RewardAdapters(lora, members, tree, base, dict(zip(ids, rows)))
