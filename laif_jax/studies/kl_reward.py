"""Reward against the distance from the start: HH-RLHF's square-root law, and the turn of over-optimisation.

Bai et al. (2022, section 4.3) find that reward grows about linearly with sqrt(KL) for most of a run; Gao et al. (2023)
that the true reward turns and falls while the proxy still rises.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 3  # evaluations averaged before a turn is looked for: one alone is noise
POINTS = 3  # evaluations that a fit needs
NATS = 0.1  # that the KL must move for a fit: estimates of a KL near 0 are noise, and their square root magnifies it


def analysed(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with `fit`, `no_fit` and `turn`, from its lists `kl`, `reward` and `true_quality` (may be missing)."""
    quality = row.get("true_quality")
    return {
        **row,
        "fit": sqrt_fit(row["kl"], row["reward"]),
        "no_fit": no_fit(row["kl"], row["reward"]),
        "turn": turn(row["kl"], quality) if quality else None,
    }


def no_fit(kl: Sequence[float | None], reward: Sequence[float | None]) -> str:
    """Why there is no `sqrt_fit`; "" where there is one."""
    x, _ = _pairs(kl, reward)
    if len(x) < POINTS:
        return f"fewer than {POINTS} evaluations"
    return f"KL moved by less than {NATS:g} nats" if np.ptp(np.maximum(x, 0.0)) < NATS else ""


def sqrt_fit(kl: Sequence[float | None], reward: Sequence[float | None]) -> dict[str, float] | None:
    """Least squares of reward = intercept + slope sqrt(KL).

    Returns:
      slope, intercept, r2 (share of the variance of the rewards that the fit explains), n, max_kl; None where `no_fit`
      says why.
    """
    if no_fit(kl, reward):
        return None
    x, y = _pairs(kl, reward)
    x = np.sqrt(np.maximum(x, 0.0))
    slope, intercept = np.polyfit(x, y, 1)
    rest, spread = np.sum((y - intercept - slope * x) ** 2), np.sum((y - y.mean()) ** 2)
    return {
        "slope": float(slope),
        "intercept": float(intercept),
        "r2": float(1.0 - rest / spread) if spread > 0 else 0.0,
        "n": len(x),
        "max_kl": float(x.max() ** 2),
    }


def turn(kl: Sequence[float | None], quality: Sequence[float | None]) -> dict[str, float] | None:
    """Where quality stops rising: the best of the moving averages over `WINDOW` evaluations, if the last of them lies
    clearly below it.

    Clearly: by more than twice the standard error of a difference of two such averages, the noise of one evaluation
    being estimated from the evaluations' second differences.

    Returns:
      kl (of the evaluation in the middle of the best average), at (its index in the lists), quality (that average),
      last (the average at the end), drop (their difference); None where there is no turn, or where the evaluations are
      too few to tell.
    """
    x, y = _pairs(kl, quality)
    if len(y) < 2 * WINDOW:
        return None
    smooth = np.convolve(y, np.ones(WINDOW) / WINDOW, mode="valid")
    # The variance of a second difference of independent noise is six times its own; a trend adds nothing.
    noise = np.sqrt(np.mean(np.diff(y, 2) ** 2) / 6.0)
    best = int(np.argmax(smooth))
    drop = float(smooth[best] - smooth[-1])
    if drop <= max(2.0 * noise * np.sqrt(2.0 / WINDOW), 1e-6):
        return None
    middle = best + WINDOW // 2
    return {
        "kl": float(x[middle]),
        "at": int(np.flatnonzero(_known(kl, quality))[middle]),
        "quality": float(smooth[best]),
        "last": float(smooth[-1]),
        "drop": drop,
    }


def _pairs(a: Sequence[float | None], b: Sequence[float | None]) -> tuple[NDArray[Any], NDArray[Any]]:
    kept = _known(a, b)
    x, y = (np.array(values, np.float64) for values in (a, b))  # None becomes NaN
    return x[kept], y[kept]


def _known(a: Sequence[float | None], b: Sequence[float | None]) -> NDArray[Any]:
    """Where both are numbers, bool [n]."""
    return np.isfinite(np.array(a, np.float64)) & np.isfinite(np.array(b, np.float64))
