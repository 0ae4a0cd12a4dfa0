"""Whether a critic's probabilities mean what they say: of verdicts given with 80%, 80% should be people's."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from laif_jax.evaluation.resample import SAMPLES, Floats, Statistic, estimate, mean, plain, ratio

BINS = 10


def calibration(
    p: ArrayLike,
    human: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    bins: int = BINS,
    samples: int = SAMPLES,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Calibration of probabilities that b is better against people's labels; None without a row that has both.

    Confidence is max(p, 1 - p), in `bins` bins of equal width from 1/2 to 1; ties of people are left out, a critic's
    tie is half right.

    Args:
      p: [N], NaN without a verdict. human: 1 = a, 2 = b, 0 = tie, -1 = none [N].

    Returns:
      ece: expected calibration error, sum over bins of share * |confidence - accuracy|. It is above 0 for every sample,
        and its interval leans upwards; so `ece_if_calibrated` has the mean and the 95th percentile of what a perfectly
        calibrated critic with these confidences would show. overconfidence: confidence - accuracy. brier: mean squared
        error (a coin that says 1/2: 0.25). bins: rows of n, confidence, accuracy, ci95.
    """
    given, truth = np.asarray(p, dtype=np.float64), np.asarray(human)
    keep = ~np.isnan(given) & (truth > 0)
    if not keep.any():
        return None
    given, right = given[keep], (truth[keep] == 2).astype(np.float64)
    prompts = [name for name, here in zip(clusters, keep, strict=True) if here]
    confidence = np.maximum(given, 1 - given)
    hits = np.where(given == 0.5, 0.5, (given > 0.5) == (right > 0.5)).astype(np.float64)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(np.int64), bins - 1)
    table = _binned(place, confidence, hits, bins)
    statistic = _ece_of(bins)
    options = {"samples": samples, "seed": seed}
    rows = []
    for index in range(bins):
        inside = place == index
        if inside.any():
            groups = [name for name, here in zip(prompts, inside, strict=True) if here]
            accuracy = estimate(
                np.stack([hits[inside], np.ones(int(inside.sum()))], axis=1),
                ratio,
                clusters=groups,
                **options,
            )
            rows.append(
                {"n": accuracy.n, "confidence": float(confidence[inside].mean())} | _as_accuracy(accuracy)
            )
    return {
        "n": len(given),
        "ece": estimate(table, statistic, clusters=prompts, **options).to_dict(),
        "ece_if_calibrated": _if_calibrated(place, confidence, given == 0.5, bins, samples, seed),
        "overconfidence": mean(confidence - hits, prompts, **options).to_dict(),
        "brier": mean((given - right) ** 2, prompts, **options).to_dict(),
        "random": {"brier": 0.25},
        "bins": rows,
    }


def _as_accuracy(accuracy: Any) -> dict[str, Any]:
    row = accuracy.to_dict()
    return {"accuracy": row["value"], "ci95": row["ci95"]}


def _binned(place: np.ndarray, confidence: Floats, hits: Floats, bins: int) -> Floats:
    """Per row its count, confidence and hit in the columns of its bin, [N, 3 * bins]."""
    table = np.zeros((len(place), 3, bins))
    table[np.arange(len(place)), :, place] = np.stack([np.ones(len(place)), confidence, hits], axis=1)
    return table.reshape(len(place), 3 * bins)


def _ece_of(bins: int) -> Statistic:
    def statistic(sums: Floats) -> Floats:
        count, confidence, hits = (sums.reshape(-1, 3, bins)[:, i] for i in range(3))
        return np.abs(confidence - hits).sum(axis=1) / count.sum(axis=1)

    return statistic


def _if_calibrated(
    place: np.ndarray, confidence: Floats, ties: np.ndarray, bins: int, samples: int, seed: int
) -> dict[str, float | None]:
    """What chance alone gives: verdicts that are right exactly as often as they say."""
    rng = np.random.default_rng(seed)
    sums = np.zeros((min(samples, 500), bins))
    for draw in range(len(sums)):
        hits = np.where(ties, 0.5, rng.random(len(confidence)) < confidence)
        sums[draw] = np.bincount(place, confidence - hits, minlength=bins)
    errors = np.abs(sums).sum(axis=1) / len(confidence)
    return {"mean": plain(errors.mean()), "p95": plain(np.percentile(errors, 95))}
