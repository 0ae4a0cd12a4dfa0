"""Tiny GGUF files of every supported architecture and kind of tokenizer, made as llama.cpp's converter makes them.

Weights come from a frozen random stream, so that the goldens (made by llama.cpp from these very files) stay valid.
"""

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

WORDS = (
    [
        "the",
        " the",
        "in",
        " a",
        "re",
        "hello",
        " hello",
        "Hello",
        " world",
        "wor",
        "don",
        "'t",
        "'T",
        "'re",
        " an",
    ]
    + [
        "12",
        "123",
        "1234",
        " 1",
        "a1",
        "1a",
        "99",
        "\n\n",
        "\n\n\n",
        "  ",
        "   ",
        "    ",
        " \n",
        "\t\t",
        ".\n",
        "!!",
    ]
    + [
        "...",
        "==",
        "+=",
        "é",
        "ü",
        "日本",
        "本語",
        "🎉",
        "x y",
        "e t",
        "lo w",
        "<|",
        "|>",
        "ab",
        "abc",
        " abc",
        "’s",
    ]
)
TEXTS = [
    "Hello world",
    " hello  the   world    end",
    "the theremin in a red 12 123 1234 12345 a1a 99x",
    "don't DON'T we're he’s I'll",
    "tabs\t\there\n\nnew\n\n\nlines  \n  indented\n",
    "ünïcödé naïve 日本語 🎉🎉 кот ½ ²",
    "x += y == z; <|not|> foo...!!\n.\n",
    "",
    " ",
    "\n",
    "trailing space ",
    "<tag>the  <tag> world<tag>\n\n<tag>",
    "<END>hello<END> world <END>",
]


@dataclass(frozen=True)
class Case:
    """One file: architecture, tokenizer ("gpt2" with a pre-tokenizer, or "llama"), and shape of the model."""

    architecture: str
    tokenizer: str
    pre: str = ""
    layers: int = 2
    head_dim: int = 8
    prefix: bool = True  # SentencePiece: a space is put before the text
    options: tuple[str, ...] = ()


CASES = {
    "llama-spm": Case("llama", "llama"),
    "llama-smollm": Case("llama", "gpt2", "smollm", options=("tied",)),
    "llama3": Case("llama", "gpt2", "llama-bpe", options=("rope_freqs",)),
    "llama-gpt2": Case("llama", "gpt2", "gpt-2", options=("linear",)),
    "llama-default": Case("llama", "gpt2", "default"),
    "qwen2": Case("qwen2", "gpt2", "qwen2", options=("tied",)),
    "gemma3": Case("gemma3", "llama", layers=7, head_dim=16, prefix=False, options=("tied",)),
}
HIDDEN, INNER, HEADS, KV = 32, 64, 4, 2
_KINDS = gguf.TokenType
_ARCH = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
}


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter of each byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in kept}
    for offset, byte in enumerate(byte for byte in range(256) if byte not in letters):
        letters[byte] = chr(256 + offset)
    return letters


def byte_level_vocab() -> tuple[list[str], list[str], list[int]]:
    """(tokens, merges, kinds): all bytes, then every word built from left to right."""
    letters = _byte_letters()
    tokens = ["<BOS>", "<END>", "<PAD>", "<tag>"]
    kinds = [_KINDS.CONTROL] * 3 + [_KINDS.USER_DEFINED]
    tokens += [letters[byte] for byte in range(256)]
    merges = []
    for word in WORDS:
        text = "".join(letters[byte] for byte in word.encode())
        for cut in range(1, len(text)):
            merge, token = f"{text[:cut]} {text[cut]}", text[: cut + 1]
            if token not in tokens:
                tokens.append(token)
                merges.append(merge)
    return tokens, merges, kinds + [_KINDS.NORMAL] * (len(tokens) - len(kinds))


def sentencepiece_vocab(prefix: bool) -> tuple[list[str], list[float], list[int]]:
    """(tokens, scores, kinds): markers, bytes, characters, pieces; without a prefix, user-defined runs as well."""
    tokens = ["<unk>", "<BOS>", "<END>", "<PAD>", "<tag>"]
    kinds = [_KINDS.UNKNOWN, *[_KINDS.CONTROL] * 3, _KINDS.USER_DEFINED]
    if not prefix:
        tokens += ["  ", "   ", "\n\n"]
        kinds += [_KINDS.USER_DEFINED] * 3
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    kinds += [_KINDS.BYTE] * 256
    pieces = []
    for word in (*WORDS, *"abcdefghijklmnopqrstuvwxyzHDIONT '.!+=\n"):
        text = word.replace(" ", "▁")
        pieces += [text[: cut + 1] for cut in range(len(text))] + list(text)
    tokens += [piece for piece in dict.fromkeys(pieces) if piece not in tokens]
    kinds += [_KINDS.NORMAL] * (len(tokens) - len(kinds))
    return tokens, [0.0 if kind != _KINDS.NORMAL else -float(i) for i, kind in enumerate(kinds)], kinds


