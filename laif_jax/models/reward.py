"""Reward models: a decoder with one scalar instead of a vocabulary, alone or as an ensemble, and its folder.

An ensemble's members share their architecture and lie stacked: every leaf that members have of their own has a leading
axis [K], and a leaf that they share (the frozen base under adapters) has none.

A folder of one member is what `transformers` loads as `AutoModelForSequenceClassification` with one label, and
`reward.json` beside it; of K members, `reward.json` over `member-0/` ... `member-(K-1)/`, each such a folder. With
adapters, which are merged there, `adapters/` holds them apart (`laif_jax.models.reward_adapters`).
"""

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
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from laif_jax.config.rl import RewardSpec
from laif_jax.models import attention
from laif_jax.models.arch import Head, ModelConfig, UnsupportedModelError
from laif_jax.models.decoder import Params, Remat, hidden_and_load, init_tree
from laif_jax.models.heads import segment_scores
from laif_jax.models.lora import add_lora, merge_lora
from laif_jax.models.model import Model, load_model, save_model
from laif_jax.models.moe import RouterLoad
from laif_jax.models.specs import ParamSpec, Specs, param_specs
from laif_jax.models.tokenizer import with_pad, with_token
from laif_jax.models.weights import WeightsError
from laif_jax.parallel.distributed import gather_to_host
from laif_jax.parallel.rules import param_shardings

logger = logging.getLogger(__name__)

REWARD_FILE = "reward.json"
ADAPTERS = "adapters"
FORMAT = 1
_VOCAB_MULTIPLE = 64  # a vocabulary that grows stays divisible over the tensor axis


@dataclasses.dataclass(frozen=True, eq=False)
class RewardModel:
    """What a reward model's folder holds.

    Attributes:
      cfg: with `head="score"`. params: its tree; members' own leaves have a leading axis [K] if K = `members` > 1.
      tokenizer: of the sequences that it scores, with a padding token that ends no sequence.
      end_of_context: the token appended to a sequence, at which its score is read; None: read at the last token.
      mean, std: of the scores on training pairs.
      template: that the conversations were written in. max_length, max_prompt_length: that they were cut to, with the
        end of context; None: not known.
      added: tokens that the policy's tokenizer does not have.
    """

    cfg: ModelConfig
    params: Params
    tokenizer: PreTrainedTokenizerFast
    members: int = 1
    end_of_context: int | None = None
    mean: float = 0.0
    std: float = 1.0
    template: str = "model"
    max_length: int | None = None
    max_prompt_length: int | None = None
    added: tuple[int, ...] = ()


# ---- forward ---------------------------------------------------------------------------------------------------


def reward_scores(
    params: Params,
    cfg: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    *,
    members: int = 1,
    max_segments: int = 1,
    prefix: jax.Array | None = None,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
) -> jax.Array:
    """The score of each segment, at its last real token.

    Args:
      params: see the head of this module. tokens, positions, segment_ids: int32 [R, T]; segment 0 is padding.
      members: K, static. max_segments: S, static, a bound on the segments of a row. dtype: of compute.
      prefix: of rows in which pairs share their prompt, see `hidden_and_load`.

    Returns:
      float32 [R, S], or [K, R, S] if K > 1; 0 where a row has no such segment.
    """
    options: dict[str, Any] = {
        "members": members,
        "max_segments": max_segments,
        "prefix": prefix,
        "dtype": dtype,
        "remat": remat,
    }
    return reward_scores_and_load(params, cfg, tokens, positions, segment_ids, **options)[0]


def reward_scores_and_load(
    params: Params,
    cfg: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    *,
    members: int,
    max_segments: int,
    dtype: Any,
    remat: Remat,
    prefix: jax.Array | None = None,
) -> tuple[jax.Array, RouterLoad | None]:
    """`reward_scores`, and the load of the experts (with a leading [K] if K > 1), None without experts."""

    def one(params: Params) -> tuple[jax.Array, RouterLoad | None]:
        hidden, load = hidden_and_load(
            params, cfg, tokens, positions, segment_ids, prefix=prefix, dtype=dtype, remat=remat
        )
        return segment_scores(params, cfg, hidden, segment_ids, max_segments), load

    return for_members(one, params, cfg, members)


def for_members(
    run: Callable[[Params], Any], params: Params, cfg: ModelConfig, members: int, axis: Any = 0
) -> Any:
    """`run(params)` of each member, vectorised; results are stacked along `axis`. One member: a plain call."""
    if members == 1:
        return run(params)
    if cfg.num_experts:  # a ragged product is not vectorised over weights that members share
        each = [run(member(params, cfg, k)) for k in range(members)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *each)
    with attention.not_fused():
        return jax.vmap(run, in_axes=(member_axes(params, cfg),), out_axes=axis)(params)


def member_axes(params: Params, cfg: ModelConfig) -> Any:
    """The tree of `params` with 0 where members have leaves of their own, and None where they share one."""
    return jax.tree.map(
        lambda leaf, spec: 0 if leaf.ndim > len(spec.shape) else None, dict(params), param_specs(cfg)
    )


