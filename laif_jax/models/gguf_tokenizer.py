"""The tokenizer in a GGUF file's metadata as a `transformers` tokenizer.

Two kinds exist: "gpt2" (byte-level BPE with merges, cut beforehand by regular expressions that
`tokenizer.ggml.pre` names) and "llama" (SentencePiece BPE: no merges but a score per token, bytes as fallback).
"""

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from laif_jax.models.names import WeightsError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CASELESS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: `tokenizer.ggml.pre` -> regular expressions that cut the text, one after the other (as llama.cpp has them).
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_CASELESS % r"\p{N}{1,3}",),
    "qwen2": (_CASELESS % r"\p{N}",),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "megrez": "qwen2"}
_SPACE = "▁"


class _Kind(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def _byte_level(metadata: Mapping[str, Any], vocab: dict[str, int], where: str) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    pre = _ALIASES.get(pre, pre)
    if pre not in PRE_TOKENIZERS:
        raise WeightsError(
            f"{where}: pre-tokenizer {pre!r} is unknown; known: {', '.join(PRE_TOKENIZERS)}. Give the model's own "
            "tokenizer instead (model.tokenizer=FOLDER)."
        )
    merges = []
    for merge in metadata.get("tokenizer.ggml.merges", ()):
        cut = merge.index(" ", 1)  # the first part is never empty, and may itself start with a space
        merges.append((merge[:cut], merge[cut + 1 :]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = (
            normalizers.NFC()
        )  # the model's own tokenizer has it, though llama.cpp does not
    cuts = [pre_tokenizers.Split(Regex(regex), behavior="isolated") for regex in PRE_TOKENIZERS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def merges_of_scores(tokens: list[str], scores: list[float], kinds: list[int]) -> list[tuple[str, str]]:
    """Merges that make BPE join as SentencePiece does: the pair whose union has the highest score comes first."""
    ranks = {
        token: score for token, score, kind in zip(tokens, scores, kinds, strict=True) if kind == _Kind.NORMAL
    }
    found = []
    for token, score in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                found.append((-score, len(left), (left, right)))
    found.sort(key=lambda item: item[:2])
    return [pair for _, _, pair in found]


def _sentencepiece(metadata: Mapping[str, Any], vocab: dict[str, int], kinds: list[int]) -> Tokenizer:
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = merges_of_scores(tokens, metadata["tokenizer.ggml.scores"], kinds)
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _add_markers(tokenizer: Tokenizer, metadata: Mapping[str, Any], *, bos: bool, tokens: list[str]) -> None:
    """Puts BOS before and EOS after every text, if the file says so."""
    wanted = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", bos),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    ids = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key, use in wanted.items() if use}
    used = {key: (tokens[index], index) for key, index in ids.items() if index is not None}
    if not used:
        return
    around = [[used[key][0]] if key in used else [] for key in ("bos", "eos")]
    single = [*around[0], "$A", *around[1]]
    pair = [*single, *(f"{part}:1" for part in (*around[0], "$B", *around[1]))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[*used.values()]
    )


def build_tokenizer(
    metadata: Mapping[str, Any], where: str, *, context_length: int | None = None
) -> PreTrainedTokenizerFast:
    """Builds the tokenizer of a GGUF file.

    Args:
      metadata: the file's `tokenizer.*` values. where: the file, for messages.
      context_length: the model's, for `model_max_length`.

    Raises:
      WeightsError: no vocabulary, or a kind of tokenizer or pre-tokenizer that is not known.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    kind = metadata.get("tokenizer.ggml.model")
    if not tokens:
        raise WeightsError(
            f"{where}: the file holds no vocabulary. Give a tokenizer (model.tokenizer=FOLDER)."
        )
    kinds = [int(k) for k in metadata.get("tokenizer.ggml.token_type") or [_Kind.NORMAL] * len(tokens)]
    vocab = {token: i for i, token in enumerate(tokens)}
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, vocab, where)
        bos = tokenizer.model.ignore_merges
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, vocab, kinds)
        bos = True
    else:
        raise WeightsError(
            f"{where}: a tokenizer of kind {kind!r} is unknown; known: gpt2, llama. Give the model's own tokenizer "
            "instead (model.tokenizer=FOLDER)."
        )
    added = [
        AddedToken(token, special=kinds[i] != _Kind.USER_DEFINED, normalized=False)
        for i, token in enumerate(tokens)
        if kinds[i] in (_Kind.CONTROL, _Kind.USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    _add_markers(tokenizer, metadata, bos=bos, tokens=tokens)
    named = {}
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            named[f"{name}_token"] = tokens[index]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
        **({"model_max_length": context_length} if context_length else {}),
    )
