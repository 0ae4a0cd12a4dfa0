"""What a critic's labels look like: states, certainty, and whether the order of showing mattered."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from laif_jax.records import Judgement, Status


def label_summary(judgements: Sequence[Judgement], single: Iterable[Judgement] = ()) -> dict[str, Any]:
    """Counts and quality of one critic's labels, as plain JSON values (None where undefined).

    Args:
      judgements: one verdict per comparison. single: the verdicts in one order each ("ab", "ba") behind them, for what
        depends on the order; verdicts in `judgements` with order "ab" or "ba" count too.

    Returns:
      n: verdicts. ok, tie, unparsable, refused, failed: how many ended so. coverage: share with a probability.
      mean_margin: mean |p_b - 1/2| of those. hard: share of them with |p_b - 1/2| > 0.45.
      swap_pairs: comparisons judged in both orders. swap_consistency: share of them in which both orders named the
        same side (or both a tie). first_shown_wins: share of decided single-order verdicts for the answer shown first.
      mean_outside: mean probability that log-prob answers left to anything but the two options.
      cost: US dollars, summed over what is known.
    """
    judgements = list(judgements)
    p = np.array([j.p_b for j in judgements if j.p_b is not None], dtype=np.float64)
    margin = np.abs(p - 0.5)
    states = Counter(judgement.status for judgement in judgements)
    orders: dict[str, dict[str, float]] = defaultdict(dict)
    for judgement in [*judgements, *single]:
        if judgement.order != "both" and judgement.p_b is not None:
            orders[judgement.comparison_id][judgement.order] = judgement.p_b
    swapped = [
        np.sign(both["ab"] - 0.5) == np.sign(both["ba"] - 0.5) for both in orders.values() if len(both) == 2
    ]
    first = [
        (p_b < 0.5) == (order == "ab")
        for both in orders.values()
        for order, p_b in both.items()
        if p_b != 0.5
    ]
    costs = [judgement.cost for judgement in judgements if judgement.cost is not None]
    return {
        "n": len(judgements),
        **{status.value: states[status] for status in Status},
        "coverage": len(p) / len(judgements) if judgements else None,
        "mean_margin": _mean(margin),
        "hard": _mean(margin > 0.45),
        "swap_pairs": len(swapped),
        "swap_consistency": _mean(swapped),
        "first_shown_wins": _mean(first),
        "mean_outside": _mean([j.meta["outside"] for j in judgements if "outside" in j.meta]),
        "cost": float(sum(costs)) if costs else None,
    }


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None
