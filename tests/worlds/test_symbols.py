"""The synthetic world: right answers, graded quality, skill, splits, determinism."""

import itertools
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laif_jax.config.schema import SymbolsSpec
from laif_jax.worlds import symbols
from laif_jax.worlds.symbols import SymbolsError, make_prompts, quality, solve, teacher_answer

SPEC = SymbolsSpec(symbols=8, min_length=3, max_length=6, max_steps=2)
PROGRAMS = [program for steps in (1, 2, 3, 4) for program in symbols._programs(steps)]
INSTRUCTIONS = st.builds(
    lambda program, text: f"{' '.join(program)}:{text}",
    st.sampled_from(PROGRAMS),
    st.text("abcdefgh", min_size=1, max_size=8),
)


@pytest.mark.parametrize(
    ("instruction", "answer"),
    [
        ("copy:dbca", "dbca"),
        ("rev:dbca", "acbd"),
        ("sort:dbca", "abcd"),
        ("uniq:bbaba", "ba"),
        ("twice:ab", "abab"),
        ("sort rev:dbca", "dcba"),
        ("rev sort:dbca", "abcd"),
        ("twice uniq sort:cab", "abc"),
        ("uniq twice:aab", "abab"),
    ],
)
def test_right_answers(instruction, answer):
    assert solve(instruction) == answer
    assert quality(instruction, answer) == 1.0


def test_quality_is_graded():
    assert quality("copy:abcd", "abcx") == pytest.approx(0.75)
    assert quality("copy:abcd", "abc") == pytest.approx(0.75)
    assert quality("copy:abcd", "ab") == pytest.approx(0.5)
    assert quality("copy:abcd", "abcdabcd") == pytest.approx(0.5)  # rambling costs
    assert quality("copy:abcd", "") == 0.0
    assert quality("copy:abcd", "wxyz") == 0.0
    assert quality("copy:abcd", " abcd\n") == 1.0


@given(INSTRUCTIONS, st.text("abcdefgh: ", max_size=20))
def test_quality_is_one_only_for_the_right_answer(instruction, text):
    value = quality(instruction, text)
    assert 0.0 <= value <= 1.0
    assert (value == 1.0) == (text.strip() == solve(instruction))


@given(INSTRUCTIONS, st.integers(0, 10**6))
def test_answers_stay_in_the_charset(instruction, seed):
    answer = teacher_answer(instruction, 0.3, random.Random(seed))
    assert answer
    assert set(answer + instruction) <= set(symbols.CHARSET)
    assert teacher_answer(instruction, 1.0, random.Random(seed)) == solve(instruction)
    assert teacher_answer(instruction, 0.3, random.Random(seed)) == answer


@given(st.sampled_from(PROGRAMS[:5]), st.text("abcdefgh", min_size=1, max_size=8), st.integers(0, 10**6))
def test_a_slip_is_never_right(program, text, seed):
    """With one step there is nothing that could undo the slip."""
    instruction = f"{program[0]}:{text}"
    assert quality(instruction, teacher_answer(instruction, 0.0, random.Random(seed))) < 1.0


def test_expected_quality_rises_with_skill():
    prompts = [p.instruction for p in make_prompts(SPEC, 1500, seed=0)]
    means = []
    for skill in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        rng = random.Random(1)
        means.append(statistics.fmean(quality(p, teacher_answer(p, skill, rng)) for p in prompts))
    assert all(low + 0.02 < high for low, high in itertools.pairwise(means)), means
    assert means[-1] == 1.0


def test_prompts_are_distinct_deterministic_and_a_prefix_of_more():
    prompts = make_prompts(SPEC, 500, seed=3)
    assert len({p.id for p in prompts}) == 500
    assert prompts == make_prompts(SPEC, 500, seed=3)
    assert prompts[:100] == make_prompts(SPEC, 100, seed=3)
    assert prompts != make_prompts(SPEC, 500, seed=4)
    for prompt in prompts:
        names, text = symbols.parse(prompt.instruction)
        assert 1 <= len(names) <= 2
        assert 3 <= len(text) <= 6
        assert set(text) <= set("abcdefgh")


def test_splits_never_share_an_instruction():
    small = SymbolsSpec(symbols=3, min_length=2, max_length=3, max_steps=2)
    total = symbols.count(small)
    seen = []
    for split in symbols.SPLITS:
        everything = [text for text in symbols._enumerate(small) if symbols._split_of(text) == split]
        made = [p.instruction for p in make_prompts(small, len(everything), seed=7, split=split)]
        assert sorted(made) == sorted(everything)  # the whole split can be had, once each
        seen += made
    assert len(seen) == len(set(seen)) == total


def test_too_many_prompts_is_an_error_with_numbers():
    small = SymbolsSpec(symbols=3, min_length=2, max_length=2, max_steps=1)
    with pytest.raises(SymbolsError, match=r"has \d+ distinct instructions.*100 were asked for"):
        make_prompts(small, 100, seed=0)


@pytest.mark.parametrize(
    "spec", [SymbolsSpec(min_length=5, max_length=4), SymbolsSpec(max_steps=5)], ids=["lengths", "steps"]
)
def test_contradictory_spec(spec):
    with pytest.raises(SymbolsError):
        make_prompts(spec, 10, seed=0)


@pytest.mark.parametrize("text", ["", "rev dbac", "rev:", ":abc", "flip:abc", "rev:a b", "rev:ABC"])
def test_not_an_instruction(text):
    with pytest.raises(SymbolsError):
        solve(text)
