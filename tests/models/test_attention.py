"""Every attention against loops in NumPy, and their gradients against each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.models import attention as module
from laif_jax.models.attention import (
    Continued,
    attention,
    blockwise_attention,
    chunked_attention,
    decode_attention,
    naive_attention,
    visibility,
)
from laif_jax.models.cache import LayerCache
from tests.models.goldens import quick_jit


def loops(q, k, v, segments, window, softcap, scale):
    """One query at a time in float64; zeros at padding."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for r, t, n in np.ndindex(q.shape[:3]):
        if segments[r, t] == 0:
            continue
        seen = [
            s for s in range(t + 1) if segments[r, s] == segments[r, t] and (window == 0 or t - s < window)
        ]
        scores = np.array([q[r, t, n].astype(np.float64) @ k[r, s, n // group] * scale for s in seen])
        if softcap is not None:
            scores = np.tanh(scores / softcap) * softcap
        weights = np.exp(scores - scores.max())
        out[r, t, n] = sum(w * v[r, s, n // group] for w, s in zip(weights / weights.sum(), seen))
    return out


def draw(seed, rows=2, length=13, heads=4, kv_heads=2, size=6):
    random = np.random.default_rng(seed)
    q = random.normal(size=(rows, length, heads, size)).astype(np.float32)
    k, v = random.normal(size=(2, rows, length, kv_heads, size)).astype(np.float32)
    ends = np.sort(random.integers(1, length + 1, (rows, 2)), axis=1)
    index = np.arange(length)
    segments = np.where(index < ends[:, :1], 1, np.where(index < ends[:, 1:], 2, 0)).astype(np.int32)
    return q, k, v, segments


def short(q, k, v, segments, window, softcap, scale):
    vis = visibility(jnp.asarray(segments), window)
    return attention(q, k, v, vis, window=window, softcap=softcap, scale=scale)


def chunked(q, k, v, segments, window, softcap, scale):
    mask = visibility(jnp.asarray(segments), window).mask
    return chunked_attention(q, k, v, mask, softcap=softcap, scale=scale, chunk=4)


def scanned(q, k, v, segments, window, softcap, scale):
    """As in a model whose layers differ: the window is a traced number."""
    vis = visibility(jnp.asarray(segments))
    return attention(q, k, v, vis, window=jnp.int32(window), softcap=softcap, scale=scale)


def blockwise(q, k, v, segments, window, softcap, scale, block=4):
    options = {"softcap": softcap, "scale": scale, "block": block}
    return blockwise_attention(q, k, v, jnp.asarray(segments), window=window, **options)


def blockwise_scanned(q, k, v, segments, window, softcap, scale):
    return blockwise(q, k, v, segments, jnp.int32(window), softcap, scale)


FORMS = [short, chunked, scanned, blockwise, blockwise_scanned]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10**6), window=st.sampled_from([0, 1, 3, 5, 40]), softcap=st.sampled_from([None, 1.5])
)
def test_equals_the_loops(form, seed, window, softcap):
    q, k, v, segments = draw(seed)
    run = quick_jit(form, static_argnums=(4, 5, 6))
    out = np.asarray(run(q, k, v, segments, window, softcap, 0.4))
    assert np.all(np.isfinite(out))
    expected = loops(q, k, v, segments, window, softcap, 0.4)
    np.testing.assert_allclose(np.where(segments[..., None, None] > 0, out, 0), expected, atol=2e-6)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("block", [1, 5, 16])
def test_blocks_of_any_size_and_any_grouping_equal_the_naive_form_in_gradient(block, kv_heads):
    q, k, v, segments = draw(3, kv_heads=kv_heads)
    weights = np.where(segments[..., None, None] > 0, np.random.default_rng(1).normal(size=q.shape), 0)

    def loss(form, q, k, v):
        return jnp.sum(weights * form(q, k, v, segments, 4, 2.0, 0.5))

    naive = quick_jit(jax.value_and_grad(partial(loss, short), argnums=(0, 1, 2)))(q, k, v)
    for form in (partial(blockwise, block=block), chunked):
        blocks = quick_jit(jax.value_and_grad(partial(loss, form), argnums=(0, 1, 2)))(q, k, v)
        for a, b in zip(jax.tree.leaves(blocks), jax.tree.leaves(naive)):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


# ---- two answers to one prompt -----------------------------------------------------------------------------------


def draw_pairs(seed, rows=2, length=17):
    """(segments, continued) of rows of pairs that share a start of 0 to all tokens of the first, and padding."""
    random = np.random.default_rng(seed)
    segments, positions, prefix = np.zeros((3, rows, length), np.int32)
    for r in range(rows):
        column, segment = 0, 1
        while True:
            first, second = random.integers(1, 7, 2)
            start = random.integers(0, first + 1)
            if column + first + second > length:
                break
            for size, begin in ((first, 0), (second, start)):
                part = slice(column, column + size)
                segments[r, part], prefix[r, part] = segment, begin
                positions[r, part] = begin + np.arange(size)
                column, segment = column + size, segment + 1
    return segments, Continued(jnp.asarray(positions), jnp.asarray(prefix))


def whole_dialogues(q, k, v, segments, continued, window):
    """Each segment alone behind the start that it continues, and its own queries picked: zeros at padding."""
    out = np.zeros(q.shape)
    for r in range(len(q)):
        for segment in range(1, segments[r].max() + 1):
            own = np.flatnonzero(segments[r] == segment)
            start = int(continued.prefix[r, own[0]])
            all_ = np.concatenate([np.flatnonzero(segments[r] == segment - 1)[:start], own])
            alone = loops(
                *(x[r : r + 1, all_] for x in (q, k, v)), np.ones((1, len(all_))), window, None, 0.4
            )
            out[r, own] = alone[0, start:]
    return out


@pytest.mark.parametrize("form", ["naive", "chunked", "blockwise", "scanned", "blockwise scanned"])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), window=st.sampled_from([0, 2, 4]))
def test_a_segment_that_continues_another_is_a_dialogue_of_its_own(form, seed, window):
    q, k, v, _ = draw(seed, length=17)
    segments, continued = draw_pairs(seed)

    def run(q, k, v, segments, continued, window):
        options = {"softcap": None, "scale": 0.4}
        width = jnp.int32(window) if form.endswith("scanned") else window
        vis = visibility(segments, 0 if form.endswith("scanned") else window, continued=continued)
        if form.startswith("blockwise"):
            return blockwise_attention(q, k, v, segments, continued, window=width, block=4, **options)
        if form == "chunked":
            return chunked_attention(q, k, v, vis.mask, chunk=4, **options)
        return attention(q, k, v, vis, window=width, **options)

    out = quick_jit(run, static_argnums=5)(q, k, v, segments, continued, window)
    expected = whole_dialogues(q, k, v, segments, continued, window)
    np.testing.assert_allclose(np.where(segments[..., None, None] > 0, out, 0), expected, atol=2e-6)


@pytest.mark.parametrize(("window", "softcap"), [(0, None), (4, 1.5)])
def test_decoding_equals_the_last_query_of_a_row(window, softcap):
    q, k, v, _ = draw(5, rows=3)
    index = np.array([12, 0, 7], np.int32)
    cache = LayerCache(jnp.moveaxis(k, 1, 3), jnp.swapaxes(v, 1, 2))
    query = q[np.arange(3), index][:, None]
    out = decode_attention(query, cache, index, window=window, softcap=softcap, scale=0.4)
    expected = loops(q, k, v, np.ones(q.shape[:2], int), window, softcap, 0.4)
    np.testing.assert_allclose(np.asarray(out)[:, 0], expected[np.arange(3), index], atol=2e-6)


def test_long_rows_go_blockwise_without_a_square_array(monkeypatch):
    q, k, v, segments = draw(7)
    expected = short(q, k, v, segments, 0, None, 0.4)
    monkeypatch.setattr(module, "BLOCKWISE_ABOVE", 8)
    assert visibility(jnp.asarray(segments)).mask is None
    out = short(q, k, v, segments, 0, None, 0.4)
    real = segments > 0
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=2e-6)
    windowed = short(q, k, v, segments, 3, None, 0.4)  # a shared window has no mask to live in
    np.testing.assert_allclose(
        np.asarray(windowed)[real], loops(q, k, v, segments, 3, None, 0.4)[real], atol=2e-6
    )


