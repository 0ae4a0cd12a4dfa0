"""The square-root law and the turn of over-optimisation, on curves whose truth is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from laif_jax.studies.kl_reward import NATS, WINDOW, analysed, no_fit, sqrt_fit, turn

finite = st.floats(-5, 5)


@given(slope=finite, intercept=finite, kls=st.lists(st.floats(0, 50), min_size=3, max_size=20))
def test_a_curve_that_follows_the_law_is_found_exactly(slope, intercept, kls):
    reward = [intercept + slope * np.sqrt(kl) for kl in kls]
    fit = sqrt_fit(kls, reward)
    if np.ptp(kls) < NATS:  # one distance has no slope
        assert fit is None
        return
    assert fit is not None
    assert fit["slope"] == pytest.approx(slope, abs=1e-5)
    assert fit["intercept"] == pytest.approx(intercept, abs=1e-5)
    assert fit["max_kl"] == pytest.approx(max(kls), abs=1e-9)


def test_a_line_in_kl_is_no_square_root():
    kl = np.linspace(0, 25, 20)
    assert sqrt_fit(kl.tolist(), (0.2 * kl).tolist())["r2"] < 0.95
    assert sqrt_fit(kl.tolist(), np.sqrt(kl).tolist())["r2"] == pytest.approx(1.0)


def test_what_is_not_known_is_left_out_and_too_little_gives_nothing():
    assert sqrt_fit([0.0, 1.0, None, 4.0], [0.0, 1.0, 7.0, 2.0])["n"] == 3
    assert sqrt_fit([0.0, 1.0, 4.0], [0.0, float("nan"), 2.0]) is None
    assert sqrt_fit([2.0, 2.0, 2.0], [0.0, 1.0, 2.0]) is None
    assert turn([0, 1, 2, 3, 4], [0, 1, 2, 1, 0]) is None


def test_a_turn_is_where_quality_peaks():
    kl = np.linspace(0, 30, 31)
    quality = 0.8 + 0.06 * np.sqrt(kl) - 0.0075 * kl  # best at sqrt(kl) = 4
    found = turn(kl.tolist(), quality.tolist())
    assert found is not None
    assert found["kl"] == pytest.approx(16, abs=1.5)
    assert found["last"] < found["quality"] == pytest.approx(0.92, abs=0.002)
    assert found["drop"] == pytest.approx(found["quality"] - found["last"])
    assert found["kl"] == kl[int(found["at"])]  # an evaluation of the run, not a place between some


def test_the_place_of_a_turn_counts_evaluations_that_are_not_known():
    kl = np.linspace(0, 30, 31)
    quality = (0.8 + 0.06 * np.sqrt(kl) - 0.0075 * kl).tolist()
    found = turn(kl.tolist(), quality)
    later = turn([None, *kl.tolist()], [0.5, *quality])
    assert found is not None
    assert later == found | {"at": found["at"] + 1}


def test_a_run_that_stays_at_its_start_has_no_slope_and_the_reason_is_told():
    """Estimates of a KL that is 0 are noise, and reward may fall all the same."""
    row = {"kl": [0.0, -0.010, -0.006, 0.006], "reward": [0.078, -0.075, -0.408, -0.408]}
    assert analysed(row)["fit"] is None
    assert analysed(row)["no_fit"] == "KL moved by less than 0.1 nats"
    moved = row | {"kl": [0.0, 0.1, 0.2, 0.3]}
    assert analysed(moved)["fit"] is not None
    assert analysed(moved)["no_fit"] == ""
    assert no_fit([0.0, 3.0], [1.0, 2.0]) == "fewer than 3 evaluations"


def test_a_rise_to_the_end_or_a_plateau_has_no_turn():
    kl = np.linspace(0, 30, 31)
    assert turn(kl.tolist(), np.sqrt(kl).tolist()) is None
    assert turn(kl.tolist(), np.minimum(kl, 10).tolist()) is None


def test_noise_is_seldom_taken_for_a_turn():
    rng = np.random.default_rng(0)
    kl = np.linspace(0, 10, 12)
    rising = 0.8 + 0.03 * np.sqrt(kl)
    found = [turn(kl.tolist(), (rising + rng.normal(0, 0.01, 12)).tolist()) for _ in range(200)]
    assert sum(one is not None for one in found) < 20
    assert len(kl) >= 2 * WINDOW
