"""The one table between Hugging Face tensor names and the parameter tree, in both directions.

A tensor of a checkpoint and a leaf of the tree hold the same numbers in another order. Every leaf has a `LeafPlan`:
which tensors it comes from (one per layer for stacked leaves), how the tensor's shape factors into the leaf's axes,
and in which order. The plan works on *slices*, so that a loader reads no more than the bytes of its shard:

    tensor  --view-->  factored  --take part, transpose-->  leaf[layer]
    q_proj.weight [N*H, D]   ->   [N, H, D]                     ->   [D, N, H]
    query_key_value [N*3*H, D] -> [N, 3, H, D] take 0|1|2       ->   [D, N, H]      (GPT-NeoX)
    o_proj.weight [D, N*H]   ->   [D, N, H]                     ->   [N, H, D]
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from laif_jax.models.arch import ModelConfig
from laif_jax.models.specs import param_specs
from laif_jax.records.errors import LaifError

Path = tuple[str, ...]
Slices = tuple[slice, ...]
#: Reads a slice of a tensor viewed in the factored shape: (tensor name, factored shape, slices) -> array.
Reader = Callable[[str, tuple[int, ...], Slices], np.ndarray]

# ---- the table -------------------------------------------------------------------------------------------------
# Leaf of the tree (joined by "/"; under "layers/" one tensor per layer) -> tensor name. `{l}` is the layer, `{e}` the
# expert.

_LLAMA = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attn_norm/scale": "model.layers.{l}.input_layernorm.weight",
    "layers/attn/q/kernel": "model.layers.{l}.self_attn.q_proj.weight",
    "layers/attn/q/bias": "model.layers.{l}.self_attn.q_proj.bias",
    "layers/attn/k/kernel": "model.layers.{l}.self_attn.k_proj.weight",
    "layers/attn/k/bias": "model.layers.{l}.self_attn.k_proj.bias",
    "layers/attn/v/kernel": "model.layers.{l}.self_attn.v_proj.weight",
    "layers/attn/v/bias": "model.layers.{l}.self_attn.v_proj.bias",
    "layers/attn/o/kernel": "model.layers.{l}.self_attn.o_proj.weight",
    "layers/attn/o/bias": "model.layers.{l}.self_attn.o_proj.bias",
    "layers/attn/q_norm/scale": "model.layers.{l}.self_attn.q_norm.weight",
    "layers/attn/k_norm/scale": "model.layers.{l}.self_attn.k_norm.weight",
    "layers/mlp_norm/scale": "model.layers.{l}.post_attention_layernorm.weight",
    "layers/mlp/gate/kernel": "model.layers.{l}.mlp.gate_proj.weight",
    "layers/mlp/gate/bias": "model.layers.{l}.mlp.gate_proj.bias",
    "layers/mlp/up/kernel": "model.layers.{l}.mlp.up_proj.weight",
    "layers/mlp/up/bias": "model.layers.{l}.mlp.up_proj.bias",
    "layers/mlp/down/kernel": "model.layers.{l}.mlp.down_proj.weight",
    "layers/mlp/down/bias": "model.layers.{l}.mlp.down_proj.bias",
    "final_norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
    "score/kernel": "score.weight",
}
# Gemma 2 and 3 have four norms per block, and "post_attention_layernorm" is another one than Llama's.
_GEMMA = _LLAMA | {
    "layers/post_attn_norm/scale": "model.layers.{l}.post_attention_layernorm.weight",
    "layers/mlp_norm/scale": "model.layers.{l}.pre_feedforward_layernorm.weight",
    "layers/post_mlp_norm/scale": "model.layers.{l}.post_feedforward_layernorm.weight",
}
_NEOX = {
    "embed/embedding": "gpt_neox.embed_in.weight",
    "layers/attn_norm/scale": "gpt_neox.layers.{l}.input_layernorm.weight",
    "layers/attn_norm/bias": "gpt_neox.layers.{l}.input_layernorm.bias",
    "layers/attn/q/kernel": "gpt_neox.layers.{l}.attention.query_key_value.weight",
    "layers/attn/q/bias": "gpt_neox.layers.{l}.attention.query_key_value.bias",
    "layers/attn/k/kernel": "gpt_neox.layers.{l}.attention.query_key_value.weight",
    "layers/attn/k/bias": "gpt_neox.layers.{l}.attention.query_key_value.bias",
    "layers/attn/v/kernel": "gpt_neox.layers.{l}.attention.query_key_value.weight",
    "layers/attn/v/bias": "gpt_neox.layers.{l}.attention.query_key_value.bias",
    "layers/attn/o/kernel": "gpt_neox.layers.{l}.attention.dense.weight",
    "layers/attn/o/bias": "gpt_neox.layers.{l}.attention.dense.bias",
    "layers/mlp_norm/scale": "gpt_neox.layers.{l}.post_attention_layernorm.weight",
    "layers/mlp_norm/bias": "gpt_neox.layers.{l}.post_attention_layernorm.bias",
    "layers/mlp/up/kernel": "gpt_neox.layers.{l}.mlp.dense_h_to_4h.weight",
    "layers/mlp/up/bias": "gpt_neox.layers.{l}.mlp.dense_h_to_4h.bias",
    "layers/mlp/down/kernel": "gpt_neox.layers.{l}.mlp.dense_4h_to_h.weight",
    "layers/mlp/down/bias": "gpt_neox.layers.{l}.mlp.dense_4h_to_h.bias",
    "final_norm/scale": "gpt_neox.final_layer_norm.weight",
    "final_norm/bias": "gpt_neox.final_layer_norm.bias",
    "lm_head/kernel": "embed_out.weight",
    "score/kernel": "score.weight",
}
# One tensor per layer and expert; w1 and w3 read a token, w2 writes it.
_MIXTRAL = {path: name for path, name in _LLAMA.items() if "/mlp/" not in path} | {
    "layers/mlp/router/kernel": "model.layers.{l}.block_sparse_moe.gate.weight",
    "layers/mlp/gate/kernel": "model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight",
    "layers/mlp/up/kernel": "model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight",
    "layers/mlp/down/kernel": "model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight",
}
_TABLES = {
    "mixtral": _MIXTRAL,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt_neox": _NEOX,
}  # the others: _LLAMA
_FUSED = {"q": 0, "k": 1, "v": 2}  # position in GPT-NeoX's query_key_value, interleaved per head

# Buffers that old checkpoints carry and that are computed, not learned.
_HARMLESS = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|rope\.freqs|attention\.(bias|masked_bias|rotary_emb\.inv_freq))$"
)
_SHOWN = 6  # names listed in an error


class WeightsError(LaifError, ValueError):
    """A weight file is missing, cut short, malformed or does not fit the config; says what, where and what to do."""


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """How one leaf of the tree is read from, and written to, checkpoint tensors.

    Attributes:
      path: keys of the leaf. shape: of the leaf.
      names: the tensors, one per index of the leaf's first `stacked` axes (in order, the last axis fastest).
      stacked: 1: the first axis is the layer; 2: layer and expert; 0: one tensor is the whole leaf.
      tensor_shape: shape of each tensor in the checkpoint.
      factored: the tensor's shape split into the leaf's other axes, as it lies in memory.
      part: (axis, index) of `factored` that holds this leaf in a fused tensor, or None.
      order: leaf axis (without the stacked ones) -> axis of `factored` with `part` taken.
    """

    path: Path
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: int
    tensor_shape: tuple[int, ...]
    factored: tuple[int, ...]
    part: tuple[int, int] | None
    order: tuple[int, ...]

    def read(self, reader: Reader, index: Slices, dtype: Any = None) -> np.ndarray:
        """Returns `leaf[index]` (index: one slice of step 1 per axis), reading only what it covers."""
        return self.read_parts(reader, [index], dtype)[0]

    def read_parts(
        self,
        reader: Reader,
        indices: Sequence[Slices],
        dtype: Any = None,
        done: Callable[[], None] = lambda: None,
    ) -> list[np.ndarray]:
        """`leaf[index]` of each index, tensor by tensor: `done()` is called when nothing more is read of one."""
        wanted = [[slice(*s.indices(n)[:2]) for s, n in zip(i, self.shape, strict=True)] for i in indices]
        # Copies: never views of a mapped file.
        if not self.stacked:
            blocks = [self._block(reader, self.names[0], tuple(bounds)) for bounds in wanted]
            parts = [block.astype(dtype or block.dtype) for block in blocks]
            done()
            return parts
        found: list[np.ndarray | None] = [None] * len(wanted)
        for number, name in enumerate(self.names):
            place = self.place(number)
            for part, bounds in enumerate(wanted):
                lead, rest = bounds[: self.stacked], bounds[self.stacked :]
                if not all(s.start <= at < s.stop for s, at in zip(lead, place)):
                    continue
                block, out = self._block(reader, name, tuple(rest)), found[part]
                if out is None:
                    out = np.empty((*(s.stop - s.start for s in lead), *block.shape), dtype or block.dtype)
                elif dtype is None and np.result_type(out, block) != out.dtype:  # layers of unlike dtypes
                    out = out.astype(np.result_type(out, block))
                out[tuple(at - s.start for s, at in zip(lead, place))] = block
                found[part] = out
            done()
        parts = [out for out in found if out is not None]
        if len(parts) < len(wanted):
            raise ValueError(f"{'/'.join(self.path)}: an empty range of layers was asked for")
        return parts

    def place(self, number: int) -> tuple[int, ...]:
        """Where tensor `number` of `names` lies in the leaf: (layer,), (layer, expert), or () for the whole leaf."""
        return (
            tuple(int(i) for i in np.unravel_index(number, self.shape[: self.stacked]))
            if self.stacked
            else ()
        )

    def _block(self, reader: Reader, name: str, index: Slices) -> np.ndarray:
        """One layer's slice in the leaf's axis order."""
        slices: list[slice] = [slice(None)] * len(self.order)
        for axis, place in enumerate(self.order):
            slices[place] = index[axis]
        if self.part is not None:
            axis, which = self.part
            slices.insert(axis, slice(which, which + 1))
        block = reader(name, self.factored, tuple(slices))
        if self.part is not None:
            block = np.squeeze(block, axis=self.part[0])
        return block.transpose(self.order)

    def write(self, out: np.ndarray, value: np.ndarray) -> None:
        """Puts one layer of the leaf, `value`, at its place in `out`, a tensor of `tensor_shape`."""
        target = out.reshape(self.factored)
        if self.part is not None:
            axis, which = self.part
            target = np.moveaxis(target, axis, 0)[which]
        target.transpose(self.order)[...] = value


def _leaf(path: Path, shape: tuple[int, ...], name: str, fused: bool) -> LeafPlan:
    """Plan of one leaf; `name` still has its `{l}` and `{e}`."""
    stacked = ("{l}" in name) + ("{e}" in name)
    own = shape[stacked:]
    dims = len(own)
    if path[-1] != "kernel":  # embedding, norms, biases: the same order
        factored, order = own, tuple(range(dims))
        tensor = own if path[-1] == "embedding" else (math.prod(own),)
    elif path[-2] in ("o", "down"):  # leaf [*in, D], tensor [D, in]
        factored, order = (own[-1], *own[:-1]), (*range(1, dims), 0)
        tensor = (own[-1], math.prod(own[:-1]))
    else:  # leaf [D, *out], tensor [out, D]
        factored, order = (*own[1:], own[0]), (dims - 1, *range(dims - 1))
        tensor = (math.prod(own[1:]), own[0])
    part = None
    if fused and path[-2] in _FUSED:
        part = (1, _FUSED[path[-2]])
        factored = (factored[0], 3, *factored[1:])
        tensor = (3 * tensor[0], *tensor[1:])
    names = tuple(
        name.format(l=layer, e=expert) for layer, expert in np.ndindex(*(*shape[:stacked], 1, 1)[:2])
    )
    return LeafPlan(path, tuple(shape), names, stacked, tensor, factored, part, order)


def flatten(tree: Mapping[str, Any], prefix: Path = ()) -> dict[Path, Any]:
    """{path: leaf} of a nested dict, in its order."""
    flat: dict[Path, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, (*prefix, key))
        else:
            flat[(*prefix, key)] = value
    return flat


def unflatten(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """The nested dict of {path: leaf}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def plans(cfg: ModelConfig) -> dict[Path, LeafPlan]:
    """One `LeafPlan` per leaf of the model's tree, without adapters (checkpoints hold merged weights)."""
    tree = param_specs(dataclasses.replace(cfg, lora=None))
    table, fused = _TABLES.get(cfg.family, _LLAMA), cfg.family == "gpt_neox"
    out = {}
    for path, spec in flatten(tree).items():
        out[path] = _leaf(path, tuple(spec.shape), table["/".join(path)], fused)
    return out


