"""Agreement beyond chance: Cohen's kappa of two labellings, Krippendorff's alpha of any number with gaps.

Alpha after Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011): 1 - observed / expected disagreement,
from the coincidences of the values within units; units with fewer than two values say nothing and are left out.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from laif_jax.evaluation.resample import NOTHING, Estimate, Floats, Statistic, estimate

Metric = Literal["nominal", "interval"]
LABELS = 3  # 0 tie, 1 a, 2 b


def one_hot(labels: ArrayLike, count: int) -> Floats:
    """[N] labels 0 .. count - 1 as [N, count]; negative ones are rows of zeros."""
    array = np.asarray(labels, dtype=np.int64)
    table = np.zeros((len(array), count))
    known = array >= 0
    table[np.flatnonzero(known), array[known]] = 1.0
    return table


def kappa_of(sums: Floats) -> Floats:
    """Cohen's kappa from confusion counts [S, C * C]: (observed - chance) / (1 - chance), NaN where chance is 1."""
    size = round(sums.shape[1] ** 0.5)
    counts = sums.reshape(-1, size, size)
    counts = counts / counts.sum(axis=(1, 2), keepdims=True)
    observed = np.trace(counts, axis1=1, axis2=2)
    chance = (counts.sum(axis=2) * counts.sum(axis=1)).sum(axis=1)
    return np.where(chance < 1.0, (observed - chance) / np.where(chance < 1.0, 1.0 - chance, 1.0), np.nan)


def raw_of(sums: Floats) -> Floats:
    """Share of equal labels from confusion counts [S, C * C]."""
    size = round(sums.shape[1] ** 0.5)
    counts = sums.reshape(-1, size, size)
    return np.trace(counts, axis1=1, axis2=2) / counts.sum(axis=(1, 2))


def confusion(one: ArrayLike, other: ArrayLike, count: int = LABELS) -> Floats:
    """Each row's cell of the confusion table, [N, count * count]; rows where either is missing (-1) are zeros."""
    first, second = one_hot(one, count), one_hot(other, count)
    return (first[:, :, None] * second[:, None, :]).reshape(len(first), count * count)


def cohen_kappa(one: ArrayLike, other: ArrayLike, count: int = LABELS) -> float:
    """Cohen's kappa of labels 0 .. count - 1; rows where either is -1 are left out. NaN where chance explains all."""
    with np.errstate(invalid="ignore"):
        return float(kappa_of(confusion(one, other, count).sum(axis=0, keepdims=True))[0])


def pairwise(
    one: ArrayLike, other: ArrayLike, clusters: Sequence[Hashable] | None, *, samples: int, seed: int
) -> dict[str, Estimate]:
    """`raw` agreement and `kappa` of two labellings, on rows that both labelled."""
    first, second = np.asarray(one), np.asarray(other)
    both = (first >= 0) & (second >= 0)
    if not both.any():
        return {"raw": NOTHING, "kappa": NOTHING}
    table = confusion(first[both], second[both])
    groups = None if clusters is None else [c for c, keep in zip(clusters, both, strict=True) if keep]
    return {
        name: estimate(table, statistic, clusters=groups, samples=samples, seed=seed)
        for name, statistic in (("raw", raw_of), ("kappa", kappa_of))
    }


# ---- Krippendorff's alpha ----------------------------------------------------------------------------------------


def coincidences(counts: ArrayLike) -> Floats:
    """Each unit's coincidences [N, C * C] from how often it got each value, counts [N, C]."""
    given = np.asarray(counts, dtype=np.float64)
    raters = given.sum(axis=1)
    usable = np.where(raters > 1, given.T, 0.0).T
    pairs = usable[:, :, None] * usable[:, None, :]
    size = given.shape[1]
    pairs[:, range(size), range(size)] -= usable  # nobody is paired with himself
    return (pairs / np.maximum(raters - 1, 1)[:, None, None]).reshape(len(given), size * size)


def _distances(values: ArrayLike, metric: Metric) -> Floats:
    points = np.asarray(values, dtype=np.float64)
    difference = points[:, None] - points[None, :]
    return (difference != 0).astype(np.float64) if metric == "nominal" else difference**2


def alpha_of(distances: Floats) -> Statistic:
    """Alpha from summed coincidences [S, C * C]; NaN where only one value occurs."""
    size = len(distances)

    def statistic(sums: Floats) -> Floats:
        table = sums.reshape(-1, size, size)
        marginal = table.sum(axis=2)
        total = marginal.sum(axis=1)
        observed = (table * distances).sum(axis=(1, 2))
        expected = np.einsum("sc,ck,sk->s", marginal, distances, marginal)
        safe = np.where(expected > 0, expected, 1.0)
        return np.where(expected > 0, 1.0 - (total - 1) * observed / safe, np.nan)

    return statistic


def krippendorff_alpha(ratings: ArrayLike, metric: Metric = "nominal") -> float:
    """Alpha of ratings [raters, units], NaN where a rater gave none; NaN if there is nothing to agree about."""
    table = np.asarray(ratings, dtype=np.float64)
    values = np.unique(table[~np.isnan(table)])
    if not values.size:
        return float("nan")
    counts = (table[:, :, None] == values).sum(axis=0)
    statistic = alpha_of(_distances(values, metric))
    return float(statistic(coincidences(counts).sum(axis=0, keepdims=True))[0])


def alpha(counts: ArrayLike, clusters: Sequence[Hashable] | None, *, samples: int, seed: int) -> Estimate:
    """Nominal alpha with its interval.

    Args:
      counts: how often each unit got each label, [N, C], over all raters. clusters: per unit.
    """
    given = np.asarray(counts, dtype=np.float64)
    usable = given.sum(axis=1) > 1
    if not usable.any():
        return NOTHING
    groups = None if clusters is None else [c for c, keep in zip(clusters, usable, strict=True) if keep]
    statistic: Callable[[Floats], Floats] = alpha_of(_distances(np.arange(given.shape[1]), "nominal"))
    return estimate(coincidences(given[usable]), statistic, clusters=groups, samples=samples, seed=seed)
