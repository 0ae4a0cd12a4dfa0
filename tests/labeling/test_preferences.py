"""Training rows from judgements."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laif_jax.labeling import to_preferences
from laif_jax.records import Judgement, Status
from tests.labeling.helpers import planted


def judgement(comparison_id: str, status: Status, p_b: float | None) -> Judgement:
    return Judgement(
        comparison_id=comparison_id, critic="c", order="both", status=status, p_b=p_b, parts=("x", "y")
    )


_OUTCOMES = st.one_of(
    st.none(),
    st.floats(0, 1).filter(lambda p: p != 0.5),
    st.just(0.5),
    st.sampled_from([Status.FAILED, Status.REFUSED, Status.UNPARSABLE]),
)


@given(outcomes=st.lists(_OUTCOMES, max_size=8), keep_ties=st.booleans(), turned=st.booleans())
def test_every_comparison_is_counted_once_and_only_labels_become_rows(outcomes, keep_ties, turned) -> None:
    items = planted(len(outcomes))
    judgements = []
    for item, outcome in zip(items, outcomes):
        if isinstance(outcome, Status):
            judgements.append(judgement(item.id, outcome, None))
        elif outcome is not None:
            status = Status.TIE if outcome == 0.5 else Status.OK
            judgements.append(judgement(item.id, status, outcome))
    rows, counts = to_preferences(items, judgements[::-1] if turned else judgements, keep_ties=keep_ties)
    states = {name: count for name, count in counts.items() if name not in ("comparisons", "preferences")}
    assert sum(states.values()) == counts["comparisons"] == len(items)
    assert counts["missing"] == outcomes.count(None)
    assert counts["preferences"] == len(rows) == counts["ok"] + (counts["tie"] if keep_ties else 0)
    expected = [
        (item, outcome)
        for item, outcome in zip(items, outcomes)
        if isinstance(outcome, float) and (keep_ties or outcome != 0.5)
    ]
    for row, (item, p_b) in zip(rows, expected, strict=True):
        assert row.prompt == item.prompt
        assert {row.chosen.id, row.rejected.id} == {item.a.id, item.b.id}
        assert row.p_chosen == (p_b if row.chosen.id == item.b.id else 1.0 - p_b)
        assert row.p_chosen >= 0.5
        assert len(row.judgement_ids) == 3


def test_single_orders_are_refused() -> None:
    (item,) = planted(1)
    twice = [judgement(item.id, Status.OK, p) for p in (0.1, 0.9)]
    with pytest.raises(ValueError, match="final"):
        to_preferences([item], twice)
