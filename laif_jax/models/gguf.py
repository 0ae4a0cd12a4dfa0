"""GGUF in: llama.cpp's files of Llama, Qwen2 and Gemma 3 models, any quantisation, as float weights.

A GGUF file differs from a Hugging Face checkpoint in three ways that are undone here: tensor names; the rows of
Llama's query and key projections, which are permuted for interleaved rotary embeddings; Gemma's norm weights, which
already include the 1 that the module adds.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
from etils import epath
from transformers import PreTrainedTokenizerFast

from laif_jax.models import names
from laif_jax.models.arch import ModelConfig, UnsupportedModelError
from laif_jax.models.config import from_hf
from laif_jax.models.gguf_tokenizer import build_tokenizer
from laif_jax.models.names import Slices, WeightsError
from laif_jax.models.weights import place

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_COMPUTED = re.compile(r"^(rope_freqs|blk\.\d+\.attn_rot_embd)\.weight$")  # not learned
_TYPES = {"llama": "llama", "qwen2": "qwen2", "gemma3": "gemma3_text"}
# Tokens that end a turn; they stop generation too if the model's chat template writes them.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")


def hf_name(name: str, architecture: str) -> str:
    """The Hugging Face name of a GGUF tensor; a name that no table holds stays as it is."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match is None or match[2] not in _BLOCK:
        return name
    part = _BLOCK[match[2]]
    if match[2] == "ffn_norm" and architecture == "gemma3":
        part = "pre_feedforward_layernorm"
    return f"model.layers.{match[1]}.{part}.{kind}"


