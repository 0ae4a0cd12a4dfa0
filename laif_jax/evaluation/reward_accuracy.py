"""How good a reward model is on compared responses, always beside "the longer response wins" on the same pairs.

Everything here works on scores of two sides: `a` and `b`, with the label `p_b`, the probability that `b` is better.
A pair whose label is a tie (1/2) has no winner: it counts in the calibration, not in an accuracy. A model's tie (equal
scores) counts one half. Intervals resample prompts, since the pairs of one prompt are alike.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from laif_jax.evaluation.bootstrap import bootstrap_interval

Floats = NDArray[np.float64]

# Characters by which the preferred response is longer than the other one: edges of the report's bins.
LENGTH_EDGES = (-float("inf"), -500.0, -100.0, 0.0, 100.0, 500.0, float("inf"))
CALIBRATION_BINS = 10
HISTOGRAM_BINS = 30


@dataclass(frozen=True)
class ScoredPairs:
    """Compared responses with a model's scores.

    Attributes:
      a, b: float64 [N], the scores; of an ensemble [K, N]. p_b: float64 [N], the label.
      length_a, length_b: [N], characters. prompts: the prompt's id of each pair. groups: column -> value, of each pair.
    """

    a: Floats
    b: Floats
    p_b: Floats
    length_a: Floats
    length_b: Floats
    prompts: Sequence[str]
    groups: Sequence[Mapping[str, str]] = ()

    def __post_init__(self) -> None:
        n = len(self.prompts)
        sizes = {
            name: np.shape(getattr(self, name))[-1] for name in ("a", "b", "p_b", "length_a", "length_b")
        }
        wrong = {name: size for name, size in sizes.items() if size != n}
        if wrong or (self.groups and len(self.groups) != n):
            raise ValueError(f"{n} prompts, but {wrong or {'groups': len(self.groups)}}: the rows must match")

    @property
    def difference(self) -> Floats:
        """Score of b minus score of a, float64 [N]; of an ensemble, the members' mean."""
        difference = self.b - self.a
        return difference.mean(axis=0) if difference.ndim == 2 else difference

    def select(self, keep: NDArray[np.bool_]) -> "ScoredPairs":
        """The pairs where `keep` [N] is true."""
        index = np.flatnonzero(keep)
        arrays = {name: getattr(self, name)[..., index] for name in ("a", "b", "p_b", "length_a", "length_b")}
        rows = {
            name: [values[i] for i in index]
            for name in ("prompts", "groups")
            if (values := getattr(self, name))
        }
        return ScoredPairs(**arrays, **{"prompts": [], **rows})


