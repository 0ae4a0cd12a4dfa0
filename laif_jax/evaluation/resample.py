"""Intervals of statistics of sums over rows: whole clusters of rows are drawn, and their sums added.

A share, a kappa, an expected calibration error and a regression by least squares are all functions of sums. A resample
needs each cluster's sums only, and a thousand of them cost one matrix product.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]  # sums [S, K] -> values [S]
SAMPLES = 1000
_BATCH = 4_000_000  # resamples are made in batches of about this many floats


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95% percentile interval. NaN where undefined. `n`: rows behind it."""

    value: float
    ci95: tuple[float, float]
    n: int

    def to_dict(self) -> dict[str, Any]:
        """`value`, `ci95` and `n` as plain JSON: None where undefined."""
        low, high = self.ci95
        return {"value": plain(self.value), "ci95": [plain(low), plain(high)], "n": self.n}


NOTHING = Estimate(float("nan"), (float("nan"), float("nan")), 0)


def plain(value: float) -> float | None:
    """A number for JSON; None for what is not finite."""
    return float(value) if np.isfinite(value) else None


def cluster_sums(table: ArrayLike, clusters: Sequence[Hashable] | None) -> Floats:
    """Rows [N, K] added up per cluster, [C, K]; None: each row is its own."""
    rows = np.asarray(table, dtype=np.float64)
    if clusters is None:
        return rows
    if len(clusters) != len(rows):
        raise ValueError(f"{len(rows)} rows and {len(clusters)} clusters: they must match")
    places: dict[Hashable, int] = {}
    index = np.array([places.setdefault(name, len(places)) for name in clusters], dtype=np.int64)
    sums = np.zeros((len(places), rows.shape[1]))
    np.add.at(sums, index, rows)
    return sums


def resampled_sums(sums: Floats, samples: int, seed: int) -> Floats:
    """Totals [S, K] of clusters [C, K] drawn with replacement."""
    count = len(sums)
    rng = np.random.default_rng(seed)
    drawn = []
    for start in range(0, samples, size := max(1, _BATCH // count)):
        rows = min(size, samples - start)
        times = rng.multinomial(count, np.full(count, 1 / count), size=rows).astype(np.float64)
        drawn.append(times @ sums)
    return np.concatenate(drawn)


def estimate(
    table: ArrayLike,
    statistic: Statistic,
    *,
    clusters: Sequence[Hashable] | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Estimate:
    """A statistic of the sums of `table` [N, K] over rows, with its interval; resamples without a value are left out.

    Args:
      statistic: sums [S, K] -> values [S], NaN where undefined.
      clusters: what each row belongs to, such as its prompt; whole clusters are drawn. None: rows are independent.
    """
    (found,) = estimates(
        table, lambda sums: statistic(sums)[:, None], 1, clusters=clusters, samples=samples, seed=seed
    )
    return found


def estimates(
    table: ArrayLike,
    statistic: Statistic,
    count: int,
    *,
    clusters: Sequence[Hashable] | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
) -> list[Estimate]:
    """As `estimate`, of `count` statistics from the same resamples: sums [S, K] -> values [S, count]."""
    rows = np.asarray(table, dtype=np.float64)
    if not len(rows):
        return [NOTHING] * count
    sums = cluster_sums(rows, clusters)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(sums.sum(axis=0, keepdims=True))[0]
        draws = statistic(resampled_sums(sums, samples, seed))
    return [_interval(float(value), column, len(rows)) for value, column in zip(values, draws.T, strict=True)]


def _interval(value: float, draws: Floats, rows: int) -> Estimate:
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(value) or not draws.size:
        return Estimate(value, NOTHING.ci95, rows)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(value, (float(low), float(high)), rows)


def ratio(sums: Floats) -> Floats:
    """First column over the second."""
    return sums[:, 0] / sums[:, 1]


def share(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of `values` [N] in [0, 1] (NaN dropped).

    Where all are 0, or all 1, resampling shows no spread; the interval is then the exact binomial one for as many
    clusters: 200 of 200 is 98.2% to 100%.
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    known = ~np.isnan(array)
    kept = array[known]
    if clusters is not None:
        clusters = [name for name, here in zip(clusters, known, strict=True) if here]
    found = estimate(
        np.stack([kept, np.ones(kept.size)], axis=1), ratio, clusters=clusters, samples=samples, seed=seed
    )
    if kept.size and (kept == kept[0]).all() and kept[0] in (0.0, 1.0):
        reach = 0.025 ** (1 / (len(set(clusters)) if clusters is not None else kept.size))
        return Estimate(found.value, (reach, 1.0) if kept[0] else (0.0, 1.0 - reach), found.n)
    return found


def mean(values: ArrayLike, clusters: Sequence[Hashable] | None = None, **options: int) -> Estimate:
    """Mean of any `values` [N] (NaN dropped)."""
    array = np.asarray(values, dtype=np.float64).ravel()
    known = ~np.isnan(array)
    if clusters is not None:
        clusters = [name for name, here in zip(clusters, known, strict=True) if here]
    table = np.stack([array[known], np.ones(int(known.sum()))], axis=1)
    return estimate(table, ratio, clusters=clusters, **options)
