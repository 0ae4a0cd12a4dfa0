"""Chunked log-probs against the plain form, values and gradients, and the size of what is ever held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.models.decoder import hidden_states, logits
from laif_jax.models.heads import token_logps, token_stats
from tests.models.goldens import LENGTHS, model, packed, quick_jit, rows


def plain_stats(params, cfg, hidden, tokens, segments):
    """logps, entropy, correct [R, T] with all logits at once."""
    logp = jax.nn.log_softmax(logits(params, cfg, hidden), axis=-1)
    target = jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)[:, :-1]
    correct = (jnp.argmax(logp, axis=-1)[:, :-1] == tokens[:, 1:]).astype(jnp.float32)
    valid = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    return [jnp.pad(jnp.where(valid, x, 0.0), ((0, 0), (1, 0))) for x in (target, entropy, correct)]


@pytest.mark.parametrize("name", ["llama2_gqa", "gemma2"])  # own head; tied head with a soft cap
@pytest.mark.parametrize("chunk", [7, 20, 1000])
def test_chunks_equal_the_plain_form_in_value_and_gradient(name, chunk):
    cfg, params = model(name)
    tokens, positions, segments = rows(cfg)
    hidden = hidden_states(params, cfg, tokens, positions, segments)
    weights = np.random.default_rng(0).normal(size=(3, *tokens.shape)).astype(np.float32)

    def ours(params, hidden):
        stats = token_stats(params, cfg, hidden, tokens, segments, chunk=chunk)
        return sum(jnp.sum(w * x) for w, x in zip(weights, stats)), stats

    def plain(params, hidden):
        stats = plain_stats(params, cfg, hidden, tokens, segments)
        return sum(jnp.sum(w * x) for w, x in zip(weights, stats)), stats

    grads, stats = quick_jit(jax.grad(ours, argnums=(0, 1), has_aux=True))(params, hidden)
    expected_grads, expected = quick_jit(jax.grad(plain, argnums=(0, 1), has_aux=True))(params, hidden)
    for a, b in zip(stats, expected):
        np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()), grads, expected_grads
    )
    only = token_logps(params, cfg, hidden, tokens, segments, chunk=chunk)
    np.testing.assert_allclose(only, expected[0], atol=1e-5)


def test_zero_at_first_tokens_and_padding_and_packing_changes_nothing():
    cfg, params = model("llama2_gqa")

    def logps(tokens, positions, segments):
        hidden = hidden_states(params, cfg, tokens, positions, segments)
        return np.asarray(token_logps(params, cfg, hidden, tokens, segments, chunk=16))

    padded, together = logps(*rows(cfg)), logps(*packed(cfg))[0]
    starts = np.cumsum((0, *LENGTHS))
    assert np.all(together[starts] == 0.0)
    assert np.all(together[starts[-1] :] == 0.0)
    for i, length in enumerate(LENGTHS):
        assert np.all(padded[i, length:] == 0.0)
        assert padded[i, 0] == 0.0
        assert np.all(padded[i, 1:length] < 0.0)
        np.testing.assert_allclose(together[starts[i] : starts[i + 1]], padded[i, :length], atol=1e-5)


def both(params, hidden, tokens, segments, cfg, chunk):
    stats = token_stats(params, cfg, hidden, tokens, segments, chunk=chunk)
    return tuple(stats), tuple(plain_stats(params, cfg, hidden, tokens, segments))


BOTH = quick_jit(both, static_argnums=(4, 5))  # compiled once per shape and chunk


@settings(max_examples=30, deadline=None)
@given(shape=st.sampled_from([(1, 2), (3, 9)]), chunk=st.sampled_from([4, 11]), seed=st.integers(0, 999))
def test_any_segments(shape, chunk, seed):
    cfg, params = model("llama2_gqa")
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(*shape, cfg.hidden_size)).astype(np.float32)
    tokens = random.integers(0, cfg.vocab_size, shape).astype(np.int32)
    segments = np.sort(random.integers(0, 3, shape))[:, ::-1].astype(np.int32)
    for a, b in zip(*BOTH(params, hidden, tokens, segments, cfg, chunk)):
        np.testing.assert_allclose(a, b, atol=1e-5)


def arrays_of(jaxpr):
    """The shapes of all values in a jaxpr and in the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield from (getattr(out.aval, "shape", ()) for out in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from arrays_of(inner)


def test_no_array_of_rows_times_time_times_vocab_exists():
    cfg, params = model("smollm2")  # tied: its head is the embedding
    tokens, positions, segments = (np.tile(x, (4, 3)) for x in rows(cfg))

    def loss(params, chunk):
        hidden = hidden_states(params, cfg, tokens, positions, segments, remat="full")
        return token_logps(params, cfg, hidden, tokens, segments, chunk=chunk).sum()

    def largest(chunk):
        jaxpr = jax.make_jaxpr(jax.grad(loss), static_argnums=1)(params, chunk)
        with_vocab = [s for s in arrays_of(jaxpr.jaxpr) if len(s) >= 3 and s[-1] == cfg.vocab_size]
        return max(int(np.prod(s)) for s in with_vocab)

    assert largest(10**6) == tokens.size * cfg.vocab_size  # the check sees what it should
    assert largest(120) <= 120 * cfg.vocab_size
