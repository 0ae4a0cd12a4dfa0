"""What moves a critic's verdict beside the texts' worth: their lengths and the place in which they are shown.

    logit P(b is better) = c + length * x - position * s (+ merit * h)

over verdicts in single orders, with x = (len(b) - len(a)) / max(len(a), len(b)) in characters, s = 1 where a was shown
first and -1 where b was, and h = 1 where people prefer b, -1 where they prefer a, 0 for a tie. With h, `length` is what
length does to the verdict beyond what people's preference explains. c is 0 if a and b were named at random.

Probabilities from log-probs are regressed by least squares on their logits. Verdicts that are 0 or 1 are regressed by
logistic regression, with a normal prior of standard deviation 5 on each coefficient, so that a critic that always takes
the longer one has a finite slope. Resamples of it take one Newton step from the estimate (a one-step bootstrap).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from laif_jax.evaluation.resample import NOTHING, SAMPLES, Estimate, Floats, estimates

LIMIT = 10.0  # logits are kept within it: a log-prob of -30 says no more than one of -10
PRIOR = 1 / 25.0  # precision of the coefficients' prior
NEWTON_STEPS = 50


@dataclass(frozen=True)
class VerdictModel:
    """Coefficients as logits; `merit` is undefined without people's labels. `method`: "logits", "verdicts" or ""."""

    length: Estimate
    position: Estimate
    merit: Estimate
    method: str


def relative_difference(lengths: ArrayLike) -> Floats:
    """(len(b) - len(a)) / max of the two, for lengths [N, 2]; 0 for two empty texts."""
    table = np.asarray(lengths, dtype=np.float64).reshape(-1, 2)
    return (table[:, 1] - table[:, 0]) / np.maximum(table.max(axis=1), 1.0)


def is_soft(p: ArrayLike) -> bool:
    """Whether the probabilities come from log-probs: most are neither 0, 1/2 nor 1."""
    values = np.asarray(p, dtype=np.float64)
    return bool(values.size) and float(np.isin(values, (0.0, 0.5, 1.0)).mean()) < 0.5


def fit(
    p: ArrayLike,
    x: ArrayLike,
    first: ArrayLike,
    human: ArrayLike | None = None,
    *,
    clusters: Sequence[Hashable] | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
) -> VerdictModel:
    """Fits the model to verdicts in single orders.

    Args:
      p: probability that b is better [N]. x: relative length difference [N], NaN where a length is not known.
      first: 1 where a was shown first, -1 where b was [N]. human: 1, -1 or 0 [N]; None: without merit.

    Returns:
      Coefficients that cannot be told (all x alike, only one order) are undefined.
    """
    y = np.asarray(p, dtype=np.float64)
    known_lengths = ~np.isnan(np.asarray(x, dtype=np.float64))
    columns = {"c": np.ones(len(y)), "position": -np.asarray(first, dtype=np.float64)}
    if known_lengths.all():
        columns["length"] = np.asarray(x, dtype=np.float64)
    if human is not None:
        columns["merit"] = np.asarray(human, dtype=np.float64)
    names = _told_apart(columns)
    if len(y) <= len(names) + 1 or len(names) < 2:
        return VerdictModel(NOTHING, NOTHING, NOTHING, "")
    design = np.stack([columns[name] for name in names], axis=1)
    soft = is_soft(y)
    rows, offset, prior = _linear_rows(y, design) if soft else _logistic_rows(y, design)
    size = len(names)

    def coefficients(sums: Floats) -> Floats:
        matrix = sums[:, size:].reshape(-1, size, size) + prior * np.eye(size)
        return offset + _solve(matrix, sums[:, :size] - prior * offset)

    values = estimates(rows, coefficients, size, clusters=clusters, samples=samples, seed=seed)
    found = dict(zip(names, values, strict=True))
    return VerdictModel(
        *(found.get(name, NOTHING) for name in ("length", "position", "merit")),
        "logits" if soft else "verdicts",
    )


def _told_apart(columns: dict[str, Floats]) -> list[str]:
    """Names of columns none of which is a combination of those before it."""
    names: list[str] = []
    for name in columns:
        trial = np.stack([columns[one] for one in [*names, name]], axis=1)
        if len(trial) and np.linalg.matrix_rank(trial) == trial.shape[1]:
            names.append(name)
    return names


def _linear_rows(y: Floats, design: Floats) -> tuple[Floats, Floats, float]:
    """Rows whose sums give least squares on the logits: X'y and X'X."""
    clipped = np.clip(y, 1e-300, 1 - 1e-16)
    logits = np.clip(np.log(clipped) - np.log1p(-clipped), -LIMIT, LIMIT)
    return np.hstack([design * logits[:, None], _outer(design)]), np.zeros(design.shape[1]), 0.0


def _logistic_rows(y: Floats, design: Floats) -> tuple[Floats, Floats, float]:
    """Rows whose sums give a Newton step from the estimate: gradient and Hessian; and the estimate."""
    beta = np.zeros(design.shape[1])
    for _ in range(NEWTON_STEPS):
        mu = _sigmoid(design @ beta)
        gradient = design.T @ (y - mu) - PRIOR * beta
        hessian = (design * (mu * (1 - mu))[:, None]).T @ design + PRIOR * np.eye(len(beta))
        step = np.linalg.solve(hessian, gradient)
        beta = beta + step * min(1.0, 2.0 / max(1e-12, float(np.abs(step).max())))
        if np.abs(step).max() < 1e-10:
            break
    mu = _sigmoid(design @ beta)
    rows = np.hstack([design * (y - mu)[:, None], _outer(design) * (mu * (1 - mu))[:, None]])
    return rows, beta, PRIOR


def _outer(design: Floats) -> Floats:
    return (design[:, :, None] * design[:, None, :]).reshape(len(design), -1)


def _sigmoid(value: NDArray) -> Floats:
    return 0.5 * (1.0 + np.tanh(0.5 * value))


def _solve(matrix: Floats, right: Floats) -> Floats:
    """Solutions [S, K]; NaN where a resample cannot tell the coefficients apart."""
    good = np.linalg.cond(matrix) < 1e12
    found = np.full(right.shape, np.nan)
    if good.any():
        found[good] = np.linalg.solve(matrix[good], right[good][:, :, None])[:, :, 0]
    return found
