"""Paired differences: coverage of the interval, pairing, missing cells, seeds."""

import numpy as np
import pytest

from laif_jax.evaluation.bootstrap import _student, bootstrap_interval, paired_difference


def _arms(rng, *, gap, prompts=120, seeds=1, seed_sd=0.0):
    """Two arms with a true difference of `gap` points, on prompts whose difficulty they share."""
    difficulty = rng.normal(0.5, 0.25, size=prompts)
    offsets = rng.normal(0.0, seed_sd, size=(seeds, 1))
    a = difficulty + gap / 200 + offsets + rng.normal(0, 0.1, size=(seeds, prompts))
    b = difficulty - gap / 200 + rng.normal(0, 0.1, size=(seeds, prompts))
    return a, b


def test_delta_and_error_match_the_textbook_with_one_seed():
    a, b = _arms(np.random.default_rng(0), gap=5)
    result = paired_difference(a[0], b[0], samples=4000)
    difference = 100 * (a - b)[0]
    assert result.delta == pytest.approx(difference.mean())
    assert result.standard_error == pytest.approx(difference.std(ddof=1) / np.sqrt(len(difference)), rel=0.06)
    assert result.ci95[0] < result.delta < result.ci95[1]
    assert (result.n, result.cells, result.seeds) == (120, 120, 1)
    assert result.detectable == pytest.approx(2.8 * result.standard_error, rel=0.06)


def test_pairing_removes_shared_difficulty():
    rng = np.random.default_rng(1)
    a, b = _arms(rng, gap=5)
    paired = paired_difference(a, b)
    shuffled = paired_difference(a, rng.permuted(b, axis=1))
    assert paired.standard_error < 0.5 * shuffled.standard_error


@pytest.mark.parametrize(("seeds", "seed_sd"), [(1, 0.0), (3, 0.0), (3, 0.02), (3, 0.06), (5, 0.06)])
def test_interval_covers_the_truth(seeds, seed_sd):
    """The 95% interval holds the planted gap about 95 times in 100, whether prompts or seeds matter most."""
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(200):
        a, b = _arms(rng, gap=4, prompts=80, seeds=seeds, seed_sd=seed_sd)
        low, high = paired_difference(a, b, samples=400, seed=trial).ci95
        hits += low <= 4 <= high
    assert 0.90 <= hits / 200 < 1.0


def test_standard_error_with_seeds_is_the_spread_over_studies():
    """The mean reported error is the spread of `delta` over repeated studies."""
    rng = np.random.default_rng(7)
    found = [paired_difference(*_arms(rng, gap=4, seeds=5, seed_sd=0.04), samples=200) for _ in range(200)]
    spread = np.std([result.delta for result in found])
    assert np.sqrt(np.mean([result.standard_error**2 for result in found])) == pytest.approx(spread, rel=0.15)


def test_student_quantiles():
    """Against the usual table."""
    for degrees, value in {1: 12.706, 2: 4.303, 10: 2.228, 11: 2.201, 20: 2.086, 60: 2.000}.items():
        assert _student(degrees) == pytest.approx(value, abs=0.003)


def test_seed_noise_widens_the_interval():
    """Many prompts cannot hide that recipes differ by seed."""
    rng = np.random.default_rng(3)
    a, b = _arms(rng, gap=0, prompts=2000, seeds=3, seed_sd=0.05)
    crossed = paired_difference(a, b)
    pooled = paired_difference(a.reshape(1, -1), b.reshape(1, -1))
    assert crossed.standard_error > 3 * pooled.standard_error


def test_p_value_agrees_with_the_interval():
    rng = np.random.default_rng(4)
    for gap in (0.0, 1.0, 2.0, 4.0, 8.0):
        result = paired_difference(*_arms(rng, gap=gap))
        excludes = result.ci95[0] > 0 or result.ci95[1] < 0
        assert excludes == (result.p_value < 0.05)
    same = paired_difference([0.5, 1.0, 0.0], [0.5, 1.0, 0.0])
    assert same.delta == 0.0
    assert same.p_value == 1.0


def test_antisymmetric_and_deterministic():
    a, b = _arms(np.random.default_rng(5), gap=3, seeds=3)
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert one == paired_difference(a, b)
    assert one.delta == pytest.approx(-other.delta)
    np.testing.assert_allclose(one.ci95, -np.array(other.ci95)[::-1])


def test_missing_verdicts_are_dropped_in_pairs():
    a, b = np.array([[1.0, 0.0, np.nan, 1.0]]), np.array([[0.0, np.nan, 1.0, 0.0]])
    result = paired_difference(a, b)
    assert result.delta == 100.0
    assert (result.n, result.cells) == (2, 2)
    several = paired_difference([[1.0, np.nan], [0.5, 0.5]], [[0.0, 0.0], [0.5, 0.5]])
    assert several.delta == pytest.approx(100 / 3)
    assert (several.n, several.cells, several.seeds) == (2, 3, 2)


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="nothing to compare"):
        paired_difference([np.nan, 1.0], [1.0, np.nan])
    with pytest.raises(ValueError, match="same seeds and prompts"):
        paired_difference(np.zeros((2, 3)), np.zeros((3, 3)))


def test_interval_of_a_mean():
    values = np.random.default_rng(6).binomial(1, 0.7, size=400).astype(float)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
    assert all(np.isnan(bootstrap_interval([])))
