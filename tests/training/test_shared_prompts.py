"""Pairs whose answers share the computation of their prompt: the same log-probs, scores and gradients as apart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.config.rl import RewardSpec
from laif_jax.config.schema import DpoSpec
from laif_jax.data.chat import Encoded, EncodedPair
from laif_jax.data.pipeline import preference_batches
from laif_jax.models import attention
from laif_jax.models.decoder import init_params
from laif_jax.training.feed import to_device
from laif_jax.training.reward_task import reward_task
from laif_jax.training.tasks import preference_task, shares_prompts
from tests.models.states import V, tiny_config
from tests.training import small

LENGTH, PAIRS = 16, 6
# Windows shorter than a dialogue, of all layers or of some; a parallel residual and partly rotated heads; a mixture.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5},
    "gpt_neox": {"use_parallel_residual": True},
    "mixtral": {},
}


def make_pairs(seed: int, count: int = PAIRS, vocab: int = V) -> list[EncodedPair]:
    """Prompts of 1 to 9 tokens; answers that may begin alike, too."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        prompt = rng.integers(3, vocab, rng.integers(1, 10)).tolist()
        answers = [rng.integers(3, 5 if i % 3 == 0 else vocab, rng.integers(1, 7)).tolist() for _ in "ab"]
        sides = [Encoded(prompt + a, [0] * len(prompt) + [1] * len(a), len(prompt)) for a in answers]
        made.append(EncodedPair(*sides))
    return made


def batch_of(pairs: list[EncodedPair], layout: str) -> tuple[dict[str, np.ndarray], int]:
    """(one step with all pairs, S) laid out "apart", "packed" or "shared"."""
    options = {} if layout == "apart" else {"packing": True, "share_prompts": layout == "shared"}
    rows = len(pairs) if layout == "apart" else 2 * len(pairs)
    batches = preference_batches(
        pairs, batch_size=rows, max_length=LENGTH, pad_id=0, epochs=1, shuffle=False, **options
    )
    assert batches.total_steps == 1
    return batches.at(0), batches.layout.max_segments


def by_pair(batch: dict[str, np.ndarray], values: np.ndarray) -> np.ndarray:
    """Values of the slots of a batch, in the order of the pairs."""
    index = batch["pair_index"][0]
    out = np.zeros((index >= 0).sum(), np.float32)
    out[index[index >= 0]] = np.asarray(values)[index >= 0]
    return out


@functools.cache
def compiled(kind: str, family: str, layout: str, segments: int):
    """A jitted (params, batch, weights [2, N]) -> (weighted sum of values, (chosen, rejected)), gradients."""
    cfg = tiny_config(family, **FAMILIES[family])
    if kind == "dpo":
        task = preference_task(cfg, DpoSpec(steps=1), **small.F32, max_segments=segments)
    else:
        cfg = dataclasses.replace(cfg, head="score")
        task = reward_task(cfg, RewardSpec(steps=1), dtype="float32", remat="none", max_segments=segments)

    def loss(params, batch, weights):
        sides = (task.sequence_logps if kind == "dpo" else task.pair_scores)(params, batch)[:2]
        return sum(jnp.sum(w * side) for w, side in zip(weights, sides)), sides

    return cfg, jax.jit(jax.value_and_grad(loss, has_aux=True))


def results(kind: str, family: str, layout: str, pairs: list[EncodedPair]):
    """(chosen, rejected, gradients) under weights that belong to the pairs."""
    batch, segments = batch_of(pairs, layout)
    cfg, run = compiled(kind, family, layout, segments)
    params = _params(cfg)
    weights = np.random.default_rng(5).normal(size=(2, len(pairs)))
    index = batch["pair_index"][0]
    laid = np.where(index >= 0, weights[:, index], 0.0).astype(np.float32)
    micro = {name: array[0] for name, array in to_device(batch, small.mesh()).items()}
    (_, sides), grads = run(params, micro, laid)
    return [by_pair(batch, side) for side in sides], grads


@functools.cache
def _params(cfg):
    return init_params(cfg, jax.random.key(1))


def assert_same(a, b):
    for x, y in zip(a[0], b[0], strict=True):
        np.testing.assert_allclose(y, x, rtol=2e-5, atol=2e-5)

    def close(path, x, y):
        error = np.linalg.norm(np.asarray(x) - np.asarray(y)) / max(np.linalg.norm(x), 1e-3)
        assert error < 2e-5, f"{jax.tree_util.keystr(path)}: {error:.1e}"

    jax.tree_util.tree_map_with_path(close, a[1], b[1])


@pytest.mark.parametrize(
    ("kind", "family"),
    [*(("dpo", family) for family in FAMILIES), ("reward", "mistral"), ("reward", "gpt_neox")],
)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_values_and_gradients_are_those_of_sides_apart(kind, family, seed):
    pairs = make_pairs(seed)
    apart = results(kind, family, "apart", pairs)
    assert_same(apart, results(kind, family, "shared", pairs))


@pytest.mark.parametrize("family", ["gemma2"])
def test_and_of_packed_sides_and_of_blockwise_attention(family, monkeypatch):
    pairs = make_pairs(11)
    packed = results("dpo", family, "packed", pairs)
    assert batch_of(pairs, "shared")[0]["prefix"].any()
    compiled.cache_clear()
    monkeypatch.setattr(attention, "BLOCKWISE_ABOVE", 8)
    monkeypatch.setattr(attention, "BLOCK", 8)
    assert_same(packed, results("dpo", family, "shared", pairs))
    compiled.cache_clear()


MESHES = {
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "explicit": {"fsdp": 2, "tensor": 2, "axis_type": "explicit"},
}


@pytest.mark.parametrize("axes", MESHES)
def test_a_step_is_the_same_on_a_mesh(axes):
    pairs = make_pairs(3, count=8, vocab=small.VOCAB)
    task = preference_task(small.config(), small.DPO, **small.F32)
    apart, _ = batch_of(pairs, "apart")
    shared, segments = batch_of(pairs, "shared")
    one = small.update(task, apart)
    other = small.update(dataclasses.replace(task, max_segments=segments), shared, small.mesh(**MESHES[axes]))
    # The tokens of a shared prompt are counted once.
    assert other[1].pop("num_tokens") == (shared["segment_ids"] > 0).sum() < one[1].pop("num_tokens")
    small.assert_same_update(one, other, rtol=2e-5)


def test_prompts_are_shared_where_that_is_exact_and_no_kernel_is_lost():
    mesh, cfg = small.mesh(), tiny_config("llama")
    packed = DpoSpec(steps=1, packing=True)
    assert shares_prompts(packed, mesh, cfg)
    assert not shares_prompts(DpoSpec(steps=1), mesh, cfg)
    assert not shares_prompts(packed.model_copy(update={"share_prompts": False}), mesh, cfg)
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    stretched = tiny_config("llama", rope_scaling=scaling, max_position_embeddings=64)
    assert not shares_prompts(packed, mesh, stretched)
    assert shares_prompts(packed.model_copy(update={"max_length": 64}), mesh, stretched)
