"""Generation: equal to the full forward pass, independent of batching, nothing lost, few compilations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.config.schema import MeshSpec, SamplingSpec
from laif_jax.models.decoder import hidden_states, logits
from laif_jax.models.specs import param_specs
from laif_jax.parallel.mesh import make_mesh
from laif_jax.parallel.rules import param_shardings
from laif_jax.rollout.engine import TRACES, Engine, Row
from laif_jax.rollout.generate import PromptTooLongError, generate, row_keys
from laif_jax.rollout.score import logp_difference, score
from tests.rollout.tiny import EOS, VOCAB, prompts, tiny

KEY = jax.random.key(7)


def spec(**changes) -> SamplingSpec:
    return SamplingSpec(**{"max_new_tokens": 12, "batch_size": 4, **changes})


def run(rows, sampling=None, key=KEY, **options):
    cfg, params = tiny()
    return generate(params, cfg, rows, sampling or spec(), key, **options)


@jax.jit
def _forward(row: jax.Array) -> jax.Array:
    cfg, params = tiny()
    positions = jnp.arange(row.shape[1])[None]
    return logits(params, cfg, hidden_states(params, cfg, row, positions, jnp.ones_like(row)))[0]


def full_logits(tokens: list[int]) -> np.ndarray:
    """Logits [T, V] of the full forward pass over one row (padded at the end, which nothing before it sees)."""
    return np.asarray(_forward(np.asarray([tokens + [0] * (64 - len(tokens))])))[: len(tokens)]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logps_equal_the_trainers(temperature):
    """Of all drawn tokens, the EOS included, through the trainer's forward pass and chunked head."""
    cfg, params = tiny()
    rows = prompts(9, longest=30)
    samples = run(rows, spec(temperature=temperature, samples=2), eos_ids=(EOS, 5, 9, 13, 21))
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    difference = logp_difference(params, cfg, rows, samples, temperature=temperature, chunk=16)
    assert difference["sampling/logp_diff_max"] < 1e-4
    assert difference["sampling/logp_diff"] <= difference["sampling/logp_diff_max"]


def test_top_p_and_top_k_do_not_change_what_log_prob_means():
    cfg, params = tiny()
    rows = prompts(5)
    samples = run(rows, spec(temperature=0.8, top_p=0.7, top_k=5))
    assert logp_difference(params, cfg, rows, samples, temperature=0.8)["sampling/logp_diff_max"] < 1e-4


def test_a_wrong_temperature_shows_in_logp_diff():
    cfg, params = tiny()
    rows = prompts(5)
    samples = run(rows, spec(temperature=0.5))
    assert logp_difference(params, cfg, rows, samples, temperature=1.0)["sampling/logp_diff"] > 0.05


def test_greedy_equals_a_loop_over_the_full_forward_pass():
    rows = prompts(4, longest=20, seed=3)
    for prompt, sample in zip(rows, run(rows, spec(temperature=0.0)), strict=True):
        tokens = list(prompt)
        for expected in [*sample.tokens, *([EOS] if sample.finish_reason == "stop" else [])]:
            assert int(full_logits(tokens)[-1].argmax()) == expected
            tokens.append(expected)


@settings(deadline=None, max_examples=8)
@given(
    chosen=st.lists(st.integers(0, 11), min_size=2, max_size=7, unique=True),
    batch_size=st.sampled_from([2, 4]),
)
def test_a_prompt_ignores_its_batch(chosen, batch_size):
    """Any subset, order and batch size gives the same samples for a prompt that keeps its index."""
    rows = prompts(12, longest=30, seed=5)
    everything = run(rows, spec(samples=2, temperature=0.9, top_p=0.95))
    some = run(
        [rows[i] for i in chosen],
        spec(samples=2, temperature=0.9, top_p=0.95, batch_size=batch_size),
        indices=chosen,
    )
    assert len(some) == 2 * len(chosen)
    for sample in some:
        twin = everything[2 * chosen[sample.prompt_index] + sample.sample_index]
        assert (sample.tokens, sample.finish_reason) == (twin.tokens, twin.finish_reason)
        np.testing.assert_allclose(sample.logps, twin.logps, atol=1e-4)


