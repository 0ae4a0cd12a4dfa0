"""Log-probs of given completions, by the same full forward pass and head that training uses."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from laif_jax.models.config import ModelConfig
from laif_jax.models.decoder import hidden_states, logits
from laif_jax.models.heads import token_logps
from laif_jax.rollout.buckets import batch_bucket, length_bucket, plan
from laif_jax.rollout.engine import TRACES
from laif_jax.rollout.generate import Sample
from laif_jax.rollout.placement import place, row_sharding, row_shards, spread, to_host, using
from laif_jax.rollout.sampling import token_logps as gather_logps


def score(
    params: Any,
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    dtype: Any = jnp.float32,
    temperature: float = 1.0,
    batch_size: int = 32,
    chunk: int = 1024,
    mesh: Mesh | None = None,
) -> list[np.ndarray]:
    """log p(token | what is before it) of every token of each completion, after its prompt.

    Args:
      prompts, completions: token ids; a completion holds its EOS if that is to be scored.
      temperature: the logits are divided by it (> 0). batch_size: rows per forward pass.
      chunk: tokens per chunk of vocabulary log-probs. mesh: None: the mesh that the parameters are on.

    Returns:
      One float32 array [len(completion)] per row, in order.

    Raises:
      ValueError: lists of different length, an empty prompt, a temperature of 0, a row longer than the context.
    """
    rows = _joined(cfg, prompts, completions)
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: log-probs need one above 0; for greedy samples use 1")
    params, mesh = place(params, mesh)
    size = batch_bucket(len(rows), batch_size, row_shards(mesh))
    run = _compiled(cfg, jnp.dtype(dtype), chunk, temperature != 1.0, mesh)
    scored = [np.zeros((0,), np.float32)] * len(rows)
    for batch in plan([len(row) for row in rows], size):
        width = length_bucket(max(len(rows[i]) for i in batch), cfg.max_position)
        tokens, lengths = np.zeros((size, width), np.int32), np.zeros((size,), np.int32)
        for slot, i in enumerate(batch):
            tokens[slot, : len(rows[i])], lengths[slot] = rows[i], len(rows[i])
        with using(mesh):
            logps = to_host(run(params, *spread((tokens, lengths), mesh), np.float32(temperature)))
        for slot, i in enumerate(batch):
            scored[i] = logps[slot, len(prompts[i]) : len(rows[i])]
    return scored


def _joined(
    cfg: ModelConfig, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> list[list[int]]:
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions: give one for each")
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    for i, row in enumerate(rows):
        if not prompts[i]:
            raise ValueError(f"row {i} has an empty prompt: give at least one token, such as BOS")
        if len(row) > cfg.max_position:
            raise ValueError(
                f"row {i} has {len(row)} tokens, more than the model's context of {cfg.max_position}; shorten it"
            )
    return rows


@functools.lru_cache(maxsize=64)
def _compiled(cfg: ModelConfig, dtype: Any, chunk: int, tempered: bool, mesh: Mesh | None) -> Any:
    def run(params: Any, tokens: jax.Array, lengths: jax.Array, temperature: jax.Array) -> jax.Array:
        TRACES["score"] += 1
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        segments = (positions < lengths[:, None]).astype(jnp.int32)
        hidden = hidden_states(params, cfg, tokens, positions, segments, dtype=dtype)
        if not tempered:
            return token_logps(params, cfg, hidden, tokens, segments, chunk=chunk)
        return _tempered_logps(params, cfg, hidden, tokens, temperature, chunk)

    if mesh is None:
        return jax.jit(run)
    rows, everywhere = row_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    return jax.jit(run, in_shardings=(None, rows, rows, everywhere), out_shardings=rows)


def _tempered_logps(
    params: Any, cfg: ModelConfig, hidden: jax.Array, tokens: jax.Array, temperature: jax.Array, chunk: int
) -> jax.Array:
    """Log-probs [R, T] float32 under logits / temperature, `chunk` tokens at a time; 0 at each row's first token."""
    rows, length, _ = hidden.shape
    steps = max(1, min(length, chunk // rows))
    count = -(-length // steps)

    def split(x: jax.Array) -> jax.Array:
        """[R, T, ...] -> [chunks, R, steps, ...]"""
        padded = jnp.pad(x, [(0, 0), (0, count * steps - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(rows, count, steps, *x.shape[2:]), 1, 0)

    def one(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        return gather_logps(logits(params, cfg, part[0]) / temperature, part[1])

    # The hidden state at t predicts token t + 1.
    parts = lax.map(one, (split(hidden), split(jnp.roll(tokens, -1, axis=1))))
    logps = jnp.moveaxis(parts, 0, 1).reshape(rows, count * steps)[:, : length - 1]
    return jnp.pad(logps, ((0, 0), (1, 0)))


def logp_difference(
    params: Any,
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    samples: Sequence[Sample],
    *,
    temperature: float = 1.0,
    **options: Any,
) -> dict[str, float]:
    """How far the sampler's log-probs are from the trainer's for the same tokens.

    Args:
      samples: of `generate` over `prompts`, with none truncated; `temperature`: that they were drawn at (0: greedy).
      options: of `score`.

    Returns:
      "sampling/logp_diff" (mean absolute difference per token) and "sampling/logp_diff_max".
    """
    drawn = [[*s.tokens, *([] if s.eos is None else [s.eos])] for s in samples]
    scored = score(
        params,
        cfg,
        [prompts[s.prompt_index] for s in samples],
        drawn,
        temperature=temperature or 1.0,
        **options,
    )
    pairs = zip(scored, samples, strict=True)
    difference = np.concatenate(
        [np.abs(mine - np.asarray(s.logps, np.float32)) for mine, s in pairs] or [np.zeros(1)]
    )
    return {"sampling/logp_diff": float(difference.mean()), "sampling/logp_diff_max": float(difference.max())}