def vocab_size(case: Case) -> int:
    """Tokens of the case's tokenizer."""
    tokens = byte_level_vocab()[0] if case.tokenizer == "gpt2" else sentencepiece_vocab(case.prefix)[0]
    return len(tokens)


def hf_state(case: Case) -> dict[str, np.ndarray]:
    """The model as a Hugging Face state dict."""
    random = np.random.RandomState(len(case.architecture) + case.layers)
    width = case.head_dim

    def matrix(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * 1.5 / np.sqrt(shape[-1])).astype(np.float32)

    def vector(size: int, around: float = 0.0) -> np.ndarray:
        return (around + 0.3 * random.standard_normal(size)).astype(np.float32)

    gemma = case.architecture == "gemma3"
    norm = 0.0 if gemma else 1.0
    state = {"model.embed_tokens.weight": matrix(vocab_size(case), HIDDEN) * np.float32(3)}
    for layer in range(case.layers):
        block = f"model.layers.{layer}."
        for name, heads in (("q", HEADS), ("k", KV), ("v", KV)):
            state[f"{block}self_attn.{name}_proj.weight"] = matrix(heads * width, HIDDEN)
            if case.architecture == "qwen2":
                state[f"{block}self_attn.{name}_proj.bias"] = vector(heads * width)
        state[f"{block}self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * width)
        if gemma:
            state |= {f"{block}self_attn.{name}_norm.weight": vector(width) for name in "qk"}
        state[f"{block}mlp.gate_proj.weight"] = matrix(INNER, HIDDEN)
        state[f"{block}mlp.up_proj.weight"] = matrix(INNER, HIDDEN)
        state[f"{block}mlp.down_proj.weight"] = matrix(HIDDEN, INNER)
        norms = ["input", "post_attention"] + (["pre_feedforward", "post_feedforward"] if gemma else [])
        state |= {f"{block}{name}_layernorm.weight": vector(HIDDEN, norm) for name in norms}
    state["model.norm.weight"] = vector(HIDDEN, norm)
    if "tied" not in case.options:
        state["lm_head.weight"] = matrix(vocab_size(case), HIDDEN)
    return state


def _permute(value: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter permutes Llama's query and key projections."""
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape)


def llama3_divisors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """rope_freqs.weight, by the loop of llama.cpp's converter."""
    found = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4.0:
            found.append(1.0)
        elif wavelength > 8192 / 1.0:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def write(path: Path, case: Case, state: dict[str, np.ndarray] | None = None) -> Path:
    """Writes the case as a float32 GGUF file."""
    writer = gguf.GGUFWriter(str(path), case.architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(case.layers)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_key_length(case.head_dim)
    writer.add_value_length(case.head_dim)
    writer.add_layer_norm_rms_eps(1e-6 if case.architecture == "gemma3" else 1e-5)
    writer.add_rope_freq_base(1e6 if case.architecture == "gemma3" else 500000.0)
    if case.architecture == "gemma3":
        writer.add_sliding_window(8)
    else:
        writer.add_rope_dimension_count(case.head_dim)
    if "linear" in case.options:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
    if "rope_freqs" in case.options:
        writer.add_tensor("rope_freqs.weight", llama3_divisors(case.head_dim, 500000.0, 8.0))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _write_tokenizer(writer, case)
    names = gguf.get_tensor_name_map(_ARCH[case.architecture], case.layers)
    for name, value in (hf_state(case) if state is None else state).items():
        if case.architecture == "llama" and ".q_proj." in name:
            value = _permute(value, HEADS)
        elif case.architecture == "llama" and ".k_proj." in name:
            value = _permute(value, KV)
        elif case.architecture == "gemma3" and name.endswith("norm.weight"):
            value = value + np.float32(1)
        full = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert full is not None, name
        writer.add_tensor(full, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer: gguf.GGUFWriter, case: Case) -> None:
    writer.add_tokenizer_model(case.tokenizer)
    if case.tokenizer == "gpt2":
        tokens, merges, kinds = byte_level_vocab()
        writer.add_tokenizer_pre(case.pre)
        writer.add_token_merges(merges)
    else:
        tokens, scores, kinds = sentencepiece_vocab(case.prefix)
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(case.prefix)
        writer.add_unk_token_id(tokens.index("<unk>"))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(tokens.index("<BOS>"))
    writer.add_eos_token_id(tokens.index("<END>"))
    writer.add_pad_token_id(tokens.index("<PAD>"))