def unpermute(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection [heads * H, ...] (or its bias) from interleaved pairs to halves."""
    split = value.reshape(heads, -1, 2, *value.shape[1:])  # [heads, H/2, 2, ...]
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(value.shape)


def _span(bounds: tuple[int, ...], width: int) -> slice:
    return slice(bounds[0] * width, bounds[1] * width)


class GGUFFile:
    """An opened GGUF file.

    Raises:
      WeightsError: no such file, or one that is cut short or no GGUF.
      UnsupportedModelError: another architecture than Llama, Qwen2 and Gemma 3.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        if not self.path.exists():
            raise WeightsError(f"{self.path}: no such file. Check the path.")
        with self.path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise WeightsError(f"{self.path}: not a GGUF file. Copy or download it again.")
        try:
            reader = gguf.GGUFReader(str(self.path))
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
            self._fields = reader.fields
        except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
            raise WeightsError(
                f"{self.path}: the GGUF file is cut short or malformed: it has {self.path.stat().length} bytes, and "
                f"reading it failed ({error}). Copy or download it again."
            ) from error
        self.architecture = str(self.value("general.architecture", ""))
        if self.architecture not in _TYPES:
            raise UnsupportedModelError(
                f"{self.path}: GGUF architecture {self.architecture!r} is not supported; "
                f"supported: {', '.join(_TYPES)}"
            )
        self._names = {
            hf_name(name, self.architecture): name for name in self._tensors if not _COMPUTED.match(name)
        }

    # ---- metadata ----------------------------------------------------------------------------------------------

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value as plain Python, `default` where it is absent."""
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def own(self, key: str, default: Any = None) -> Any:
        """A value under the architecture's prefix."""
        value = self.value(f"{self.architecture}.{key}", default)
        if isinstance(value, float):  # stored as float32: 1e-5, not 9.999999747378752e-06
            return float(str(np.float32(value)))
        return value

    def _required(self, key: str) -> Any:
        value = self.own(key)
        if value is None:
            raise WeightsError(
                f"{self.path}: the metadata lacks {self.architecture}.{key}. The file was written by an incomplete "
                "converter; use another one."
            )
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedModelError(f"{self.path}: layers of unlike {key} are not supported: {value}")
            return value[0]
        return value

    def config(self) -> ModelConfig:
        """The model's configuration.

        Raises:
          WeightsError: metadata that is missing. UnsupportedModelError: maths that the decoder does not have.
        """
        return from_hf(self.hf_config())

    def hf_config(self) -> dict[str, Any]:
        """The metadata as a Hugging Face `config.json`."""
        for key in ("expert_count", "rope.scaling.attn_factor", "attention.clamp_kqv"):
            if self.own(key):
                raise UnsupportedModelError(f"{self.path}: {self.architecture}.{key} is not supported")
        if "token_embd.weight" not in self._tensors:
            raise WeightsError(
                f"{self.path}: has no token_embd.weight. Is it a file of weights? Copy it again."
            )
        heads, hidden = self._required("attention.head_count"), self._required("embedding_length")
        head_dim = self.own("attention.key_length") or self.own("rope.dimension_count") or hidden // heads
        if self.own("rope.dimension_count", head_dim) != head_dim:
            raise UnsupportedModelError(
                f"{self.path}: partial rotary embedding in a {self.architecture} model"
            )
        fields = {
            "model_type": _TYPES[self.architecture],
            "vocab_size": int(self._tensors["token_embd.weight"].shape[1]),
            "hidden_size": hidden,
            "intermediate_size": self._required("feed_forward_length"),
            "num_hidden_layers": self._required("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.own("attention.head_count_kv")
            and self._required("attention.head_count_kv"),
            "max_position_embeddings": self._required("context_length"),
            "rms_norm_eps": self._required("attention.layer_norm_rms_epsilon"),
            "rope_theta": self.own("rope.freq_base", 1e6 if self.architecture == "gemma3" else 10000.0),
            "rope_scaling": self._rope_scaling(head_dim),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "bos_token_id": self.value("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._eos_ids(),
            "pad_token_id": self.value("tokenizer.ggml.padding_token_id"),
        }
        if self.architecture == "qwen2":
            if head_dim * heads != hidden:
                raise UnsupportedModelError(
                    f"{self.path}: a qwen2 model with head_dim {head_dim} x {heads} heads"
                )
            return fields
        fields["head_dim"] = head_dim
        if self.architecture == "gemma3":
            return fields | self._gemma_fields(head_dim)
        return fields | {"attention_bias": "blk.0.attn_q.bias" in self._tensors}

    def _gemma_fields(self, head_dim: int) -> dict[str, Any]:
        layers = self._required("block_count")
        pattern = self.own("attention.sliding_window_pattern", 6)
        if isinstance(pattern, list):
            local = [bool(flag) for flag in pattern[:layers]]
        else:
            local = [bool((i + 1) % pattern) for i in range(layers)]
        hidden, heads = self._required("embedding_length"), self._required("attention.head_count")
        return {
            "sliding_window": self._required("attention.sliding_window"),
            "layer_types": ["sliding_attention" if flag else "full_attention" for flag in local],
            "rope_local_base_freq": self.own("rope.freq_base_swa", 10000.0),
            # The 27B model, told by its 62 layers, is the one whose scale is not its head size (as in llama.cpp).
            "query_pre_attn_scalar": hidden // heads if layers == 62 else head_dim,
            "final_logit_softcapping": self.own("final_logit_softcapping"),
        }

    def _rope_scaling(self, head_dim: int) -> dict[str, Any] | None:
        if "rope_freqs.weight" in self._tensors:
            return self._llama3_scaling(head_dim)
        kind, factor = self.own("rope.scaling.type", "none"), self.own("rope.scaling.factor", 1.0)
        if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
            return None
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        original = self.own("rope.scaling.original_context_length")
        if kind == "yarn" and original:
            return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        raise UnsupportedModelError(f"{self.path}: rope scaling {kind!r} of a GGUF file is not supported")

    def _llama3_scaling(self, head_dim: int) -> dict[str, Any]:
        """Llama 3.1+ files hold only the resulting divisors of each frequency; finds the settings they come from."""
        divisors = self._dequantized("rope_freqs.weight").astype(np.float64).reshape(-1)
        factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
        theta = self.own("rope.freq_base", 10000.0)
        wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
        smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
        want = 1.0 / ((1 - smooth) / factor + smooth)
        if divisors.shape != want.shape or not np.allclose(divisors, want, rtol=1e-3):
            raise UnsupportedModelError(
                f"{self.path}: rope_freqs.weight is not what Llama 3's scaling (low 1, high 4, original context 8192) "
                "gives; convert the model from its Hugging Face checkpoint instead"
            )
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }

    def _eos_ids(self) -> list[int]:
        ids = [self.value(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
        tokens = self.value("tokenizer.ggml.tokens", [])
        template = self.value("tokenizer.chat_template", "")
        for text in _END_OF_TURN:
            if text in template and text in tokens:
                ids.append(tokens.index(text))
        return list(dict.fromkeys(int(i) for i in ids if i is not None))

    # ---- tensors -----------------------------------------------------------------------------------------------

    def _dequantized(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """`tensor[rows, columns]` (of a vector: `tensor[rows]`) as float32, in the order of PyTorch's shapes. Only the
        blocks that hold these are dequantised: blocks lie along the columns."""
        tensor = self._tensors[name]
        shape = [int(n) for n in reversed(tensor.shape)]
        if len(shape) == 1:
            rows, columns, shape = slice(None), rows, [1, *shape]
        block, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        first, last, _ = columns.indices(shape[-1])
        start, stop = first // block, -(-last // block)
        data = tensor.data.view(np.uint8).reshape(shape[0], -1)[rows, start * size : stop * size]
        try:
            value = gguf.quants.dequantize(np.ascontiguousarray(data), tensor.tensor_type)
        except NotImplementedError as error:
            raise WeightsError(
                f"{self.path}: {name} has type {tensor.tensor_type.name}, which cannot be dequantised. "
                "Use a file of another quantisation."
            ) from error
        part = np.asarray(value, np.float32)[:, first - start * block : last - start * block]
        return part if len(tensor.shape) > 1 else part[0]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{Hugging Face name: shape} of the file's weights."""
        return {
            full: tuple(int(n) for n in reversed(self._tensors[name].shape))
            for full, name in self._names.items()
        }

    def _heads(self, name: str) -> int | None:
        """Of a projection whose rows are permuted within each head; None: they are not."""
        if self.architecture != "llama" or not (".q_proj." in name or ".k_proj." in name):
            return None
        heads = self._required("attention.head_count")
        return (self.own("attention.head_count_kv") or heads) if ".k_proj." in name else heads

    def read(self, name: str, factored: tuple[int, ...], index: Slices) -> np.ndarray:
        """`weight.reshape(factored)[index]` of a Hugging Face name, as that checkpoint holds it, as float32.

        Little more than this part is dequantised.
        """
        shape = [int(n) for n in reversed(self._tensors[self._names[name]].shape)]
        bounds = [s.indices(n)[:2] for s, n in zip(index, factored, strict=True)]
        # The first axes are the tensor's rows, the others its columns: cut each along its first one.
        cut = next(i for i in range(1, len(factored) + 1) if math.prod(factored[:i]) == shape[0])
        rows, rest = _span(bounds[0], shape[0] // factored[0]), list(factored)
        columns, taken = slice(None), [0]
        if len(shape) > 1:
            columns, taken = _span(bounds[cut], shape[1] // factored[cut]), [0, cut]
        for axis in taken:
            rest[axis] = bounds[axis][1] - bounds[axis][0]
        heads = self._heads(name)
        value = self._dequantized(self._names[name], rows, columns)
        if heads is not None:
            value = unpermute(value, heads * rest[0] // factored[0])
        if self.architecture == "gemma3" and name.endswith("norm.weight"):
            value = value - 1.0
        whole = tuple(slice(None) if axis in taken else slice(*b) for axis, b in enumerate(bounds))
        return value.reshape(rest)[whole]

    def tensor(self, name: str) -> np.ndarray:
        """The whole weight of a Hugging Face name, see `read`."""
        shape = self.shapes()[name]
        return self.read(name, shape, (slice(None),) * len(shape))

    def params(self, cfg: ModelConfig, *, dtype: Any = jnp.float32, shardings: Any = None) -> dict[str, Any]:
        """The parameter tree; of one leaf at a time, one device's part is in host memory.

        Raises:
          WeightsError: missing tensors, tensors that are no part of the model, or wrong shapes.
        """
        names.check(cfg, self.shapes(), str(self.path))
        flat_shardings = {} if shardings is None else names.flatten(shardings)
        flat = {
            path: place(plan, self.read, np.dtype(dtype), flat_shardings.get(path))
            for path, plan in names.plans(cfg).items()
        }
        return names.unflatten(flat)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of the file's metadata.

        Raises:
          WeightsError: the file has no tokenizer, or one of an unknown kind.
        """
        metadata: Mapping[str, Any] = {
            key: self.value(key) for key in self._fields if key.startswith("tokenizer.")
        }
        return build_tokenizer(metadata, str(self.path), context_length=self.own("context_length"))


def load_gguf(
    path: epath.PathLike, *, dtype: Any = jnp.float32, shardings: Any = None
) -> tuple[ModelConfig, dict[str, Any], PreTrainedTokenizerFast]:
    """(configuration, parameters, tokenizer) of a GGUF file; see `GGUFFile` for what can go wrong."""
    file = GGUFFile(path)
    cfg = file.config()
    return cfg, file.params(cfg, dtype=dtype, shardings=shardings), file.tokenizer()
