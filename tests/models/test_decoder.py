"""The decoder against `transformers` (golden logits), and its ways of running against each other."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laif_jax.models.cache import init_cache
from laif_jax.models.decoder import (
    decode_step,
    hidden_states,
    init_params,
    logits,
    prefill,
    unstack_layers,
)
from laif_jax.models.specs import param_specs
from tests.models.goldens import CASES, LENGTHS, golden_logits, golden_steps, model, packed, quick_jit, rows

TOLERANCE = 2e-5  # relative to the largest logit
# One model per family is enough where the test is not about the family's maths.
DECODED = (
    "llama_biases",
    "llama3",
    "llama_yarn_mscale",
    "smollm2",
    "mistral",
    "mixtral_of_six",
    "qwen2_sliding",
    "qwen3_yarn_bias",
    "gemma2",
    "gemma3",
    "pythia",
    "pythia_sequential",
)
FEW = ("llama2_gqa", "gemma3", "pythia")


@partial(jax.jit, static_argnames=("cfg", "remat", "dtype"))
def full(params, cfg, tokens, positions, segments, remat="none", dtype=jnp.float32):
    hidden = hidden_states(params, cfg, tokens, positions, segments, remat=remat, dtype=dtype)
    return logits(params, cfg, hidden)


def assert_close(ours, theirs, tolerance=TOLERANCE):
    error = np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(theirs).max()
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_padded_and_packed(name):
    cfg, params = model(name)
    expected = golden_logits(name)
    together = packed(cfg)
    extra = together[0].shape[1] - max(LENGTHS)
    # One batch: the sequences padded, one per row, and a last row that holds them all.
    padded = [np.pad(x, ((0, 0), (0, extra)), constant_values=fill) for x, fill in zip(rows(cfg), (5, 0, 0))]
    ours = full(params, cfg, *(np.concatenate(pair) for pair in zip(padded, together)))
    for i, row in enumerate(expected):
        assert_close(ours[i, : len(row)], row)
    assert_close(ours[-1, : sum(LENGTHS)], np.concatenate(expected))


def test_goldens_tell_the_variants_apart():
    """A golden that another variant also meets would prove nothing."""
    llama = [name for name in CASES if CASES[name]["shapes"] == CASES["llama2_gqa"]["shapes"]]
    llama += ["yi", "qwen2", "qwen2_layer_types"]
    assert len(llama) > 7
    distinct = {name: np.concatenate(golden_logits(name)) for name in llama if name != "mistral_full"}
    for a in distinct:
        for b in distinct:
            if a < b:
                assert (
                    np.abs(distinct[a] - distinct[b]).max() > 100 * TOLERANCE * np.abs(distinct[a]).max()
                ), (a, b)


@pytest.mark.parametrize("name", DECODED)
def test_incremental_decoding_equals_the_full_forward(name):
    cfg, params = model(name)
    tokens = rows(cfg)[0]
    expected = golden_logits(name)
    decode_params = quick_jit(unstack_layers, static_argnums=1)(params, cfg)
    lengths = np.array([9, 2, 5], np.int32)  # ragged prompts; the third row never goes beyond its prompt
    cache = init_cache(cfg, len(LENGTHS), max(LENGTHS) + 3)
    start = quick_jit(partial(prefill, return_all=True), static_argnums=1)
    hidden, cache, every = start(decode_params, cfg, tokens[:, :9], lengths, cache)
    for i, length in enumerate(lengths):
        assert_close(logits(params, cfg, every[i, :length]), expected[i][:length])
    assert_close(logits(params, cfg, hidden), [expected[i][length - 1] for i, length in enumerate(lengths)])
    step = quick_jit(decode_step, static_argnums=1)
    index = lengths
    while (index < LENGTHS).any():
        now = np.minimum(index, np.array(LENGTHS) - 1)
        hidden, cache = step(decode_params, cfg, tokens[np.arange(len(now)), now], now, cache)
        for i in np.flatnonzero(index < LENGTHS):
            assert_close(logits(params, cfg, hidden[i]), expected[i][index[i]])
        index = index + 1


def test_incremental_decoding_with_dynamic_rope_equals_transformers():
    """Beyond max_position the frequencies move with every token and cached keys keep theirs, so a full forward pass
    is no reference; `transformers` generating with its cache is."""
    cfg, params = model("llama_dynamic")
    tokens, expected = rows(cfg)[0][:1], golden_steps("llama_dynamic")
    prompt = tokens.shape[1] - len(expected) + 1
    assert prompt < cfg.max_position < tokens.shape[1]
    decode_params, cache = unstack_layers(params, cfg), init_cache(cfg, 1, tokens.shape[1])
    lengths = np.array([prompt], np.int32)
    hidden, cache = quick_jit(prefill, static_argnums=1)(
        decode_params, cfg, tokens[:, :prompt], lengths, cache
    )
    assert_close(logits(params, cfg, hidden[0]), expected[0])
    step = quick_jit(decode_step, static_argnums=1)
    for i, row in enumerate(expected[1:], start=prompt):
        hidden, cache = step(decode_params, cfg, tokens[:, i], np.array([i], np.int32), cache)
        assert_close(logits(params, cfg, hidden[0]), row)


@pytest.mark.parametrize("name", FEW)
def test_what_padding_holds_and_how_long_it_is_does_not_matter(name):
    cfg, params = model(name)
    tokens, positions, segments = rows(cfg)
    real = segments > 0
    expected = np.asarray(full(params, cfg, tokens, positions, segments))[real]
    other = np.asarray(full(params, cfg, *rows(cfg, pad=int(tokens[0, 0]))))[real]
    np.testing.assert_array_equal(other, expected)
    longer = [np.pad(x, ((0, 0), (0, 6))) for x in (tokens, positions, segments)]
    np.testing.assert_allclose(
        np.asarray(full(params, cfg, *longer))[:, : tokens.shape[1]][real], expected, atol=3e-5
    )


@pytest.mark.parametrize("name", FEW)
def test_scan_equals_layers_one_by_one(name):
    cfg, params = model(name)
    tokens, _, segments = rows(cfg)
    cache = init_cache(cfg, *tokens.shape)
    start = quick_jit(partial(prefill, return_all=True), static_argnums=1)
    unrolled = start(unstack_layers(params, cfg), cfg, tokens, np.array(LENGTHS), cache)[2]
    scanned = np.asarray(full(params, cfg, *rows(cfg)))
    assert_close(np.asarray(logits(params, cfg, unrolled))[segments > 0], scanned[segments > 0], 1e-6)


def test_remat_changes_neither_values_nor_gradients():
    cfg, params = model("gemma3")
    inputs = rows(cfg)

    @partial(quick_jit, static_argnames="remat")
    @partial(jax.value_and_grad, argnums=0)
    def loss(params, remat):
        hidden = hidden_states(params, cfg, *inputs, remat=remat)
        return jnp.sum(jnp.where(inputs[2][..., None] > 0, hidden, 0.0) ** 2)

    value, gradient = loss(params, "none")
    for remat in ("full", "dots"):
        other, other_gradient = loss(params, remat)
        np.testing.assert_allclose(other, value, rtol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()),
            other_gradient,
            gradient,
        )


@pytest.mark.parametrize("name", FEW)
def test_bfloat16_compute_stays_near_float32(name):
    cfg, params = model(name)
    inputs = rows(cfg)
    real = inputs[2] > 0
    exact = np.asarray(full(params, cfg, *inputs))[real]
    low = np.asarray(full(params, cfg, *inputs, dtype=jnp.bfloat16))[real]
    assert low.dtype == np.float32
    assert 1e-4 < np.abs(low - exact).max() / np.abs(exact).max() < 0.06


def test_init_follows_the_table_and_does_not_depend_on_the_other_parameters():
    cfg, _ = model("qwen2")
    params = init_params(cfg, jax.random.key(0))
    specs = param_specs(cfg)
    jax.tree.map(
        lambda spec, leaf: None if spec.shape == leaf.shape else pytest.fail(str(spec)), specs, params
    )
    assert np.all(params["layers"]["attn_norm"]["scale"] == 1.0)
    assert np.all(params["layers"]["attn"]["q"]["bias"] == 0.0)
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert np.std(kernel) == pytest.approx(specs["layers"]["mlp"]["up"]["kernel"].stddev, rel=0.05)
    assert not np.allclose(kernel[0], kernel[1])
    tied = init_params(dataclasses.replace(cfg, tie_embeddings=True, qkv_bias=False), jax.random.key(0))
    assert "lm_head" not in tied
    np.testing.assert_array_equal(tied["layers"]["mlp"]["up"]["kernel"], kernel)


def test_a_prompt_longer_than_the_cache_is_refused():
    cfg, params = model("llama1")
    with pytest.raises(ValueError, match="9 tokens do not fit a cache of 8"):
        prefill(
            unstack_layers(params, cfg), cfg, np.zeros((1, 9), np.int32), np.ones(1), init_cache(cfg, 1, 8)
        )


def test_incremental_decoding_in_bfloat16_with_weights_cast_once():
    cfg, params = model("gemma2")
    tokens, *_ = rows(cfg)
    lengths = np.array([9, 2, 5], np.int32)
    results = []
    for cast in (None, jnp.bfloat16):
        decode_params = unstack_layers(params, cfg, cast)
        cache = init_cache(cfg, len(lengths), 16, jnp.bfloat16)
        start = quick_jit(partial(prefill, dtype=jnp.bfloat16), static_argnums=1)
        _, cache = start(decode_params, cfg, tokens[:, :9], lengths, cache)
        step = quick_jit(partial(decode_step, dtype=jnp.bfloat16), static_argnums=1)
        hidden, cache = step(decode_params, cfg, tokens[:, 9], lengths, cache)
        assert hidden.dtype == jnp.bfloat16
        results.append(np.asarray(hidden, np.float32))
    assert_close(results[1], results[0], 0.03)