def tensors(cfg: ModelConfig) -> dict[str, list[tuple[LeafPlan, int]]]:
    """{tensor name: [(plan of a leaf in it, its number in `plan.names`)]}: one entry, or q, k, v of a fused tensor."""
    found: dict[str, list[tuple[LeafPlan, int]]] = {}
    for plan in plans(cfg).values():
        for number, name in enumerate(plan.names):
            found.setdefault(name, []).append((plan, number))
    return found


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def canonical_names(cfg: ModelConfig, present: Iterable[str]) -> dict[str, str]:
    """{name in the table: name in the checkpoint}. Checkpoints of the bare decoder leave out its prefix
    ("model." or "gpt_neox."); buffers, and a second copy of tied embeddings, are left out."""
    present = list(present)
    expected = tensors(cfg)
    prefix = plans(cfg)["embed", "embedding"].names[0].split(".")[0] + "."
    bare = not any(name.startswith(prefix) for name in present)
    head = {_LLAMA["lm_head/kernel"], _NEOX["lm_head/kernel"]}
    unprefixed = {*head, _LLAMA["score/kernel"]}
    found = {}
    for name in present:
        full = prefix + name if bare and name not in unprefixed else name
        if full not in expected and (_HARMLESS.search(full) or (cfg.tie_embeddings and full in head)):
            continue
        found[full] = name
    return found