@pytest.mark.parametrize("window", [0, 3])
def test_the_fused_call_means_the_same(window, monkeypatch):
    """What a GPU hands to cuDNN, run by XLA: same mask, scale and head grouping."""
    q, k, v, segments = draw(11, length=12, size=8)
    real = segments > 0
    expected = loops(q, k, v, segments, window, None, 0.4)[real]
    monkeypatch.setattr(module, "_gpu_has_fused", lambda: True)
    monkeypatch.setattr(module, "_FUSED", "xla")
    calls = []
    fused = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    for form in (short, scanned):
        np.testing.assert_allclose(
            np.asarray(form(*low, segments, window, None, 0.4))[real], expected, atol=0.03
        )
    assert len(calls) == 2
    short(*low, segments, window, 2.0, 0.4)  # a soft cap is beyond it
    assert len(calls) == 2


def test_softmax_is_float32_in_bfloat16_compute():
    q, k, v, segments = (jnp.asarray(x) for x in draw(9))
    mask = visibility(segments).mask
    assert mask is not None
    jaxpr = jax.make_jaxpr(lambda q, k, v: naive_attention(q, k, v, mask, softcap=None, scale=1.0))(
        *(x.astype(jnp.bfloat16) for x in (q, k, v))
    )
    kinds = [str(e.outvars[0].aval) for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"]
    assert kinds[0].startswith("float32")
    assert str(jaxpr.out_avals[0]).startswith("bfloat16")
