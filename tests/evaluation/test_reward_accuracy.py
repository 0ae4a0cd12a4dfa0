"""Accuracy of a reward model beside its trivial rival, calibration, and intervals over prompts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from laif_jax.evaluation.bootstrap import bootstrap_interval
from laif_jax.evaluation.reward_accuracy import (
    ScoredPairs,
    accuracy,
    by_group,
    by_length,
    calibration,
    distribution,
    hits,
    members,
    reward_report,
)


def scored(a, b, p_b, length_a=None, length_b=None, prompts=None, groups=()) -> ScoredPairs:
    n = len(p_b)
    return ScoredPairs(
        a=np.asarray(a, np.float64),
        b=np.asarray(b, np.float64),
        p_b=np.asarray(p_b, np.float64),
        length_a=np.asarray(length_a if length_a is not None else [10] * n, np.float64),
        length_b=np.asarray(length_b if length_b is not None else [20] * n, np.float64),
        prompts=prompts or [str(i) for i in range(n)],
        groups=groups,
    )


def test_accuracy_by_hand() -> None:
    # Right; wrong; the model's tie; the label's tie; right by a soft label.
    pairs = scored(
        [0, 1, 2, 5, 3], [1, 0, 2, 0, 1], [1.0, 1.0, 0.0, 0.5, 0.2], [9, 9, 5, 5, 9], [5, 9, 9, 9, 5]
    )
    assert hits(pairs.difference, pairs.p_b).tolist()[:3] == [1.0, 0.0, 0.5]
    found = accuracy(pairs)
    assert (found.n, found.ties, found.prompts) == (4, 1, 4)
    assert found.accuracy == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert found.longest_wins == pytest.approx((0 + 0.5 + 0 + 1) / 4)
    assert found.gain == pytest.approx(found.accuracy - found.longest_wins)
    assert found.ci95[0] <= found.accuracy <= found.ci95[1]


@given(st.lists(st.tuples(st.integers(-3, 3), st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])), min_size=1))
def test_swapping_the_sides_changes_nothing(rows) -> None:
    d, p = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    np.testing.assert_array_equal(hits(d, p), hits(-d, 1 - p))
    here, there = calibration(d, p), calibration(-d, 1 - p)
    assert here["ece"] == pytest.approx(there["ece"])
    assert here["log_loss"] == pytest.approx(there["log_loss"])


def test_an_interval_over_prompts_is_wider_where_their_pairs_are_alike() -> None:
    rng = np.random.default_rng(0)
    of_prompt = rng.integers(0, 2, 60)
    values, prompts = np.repeat(of_prompt, 10).astype(float), np.repeat(np.arange(60), 10).tolist()
    rows = bootstrap_interval(values)
    clustered = bootstrap_interval(values, clusters=prompts)
    assert (clustered[1] - clustered[0]) / (rows[1] - rows[0]) == pytest.approx(10**0.5, rel=0.15)
    alone = bootstrap_interval(values[::10], clusters=list(range(60)), seed=3)
    assert alone == bootstrap_interval(values[::10], seed=3)


def test_calibration_of_a_planted_model() -> None:
    rng = np.random.default_rng(1)
    d = rng.normal(0, 2, 40_000)
    won = (rng.random(d.size) < 1 / (1 + np.exp(-d))).astype(float)
    assert calibration(d, won)["ece"] < 0.01
    too_sure = calibration(3 * d, won)
    assert too_sure["ece"] > 0.08
    assert too_sure["overconfidence"] == pytest.approx(too_sure["ece"], abs=0.01)
    assert calibration(np.zeros(3), np.array([1.0, 0.0, 0.5]))["log_loss"] == pytest.approx(np.log(2))


def test_a_model_that_goes_by_length_is_seen() -> None:
    rng = np.random.default_rng(2)
    length_a, length_b = rng.integers(1, 1500, (2, 500))
    pairs = scored(length_a, length_b, rng.integers(0, 2, 500), length_a, length_b)
    rows = by_length(pairs)
    assert sum(row["n"] for row in rows) == 500
    assert all(row["accuracy"] == row["longest_wins"] for row in rows)
    assert rows[0]["low"] is None
    assert rows[0]["accuracy"] == 0.0
    assert rows[-1]["high"] is None
    assert rows[-1]["accuracy"] == 1.0
    assert accuracy(pairs).gain_ci95 == (0.0, 0.0)


def test_groups_and_members() -> None:
    groups = [{"opponent": name} for name in ("x", "x", "y")]
    pairs = scored([[0, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, -1, 3]], [1, 1, 0], groups=groups)
    found = by_group(pairs)["opponent"]
    assert list(found) == ["x", "y"]
    assert found["x"]["accuracy"] == pytest.approx(0.75)  # the members' mean is a tie on the second
    assert found["y"]["accuracy"] == 0.0
    ensemble = members(pairs)
    assert ensemble is not None
    assert ensemble["accuracy"] == pytest.approx([2 / 3, 1 / 3])
    assert ensemble["agree"] == pytest.approx(2 / 3)
    assert members(scored([0], [1], [1.0])) is None


def test_distribution_counts_every_pair_with_a_winner() -> None:
    found = distribution(scored([0, 5, 9], [1, 2, 9], [1, 0, 0.5]))
    assert sum(found["chosen"]) == sum(found["rejected"]) == 2
    assert (found["chosen_mean"], found["rejected_mean"], found["margin_mean"]) == (3.0, 1.0, 2.0)


def test_a_report_is_json_and_refuses_what_is_no_number() -> None:
    import json

    only_ties = reward_report(scored([0.0], [1.0], [0.5]))
    assert only_ties["n"] == 0
    assert only_ties["accuracy"] is None
    json.dumps(only_ties, allow_nan=False)
    with pytest.raises(ValueError, match="1 of 2 pairs"):
        reward_report(scored([0.0, np.nan], [1.0, 1.0], [1.0, 0.0]))
    with pytest.raises(ValueError, match="rows must match"):
        scored([0.0], [1.0], [1.0], prompts=["a", "b"])