def test_every_prompt_and_sample_comes_back_in_order_and_samples_differ():
    rows = prompts(7)  # 21 rows over 4 slots
    calls = []
    samples = run(rows, spec(samples=3), progress=lambda done, total: calls.append((done, total)))
    assert [(s.prompt_index, s.sample_index) for s in samples] == [(p, s) for p in range(7) for s in range(3)]
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1] == (21, 21)
    assert len(calls) > 1
    assert len({tuple(s.tokens) for s in samples}) > 14
    assert run([]) == []


def test_a_seed_repeats_and_another_one_differs():
    rows = prompts(4)
    first, again, other = run(rows), run(rows), run(rows, key=jax.random.key(8))
    assert first == again
    assert [s.tokens for s in first] != [s.tokens for s in other]


def test_finish_reasons_and_what_they_leave():
    rows = prompts(16)
    for sample in run(rows):
        stopped = sample.finish_reason == "stop"
        assert len(sample.logps) == len(sample.tokens) + stopped
        assert len(sample.tokens) == 12 if not stopped else len(sample.tokens) < 12
        assert EOS not in sample.tokens
        assert sample.eos == (EOS if stopped else None)
    everything_ends = run(rows[:4], eos_ids=range(VOCAB))
    assert {(len(s.tokens), s.finish_reason) for s in everything_ends} == {(0, "stop")}
    nothing_ends = run(rows, eos_ids=())
    assert {(len(s.tokens), s.finish_reason) for s in nothing_ends} == {(12, "length")}
    assert any(EOS in s.tokens for s in nothing_ends)


def test_any_of_several_eos_ids_ends_a_completion():
    samples = run(prompts(16), spec(samples=4), eos_ids=(EOS, 5, 9))
    assert {s.eos for s in samples if s.finish_reason == "stop"} >= {5, 9}
    assert not any({EOS, 5, 9} & set(s.tokens) for s in samples)


def test_first_tokens_follow_the_models_distribution():
    """Chi-square of 2000 samples of one prompt against the full forward pass, at temperature 0.7."""
    prompt = [3, 8, 2]
    n = 2000
    samples = run([prompt], spec(samples=n, max_new_tokens=1, batch_size=500, temperature=0.7), eos_ids=())
    scaled = full_logits(prompt)[-1].astype(np.float64) / 0.7
    expected = n * np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
    counts = np.bincount([s.tokens[0] for s in samples], minlength=VOCAB)
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    freedom = len(observed) - 1
    assert ((observed - wanted) ** 2 / wanted).sum() < freedom + 6 * np.sqrt(2 * freedom)


def test_the_context_is_a_limit():
    """A prompt near the end of the context is completed up to it; one with no room is an error, or cut and flagged."""
    rows = [list(range(2, 40)) + [3] * 24, [4, 5]]  # 62 and 2 tokens in a context of 64
    long, short = run(rows, eos_ids=())
    assert (len(long.tokens), long.finish_reason) == (2, "length")
    assert len(short.tokens) == 12
    too_long = [[4, 5], [7] * 64]
    with pytest.raises(PromptTooLongError, match=r"prompt 1 has 64 tokens.*context of 64"):
        run(too_long)
    fine, cut = run(too_long, eos_ids=(), on_long_prompt="truncate")
    assert (fine.prompt_truncated, cut.prompt_truncated) == (False, True)
    assert len(cut.tokens) == 12
    assert run([[4, 5], [7] * 52], eos_ids=())[1].tokens == cut.tokens
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        run([[]])
    with pytest.raises(ValueError, match="one index per prompt"):
        run([[1], [2]], indices=[0])


def test_max_length_limits_prompt_and_completion():
    sample = run([[3, 4, 5]], max_length=8, eos_ids=())[0]
    assert len(sample.tokens) == 5


def test_arms_and_sweeps_share_compiled_functions():
    """Same shapes, other weights, temperature, top-p, top-k and prompts: not one new trace."""
    cfg, params = tiny()
    run(prompts(6, longest=14))
    before = dict(TRACES)
    other = jax.tree.map(lambda x: x * 0.9, params)
    for sampling in (spec(temperature=0.0), spec(temperature=0.3, top_p=0.5), spec(top_k=3)):
        generate(other, cfg, prompts(5, longest=13, seed=9), sampling, jax.random.key(1))
    assert dict(TRACES) == before
    run(prompts(6, longest=14), spec(max_new_tokens=13))
    assert TRACES["decode"] == before["decode"] + 1


