"""Lengths, the longest-wins baseline, and a judge's agreement with humans."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from laif_jax.evaluation import agreement as agree
from laif_jax.evaluation import length
from laif_jax.records import DataError, read_jsonl, write_jsonl

DATA = os.environ.get("LAIF_DATA")
LABELS = st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=30)


def test_lengths():
    assert length.mean_length(["ab", "abcd"]) == 3.0
    assert math.isnan(length.mean_length([]))
    assert length.length_summary(["", "abcd"])["empty"] == 0.5
    np.testing.assert_array_equal(length.longest_wins(["a", "ab", "ab"], ["ab", "a", "xy"]), [1.0, 0.0, 0.5])
    assert length.longest_wins_rate(["a", "ab"], ["ab", "a"]).win_rate == 50.0
    with pytest.raises(ValueError):
        length.longest_wins(["a"], [])


def test_longest_wins_accuracy_skips_what_the_judge_did_not_decide():
    p = np.array([1.0, 0.0, 0.5, np.nan, 0.9])
    references, outputs = ["a"] * 5, ["ab", "ab", "ab", "ab", "x"]
    assert length.longest_wins_accuracy(p, references, outputs) == pytest.approx((1 + 0 + 0.5) / 3)
    assert math.isnan(length.longest_wins_accuracy(np.array([0.5]), ["a"], ["b"]))


def test_labels():
    assert agree.labels_from_p([0.9, 0.1, 0.5, None, float("nan")]) == [2, 1, 0, None, None]
    assert agree.label_from_p(0.52, margin=0.05) == 0
    assert agree.human_label([1, 1, 2]) == 1
    assert agree.human_label([1, 2]) == 0
    assert agree.human_label([0, 1, 2]) == 0
    for bad in ([], [3]):
        with pytest.raises(ValueError, match="human labels"):
            agree.human_label(bad)


def test_agreement_by_hand():
    human = [[1], [2], [2], [0], [2]]
    judge = [1, 1, 0, 0, None]
    texts = [("longer", "x"), ("x", "longer"), ("x", "longer"), ("x", "y"), ("x", "y")]
    result = agree.agreement(judge, human, texts)
    assert (result.n, result.n_decided) == (5, 3)
    assert result.coverage == pytest.approx(0.8)
    assert result.with_ties == pytest.approx(2 / 4)
    assert result.without_ties == pytest.approx((1 + 0 + 0.5) / 3)
    assert result.longest_wins == 1.0
    assert result.majority == pytest.approx(2 / 3)
    # Judge: two 1s, two 0s; humans: 0, 1, 2, 2. Chance = 1/2 * 1/4 + 1/2 * 1/4.
    assert result.kappa == pytest.approx((0.5 - 0.25) / 0.75)


@given(LABELS)
def test_a_perfect_judge(labels):
    texts = [("a", "bb")] * len(labels)
    result = agree.agreement(labels, [[label] for label in labels], texts, samples=50)
    assert result.with_ties == 1.0
    assert math.isnan(result.kappa) if len(set(labels)) == 1 else result.kappa == pytest.approx(1.0)
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_coin_has_no_kappa():
    rng = np.random.default_rng(0)
    judge, human = rng.integers(1, 3, 4000), rng.integers(1, 3, 4000)
    result = agree.agreement(judge.tolist(), human[:, None].tolist(), [("a", "b")] * 4000)
    assert abs(result.kappa) < 0.05
    assert result.ci95[0] < 0.5 < result.ci95[1]


def test_per_source():
    rows = agree.agreement_by_source([1, 2, 1], [[1], [1], [1]], [("a", "b")] * 3, ["x", "y", "x"])
    assert [(row.source, row.n, row.without_ties) for row in rows] == [
        ("all", 3, 2 / 3),
        ("x", 2, 1),
        ("y", 1, 0),
    ]


def test_rows_must_match():
    with pytest.raises(ValueError, match="rows must match"):
        agree.agreement([1], [], [])


def test_reading_human_labels(tmp_path):
    row = {"source": "x", "prompt": "p", "a": True, "b": "text", "human": [2, 2, 1], "more": 1}
    path = tmp_path / "labels.jsonl"
    write_jsonl(path, [{**row, "prompt": str(i)} for i in range(50)])
    rows = agree.read_human_labels(path)
    assert len(rows) == 50
    assert rows[0] == agree.HumanRow("x", "0", "True", "text", (2, 2, 1))
    sample = agree.read_human_labels(path, limit=10, seed=1)
    assert len(sample) == 10
    assert sample == agree.read_human_labels(path, limit=10, seed=1)
    assert [r.prompt for r in sample] == sorted((r.prompt for r in sample), key=int)
    for bad in ({"human": [5]}, {"human": []}, {"human": None}):
        write_jsonl(path, [row, {**row, **bad}])
        with pytest.raises(DataError, match="row 2"):
            agree.read_human_labels(path)
    write_jsonl(path, [])
    with pytest.raises(DataError, match="no rows"):
        agree.read_human_labels(path)


def test_no_rows():
    result = agree.agreement([], [], [])
    assert result.n == 0
    assert result.to_dict()["without_ties"] is None


@pytest.mark.real
@pytest.mark.skipif(DATA is None, reason="LAIF_DATA is not set: the human labels are not here")
def test_published_critic_against_the_humans_of_pandalm():
    """gpt-3.5-turbo's labels beat a coin and chance, and its unusable answers lower coverage, not agreement."""
    path = Path(str(DATA)) / "critics" / "human_labels.jsonl.gz"
    critics = [row["critics"]["gpt-3.5-turbo"] for row in read_jsonl(path) if row["source"] == "pandalm"]
    rows = [row for row in agree.read_human_labels(path) if row.source == "pandalm"]
    judge = [{"1": 1, "2": 2, "Tie": 0}.get(name) for name in critics]
    result = agree.agreement(judge, [row.human for row in rows], [(row.a, row.b) for row in rows])
    assert result.n == 999
    assert result.coverage == pytest.approx(974 / 999)
    assert result.ci95[0] > 0.6
    assert result.kappa > 0.3
