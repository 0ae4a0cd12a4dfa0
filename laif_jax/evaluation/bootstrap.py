"""Differences between two arms, paired on prompts and training seeds, with bootstrap intervals.

Two arms answer the same prompts and are judged against the same references, so what is hard about a prompt cancels in
the difference. Trained models differ by seed too, and every prompt is answered by every seed: prompts and seeds are
*crossed*. So both are resampled, independently (the pigeonhole bootstrap; Owen 2007, "The pigeonhole bootstrap").
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_BATCH_CELLS = 4_000_000  # resamples are made in batches of about this many floats


@dataclass(frozen=True)
class Difference:
    """Win rate of `a` minus win rate of `b`, in percentage points, over the cells that both have.

    Attributes:
      ci95: percentile interval. standard_error: of the bootstrap distribution.
      p_value: two-sided; the interval excludes 0 exactly when it is below about 0.05.
      n: prompts with at least one cell in both arms. cells: (prompt, seed) cells. seeds: how many.
      detectable: the true difference that a study of this size finds with probability 0.8: 2.80 standard errors.
    """

    delta: float
    ci95: tuple[float, float]
    standard_error: float
    p_value: float
    n: int
    cells: int
    seeds: int
    detectable: float

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {**asdict(self), "ci95": list(self.ci95)}


def paired_difference(a: ArrayLike, b: ArrayLike, *, samples: int = 2000, seed: int = 0) -> Difference:
    """Difference of two arms' win rates with a 95% interval.

    With one seed, prompts alone are resampled, and the interval is about these two trained models. With several, seeds
    are resampled too, and it is about the recipes. The spread of a few seeds is underestimated by plain resampling, by
    (S - 1) / S in variance; each seed's deviation is widened by sqrt(S / (S - 1)) to undo that. Intervals from fewer
    than about five seeds stay rough all the same.

    Args:
      a, b: probability of winning against the reference, [N] or [S, N], NaN where there is no verdict. Column j is the
        same prompt in both, row i the same seed.
      samples: bootstrap resamples. seed: of the resampling; the result is a function of the arguments alone.

    Raises:
      ValueError: shapes differ, or no prompt has a verdict in both arms.
    """
    left, right = (np.atleast_2d(np.asarray(x, dtype=np.float64)) for x in (a, b))
    if left.shape != right.shape or left.ndim != 2:
        raise ValueError(
            f"the arms must have the same seeds and prompts to be paired, found {left.shape} and {right.shape}"
        )
    cells = 100.0 * (left - right)  # [S, N]
    present = ~np.isnan(cells)
    cells, present = cells[present.any(axis=1)], present[present.any(axis=1)]
    cells, present = cells[:, present.any(axis=0)], present[:, present.any(axis=0)]
    if not cells.size:
        raise ValueError("no prompt has a verdict in both arms; there is nothing to compare")
    delta = float(cells[present].mean())
    values = _widen_seeds(np.where(present, cells, 0.0), present, delta)
    draws = np.concatenate(list(_resample(values, present, samples, np.random.default_rng(seed))))
    # The overall mean is not moved by widening when no cell is missing; recentre so that it never is.
    draws += delta - values[present].mean()
    low, high = np.percentile(draws, [2.5, 97.5])
    error = float(draws.std(ddof=1))
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    return Difference(
        delta=delta,
        ci95=(float(low), float(high)),
        standard_error=error,
        p_value=float(min(1.0, 2.0 * (tail + 1) / (samples + 1))),
        n=cells.shape[1],
        cells=int(present.sum()),
        seeds=cells.shape[0],
        detectable=2.80 * error,  # z(0.975) + z(0.8) = 1.96 + 0.84
    )


def _widen_seeds(values: NDArray, present: NDArray, mean: float) -> NDArray:
    """Moves each seed's cells [S, N] away from the overall mean by sqrt(S / (S - 1)); one seed stays as it is."""
    seeds = values.shape[0]
    if seeds == 1:
        return values
    rows = values.sum(axis=1) / present.sum(axis=1)  # [S]
    shift = (np.sqrt(seeds / (seeds - 1)) - 1.0) * (rows - mean)
    return np.where(present, values + shift[:, None], 0.0)


def _resample(values: NDArray, present: NDArray, samples: int, rng: np.random.Generator) -> Iterator[NDArray]:
    """Means of resampled cells, in batches: prompts drawn with replacement, seeds likewise when there are several.

    values [S, N] (0 where absent) and present [S, N] -> [samples] in all.
    """
    seeds, prompts = values.shape
    batch = max(1, _BATCH_CELLS // (seeds * prompts + prompts))
    for start in range(0, samples, batch):
        size = min(batch, samples - start)
        columns = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=size).astype(np.float64)
        if seeds == 1:
            rows = np.ones((size, 1))
        else:
            rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=size).astype(np.float64)
        total = ((rows @ values) * columns).sum(axis=1)
        weight = ((rows @ present.astype(np.float64)) * columns).sum(axis=1)
        # A resample without a single cell (possible only when nearly all are missing) says nothing: the mean stands in.
        mean = values.sum() / present.sum()
        yield np.divide(total, weight, out=np.full(size, mean), where=weight > 0)


def bootstrap_interval(values: ArrayLike, *, samples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of `values` [N] (NaN dropped), rows being independent.

    Returns:
      (low, high); (nan, nan) if there are no values.
    """
    kept = np.asarray(values, dtype=np.float64).ravel()
    kept = kept[~np.isnan(kept)]
    if not kept.size:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    present = np.ones((1, kept.size), dtype=bool)
    draws = np.concatenate(list(_resample(kept[None], present, samples, rng)))
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