@dataclass(frozen=True)
class RewardAccuracy:
    """How often the better response has the higher score. Shares are in [0, 1]; NaN where undefined.

    Attributes:
      n: pairs with a winner. ties: pairs whose label is a tie, in no accuracy. prompts: different ones among the n.
      accuracy, ci95: of the model; equal scores count one half.
      longest_wins, longest_ci95: of a judge that takes the longer text (equal lengths: one half), on the same pairs.
      gain, gain_ci95: accuracy minus longest_wins, paired.
    """

    n: int
    ties: int
    prompts: int
    accuracy: float
    ci95: tuple[float, float]
    longest_wins: float
    longest_ci95: tuple[float, float]
    gain: float
    gain_ci95: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; NaN becomes None."""
        return plain(asdict(self))


def hits(difference: ArrayLike, p_b: ArrayLike) -> Floats:
    """1 where `difference` [N] (of b and a) and the label name the same side, 0 where the other, 1/2 where the
    difference is 0; NaN where the label is a tie. float64 [N]."""
    sign = np.sign(np.asarray(difference, np.float64))
    label = np.sign(np.asarray(p_b, np.float64) - 0.5)
    return np.where(label == 0, np.nan, 0.5 * (1.0 + sign * label))


def accuracy(pairs: ScoredPairs, *, samples: int = 2000, seed: int = 0) -> RewardAccuracy:
    """The model's accuracy and the longer text's, with intervals over prompts.

    Args:
      samples: bootstrap resamples. seed: of the resampling.
    """
    model = hits(pairs.difference, pairs.p_b)
    longest = hits(pairs.length_b - pairs.length_a, pairs.p_b)
    decided = ~np.isnan(model)
    means, intervals = [], []
    for values in (model, longest, model - longest):
        means.append(float(values[decided].mean()) if decided.any() else float("nan"))
        intervals.append(bootstrap_interval(values, clusters=pairs.prompts, samples=samples, seed=seed))
    return RewardAccuracy(
        n=int(decided.sum()),
        ties=int((~decided).sum()),
        prompts=len({prompt for prompt, kept in zip(pairs.prompts, decided, strict=True) if kept}),
        accuracy=means[0],
        ci95=intervals[0],
        longest_wins=means[1],
        longest_ci95=intervals[1],
        gain=means[2],
        gain_ci95=intervals[2],
    )


def by_length(pairs: ScoredPairs) -> list[dict[str, Any]]:
    """Accuracy by how much longer the preferred response is, in characters: rows of `low`, `high` (low < x <= high;
    None: unbounded), `n`, `accuracy`, `longest_wins`. A model that goes by length is right in the last rows and wrong
    in the first. Empty bins are left out."""
    label = np.sign(pairs.p_b - 0.5)
    longer = label * (pairs.length_b - pairs.length_a)
    model = hits(pairs.difference, pairs.p_b)
    length = hits(pairs.length_b - pairs.length_a, pairs.p_b)
    rows = []
    for low, high in itertools.pairwise(LENGTH_EDGES):
        inside = (label != 0) & (longer > low) & (longer <= high)
        if inside.any():
            row = {"low": low, "high": high, "n": int(inside.sum())}
            rows.append(
                plain(row | {"accuracy": model[inside].mean(), "longest_wins": length[inside].mean()})
            )
    return rows


def calibration(difference: ArrayLike, p_b: ArrayLike, *, bins: int = CALIBRATION_BINS) -> dict[str, Any]:
    """Whether sigmoid(score difference) is the chance that the response is preferred.

    Each pair counts from the side that the model prefers: it predicts q = sigmoid(|d|) in [1/2, 1], and the label says
    with which probability that side was preferred.

    Args:
      difference: [N] of b and a. p_b: [N] the label; soft labels and ties count as they are. bins: equal widths of q.

    Returns:
      `bins`: rows of `n`, `predicted`, `observed` (means); `ece`: the expected calibration error, their mean absolute
      difference weighted by n; `log_loss`: mean cross-entropy of the labels (nats; 0.693 for a coin); `overconfidence`:
      mean predicted minus mean observed. None for no pairs.
    """
    d, p = np.asarray(difference, np.float64), np.asarray(p_b, np.float64)
    if not d.size:
        return {"bins": [], "ece": None, "log_loss": None, "overconfidence": None}
    predicted = 1.0 / (1.0 + np.exp(-np.abs(d)))
    # Of equal scores neither side is preferred: the prediction is 1/2, and so is the average of both readings.
    observed = np.where(d > 0, p, np.where(d < 0, 1.0 - p, 0.5))
    place = np.minimum(((predicted - 0.5) * 2 * bins).astype(np.int64), bins - 1)
    rows, error = [], 0.0
    for index in np.unique(place):
        inside = place == index
        row = {
            "n": int(inside.sum()),
            "predicted": predicted[inside].mean(),
            "observed": observed[inside].mean(),
        }
        error += row["n"] / d.size * abs(row["predicted"] - row["observed"])
        rows.append(plain(row))
    losses = p * np.logaddexp(0.0, -d) + (1.0 - p) * np.logaddexp(0.0, d)
    rest = {"ece": error, "log_loss": losses.mean(), "overconfidence": predicted.mean() - observed.mean()}
    return {"bins": rows, **plain(rest)}


def distribution(pairs: ScoredPairs, *, bins: int = HISTOGRAM_BINS) -> dict[str, Any]:
    """Histograms of the scores of preferred and other responses (ties left out; of an ensemble, the members' mean):
    `edges` [bins + 1], `chosen`, `rejected` (counts), and mean and standard deviation of each and of the margin."""
    a, b = (scores.mean(axis=0) if scores.ndim == 2 else scores for scores in (pairs.a, pairs.b))
    decided = (pairs.p_b != 0.5) & np.isfinite(a) & np.isfinite(b)
    prefers_b = pairs.p_b > 0.5
    chosen, rejected = np.where(prefers_b, b, a)[decided], np.where(prefers_b, a, b)[decided]
    if not chosen.size:
        return {}
    edges = np.histogram_bin_edges(np.concatenate([chosen, rejected]), bins=bins)
    named = {"chosen": chosen, "rejected": rejected, "margin": chosen - rejected}
    return {
        "edges": edges.tolist(),
        **{name: np.histogram(named[name], edges)[0].tolist() for name in ("chosen", "rejected")},
        **{f"{name}_mean": float(values.mean()) for name, values in named.items()},
        **{f"{name}_std": float(values.std()) for name, values in named.items()},
    }


def by_group(pairs: ScoredPairs, *, samples: int = 1000, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Per group column, `RewardAccuracy` of each of its values, the largest first."""
    columns = dict.fromkeys(name for row in pairs.groups for name in row)
    found: dict[str, dict[str, Any]] = {}
    for column in columns:
        values = [row.get(column, "") for row in pairs.groups]
        rows = {}
        for value in dict.fromkeys(values):
            part = pairs.select(np.array([other == value for other in values]))
            rows[value] = accuracy(part, samples=samples, seed=seed).to_dict()
        found[column] = dict(sorted(rows.items(), key=lambda item: (-item[1]["n"], item[0])))
    return found


def members(pairs: ScoredPairs) -> dict[str, Any] | None:
    """Of an ensemble: each member's accuracy, the share of pairs on which all name the same side, and the mean standard
    deviation of their score differences. None of a single model."""
    difference = pairs.b - pairs.a
    if difference.ndim == 1 or not difference.shape[1]:
        return None
    agree = np.all(np.sign(difference) == np.sign(difference[:1]), axis=0)
    right = [hits(row, pairs.p_b) for row in difference]
    return plain(
        {
            "accuracy": [float(np.nanmean(row)) if (~np.isnan(row)).any() else float("nan") for row in right],
            "agree": float(agree.mean()),
            "spread": float(difference.std(axis=0).mean()),
        }
    )


def reward_report(pairs: ScoredPairs, *, samples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Everything of one test set as plain JSON: `RewardAccuracy`'s fields, `by_length`, `groups`, `calibration`,
    `distribution`, `members`."""
    finite = np.isfinite(pairs.difference)
    if not finite.all():
        raise ValueError(f"{int((~finite).sum())} of {finite.size} pairs have a score that is not a number")
    return {
        **accuracy(pairs, samples=samples, seed=seed).to_dict(),
        "by_length": by_length(pairs),
        "groups": by_group(pairs, seed=seed),
        "calibration": calibration(pairs.difference, pairs.p_b),
        "distribution": distribution(pairs),
        "members": members(pairs),
    }


def plain(value: Any) -> Any:
    """Plain JSON values: NaN and infinities become None, NumPy numbers Python's."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
