"""Kappa and alpha against published examples; what they must do whatever the data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.evaluation import agreement
from laif_jax.evaluation.reliability import alpha, cohen_kappa, coincidences, krippendorff_alpha, pairwise

N = float("nan")
# Krippendorff (2011), section C: four observers, twelve units, missing data.
KRIPPENDORFF = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
    [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
]


@pytest.mark.parametrize(("metric", "value"), [("nominal", 0.743), ("interval", 0.849)])
def test_alpha_of_krippendorffs_own_example(metric, value) -> None:
    assert krippendorff_alpha(KRIPPENDORFF, metric) == pytest.approx(value, abs=5e-4)


@pytest.mark.parametrize(("metric", "value"), [("nominal", 0.691), ("interval", 0.811)])
def test_alpha_of_three_coders_with_gaps(metric, value) -> None:
    # Three coders, fifteen units: the example of the encyclopaedias' article on alpha.
    ratings = [
        [N, N, N, N, N, 3, 4, 1, 2, 1, 1, 3, 3, N, 3],
        [1, N, 2, 1, 3, 3, 4, 3, N, N, N, N, N, N, N],
        [N, N, 2, 1, 3, 4, 4, N, 2, 1, 1, 3, 3, N, 4],
    ]
    assert krippendorff_alpha(ratings, metric) == pytest.approx(value, abs=5e-4)


def test_coincidences_of_krippendorffs_example() -> None:
    # His matrix for these data: 1-1: 7, 1-2: 4/3, 1-3: 1/3, 1-4: 1/3, 2-2: 10, 40 values in all.
    table = np.array(KRIPPENDORFF)
    counts = (table[:, :, None] == np.arange(1, 6)).sum(axis=0)
    found = coincidences(counts).sum(axis=0).reshape(5, 5)
    assert found[0] == pytest.approx([7, 4 / 3, 1 / 3, 1 / 3, 0])
    assert found[1, 1] == pytest.approx(10)
    assert found.sum() == pytest.approx(40)


def test_kappa_by_hand() -> None:
    # Cohen's table [[20, 5], [10, 15]]: observed 0.7, chance 0.5.
    one = [0] * 25 + [1] * 25
    other = [0] * 20 + [1] * 5 + [0] * 10 + [1] * 15
    assert cohen_kappa(one, other) == pytest.approx(0.4)
    assert cohen_kappa([1, 1, 2, -1], [1, 2, 2, 0]) == pytest.approx((2 / 3 - 4 / 9) / (5 / 9))
    assert np.isnan(cohen_kappa([1, 1], [1, 1]))


labellings = st.lists(st.tuples(st.integers(-1, 2), st.integers(-1, 2)), min_size=1, max_size=60)


@given(labellings)
@settings(deadline=None, max_examples=60)
def test_kappa_is_that_of_the_agreement_with_people(rows) -> None:
    known = [(a, b) for a, b in rows if a >= 0 and b >= 0]
    one, other = (np.array([row[side] for row in known], dtype=np.int64) for side in (0, 1))
    before = agreement.cohen_kappa(one, other)
    found = cohen_kappa([a for a, _ in rows], [b for _, b in rows])
    assert found == pytest.approx(before, nan_ok=True)


@given(labellings)
@settings(deadline=None, max_examples=60)
def test_agreement_has_no_side_and_its_interval_holds_it(rows) -> None:
    one, other = ([row[side] for row in rows] for side in (0, 1))
    there = pairwise(one, other, None, samples=60, seed=0)
    back = pairwise(other, one, None, samples=60, seed=0)
    for name in ("raw", "kappa"):
        assert there[name].value == pytest.approx(back[name].value, nan_ok=True)
    raw = there["raw"]
    assert np.isnan(raw.value) or 0 <= raw.ci95[0] <= raw.ci95[1] <= 1


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=30))
@settings(deadline=None, max_examples=60)
def test_alpha_is_at_most_one_and_does_not_know_the_values_names(counts) -> None:
    found = alpha(counts, None, samples=20, seed=0).value
    assert np.isnan(found) or found <= 1 + 1e-12
    turned = alpha([row[::-1] for row in counts], None, samples=20, seed=0).value
    assert found == pytest.approx(turned, nan_ok=True)


def test_alpha_of_perfect_agreement_and_of_coins() -> None:
    perfect = np.array([[3, 0, 0], [0, 3, 0]] * 10)
    assert alpha(perfect, None, samples=200, seed=0).value == pytest.approx(1.0)
    rng = np.random.default_rng(0)
    coins = rng.multinomial(3, [0, 0.5, 0.5], size=4000)
    found = alpha(coins, None, samples=300, seed=0)
    assert abs(found.value) < 0.05
    assert found.ci95[0] < 0 < found.ci95[1]
