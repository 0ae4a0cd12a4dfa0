"""Tokenised examples as flat arrays, and batches assembled from them without a Python loop over tokens."""

import hashlib
from collections.abc import Sequence

import numpy as np

from laif_jax.data.chat import Encoded
from laif_jax.data.packing import Rows


class TokenTable:
    """All examples' tokens, one after another.

    Attributes:
      tokens: int32 [total]. loss_mask: float32 [total]. offsets: int64 [n + 1]; example i is
        `tokens[offsets[i]:offsets[i + 1]]`. lengths: int64 [n].
    """

    def __init__(self, examples: Sequence[Encoded]):
        self.lengths = np.fromiter((len(e.tokens) for e in examples), np.int64, len(examples))
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        total = int(self.offsets[-1])
        self.tokens = np.fromiter((t for e in examples for t in e.tokens), np.int32, total)
        self.loss_mask = np.fromiter((m for e in examples for m in e.loss_mask), np.float32, total)

    def __len__(self) -> int:
        return len(self.lengths)

    def digest(self) -> str:
        """SHA-256 (hex) of the content."""
        sha = hashlib.sha256()
        for array in (self.tokens, self.loss_mask, self.offsets):
            sha.update(array.tobytes())
        return sha.hexdigest()

    def assemble(self, rows: Rows, n_rows: int, row_length: int, pad_id: int) -> dict[str, np.ndarray]:
        """Arrays [n_rows, row_length] (`tokens, segment_ids, positions` int32, `loss_mask` float32), right-padded.

        Padding has segment 0, position 0, weight 0; it is made from lengths, so `pad_id` may be a token in use.
        """
        lengths = self.lengths[rows.example]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        source = np.repeat(self.offsets[rows.example], lengths) + within
        target = np.repeat(rows.row * row_length + rows.column, lengths) + within
        shape = (n_rows, row_length)
        tokens = np.full(shape, pad_id, np.int32)
        segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        loss_mask = np.zeros(shape, np.float32)
        tokens.reshape(-1)[target] = self.tokens[source]
        segment_ids.reshape(-1)[target] = np.repeat(rows.segment, lengths)
        positions.reshape(-1)[target] = within
        loss_mask.reshape(-1)[target] = self.loss_mask[source]
        return {
            "tokens": tokens,
            "segment_ids": segment_ids,
            "positions": positions,
            "loss_mask": loss_mask,
        }
