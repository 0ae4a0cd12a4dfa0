"""Win rates: AlpacaEval's definitions, missing verdicts, judgements."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from laif_jax.evaluation.winrate import align, p_from_judgements, p_from_preferences, win_rate
from laif_jax.records import Judgement, Status

CODES = st.one_of(st.none(), st.sampled_from([0, 0.0, 1, 1.5, 2]), st.floats(1.0, 2.0))


def test_by_hand():
    result = win_rate(p_from_preferences([2, 2, 1, 0, 1.5, None, 1.75]))
    p = [1, 1, 0, 0.5, 0.5, 0.75]
    assert result.win_rate == pytest.approx(100 * np.mean(p))
    assert result.standard_error == pytest.approx(100 * np.std(p, ddof=1) / math.sqrt(6))
    assert (result.n, result.wins, result.losses, result.ties, result.missing) == (6, 3, 1, 2, 1)
    assert result.coverage == pytest.approx(6 / 7)
    assert result.discrete_win_rate == pytest.approx(100 * (3 + 1) / 6)


@given(st.lists(CODES, max_size=40))
def test_counts_and_symmetry(codes):
    p = p_from_preferences(codes)
    result, mirrored = win_rate(p), win_rate(1 - p)
    assert result.wins + result.losses + result.ties == result.n == sum(code is not None for code in codes)
    assert result.n + result.missing == len(codes)
    assert (mirrored.wins, mirrored.ties) == (result.losses, result.ties)
    if result.n:
        assert mirrored.win_rate == pytest.approx(100 - result.win_rate)
        assert 0 <= result.win_rate <= 100


def test_no_verdicts_are_nan_not_zero():
    result = win_rate([np.nan, np.nan])
    assert math.isnan(result.win_rate)
    assert result.coverage == 0.0
    assert result.to_dict()["win_rate"] is None
    assert win_rate([]).n == 0
    assert math.isnan(win_rate([1.0]).standard_error)


@pytest.mark.parametrize("code", [3, 0.5, -1, 2.01])
def test_unknown_code(code):
    with pytest.raises(ValueError, match="row 1"):
        p_from_preferences([1, code])


def test_probability_out_of_range():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        win_rate([0.5, 1.5])


def _judgement(name: str, status: Status, p_b: float | None) -> Judgement:
    return Judgement(comparison_id=name, critic="judge", order="both", status=status, p_b=p_b)


def test_failures_are_missing_never_ties():
    judgements = [
        _judgement("x", Status.OK, 0.9),
        _judgement("y", Status.TIE, 0.5),
        _judgement("z", Status.FAILED, None),
        _judgement("w", Status.UNPARSABLE, None),
    ]
    result = win_rate(p_from_judgements(judgements))
    assert (result.n, result.wins, result.ties, result.missing) == (2, 1, 1, 2)
    np.testing.assert_array_equal(align(judgements, ["y", "q", "z", "x"]), [0.5, np.nan, np.nan, 0.9])


def test_two_verdicts_for_one_comparison():
    with pytest.raises(ValueError, match="two verdicts"):
        align([_judgement("x", Status.OK, 0.9), _judgement("x", Status.OK, 0.1)], ["x"])
