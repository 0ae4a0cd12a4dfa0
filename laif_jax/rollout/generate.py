"""Completions for a list of prompts."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from laif_jax.config.schema import SamplingSpec
from laif_jax.models.config import ModelConfig
from laif_jax.records.errors import LaifError
from laif_jax.rollout.buckets import batch_bucket, plan
from laif_jax.rollout.engine import Engine, Row, RowOutput
from laif_jax.rollout.slots import generate_rows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One completion.

    Attributes:
      prompt_index: of the prompt in the call's list. sample_index: 0 .. samples-1.
      tokens: without the EOS.
      logps: log softmax(logits / temperature) of each drawn token, before top-p and top-k (at temperature 1 when
        greedy); one longer than `tokens` when an EOS was drawn, and then its last entry is the EOS's.
      finish_reason: "stop": an EOS was drawn; "length": the limit or the end of the context came first.
      eos: the EOS that was drawn, or None.
      prompt_truncated: the prompt's start was cut away to make room.
      top_logprobs: per drawn token the best tokens at temperature 1 as (id, log-prob), or None if not asked for.
    """

    prompt_index: int
    sample_index: int
    tokens: list[int]
    logps: list[float]
    finish_reason: Literal["stop", "length"]
    eos: int | None = None
    prompt_truncated: bool = False
    top_logprobs: list[list[tuple[int, float]]] | None = None


class PromptTooLongError(LaifError, ValueError):
    """A prompt leaves no room for a single new token."""