def test_top_logprobs_are_those_of_the_full_forward_pass_at_temperature_one():
    rows = prompts(3, longest=12)
    for sample in run(rows, spec(temperature=0.5), top_logprobs=4):
        tokens = list(rows[sample.prompt_index])
        drawn = [*sample.tokens, *([] if sample.eos is None else [sample.eos])]
        assert sample.top_logprobs is not None
        assert len(sample.top_logprobs) == len(drawn) == len(sample.logps)
        for token, best in zip(drawn, sample.top_logprobs, strict=True):
            expected = np.asarray(jax.nn.log_softmax(full_logits(tokens)[-1]))
            assert [i for i, _ in best] == np.argsort(-expected)[:4].tolist()
            np.testing.assert_allclose([v for _, v in best], np.sort(expected)[::-1][:4], atol=1e-4)
            tokens.append(token)


def test_bfloat16_generates_and_stays_near_its_own_forward_pass():
    cfg, params = tiny()
    rows = prompts(6)
    samples = run(rows, dtype=jnp.bfloat16)
    difference = logp_difference(params, cfg, rows, samples, dtype=jnp.bfloat16)
    assert difference["sampling/logp_diff"] < 0.1


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"data": 4, "fsdp": 2}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2, "axis_type": "explicit"}, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_gives_what_one_device_gives(axes):
    """Weights and rows sharded; 10 rows do not divide over 8 or 4 row shards."""
    cfg, params = tiny()
    rows = prompts(5)
    alone = run(rows, spec(samples=2))
    mesh = make_mesh(MeshSpec(**{"fsdp": 1, **axes}))
    spread = jax.device_put(params, param_shardings(param_specs(cfg), mesh))
    with jax.set_mesh(mesh):  # as the stages run
        sharded = generate(spread, cfg, rows, spec(samples=2), KEY)  # the mesh is the parameters'
    assert [s.tokens for s in sharded] == [s.tokens for s in alone]
    for mine, theirs in zip(sharded, alone, strict=True):
        np.testing.assert_allclose(mine.logps, theirs.logps, atol=1e-4)
    assert logp_difference(spread, cfg, rows, sharded)["sampling/logp_diff_max"] < 1e-4


def test_broken_weights_are_an_error_that_says_so():
    cfg, params = tiny()
    broken = {**params, "final_norm": {"scale": params["final_norm"]["scale"] * jnp.nan}}
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(broken, cfg, prompts(2), spec(), KEY)


def test_score_of_given_completions():
    cfg, params = tiny()
    rows, completions = prompts(5, longest=10), [[4, 5, EOS], [], [7], [8] * 20, [9, 9]]
    scored = score(params, cfg, rows, completions, batch_size=2)
    for prompt, completion, mine in zip(rows, completions, scored, strict=True):
        assert mine.shape == (len(completion),)
        table = np.asarray(jax.nn.log_softmax(full_logits([*prompt, *completion])))
        expected = [table[len(prompt) - 1 + i, token] for i, token in enumerate(completion)]
        np.testing.assert_allclose(mine, expected, atol=1e-4)
    with pytest.raises(ValueError, match="row 0 has 70 tokens"):
        score(params, cfg, [[1] * 60], [[2] * 10])
    with pytest.raises(ValueError, match="above 0"):
        score(params, cfg, [[1]], [[2]], temperature=0)
    with pytest.raises(ValueError, match="1 prompts but 2"):
        score(params, cfg, [[1]], [[2], [3]])


def test_chunks_and_halting():
    """Decoding in dispatches of 3 steps gives the same; a halted row keeps what it has and others go on."""
    cfg, params = tiny()
    engine = Engine(params, cfg, eos_ids=())
    keys = row_keys(KEY, [0, 1], 1)[:, 0]
    rows = [Row([3, 4], keys[0], 12), Row([5], keys[1], 10)]
    whole = engine.run(rows, capacity=12, batch_size=2)
    seen = []

    def halt(outputs):
        seen.append([len(o.tokens) for o in outputs])
        return [len(outputs[0].tokens) >= 6, False]

    halted = engine.run(rows, capacity=12, batch_size=2, chunk=3, halt=halt)
    assert seen == [[4, 4], [7, 7], [7, 10]]
    assert halted[0].tokens == whole[0].tokens[:7]
    assert halted[1].tokens == whole[1].tokens
    with pytest.raises(ValueError, match="do not fit"):
        engine.run([Row([3], keys[0], 64)], capacity=64, batch_size=1)
    with pytest.raises(ValueError, match="give 1 to 1"):
        engine.run(rows, capacity=12, batch_size=1)
