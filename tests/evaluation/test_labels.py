"""Summary of a critic's labels."""

import json

import pytest

from laif_jax.evaluation.labels import label_summary
from laif_jax.records import Judgement, Status


def _judgement(name, order, p_b, status=Status.OK, **more):
    return Judgement(comparison_id=name, critic="c", order=order, status=status, p_b=p_b, **more)


def test_by_hand():
    merged = [
        _judgement("x", "both", 0.9, cost=0.5),
        _judgement("y", "both", 0.5, Status.TIE, cost=0.25),
        _judgement("z", "both", None, Status.FAILED),
    ]
    single = [
        _judgement("x", "ab", 0.98),
        _judgement("x", "ba", 0.82),
        _judgement("y", "ab", 0.1),  # the first shown wins in both orders: inconsistent
        _judgement("y", "ba", 0.9),
        _judgement("z", "ab", 0.1),
    ]
    summary = label_summary(merged, single)
    assert (summary["n"], summary["ok"], summary["tie"], summary["failed"], summary["refused"]) == (
        3,
        1,
        1,
        1,
        0,
    )
    assert summary["coverage"] == pytest.approx(2 / 3)
    assert summary["mean_margin"] == pytest.approx(0.2)
    assert (summary["swap_pairs"], summary["swap_consistency"]) == (2, 0.5)
    # First shown: x/ab no, x/ba yes, y/ab yes, y/ba yes, z/ab yes.
    assert summary["first_shown_wins"] == pytest.approx(4 / 5)
    assert summary["cost"] == 0.75


def test_no_labels():
    summary = label_summary([])
    assert summary["n"] == 0
    assert summary["coverage"] is None
    json.dumps(summary, allow_nan=False)