def member(params: Params, cfg: ModelConfig, index: int) -> dict[str, Any]:
    """The parameters of one member of an ensemble."""
    return jax.tree.map(
        lambda leaf, spec: leaf[index] if leaf.ndim > len(spec.shape) else leaf,
        dict(params),
        param_specs(cfg),
    )


def reward_specs(cfg: ModelConfig, members: int = 1) -> Specs:
    """The specs of a reward model's tree, for shardings: `param_specs` with the members' axis."""
    specs = param_specs(cfg)
    if members == 1:
        return specs

    def one(path: tuple[Any, ...], spec: ParamSpec) -> ParamSpec:
        if not _own(cfg, path):
            return spec
        return dataclasses.replace(
            spec, shape=(members, *spec.shape), logical_axes=(None, *spec.logical_axes)
        )

    return jax.tree_util.tree_map_with_path(one, specs)


def _own(cfg: ModelConfig, path: tuple[Any, ...]) -> bool:
    """Whether members have a leaf of their own there: all that is trained."""
    return cfg.lora is None or path[0].key == "score" or path[-1].key.startswith("lora_")


# ---- a reward model to train -----------------------------------------------------------------------------------


def change_head(
    cfg: ModelConfig, params: Params, head: Head, *, key: jax.Array | None = None, mesh: Mesh | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """The same trunk under another head; leaves that both have are shared, not copied.

    Args:
      key: for a scalar head that is not there yet. mesh: where it is born; None: the default device.

    Raises:
      ValueError: a vocabulary head is wanted where there is none, or a scalar one without a key.
    """
    new = dataclasses.replace(cfg, head=head)
    specs = param_specs(new)
    if cfg.head == "score" and head != "score":
        raise ValueError("a reward model has no vocabulary head: start from a language model")
    out = {name: tree for name, tree in params.items() if name in specs}
    if "score" in specs and "score" not in out:
        if key is None:
            raise ValueError("a new scalar head is drawn at random: give a `key`")
        part = {"score": specs["score"]}
        out |= init_tree(part, key, shardings=None if mesh is None else param_shardings(part, mesh))
    return new, out


def start_reward_model(
    model: Model, spec: RewardSpec, key: jax.Array, *, mesh: Mesh | None = None, template: str = "model"
) -> RewardModel:
    """A reward model to train, from a policy, a base model or (one member alone) a reward model.

    The vocabulary head goes, a scalar head comes: one per member, each with weights N(0, 1 / (D + 1)); with adapters
    (`model.cfg.lora`) also fresh adapters per member, over one base. A tokenizer without the end-of-context token, or
    without a padding token that ends no sequence, gets one; its embedding is the mean of all others.

    Args:
      spec: its `members`, `end_of_context` and lengths. mesh: of the parameters, if they are on one.

    Raises:
      ValueError: `model` holds the members of an ensemble; start from one of them.
    """
    if model.params["embed"]["embedding"].ndim != 2:
        raise ValueError(
            "a reward model starts from one model, not from an ensemble: give the folder of a member"
        )
    tokenizer, end, pad, added = _special_tokens(model, spec)
    cfg = dataclasses.replace(model.cfg, pad_id=pad)
    params = dict(model.params)
    if added:
        cfg, params["embed"] = _grown(cfg, params["embed"], added, mesh)
    keys = [jax.random.fold_in(key, k) for k in range(spec.members)]
    if spec.members > 1:  # with one head they would be one model
        params.pop("score", None)
    parts = [_member(cfg, params, k, mesh) for k in keys]
    new = parts[0][0]
    tree = parts[0][1] if spec.members == 1 else _stack(new, [part for _, part in parts], mesh)
    return RewardModel(
        new,
        tree,
        tokenizer,
        spec.members,
        end,
        template=template,
        max_length=spec.max_length,
        max_prompt_length=spec.max_prompt_length,
        added=added,
    )


def _member(
    cfg: ModelConfig, params: Params, key: jax.Array, mesh: Mesh | None
) -> tuple[ModelConfig, dict[str, Any]]:
    new, tree = change_head(cfg, params, "score", key=key, mesh=mesh)
    if new.lora is not None:
        shardings = None if mesh is None else param_shardings(param_specs(new), mesh)
        tree = add_lora(tree, new, jax.random.fold_in(key, 1), shardings)
    return new, tree


def _stack(cfg: ModelConfig, trees: list[dict[str, Any]], mesh: Mesh | None) -> dict[str, Any]:
    """One tree of several: what members share once, the rest stacked on a new leading axis."""

    def one(path: tuple[Any, ...], *leaves: jax.Array) -> jax.Array:
        return jnp.stack(leaves) if _own(cfg, path) else leaves[0]

    shardings = None if mesh is None else param_shardings(reward_specs(cfg, len(trees)), mesh)
    return jax.jit(lambda *trees: jax.tree_util.tree_map_with_path(one, *trees), out_shardings=shardings)(
        *trees
    )


def _special_tokens(
    model: Model, spec: RewardSpec
) -> tuple[PreTrainedTokenizerFast, int | None, int, tuple[int, ...]]:
    """(tokenizer, end of context, padding, ids that were added)."""
    before, tokenizer, end = len(model.tokenizer), model.tokenizer, None
    if spec.end_of_context is not None:
        tokenizer, end = with_token(tokenizer, spec.end_of_context)
    ends = {*model.cfg.eos_ids, *(() if end is None else (end,))}
    tokenizer, pad = with_pad(tokenizer, ends)
    added = tuple(range(before, len(tokenizer)))
    if added:
        logger.info("tokens added to the tokenizer: %s", tokenizer.convert_ids_to_tokens(list(added)))
    return tokenizer, end, pad, added


def _grown(
    cfg: ModelConfig, embed: Params, added: tuple[int, ...], mesh: Mesh | None
) -> tuple[ModelConfig, dict[str, Any]]:
    """The embedding with rows for new tokens, each the mean of the rows before them."""
    table = embed["embedding"]
    host = np.asarray(gather_to_host(table))
    size = cfg.vocab_size
    if max(added) >= size:
        size = -(-(max(added) + 1) // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    out = np.empty((size, host.shape[1]), host.dtype)
    out[: len(host)] = host
    out[added[0] :] = host[: added[0]].astype(np.float32).mean(axis=0)
    cfg = dataclasses.replace(cfg, vocab_size=size)
    if mesh is None:
        return cfg, {"embedding": jnp.asarray(out)}
    sharding = param_shardings(param_specs(cfg)["embed"], mesh)["embedding"]
    return cfg, {"embedding": jax.make_array_from_callback(out.shape, sharding, lambda index: out[index])}


# ---- in and out ------------------------------------------------------------------------------------------------


def save_reward_model(
    folder: epath.PathLike, model: RewardModel, *, dtype: Any = jnp.float32
) -> Path | epath.Path:
    """Writes a reward model's folder; adapters are merged, and beside that written apart. Returns the folder.

    On several hosts every process calls this; process 0 writes.

    Raises:
      OSError: the folder cannot be written. WeightsError: the padding token may end a sequence, so that `transformers`
        would read the score at another token.
    """
    from laif_jax.models.reward_adapters import save_adapters

    root = epath.Path(folder)
    if model.cfg.pad_id is None or model.cfg.pad_id in {*model.cfg.eos_ids, model.end_of_context}:
        raise WeightsError(
            f"{root}: padding token {model.cfg.pad_id} of the reward model is missing or ends a sequence, and "
            "`transformers` would read scores at another token; train it anew (`laif reward`), which gives it one "
            "that does not"
        )
    for k in range(model.members):
        params = member(model.params, model.cfg, k) if model.members > 1 else model.params
        cfg = model.cfg
        if cfg.lora is not None:
            params, cfg = merge_lora(params, cfg, dtype=dtype), dataclasses.replace(cfg, lora=None)
        save_model(_member_folder(root, model.members, k), Model(cfg, params, model.tokenizer), dtype=dtype)
    if model.cfg.lora is not None:
        save_adapters(root / ADAPTERS, model)
    if jax.process_index() == 0:
        content = {"format": FORMAT} | {name: getattr(model, name) for name in _KEPT}
        temporary = root / f".{REWARD_FILE}.tmp"
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        temporary.replace(root / REWARD_FILE)
    return root


_KEPT = (
    "members",
    "end_of_context",
    "mean",
    "std",
    "template",
    "max_length",
    "max_prompt_length",
    "added",
)


def _member_folder(root: epath.Path, members: int, index: int) -> epath.Path:
    return root if members == 1 else root / f"member-{index}"


def is_reward_model(folder: epath.PathLike) -> bool:
    """Whether the folder was written by `save_reward_model`."""
    return (epath.Path(folder) / REWARD_FILE).exists()


def load_reward_model(
    folder: epath.PathLike, *, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> RewardModel:
    """Reads a reward model's folder, or one that `transformers` wrote of a sequence classifier with one label.

    Args:
      dtype: of the parameters. mesh: they are sharded over it; None: the default device.

    Raises:
      WeightsError, UnsupportedModelError, TokenizerError: say what, where and what to do.
    """
    root = epath.Path(folder)
    kept = _read(root / REWARD_FILE) if is_reward_model(root) else {"members": 1}
    members = kept["members"]
    loaded = [
        load_model(str(_member_folder(root, members, k)), dtype=dtype, mesh=mesh, head="score")
        for k in range(members)
    ]
    first = loaded[0]
    if any(other.cfg != first.cfg for other in loaded):
        raise WeightsError(
            f"{root}: its {members} members are of unlike architectures. Copy the folder again."
        )
    params = first.params
    if members > 1:
        params = _stack(first.cfg, [dict(one.params) for one in loaded], mesh)
    return RewardModel(first.cfg, params, first.tokenizer, **kept)


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        content: Mapping[str, Any] = json.loads(path.read_text())
        version = content["format"]
        kept = {name: content[name] for name in _KEPT}
        kept["added"] = tuple(kept["added"])
        kept["members"] = int(kept["members"])
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: not a reward model's description ({error!r}). Copy it again.") from error
    if version != FORMAT:
        raise UnsupportedModelError(
            f"{path}: format {version!r}, this version reads {FORMAT}; use the version that wrote it"
        )
    return kept
