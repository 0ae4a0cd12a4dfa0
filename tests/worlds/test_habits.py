"""Habitual errors: the same slip every time, independent of the draw, at about the same rate as independent ones."""

import random

from hypothesis import given
from hypothesis import strategies as st

from laif_jax.config.schema import SymbolsSpec
from laif_jax.worlds import symbols

PROMPTS = [prompt.instruction for prompt in symbols.make_prompts(SymbolsSpec(), 2000, seed=5)]


@given(st.sampled_from(PROMPTS), st.floats(0, 1), st.integers(0, 99), st.integers(0, 99))
def test_a_habit_does_not_depend_on_the_draw(instruction, skill, one, other):
    answers = {symbols.teacher_answer(instruction, skill, random.Random(seed), "h") for seed in (one, other)}
    assert len(answers) == 1


def test_habits_differ_by_name_and_keep_the_skill():
    def exact(habits):
        answers = [
            symbols.teacher_answer(text, 0.7, random.Random(i), habits) for i, text in enumerate(PROMPTS)
        ]
        return [symbols.quality(text, answer) == 1.0 for text, answer in zip(PROMPTS, answers)]

    by_name = {name: exact(name) for name in ("a", "b", "c", "d")}
    assert by_name["a"] != by_name["b"]
    independent = sum(exact(None)) / len(PROMPTS)
    habitual = sum(map(sum, by_name.values())) / (4 * len(PROMPTS))
    # 400 cells a name: their draw has a standard deviation of about 0.03 in the share of right answers.
    assert abs(habitual - independent) < 0.06


def test_a_habit_is_kept_on_other_strings_of_the_same_length_and_first_symbol():
    """What is learnable about the error: its operation, length and first symbol, not the whole string."""
    by_cell: dict[tuple[str, int, str], set[bool]] = {}
    for text in PROMPTS:
        names, string = symbols.parse(text)
        if len(names) == 1 and len(set(string)) == len(
            string
        ):  # a slip on repeated symbols may change nothing
            right = symbols.teacher_answer(text, 0.6, random.Random(0), "h") == symbols.solve(text)
            by_cell.setdefault((names[0], len(string), string[0]), set()).add(right)
    assert all(len(outcomes) == 1 for outcomes in by_cell.values())
    assert {outcome for outcomes in by_cell.values() for outcome in outcomes} == {True, False}
