"""Scores of sequences: whatever shares their batch, whatever mesh, at the end of context; ensembles combined."""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.config.rl import RewardSpec
from laif_jax.config.schema import MeshSpec, ScratchSpec
from laif_jax.data.chat import encode_dialogue, encode_pair
from laif_jax.models.config import scratch
from laif_jax.models.decoder import init_params
from laif_jax.models.model import Model
from laif_jax.models.reward import (
    RewardModel,
    load_reward_model,
    reward_scores,
    save_reward_model,
    start_reward_model,
)
from laif_jax.models.tokenizer import symbols_tokenizer
from laif_jax.parallel import make_mesh
from laif_jax.rollout.engine import TRACES
from laif_jax.rollout.rewards import RewardScorer, combine, encode_response, with_end_of_context

EOC = "<end>"
PROMPT = [{"role": "user", "content": "reverse abc"}]


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    """Many small programs whose numbers are compared to a tolerance need no machine-code optimisation."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@cache
def reward_model(members: int = 1, end: str | None = EOC) -> RewardModel:
    tokenizer = symbols_tokenizer()
    sizes = ScratchSpec(
        hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, max_position=48
    )
    cfg = scratch(sizes, len(tokenizer), eos_ids=(1,), pad_id=0)
    policy = Model(cfg, init_params(cfg, jax.random.key(0)), tokenizer)
    spec = RewardSpec(steps=1, members=members, end_of_context=end, max_length=32, max_prompt_length=12)
    return start_reward_model(policy, spec, jax.random.key(1))


def expected(model: RewardModel, sequence) -> np.ndarray:
    """One forward pass of the sequence alone, unpadded."""
    tokens = np.asarray([[*sequence, *([model.end_of_context] if model.end_of_context else [])]], np.int32)
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    forward = jax.jit(reward_scores, static_argnums=1, static_argnames="members")
    found = forward(model.params, model.cfg, tokens, positions, np.ones_like(tokens), members=model.members)
    return np.asarray(found)[..., 0, 0]


SEQUENCES = [[5, 6, 7, 1], [0], list(range(2, 22)), [9, 0, 0], [8] * 40]  # token 0 is a pad id, 1 is EOS


@pytest.mark.parametrize(("members", "end"), [(1, EOC), (1, None), (3, EOC)])
def test_scores_are_those_of_each_sequence_alone(members, end):
    model = reward_model(members, end)
    got = RewardScorer(model, batch_size=2).score(SEQUENCES)
    assert got.dtype == np.float32
    assert got.shape == ((5,) if members == 1 else (3, 5))
    for i in (0, 3):
        np.testing.assert_allclose(got[..., i], expected(model, SEQUENCES[i]), atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(5)), size=st.sampled_from([2, 4]))
def test_the_order_and_the_batch_change_no_score(order, size):
    scorer = RewardScorer(reward_model(), batch_size=size)
    want = RewardScorer(reward_model(), batch_size=4).score(SEQUENCES)
    np.testing.assert_allclose(scorer.score([SEQUENCES[i] for i in order]), want[list(order)], atol=1e-6)


def test_each_shape_is_compiled_once():
    scorer = RewardScorer(reward_model(), batch_size=4)
    scorer.score(SEQUENCES)
    before = TRACES["rewards"]
    RewardScorer(reward_model(), batch_size=4).score(SEQUENCES[::-1])
    assert TRACES["rewards"] == before


@pytest.mark.parametrize(("members", "axis_type"), [(1, "explicit"), (3, "auto")])
def test_scores_on_a_mesh_are_the_same(tmp_path, members, axis_type):
    model = reward_model(members)
    save_reward_model(tmp_path, model)
    mesh = make_mesh(MeshSpec(data=2, fsdp=2, tensor=2, axis_type=axis_type), jax.devices()[:8])
    spread = load_reward_model(tmp_path, mesh=mesh)
    assert len(spread.params["layers"]["mlp"]["up"]["kernel"].sharding.device_set) == 8
    got = RewardScorer(spread, batch_size=2).score(SEQUENCES)
    np.testing.assert_allclose(got, RewardScorer(model).score(SEQUENCES), atol=1e-5)


def test_bad_sequences_are_told():
    scorer = RewardScorer(reward_model())
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        scorer.score([[3], []])
    with pytest.raises(ValueError, match="49 tokens, more than the reward model's context of 48"):
        scorer.score([[3] * 48])  # and the end of context
    with pytest.raises(ValueError, match="another tokenizer"):
        scorer.score([[3, 4000]])
    assert scorer.score([]).shape == (0,)


def test_combinations():
    scores = np.asarray([[1.0, 4.0], [3.0, 4.0]], np.float32)
    np.testing.assert_allclose(combine(scores, "mean"), [2.0, 4.0])
    np.testing.assert_allclose(combine(scores, "min"), [1.0, 4.0])
    np.testing.assert_allclose(combine(scores, "lower"), [1.0, 4.0])
    np.testing.assert_array_equal(combine(scores[0], "min"), scores[0])
    with pytest.raises(ValueError, match="mean, min or lower"):
        combine(scores, "max")  # ty: ignore[invalid-argument-type]


@pytest.mark.parametrize(("end", "text"), [(EOC, "cba"), (None, "cba"), (EOC, "cba" * 12)])
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_responses_are_encoded_as_in_training(end, text, reason):
    model = reward_model(end=end)
    room = 32 - (end is not None)
    pair = encode_pair(
        model.tokenizer,
        PROMPT,
        text,
        "abc",
        "model",
        max_length=room,
        max_prompt_length=12,
        finish_reasons=(reason, "stop"),
    )
    trained = with_end_of_context(pair.chosen, model.end_of_context)
    assert len(trained.tokens) == len(trained.loss_mask) <= 32
    scored = encode_response(model, PROMPT, text, reason)
    assert trained.tokens == [*scored, *([model.end_of_context] if end else [])]
    assert (trained.tokens[-1] == model.end_of_context) == (end is not None)


def test_lengths_not_known_are_the_whole_context():
    model = dataclasses.replace(reward_model(), max_length=None, max_prompt_length=None)
    long = encode_response(model, PROMPT, "cba" * 20)
    assert len(long) == 47
    want = encode_dialogue(
        model.tokenizer, PROMPT, "model", max_length=47, max_prompt_length=23, completion="cba" * 20
    )
    assert long == want.tokens
    assert len(encode_response(model, PROMPT, "cba" * 20, max_length=20)) == 19
