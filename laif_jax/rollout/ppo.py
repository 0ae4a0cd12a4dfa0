"""One iteration's experience in one compiled program: sample responses, then score them with every model.

Prefill and the decode loop draw responses; a full forward pass of each model over the finished rows then gives the
policy's log-probs (by the arithmetic of training, under the same temperature), the reference's, the values, and the
scores of the reward models that read the policy's tokens. Whether and where a response ended is carried from sampling:
nothing is ever read off token ids. Rows are right-padded, prompt and response without a gap.

All programs run on a mesh of automatic axes, `auto_mesh`.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from laif_jax.models.arch import ModelConfig
from laif_jax.models.cache import Cache, init_cache
from laif_jax.models.decoder import decode_step, logits, prefill
from laif_jax.models.reward import for_members
from laif_jax.rollout.engine import DecodeState, RowSettings, emit, empty_state, unstack
from laif_jax.rollout.placement import row_sharding
from laif_jax.rollout.ppo_heads import (
    by_rows,
    in_groups,
    last_score,
    predicting,
    response_kl,
    response_stats,
    response_values,
    row_hidden,
)
from laif_jax.rollout.sampling import SamplingParams

TRACES: Counter[str] = Counter()  # how often the rollout was traced; tests hold compilation down with it
Array = jax.Array


@dataclass(frozen=True)
class ScorerConfig:
    """A reward model as the rollout runs it; static.

    Attributes:
      cfg: its architecture (with `lora` where it is adapters on the policy's base).
      members: 1, or how many are stacked on a leading axis of their own parameters (`models.reward`).
      how: what an ensemble's scores become: "mean", "min" or "lower" (mean minus standard deviation).
      end_of_context: a token put after every response, at which the score is read; None: the response's last token.
    """

    cfg: ModelConfig
    members: int = 1
    how: Literal["mean", "min", "lower"] = "mean"
    end_of_context: int | None = None


@dataclass(frozen=True)
class RolloutConfig:
    """All that a rollout compiles to.

    Attributes:
      policy: with `lora`, the reference is the same weights without the adapters. new_tokens: N, drawn at most.
      value: of a separate value model; None: none. shared: values come from a scalar head on the policy's trunk.
      scorers: reward models by name. full_kl: also compute the KL over the whole vocabulary.
      keep_states: also return the reference's hidden states, for a full KL in the loss.
      decode_rows, score_rows: rows that are decoded, and scored, at a time; both divide the rows.
      dtype: of compute. chunk: tokens whose logits exist at a time.
    """

    policy: ModelConfig
    reference: ModelConfig
    new_tokens: int
    decode_rows: int
    score_rows: int
    value: ModelConfig | None = None
    shared: bool = False
    scorers: tuple[tuple[str, ScorerConfig], ...] = ()
    full_kl: bool = False
    keep_states: bool = False
    dtype: str = "float32"
    chunk: int = 1024


class Prompts(NamedTuple):
    """What to respond to: tokens int32 [B, P] right-padded, lengths int32 [B] (at least 1), keys: PRNG key data
    uint32 [B, W], limits int32 [B], tokens to draw at most (0: a row of padding)."""

    tokens: Any
    lengths: Any
    keys: Any
    limits: Any


class Rollout(NamedTuple):
    """An iteration's experience; T = P + N, everything that is not an id float32.

    Attributes:
      tokens: int32 [B, T], prompt and response. lengths: int32 [B], of the prompts.
      responses: int32 [B, N], counts: int32 [B] of their tokens, an EOS included; 0 at rows of padding.
      ended: bool [B], the response drew an EOS.
      sampled_logps: [B, N], of the sampler. logps, ref_logps: [B, N], of a full forward pass at the same temperature.
      values: [B, N], before each token; zeros without a value function.
      full_kl: [B, N], or None. ref_states: [B, N, D] in the compute dtype, or None.
      scores: name -> [B], of the reward models in the rollout, shifted and scaled where that was asked for.
    """

    tokens: Array
    lengths: Array
    responses: Array
    counts: Array
    ended: Array
    sampled_logps: Array
    logps: Array
    ref_logps: Array
    values: Array
    full_kl: Array | None
    ref_states: Array | None
    scores: dict[str, Array]

    @property
    def mask(self) -> Array:
        """float32 [B, N]: 1 on the drawn tokens."""
        places = jnp.arange(self.responses.shape[1], dtype=jnp.int32)
        return (places < self.counts[:, None]).astype(jnp.float32)


def auto_mesh(mesh: Mesh) -> Mesh:
    """The same devices with automatic axes."""
    if AxisType.Explicit not in mesh.axis_types:
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def make_rollout(config: RolloutConfig, mesh: Mesh) -> Callable[..., Rollout]:
    """The jitted `rollout(models, prompts, eos_ids, temperature) -> Rollout`.

    Two calls with equal arguments give the same function, so that arms, seeds and sweeps of a process share it.

    Args:
      mesh: of automatic axes; rows are spread over data and fsdp, parameters lie as they do.

    Returns:
      The function. `models`: {"policy", "reference", "value": parameter trees, "scorers": {name: {"params", "mean",
      "std"}}}, where trees may share arrays, and what is not used is absent; `prompts`: Prompts; `eos_ids`: int32 [K],
      filled up with -1; `temperature`: float32 scalar.
    """
    return _compiled(config, mesh)


@functools.lru_cache(maxsize=32)
def _compiled(config: RolloutConfig, mesh: Mesh) -> Callable[..., Rollout]:
    def rollout(models: Any, prompts: Prompts, eos_ids: Array, temperature: Array) -> Rollout:
        TRACES["rollout"] += 1
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            drawn = _draw(config, models["policy"], prompts, eos_ids, temperature)
            return _score(config, models, prompts, drawn, temperature)

    rows, everywhere = row_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    return jax.jit(rollout, in_shardings=(None, rows, everywhere, everywhere), out_shardings=rows)


# ---- sampling --------------------------------------------------------------------------------------------------


class _Drawn(NamedTuple):
    responses: Array
    counts: Array
    ended: Array
    logps: Array


def _draw(config: RolloutConfig, policy: Any, prompts: Prompts, eos_ids: Array, temperature: Array) -> _Drawn:
    """Responses to all prompts, `decode_rows` at a time."""
    dtype = jnp.dtype(config.dtype)
    params = unstack(policy, config.policy, dtype)  # once, outside of all loops
    sampling = SamplingParams(temperature, 1.0, 0)

    def group(part: Prompts) -> _Drawn:
        settings = RowSettings(part.keys, sampling, part.limits)
        state = _prefilled(config, params, part, settings, eos_ids, dtype)

        def step(now: DecodeState) -> DecodeState:
            hidden, cache = decode_step(params, config.policy, now.token, now.index, now.cache, dtype=dtype)
            out = logits(params, config.policy, hidden)
            return emit(out, now._replace(cache=cache), settings, eos_ids, None)

        state = lax.while_loop(lambda now: now.alive.any(), step, state)
        return _Drawn(state.tokens, state.count, state.stopped, state.logps)

    return in_groups(group, prompts, config.decode_rows)


def _prefilled(
    config: RolloutConfig, params: Any, prompts: Prompts, settings: RowSettings, eos_ids: Array, dtype: Any
) -> DecodeState:
    """The state after the prompts were read and each row's first token was drawn."""
    rows, width = prompts.tokens.shape
    cache = init_cache(config.policy, rows, width + config.new_tokens, dtype)
    hidden, filled = prefill(params, config.policy, prompts.tokens, prompts.lengths, cache, dtype=dtype)[:2]
    state = empty_state(cast(Cache, filled), rows, config.new_tokens, None)
    state = state._replace(index=prompts.lengths - 1, alive=prompts.limits > 0)
    return emit(logits(params, config.policy, hidden), state, settings, eos_ids, None)


def join(prompts: Array, lengths: Array, responses: Array, counts: Array, extra: int = 0) -> Array:
    """Rows int32 [B, P + N + extra] of prompt and response without a gap, zeros after them."""
    places = jnp.arange(prompts.shape[1] + responses.shape[1] + extra, dtype=jnp.int32)
    place = places - lengths[:, None]  # in the response
    picked = jnp.take_along_axis(responses, jnp.clip(place, 0, responses.shape[1] - 1), axis=1)
    head = jnp.pad(prompts, ((0, 0), (0, places.shape[0] - prompts.shape[1])))
    return jnp.where(place < 0, head, jnp.where(place < counts[:, None], picked, 0))


# ---- scoring ---------------------------------------------------------------------------------------------------


def _score(
    config: RolloutConfig, models: Any, prompts: Prompts, drawn: _Drawn, temperature: Array
) -> Rollout:
    """Every model over the finished rows, `score_rows` at a time."""

    def group(part: tuple[Prompts, _Drawn]) -> dict[str, Any]:
        asked, drawn = part
        tokens = join(asked.tokens, asked.lengths, drawn.responses, drawn.counts)
        scores = {
            name: _reward(models["scorers"][name], scorer, config.dtype, asked, drawn)
            for name, scorer in config.scorers
        }
        return {"tokens": tokens, "scores": scores} | _policy_side(
            config, models, tokens, asked, drawn, temperature
        )

    found = in_groups(group, (prompts, drawn), config.score_rows)
    return Rollout(
        lengths=by_rows(prompts.lengths),
        responses=drawn.responses,
        counts=drawn.counts,
        ended=drawn.ended,
        sampled_logps=drawn.logps,
        **found,
    )


def _policy_side(
    config: RolloutConfig, models: Any, tokens: Array, asked: Prompts, drawn: _Drawn, temperature: Array
) -> dict[str, Any]:
    """Log-probs of policy and reference, their KL, and values; each [R, N]."""
    dtype, places = jnp.dtype(config.dtype), config.new_tokens
    totals = asked.lengths + drawn.counts
    mask = jnp.arange(places) < drawn.counts[:, None]

    def states(params: Any, cfg: ModelConfig) -> Array:
        return predicting(row_hidden(params, cfg, tokens, totals, dtype=dtype), asked.lengths, places)

    def logps(params: Any, cfg: ModelConfig, hidden: Array) -> Array:
        options: dict[str, Any] = {"temperature": temperature, "chunk": config.chunk, "logps_only": True}
        return response_stats(params, cfg, hidden, drawn.responses, mask, **options).logps

    mine, theirs = (
        states(models["policy"], config.policy),
        states(models["reference"], config.reference),
    )
    values = jnp.zeros(mask.shape, jnp.float32)
    if config.shared:
        values = response_values(models["policy"], config.policy, mine, mask)
    elif config.value is not None:
        values = response_values(models["value"], config.value, states(models["value"], config.value), mask)
    full = None
    if config.full_kl:
        full = response_kl(
            models["policy"],
            config.policy,
            mine,
            models["reference"],
            theirs,
            mask,
            temperature=temperature,
            chunk=config.chunk,
        )
    return {
        "logps": logps(models["policy"], config.policy, mine),
        "ref_logps": logps(models["reference"], config.reference, theirs),
        "values": values,
        "full_kl": full,
        "ref_states": theirs if config.keep_states else None,
    }


def _reward(
    model: Mapping[str, Any], scorer: ScorerConfig, dtype: str, asked: Prompts, drawn: _Drawn
) -> Array:
    """A reward model's scores [R] of finished rows."""
    totals = asked.lengths + drawn.counts
    extra = scorer.end_of_context is not None
    tokens = join(asked.tokens, asked.lengths, drawn.responses, drawn.counts, int(extra))
    if scorer.end_of_context is not None:
        tokens = jnp.where(jnp.arange(tokens.shape[1]) == totals[:, None], scorer.end_of_context, tokens)
        totals = totals + 1

    def one(params: Any) -> Array:
        hidden = row_hidden(params, scorer.cfg, tokens, totals, dtype=jnp.dtype(dtype))
        return last_score(params, scorer.cfg, hidden, totals)

    scores = for_members(one, model["params"], scorer.cfg, scorer.members)  # [R] or [K, R]
    if scorer.members > 1:
        every, scores = scores, scores.min(axis=0) if scorer.how == "min" else scores.mean(axis=0)
        scores = scores - every.std(axis=0) if scorer.how == "lower" else scores
    return (scores - model["mean"]) / model["std"]