def check(cfg: ModelConfig, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Checks that tensors of these names (as in the table) and shapes are exactly the model's.

    Raises:
      WeightsError: tensors that are missing, not the model's, or of another shape; names them.
    """
    expected = tensors(cfg)
    missing, extra = expected.keys() - shapes.keys(), shapes.keys() - expected.keys()
    problems = []
    if missing:
        problems.append(f"{len(missing)} of the model's tensors are missing: {_some(missing)}")
    if extra:
        problems.append(f"{len(extra)} tensors belong to no part of the model: {_some(extra)}")
    for name in sorted(expected.keys() & shapes.keys()):
        want = expected[name][0][0].tensor_shape
        if tuple(shapes[name]) != want:
            problems.append(f"{name} has shape {tuple(shapes[name])}, the config asks for {want}")
            if len(problems) > _SHOWN:
                break
    if problems:
        raise WeightsError(
            f"{where}: the weights do not fit the config. " + "; ".join(problems) + ". "
            "Check that config.json and the weights come from the same model and that every file was copied."
        )


# ---- whole states, in memory -----------------------------------------------------------------------------------


def from_hf_state(cfg: ModelConfig, state: Mapping[str, np.ndarray], *, dtype: Any = None) -> dict[str, Any]:
    """Builds the parameter tree (NumPy leaves) from a Hugging Face state dict.

    Args:
      state: {tensor name: array}; values are looked up when needed, so a lazy mapping works.
      dtype: of the leaves; None keeps the tensors'.

    Raises:
      WeightsError: missing tensors, tensors that are no part of the model, or wrong shapes.
    """
    names = canonical_names(cfg, state)
    check(cfg, {full: np.shape(state[name]) for full, name in names.items()}, "state dict")

    def reader(name: str, factored: tuple[int, ...], index: Slices) -> np.ndarray:
        return np.asarray(state[names[name]]).reshape(factored)[index]

    return unflatten(
        {
            path: plan.read(reader, (slice(None),) * len(plan.shape), dtype)
            for path, plan in plans(cfg).items()
        }
    )


def tensor_value(
    parts: list[tuple[LeafPlan, int]], leaf: Callable[[LeafPlan, int], np.ndarray]
) -> np.ndarray:
    """One checkpoint tensor from its leaves; `leaf(plan, number)` gives the part of a leaf that lies at
    `plan.place(number)`."""
    out: np.ndarray | None = None
    for plan, number in parts:
        value = np.asarray(leaf(plan, number))
        if out is None:
            out = np.empty(plan.tensor_shape, value.dtype)
        plan.write(out, value)
    if out is None:
        raise ValueError("a tensor is made of at least one leaf")
    return out


def to_hf_state(cfg: ModelConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The Hugging Face state dict of a parameter tree without adapters; the inverse of `from_hf_state`."""
    flat = flatten(params)

    def leaf(plan: LeafPlan, number: int) -> np.ndarray:
        return np.asarray(flat[plan.path])[plan.place(number)]

    return {name: tensor_value(parts, leaf) for name, parts in tensors(cfg).items()}
