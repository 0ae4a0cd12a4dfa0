"""Scores of sequences under a reward model."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from laif_jax.data.chat import Encoded, Messages, encode_dialogue
from laif_jax.models.config import ModelConfig
from laif_jax.models.reward import RewardModel, reward_scores
from laif_jax.parallel.mesh import ROW_AXES
from laif_jax.rollout.buckets import batch_bucket, length_bucket, plan
from laif_jax.rollout.engine import TRACES
from laif_jax.rollout.placement import place, row_sharding, row_shards, spread, to_host, using

Combine = Literal["mean", "min", "lower"]


class RewardScorer:
    """Scores sequences of tokens; each shape is compiled once per process.

    Args:
      model: whose tokenizer the tokens are of. mesh: None: the mesh that the parameters are on.
      dtype: of compute. batch_size: sequences per forward pass.
    """

    def __init__(
        self,
        model: RewardModel,
        *,
        mesh: Mesh | None = None,
        dtype: Any = jnp.float32,
        batch_size: int = 32,
    ):
        self.model, self.batch_size = model, batch_size
        self.params, self.mesh = place(model.params, mesh)
        self._run = _compiled(model.cfg, model.members, jnp.dtype(dtype), self.mesh)

    def score(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """The score of each, read at its last token, which is the end of context (appended here) where there is one.

        Args:
          sequences: token ids of prompt and response, of `encode_response`.

        Returns:
          float32 [n], or [K, n] of an ensemble. What shares a batch does not change a score.

        Raises:
          ValueError: an empty sequence, one longer than the context, or a token beyond the vocabulary.
        """
        rows = [self._checked(i, sequence) for i, sequence in enumerate(sequences)]
        size = batch_bucket(len(rows), self.batch_size, row_shards(self.mesh))
        scores = np.zeros((self.model.members, len(rows)), np.float32)
        for batch in plan([len(row) for row in rows], size):
            width = length_bucket(max(len(rows[i]) for i in batch), self.model.cfg.max_position)
            tokens, lengths = np.zeros((size, width), np.int32), np.zeros((size,), np.int32)
            for slot, i in enumerate(batch):
                tokens[slot, : len(rows[i])], lengths[slot] = rows[i], len(rows[i])
            with using(self.mesh):
                found = to_host(self._run(self.params, *spread((tokens, lengths), self.mesh)))
            scores[:, batch] = found[:, : len(batch)]
        return scores if self.model.members > 1 else scores[0]

    def _checked(self, i: int, sequence: Sequence[int]) -> list[int]:
        end, cfg = self.model.end_of_context, self.model.cfg
        row = [*sequence, *(() if end is None else (end,))]
        if not sequence:
            raise ValueError(f"sequence {i} is empty: there is nothing to score")
        if len(row) > cfg.max_position:
            raise ValueError(
                f"sequence {i} has {len(row)} tokens, more than the reward model's context of {cfg.max_position}; "
                "shorten it"
            )
        if max(row) >= cfg.vocab_size or min(row) < 0:
            raise ValueError(
                f"sequence {i} has the token {max(row) if max(row) >= cfg.vocab_size else min(row)}, and the reward "
                f"model's vocabulary has {cfg.vocab_size}: it was made by another tokenizer"
            )
        return row


@functools.lru_cache(maxsize=16)
def _compiled(cfg: ModelConfig, members: int, dtype: Any, mesh: Mesh | None) -> Any:
    def run(params: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        TRACES["rewards"] += 1
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        segments = (positions < lengths[:, None]).astype(jnp.int32)
        scores = reward_scores(params, cfg, tokens, positions, segments, members=members, dtype=dtype)
        return scores[..., 0].reshape(members, -1)

    if mesh is None:
        return jax.jit(run)
    axes = tuple(axis for axis in ROW_AXES if mesh.shape.get(axis, 1) > 1) or None
    rows, out = row_sharding(mesh), NamedSharding(mesh, PartitionSpec(None, axes))
    return jax.jit(run, in_shardings=(None, rows, rows), out_shardings=out)


def combine(scores: np.ndarray, how: Combine) -> np.ndarray:
    """One score of an ensemble's, float32 [K, n] -> [n]: "mean"; "min", the most cautious; "lower": the mean minus the
    members' standard deviation (Coste et al. 2024). Scores [n] of one model stay as they are.

    Raises:
      ValueError: for another name.
    """
    if how not in ("mean", "min", "lower"):
        raise ValueError(f"unknown combination `{how}` of an ensemble's scores; use mean, min or lower")
    if scores.ndim == 1:
        return scores
    if how == "min":
        return scores.min(axis=0)
    mean = scores.mean(axis=0)
    return mean if how == "mean" else mean - scores.std(axis=0)


# ---- what is scored --------------------------------------------------------------------------------------------


def encode_response(
    model: RewardModel,
    messages: Messages,
    text: str,
    finish_reason: str = "stop",
    max_length: int | None = None,
) -> list[int]:
    """Tokens of a conversation and a response to it, as training encoded them; without the end of context, which
    `RewardScorer` appends.

    Args:
      finish_reason: anything but "stop": the response has no end of turn.
      max_length: tokens, end of context included; None: as in training, or the whole context.

    Raises: as `laif_jax.data.chat.encode_dialogue`.
    """
    limit = (max_length or model.max_length or model.cfg.max_position) - (model.end_of_context is not None)
    prompt = min(model.max_prompt_length or limit // 2, limit - 1)
    return encode_dialogue(
        model.tokenizer,
        messages,
        model.template,  # ty: ignore[invalid-argument-type]
        max_length=limit,
        max_prompt_length=prompt,
        completion=text,
        finish_reason=finish_reason,
    ).tokens


def with_end_of_context(encoded: Encoded, token: int | None) -> Encoded:
    """An encoded dialogue with the end of context behind it, for training; None: as it is. Encode with `max_length`
    one less."""
    if token is None:
        return encoded
    return dataclasses.replace(encoded, tokens=[*encoded.tokens, token], loss_mask=[*encoded.loss_mask, 1])
