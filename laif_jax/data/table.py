"""Tokenised examples as flat arrays, and batches assembled from them without a Python loop over tokens."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from laif_jax.data.chat import Encoded
from laif_jax.data.packing import Rows


class TokenTable:
    """All examples' tokens, one after another.

    Attributes:
      tokens: int32 [total]. loss_mask: float32 [total]. offsets: int64 [n + 1]; example i is
        `tokens[offsets[i]:offsets[i + 1]]`. lengths: int64 [n]. starts: int64 [n], or None: tokens that an example has
        in common with the one before it, which are left out here: it begins at that position.
    """

    def __init__(self, examples: Sequence[Encoded], starts: np.ndarray | None = None):
        self.starts = starts
        if starts is not None:
            examples = [_without_start(one, start) for one, start in zip(examples, starts.tolist())]
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
        for array in (self.tokens, self.loss_mask, self.offsets, self.starts):
            if array is not None:
                sha.update(array.tobytes())
        return sha.hexdigest()

    def assemble(self, rows: Rows, n_rows: int, row_length: int, pad_id: int) -> dict[str, np.ndarray]:
        """Arrays [n_rows, row_length] (`tokens, segment_ids, positions` int32, `loss_mask` float32), right-padded.

        Padding has segment 0, position 0, weight 0; it is made from lengths, so `pad_id` may be a token in use. With
        `starts` also `prefix` int32: at every token of an example its start, that is how many tokens of the segment
        before it it continues.
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
        loss_mask.reshape(-1)[target] = self.loss_mask[source]
        batch = {
            "tokens": tokens,
            "segment_ids": segment_ids,
            "positions": positions,
            "loss_mask": loss_mask,
        }
        if self.starts is not None:
            starts = np.repeat(self.starts[rows.example], lengths)
            batch["prefix"] = np.zeros(shape, np.int32)
            batch["prefix"].reshape(-1)[target] = starts
            within = within + starts
        positions.reshape(-1)[target] = within
        return batch


def _without_start(one: Encoded, start: int) -> Encoded:
    if start == 0:
        return one
    return replace(
        one,
        tokens=one.tokens[start:],
        loss_mask=one.loss_mask[start:],
        prompt_length=max(one.prompt_length - start, 0),
    )


def shared_starts(pairs: Sequence[tuple[Encoded, Encoded]]) -> np.ndarray:
    """Starts int64 [2 x pairs] of interleaved sides: how many tokens of each rejected side the chosen one computes.

    They are the tokens that both sides begin with, less one: the last of them opens the rejected segment, so that the
    answer's first token is predicted there. No supervised token of the rejected side is among them.
    """
    starts = np.zeros((len(pairs), 2), np.int64)
    for i, (chosen, rejected) in enumerate(pairs):
        size = min(len(chosen.tokens), len(rejected.tokens))
        a, b = (np.asarray(side.tokens[:size]) for side in (chosen, rejected))
        common = size if (a == b).all() else int(np.argmax(a != b))
        learned = next((t for t, m in enumerate(rejected.loss_mask) if m), len(rejected.tokens))
        starts[i, 1] = max(min(common, learned) - 1, 0)
    return starts.reshape(-1)
