"""Win rate, standard error, wins, losses and ties, by AlpacaEval's definitions (`metrics/helpers.py`, v0.6).

Everything here works on `p`: float64 [N], the probability that the *model* beats the reference, NaN where there is no
verdict. AlpacaEval's preference codes and our judgements are both turned into it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from laif_jax.records import Judgement

Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class WinRate:
    """How often a model beats its reference, by one judge.

    Attributes:
      win_rate: 100 * mean(p), in percent; a tie counts one half.
      standard_error: 100 * std(p, ddof=1) / sqrt(n), in percentage points; NaN if n < 2. It treats prompts as
        independent and knows nothing of training seeds.
      n: verdicts counted. wins, losses, ties: p above, below, equal to 1/2. missing: rows without a verdict.
      coverage: n / (n + missing); 0 for no rows.
      discrete_win_rate: win rate after rounding each verdict to win, loss or tie.
    """

    win_rate: float
    standard_error: float
    n: int
    wins: int
    losses: int
    ties: int
    missing: int
    coverage: float
    discrete_win_rate: float

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; NaN becomes None."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def win_rate(p: ArrayLike) -> WinRate:
    """Summary of verdicts `p` [N] (NaN: no verdict; more dimensions are flattened).

    Raises:
      ValueError: a value outside [0, 1].
    """
    flat = np.asarray(p, dtype=np.float64).ravel()
    kept = flat[~np.isnan(flat)]
    if kept.size and (kept.min() < 0.0 or kept.max() > 1.0):
        raise ValueError(f"win probabilities must lie in [0, 1], found {kept.min()} .. {kept.max()}")
    n = kept.size
    wins, losses = int((kept > 0.5).sum()), int((kept < 0.5).sum())
    ties = n - wins - losses
    return WinRate(
        win_rate=100.0 * float(kept.mean()) if n else float("nan"),
        standard_error=100.0 * float(kept.std(ddof=1)) / np.sqrt(n).item() if n > 1 else float("nan"),
        n=n,
        wins=wins,
        losses=losses,
        ties=ties,
        missing=flat.size - n,
        coverage=n / flat.size if flat.size else 0.0,
        discrete_win_rate=100.0 * (wins + 0.5 * ties) / n if n else float("nan"),
    )


def p_from_preferences(preferences: Iterable[float | None]) -> Probabilities:
    """AlpacaEval's preference codes to `p` [N].

    1: output_1 (the reference) wins; 2: output_2 (the model) wins; between: soft; 0 or 1.5: tie; None or NaN: missing.

    Raises:
      ValueError: any other value, with its row.
    """
    p = np.array([np.nan if code is None else code for code in preferences], dtype=np.float64)
    bad = ~(np.isnan(p) | (p == 0.0) | ((p >= 1.0) & (p <= 2.0)))
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(
            f"preference row {row}: {p[row]} is none of AlpacaEval's codes (1..2, 0 or 1.5 for a tie)"
        )
    return np.where(p == 0.0, 0.5, p - 1.0)


def p_from_judgements(judgements: Iterable[Judgement]) -> Probabilities:
    """Judgements to `p` [N], for comparisons whose `a` is the reference and whose `b` is the model, as AlpacaEval's
    output_1 and output_2. A judgement without a probability (unparsable, refused, failed) is missing, never a tie."""
    return np.array([np.nan if j.p_b is None else j.p_b for j in judgements], dtype=np.float64)


def align(judgements: Sequence[Judgement], comparison_ids: Sequence[str]) -> Probabilities:
    """`p` [N] in the order of `comparison_ids`; a comparison without a judgement is missing.

    Raises:
      ValueError: two different verdicts for one comparison (different orders or judges were mixed).
    """
    found: dict[str, float] = {}
    for judgement, p in zip(judgements, p_from_judgements(judgements), strict=True):
        known = found.setdefault(judgement.comparison_id, float(p))
        if known != p and not (known != known and p != p):
            raise ValueError(
                f"comparison {judgement.comparison_id} has two verdicts, {known} and {p}; give the judgements of "
                "one judge, merged over the orders"
            )
    return np.array([found.get(name, np.nan) for name in comparison_ids], dtype=np.float64)