def generate(
    params: Any,
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    spec: SamplingSpec,
    key: jax.Array,
    *,
    dtype: Any = jnp.float32,
    pad_id: int | None = None,
    eos_ids: Sequence[int] | None = None,
    max_length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    indices: Sequence[int] | None = None,
    on_long_prompt: Literal["error", "truncate"] = "error",
    top_logprobs: int = 0,
    mesh: Mesh | None = None,
) -> list[Sample]:
    """Draws `spec.samples` completions of every prompt.

    Sample s of prompt p is drawn with key fold_in(fold_in(key, indices[p]), s): it does not depend on the other
    prompts, their number or `spec.batch_size` (but for the float rounding of differently shaped matrix products).

    In one process, `spec.batch_size` slots are kept busy: a finished row's is given to the next prompt, and a prompt is
    prefilled once for all of its samples (`laif_jax.rollout.slots`). In several processes batches run one after
    another, each until its longest row is done: rows and their caches stay on the hosts where they are.

    Args:
      params, cfg: a model (stacked layers, as trained).
      prompts: token ids, unpadded. indices: numbers that name the prompts in the random keys; None: 0, 1, 2, ...
      key: a PRNG key.
      eos_ids: tokens that end a completion; None: the model's.
      max_length: limit of prompt and completion together; None: the model's context. A prompt that leaves room for
        fewer than `spec.max_new_tokens` is completed up to the limit, with finish_reason "length".
      progress: called with (samples done, samples in all) whenever some are done.
      on_long_prompt: for a prompt with no room left: "error", or "truncate": keep its last tokens, so that
        `spec.max_new_tokens` fit (at least half of the context stays with the prompt), and set `prompt_truncated`.
      top_logprobs: how many of the best tokens' log-probs to return per drawn token (static; 0: none).
      mesh: rows are spread over its axes data and fsdp; None: the mesh that the parameters are on.

    Returns:
      len(prompts) * spec.samples samples, ordered by prompt, then by sample index.

    Raises:
      PromptTooLongError, ValueError (an empty prompt), FloatingPointError (logits not finite).
    """
    if not prompts:
        return []
    options: dict[str, Any] = {"pad_id": pad_id, "eos_ids": eos_ids, "max_length": max_length}
    engine = Engine(params, cfg, dtype=dtype, mesh=mesh, kv_cache=spec.kv_cache, **options)
    rows, truncated = _rows(engine, prompts, spec, key, indices, on_long_prompt)
    capacity = min(spec.max_new_tokens, engine.max_length - 1)
    told = None if progress is None else lambda done: progress(done, len(rows))
    if jax.process_count() == 1:
        results = generate_rows(
            engine, rows, slots=spec.batch_size, capacity=capacity, top=top_logprobs or None, progress=told
        )
    else:
        results = _in_batches(engine, rows, spec.batch_size, capacity, top_logprobs or None, told)
    return [
        _sample(output, *divmod(i, spec.samples), truncated[i // spec.samples])
        for i, output in enumerate(results)
    ]


def _in_batches(
    engine: Engine,
    rows: Sequence[Row],
    batch_size: int,
    capacity: int,
    top: int | None,
    progress: Callable[[int], None] | None,
) -> list[RowOutput]:
    """The plain loop: batch after batch, each until its longest row is done."""
    size = batch_bucket(len(rows), batch_size, engine.row_multiple)
    results: dict[int, RowOutput] = {}
    for batch in plan([len(row.tokens) for row in rows], size):
        some = [rows[i] for i in batch]
        results |= zip(batch, engine.run(some, capacity=capacity, batch_size=size, top=top), strict=True)
        if progress is not None:
            progress(len(results))
    return [results[i] for i in range(len(rows))]


def _rows(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    spec: SamplingSpec,
    key: jax.Array,
    indices: Sequence[int] | None,
    on_long_prompt: str,
) -> tuple[list[Row], list[bool]]:
    """One row per prompt and sample, and which prompts were truncated."""
    names = range(len(prompts)) if indices is None else indices
    if len(names) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(names)} indices: give one index per prompt")
    keys = row_keys(key, names, spec.samples)
    rows, truncated = [], []
    for p, prompt in enumerate(prompts):
        tokens = list(prompt)
        if not tokens:
            raise ValueError(f"prompt {p} is empty: give at least one token, such as BOS")
        cut = len(tokens) >= engine.max_length
        if cut:
            tokens = _shorten(tokens, p, engine.max_length, spec.max_new_tokens, on_long_prompt)
        truncated.append(cut)
        limit = min(spec.max_new_tokens, engine.max_length - len(tokens))
        for s in range(spec.samples):
            rows.append(Row(tokens, keys[p, s], limit, spec.temperature, spec.top_p, spec.top_k))
    if any(truncated):
        log.warning("%d of %d prompts were cut to fit the context", sum(truncated), len(prompts))
    return rows, truncated


def _shorten(tokens: list[int], index: int, max_length: int, max_new_tokens: int, policy: str) -> list[int]:
    if policy == "error":
        raise PromptTooLongError(
            f"prompt {index} has {len(tokens)} tokens, which leaves no room for a completion in a context of "
            f"{max_length}. Shorten the prompt, raise the limit if the model allows, or ask for truncation"
        )
    return tokens[-max(max_length - max_new_tokens, max_length // 2, 1) :]


@jax.jit
def _fold(key: jax.Array, prompts: jax.Array, samples: jax.Array) -> jax.Array:
    """Key data [P, S, W]."""

    def one(p: jax.Array, s: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, p), s))

    return jax.vmap(lambda p: jax.vmap(lambda s: one(p, s))(samples))(prompts)


def row_keys(key: jax.Array, indices: Sequence[int], samples: int) -> np.ndarray:
    """PRNG key data [len(indices), samples, W] uint32 of fold_in(fold_in(key, index), sample)."""
    # Padded to a power of two: one compilation serves many list lengths.
    padded = np.zeros((batch_bucket(len(indices), 1 << 30),), np.uint32)
    padded[: len(indices)] = np.asarray(indices, np.uint32)
    return np.asarray(_fold(key, padded, np.arange(samples, dtype=np.uint32)))[: len(indices)]


def _sample(output: RowOutput, prompt_index: int, sample_index: int, truncated: bool) -> Sample:
    top = None
    if output.top_ids is not None and output.top_values is not None:
        top = [
            list(zip(ids, values, strict=True))
            for ids, values in zip(output.top_ids.tolist(), output.top_values.tolist(), strict=True)
        ]
    return Sample(
        prompt_index=prompt_index,
        sample_index=sample_index,
        tokens=output.tokens,
        logps=output.logps,
        finish_reason="stop" if output.stopped else "length",
        eos=output.drawn[-1] if output.stopped else None,
        prompt_truncated=truncated,
        top_logprobs=top,
    )
