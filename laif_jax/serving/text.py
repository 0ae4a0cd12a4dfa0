"""Tokens as text and bytes, and where a stop string cuts."""

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any


def _byte_alphabet() -> dict[str, int]:
    """The printable characters that byte-level BPE writes bytes as (Radford et al. 2019), to the bytes."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(b): b for b in kept}
    others = [b for b in range(256) if b not in set(kept)]
    table.update({chr(256 + i): b for i, b in enumerate(others)})
    return table


def _decoder_types(node: Any) -> set[str]:
    """Names of the decoders in a tokenizer's JSON, nested ones included."""
    if isinstance(node, dict):
        return {str(node.get("type"))}.union(*[_decoder_types(value) for value in node.values()])
    if isinstance(node, list):
        return set().union(*[_decoder_types(value) for value in node])
    return set()


class TokenText:
    """A tokenizer's text side. The lock serialises its use: a fast tokenizer may not be used by two threads at once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.lock = threading.Lock()
        self._special = set(tokenizer.all_special_ids)
        self._added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        self._byte_level = "ByteLevel" in _decoder_types(spec.get("decoder"))
        self._alphabet = _byte_alphabet()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer; special tokens leave no trace in it."""
        with self.lock:
            return self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for; a special token stands for its name."""
        if token in self._added:
            return self._added[token].encode()
        with self.lock:
            piece = self.tokenizer.convert_ids_to_tokens(int(token))
        if piece is None:  # a padded row of the embedding matrix: no text
            return b""
        if self._byte_level:
            return b"".join(bytes([self._alphabet[c]]) if c in self._alphabet else c.encode() for c in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    def string(self, token: int) -> str:
        """The token as text; bytes that are no whole character show as U+FFFD."""
        return self.bytes_of(token).decode("utf-8", errors="replace")


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string starts in `text`, or None."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return min(places, default=None)


def tokens_before(decode: Callable[[Sequence[int]], str], tokens: Sequence[int], length: int) -> int:
    """How many of `tokens` it takes for their text to be at least `length` characters (by bisection)."""
    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high) // 2
        if len(decode(tokens[:middle])) >= length:
            high = middle
        else:
            low = middle + 1
    return low
