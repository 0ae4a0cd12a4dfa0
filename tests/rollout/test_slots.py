"""Refilled slots give every row what the plain loop gives it, whatever comes before, beside and after it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.config.rl import PpoSpec
from laif_jax.config.schema import SamplingSpec
from laif_jax.models.cache import init_cache, quantize
from laif_jax.rollout import slots as module
from laif_jax.rollout.engine import TRACES, Engine, Row
from laif_jax.rollout.generate import generate, row_keys
from laif_jax.rollout.score import logp_difference
from laif_jax.rollout.slots import generate_rows
from tests.rollout.tiny import EOS, prompts, tiny

CAPACITY = 12
ENDS = (EOS, 5, 9, 13)
KEYS = row_keys(jax.random.key(3), range(40), 1)[:, 0]


def engine(ends=ENDS, kv_cache="compute") -> Engine:
    cfg, params = tiny()
    return Engine(params, cfg, eos_ids=ends, kv_cache=kv_cache)


def plain(rows, ends=ENDS, capacity=CAPACITY, **options):
    """Batches of 8, each from its first token to its last."""
    loop, found = engine(ends, **options), []
    for start in range(0, len(rows), 8):
        found += loop.run(rows[start : start + 8], capacity=capacity, batch_size=8)
    return found


def assert_equal(found, expected):
    assert [(r.tokens, r.stopped, r.drawn) for r in found] == [
        (r.tokens, r.stopped, r.drawn) for r in expected
    ]
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine.logps, theirs.logps, atol=1e-4)


def many(n: int, *, samples: int = 1, seed: int = 0, limit: int | None = None) -> list[Row]:
    """`n` rows, `samples` of each prompt side by side, with limits of 1 to 12 tokens."""
    rng, asked = np.random.default_rng(seed), prompts(n, longest=30, seed=seed)
    return [
        Row(asked[i // samples], KEYS[i], limit or int(rng.integers(1, CAPACITY + 1)), 0.9, 0.95)
        for i in range(n)
    ]


@settings(deadline=None, max_examples=25)
@given(
    order=st.permutations(range(24)),
    n=st.integers(1, 24),
    slots=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 3),
    kinds=st.lists(
        st.sampled_from([(1.0, 1.0, 0), (0.0, 1.0, 0), (0.7, 0.8, 0), (1.3, 1.0, 5)]), min_size=24
    ),
    twins=st.booleans(),
)
def test_slots_give_what_the_plain_loop_gives(order, n, slots, seed, kinds, twins):
    """Any lengths, limits, order, number of slots and settings; with `twins`, prompts that come back."""
    rows = [
        Row(row.tokens, row.key, row.limit, *kind)
        for row, kind in zip(many(24, samples=3 if twins else 1, seed=seed), kinds, strict=False)
    ]
    rows = [rows[i] for i in order][:n]
    assert_equal(generate_rows(engine(), rows, slots=slots, capacity=CAPACITY), plain(rows))


def test_a_cache_that_grows_changes_nothing(monkeypatch):
    monkeypatch.setattr(module, "ROOM", 2)
    rows = [*many(6, limit=3), *(Row([2 + i, 3], KEYS[i], 40, 1.0) for i in range(6))]
    before = TRACES["decode"]
    found = generate_rows(engine(ends=()), rows, slots=4, capacity=40)
    assert TRACES["decode"] - before == 3  # 32, 48 and 64 positions
    assert_equal(found, plain(rows, ends=(), capacity=40))


def test_a_prompt_is_read_once_for_all_of_its_samples(monkeypatch):
    """Five samples of each prompt in four slots: some start together, some when a slot is free again."""
    functions, calls = module.slot_functions, []

    def counting(*static):
        real = functions(*static)

        def prefill(*args):
            calls.append(args)
            return real.prefill(*args)

        return real._replace(prefill=prefill)

    rows = many(20, samples=5, seed=2)
    assert len({tuple(row.tokens) for row in rows}) == 4
    monkeypatch.setattr(module, "slot_functions", counting)
    found = generate_rows(engine(), rows, slots=4, capacity=CAPACITY)
    assert len(calls) == 4
    assert_equal(found, plain(rows))
    assert len({tuple(r.drawn) for r in found}) > 10


def test_a_copy_is_never_taken_from_a_slot_that_gets_its_own_copy_only_then():
    """The first prompt's samples sit behind the others', so that a sample that comes later is placed before its source,
    and a second one finds both."""
    first, second = many(2, limit=2)
    late = [Row(second.tokens, KEYS[10 + i], limit, 1.0) for i, limit in enumerate((12, 11, 10, 9))]
    rows = [Row(first.tokens, KEYS[i], 12 if i == 0 else 1, 1.0) for i in range(3)] + late
    for slots in (2, 4):
        assert_equal(
            generate_rows(engine(ends=()), rows, slots=slots, capacity=CAPACITY), plain(rows, ends=())
        )


def test_new_prompts_settings_and_numbers_of_rows_compile_nothing():
    run = engine()
    generate_rows(run, many(24, limit=CAPACITY), slots=4, capacity=CAPACITY)
    generate_rows(run, many(24, samples=4, limit=CAPACITY), slots=4, capacity=CAPACITY)
    before = dict(TRACES)
    for seed in range(4):
        generate_rows(run, many(9 + 5 * seed, seed=seed), slots=4, capacity=CAPACITY)
        generate_rows(run, many(9 + 5 * seed, seed=seed, samples=3), slots=4, capacity=CAPACITY)
    new = {name: count - before[name] for name, count in TRACES.items()}
    assert new["decode"] == new["slots/prefill"] == new["slots/insert"] == 0
    assert new["slots/start"] <= 2  # copies of a prompt of up to 16, and of up to 32 tokens


def test_rows_that_end_with_their_first_token_and_progress():
    rows, told = many(11, limit=1), []
    found = generate_rows(engine(), rows, slots=2, capacity=CAPACITY, progress=told.append)
    assert [len(r.drawn) for r in found] == [1] * 11
    assert told == sorted(set(told))
    assert told[-1] == 11
    assert generate_rows(engine(), [], slots=2, capacity=CAPACITY) == []


def test_errors_name_the_row():
    cfg, params = tiny()
    broken = {**params, "final_norm": {"scale": params["final_norm"]["scale"] * jnp.nan}}
    with pytest.raises(FloatingPointError, match="not finite"):
        generate_rows(Engine(broken, cfg), many(3), slots=2, capacity=CAPACITY)
    rows = [Row([1], KEYS[0], 2), Row([1, 2, 3], KEYS[1], 62)]
    with pytest.raises(ValueError, match="row 1: 3 prompt tokens and a limit of 62"):
        generate_rows(engine(), rows, slots=2, capacity=62)


# ---- keys and values in 8 bits ---------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), scale=st.floats(1e-6, 1e4))
@settings(deadline=None, max_examples=25)
def test_a_quantized_vector_is_off_by_half_a_step(seed, scale):
    x = np.random.default_rng(seed).normal(size=(3, 16)).astype(np.float32) * scale
    x[1] = 0.0
    kept, steps = quantize(jnp.asarray(x))
    assert kept.dtype == jnp.int8
    assert (
        np.abs(np.asarray(kept) * np.asarray(steps)[:, None] - x) <= np.asarray(steps)[:, None] * 0.501
    ).all()
    assert not np.asarray(kept)[1].any()


def test_an_int8_cache_keeps_log_probs_close_and_a_quarter_of_the_bytes():
    cfg, params = tiny()
    rows = prompts(10, longest=30)
    spec = SamplingSpec(max_new_tokens=12, batch_size=4, samples=2, kv_cache="int8")
    samples = generate(params, cfg, rows, spec, jax.random.key(1), eos_ids=ENDS)
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    difference = logp_difference(params, cfg, rows, samples)
    assert 1e-5 < difference["sampling/logp_diff"] < 0.02
    assert difference["sampling/logp_diff_max"] < 0.15

    def size(**options):
        return sum(x.nbytes for x in jax.tree.leaves(init_cache(cfg, 4, 64, **options)))

    assert size(kind="int8") == size() * (0.25 + 1 / cfg.head_dim)


def test_int8_slots_give_what_the_int8_plain_loop_gives():
    rows = many(20, samples=2, seed=1)
    found = generate_rows(engine(kv_cache="int8"), rows, slots=4, capacity=CAPACITY)
    assert_equal(found, plain(rows, kv_cache="int8"))


def test_the_option_names_no_old_artifact_anew_and_is_refused_where_the_update_needs_the_samplers_log_probs():
    assert "kv_cache" not in SamplingSpec().resolved()
    assert SamplingSpec(kv_cache="int8").resolved()["kv_cache"] == "int8"
    with pytest.raises(ValueError, match="another distribution"):
        PpoSpec(sampling=SamplingSpec(kv_cache="int8"))
