"""Drawing the next token from logits. Pure; every setting is a traced number, so a sweep never recompiles.

Which log-prob is returned. `Draw.logps` is log softmax(logits / temperature)[token], *before* top-k and top-p cut the
distribution: it is what a trainer computes for the token at that temperature, so importance ratios and KL terms start
at exactly the trainer's value. A greedy row (temperature 0) reports the log-prob at temperature 1.

Truncation without a sort. Both top-k and top-p keep the tokens whose probability is at least some threshold. The
threshold is found by bisection on the bit pattern of the probability (a non-negative float orders like its bits), which
is exact after 31 reductions over the vocabulary. On a CPU with 32 rows and 49k tokens this takes 22 ms against 268 ms
for a sort, and over a sharded vocabulary it needs only sums. Tokens that tie with the threshold are all kept.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class SamplingParams(NamedTuple):
    """Settings of one draw; each is a scalar or [B]. `temperature` 0 is greedy, `top_p` 1 and `top_k` 0 are off."""

    temperature: jax.typing.ArrayLike = 1.0
    top_p: jax.typing.ArrayLike = 1.0
    top_k: jax.typing.ArrayLike = 0


class Draw(NamedTuple):
    """Sampled tokens [B] int32 and their log-probs [B] float32 (see the module's text)."""

    tokens: jax.Array
    logps: jax.Array


def _threshold(probs: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """Largest t [B] such that `weights` summed where probs >= t is at least `target` [B]; all are float32."""
    bits = lax.bitcast_convert_type(probs, jnp.int32)  # probs >= 0: the bit patterns order like the numbers

    def halve(i: jax.Array, low: jax.Array) -> jax.Array:
        trial = low | (1 << (30 - i))
        mass = jnp.where(bits >= trial[:, None], weights, 0.0).sum(axis=-1)
        return jnp.where(mass >= target, trial, low)

    low = lax.fori_loop(0, 31, halve, jnp.zeros_like(bits[:, 0]))
    return lax.bitcast_convert_type(low, jnp.float32)


def truncate(logits: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
    """Logits [B, V] float32 with -inf for the tokens that top-k, then top-p of what is left, cut away.

    Top-p keeps the smallest set of most probable tokens whose mass reaches `top_p` [B] (Holtzman et al. 2020, section
    3.1), the token that crosses it included. The most probable token always stays.
    """
    off = (top_p >= 1.0) & (top_k <= 0)
    return lax.cond(jnp.all(off), lambda: logits, lambda: _truncated(logits, top_p, top_k, off))


def _truncated(logits: jax.Array, top_p: jax.Array, top_k: jax.Array, off: jax.Array) -> jax.Array:
    probs = jnp.exp(logits - logits.max(axis=-1, keepdims=True))

    def cut_k(p: jax.Array) -> jax.Array:
        k = jnp.where(top_k > 0, top_k, p.shape[-1]).astype(jnp.float32)
        floor = _threshold(p, jnp.ones_like(p), jnp.minimum(k, p.shape[-1]))
        return jnp.where((p >= floor[:, None]) | (top_k <= 0)[:, None], p, 0.0)

    def cut_p(p: jax.Array) -> jax.Array:
        # A target above 0, so that a threshold beyond the best token never reaches it, not even for top_p = 0.
        floor = _threshold(p, p, jnp.maximum(top_p * p.sum(axis=-1), jnp.finfo(p.dtype).tiny))
        return jnp.where((p >= floor[:, None]) | (top_p >= 1.0)[:, None], p, 0.0)

    kept = lax.cond(jnp.any(top_k > 0), cut_k, lambda p: p, probs)
    kept = lax.cond(jnp.any(top_p < 1.0), cut_p, lambda p: p, kept)
    # Where nothing was cut, a probability that underflowed to 0 must stay possible as far as float32 can tell.
    return jnp.where((kept > 0.0) | off[:, None], logits, -jnp.inf)


def sample(logits: jax.Array, keys: jax.Array, params: SamplingParams) -> Draw:
    """Draws one token per row.

    Args:
      logits: [B, V] float32.
      keys: [B] PRNG keys, one per row, so that a row's draw does not depend on the rows beside it.
      params: scalars or [B] each.

    Returns:
      Draw(tokens [B] int32, logps [B] float32).
    """
    rows = logits.shape[:1]
    temperature = jnp.broadcast_to(jnp.asarray(params.temperature, jnp.float32), rows)
    top_p = jnp.broadcast_to(jnp.asarray(params.top_p, jnp.float32), rows)
    top_k = jnp.broadcast_to(jnp.asarray(params.top_k, jnp.int32), rows)
    greedy = temperature <= 0.0
    scaled = logits.astype(jnp.float32) / jnp.where(greedy, 1.0, temperature)[:, None]

    def best() -> jax.Array:
        return first_best(scaled)

    def draw() -> jax.Array:
        # A greedy row beside sampled ones must not switch the truncation on.
        kept = truncate(scaled, jnp.where(greedy, 1.0, top_p), jnp.where(greedy, 0, top_k))
        noise = jax.vmap(lambda key: jax.random.gumbel(key, kept.shape[1:], kept.dtype))(keys)
        drawn = first_best(kept + noise)  # what jax.random.categorical gives
        return lax.cond(jnp.any(greedy), lambda: jnp.where(greedy, best(), drawn), lambda: drawn)

    tokens = lax.cond(jnp.all(greedy), best, draw)
    return Draw(tokens, token_logps(scaled, tokens))


def first_best(x: jax.Array) -> jax.Array:
    """The index of the first largest entry of each row, int32 [B] of [B, V], as `argmax` gives it.

    As two plain reductions: XLA's CPU backend goes through an argmax, and through the noise that is fused into it, one
    number at a time (8 rows, 49k tokens: 5.6 ms against 1.5 ms with Gumbel noise, of a decode step of 30 ms). A row
    with NaN gives its last index; its log-prob is NaN, too.
    """
    places = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    hits = jnp.where(x == x.max(axis=-1, keepdims=True), places, x.shape[-1])
    return jnp.minimum(hits.min(axis=-1), x.shape[-1] - 1)


def token_logps(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """log softmax(logits)[token]: logits [..., V] and tokens [...] -> [...] float32."""
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def top_logps(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The `k` most probable tokens at temperature 1: (ids [B, k] int32, log-probs [B, k] float32), best first."""
    values, ids = lax.top_k(logits.astype(jnp.float32), k)
    return ids.astype(jnp.int32), values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
