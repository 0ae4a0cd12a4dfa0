"""How far a judge can be trusted: its agreement with human labels, beside baselines that read nothing.

Labels: 1 = `a` is better, 2 = `b` is better, 0 = tie (as in the human data); None = the judge gave no verdict.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laif_jax.evaluation.bootstrap import bootstrap_interval
from laif_jax.evaluation.length import longest_wins
from laif_jax.evaluation.winrate import Probabilities
from laif_jax.records import DataError, read_rows
from laif_jax.records.io import PathLike

Label = int | None


@dataclass(frozen=True)
class HumanRow:
    """A pair of answers that humans compared. `human`: one label per annotator."""

    source: str
    prompt: str
    a: str
    b: str
    human: tuple[int, ...]


def read_human_labels(path: PathLike, *, limit: int | None = None, seed: int = 0) -> list[HumanRow]:
    """Reads human labels: rows of `source, prompt, a, b, human`.

    Args:
      limit: a random sample of that many rows, drawn with `seed` (the file is sorted by source); None: all.

    Raises:
      DataError: no rows, or a malformed one (named by number).
    """
    rows = []
    for number, row in enumerate(read_rows(path), 1):
        try:
            # Answers such as `True` or `7` were published as JSON booleans and numbers.
            texts = [str(row[name]) for name in ("source", "prompt", "a", "b")]
            rows.append(HumanRow(*texts, human=tuple(row["human"])))
            human_label(rows[-1].human)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}, row {number}: {type(error).__name__}: {error}") from error
    if not rows:
        raise DataError(f"{path}: no rows")
    if limit is None or limit >= len(rows):
        return rows
    kept = np.random.default_rng(seed).choice(len(rows), size=limit, replace=False)
    return [rows[i] for i in sorted(kept)]


@dataclass(frozen=True)
class Agreement:
    """Agreement of one judge with the humans on one set of rows. Shares are in [0, 1]; NaN where undefined.

    Attributes:
      n: rows with human labels. coverage: share of them on which the judge gave a verdict (ties are verdicts).
      with_ties: share of covered rows where the judge's label (a, b or tie) is the human one.
      without_ties: the same among covered rows on which humans named a winner; a judge's tie counts one half.
      ci95: bootstrap interval of `without_ties`, over rows. n_decided: how many rows that is.
      kappa: Cohen's kappa over the three labels, on covered rows: 0 is chance given both sides' label frequencies.
      longest_wins, majority, random: `without_ties` of a judge that takes the longer text, always the humans' more
        frequent side (known only with hindsight, so generous), or a coin, on the same rows.
    """

    source: str
    n: int
    coverage: float
    with_ties: float
    without_ties: float
    ci95: tuple[float, float]
    n_decided: int
    kappa: float
    longest_wins: float
    majority: float
    random: float = 0.5

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; NaN becomes None."""
        row = {name: None if value != value else value for name, value in asdict(self).items()}
        return {**row, "ci95": [None if value != value else value for value in self.ci95]}


def label_from_p(p_b: float | None, margin: float = 0.0) -> Label:
    """A judge's probability that `b` is better, as a label: a tie within `margin` of 1/2; None or NaN: no verdict."""
    if p_b is None or p_b != p_b:
        return None
    if abs(p_b - 0.5) <= margin:
        return 0
    return 2 if p_b > 0.5 else 1


def human_label(labels: Sequence[int]) -> int:
    """The label of most annotators; 0 (tie) when no label has more votes than every other.

    Raises:
      ValueError: no labels, or one that is not 0, 1 or 2.
    """
    if not labels or set(labels) - {0, 1, 2}:
        raise ValueError(
            f"human labels must be a non-empty list of 0 (tie), 1 (a) and 2 (b), found {labels!r}"
        )
    (first, votes), *rest = Counter(labels).most_common()
    return 0 if rest and rest[0][1] == votes else first


def agreement(
    judge: Sequence[Label],
    human: Sequence[Sequence[int]],
    texts: Sequence[tuple[str, str]],
    *,
    source: str = "all",
    samples: int = 2000,
    seed: int = 0,
) -> Agreement:
    """Agreement of a judge's labels with human ones.

    Args:
      judge: label per row. human: the annotators' labels per row. texts: (a, b) per row, for the longest-wins baseline.

    Raises:
      ValueError: the three differ in length, or a label is malformed.
    """
    if not len(judge) == len(human) == len(texts):
        raise ValueError(
            f"{len(judge)} verdicts, {len(human)} human labels and {len(texts)} pairs of texts: the rows must match"
        )
    truth = np.array([human_label(labels) for labels in human], dtype=np.int64)
    verdict = np.array([-1 if label is None else label for label in judge], dtype=np.int64)
    covered = verdict >= 0
    decided = covered & (truth != 0)
    hits = np.where(verdict == 0, 0.5, verdict == truth).astype(np.float64)
    longer = longest_wins([a for a, _ in texts], [b for _, b in texts]) if len(texts) else np.zeros(0)
    longer_hits = np.where(longer == 0.5, 0.5, (longer > 0.5) == (truth == 2))
    right = float((truth[decided] == 2).mean()) if decided.any() else float("nan")
    return Agreement(
        source=source,
        n=len(truth),
        coverage=float(covered.mean()) if len(truth) else 0.0,
        with_ties=_mean(verdict[covered] == truth[covered]),
        without_ties=_mean(hits[decided]),
        ci95=bootstrap_interval(hits[decided], samples=samples, seed=seed),
        n_decided=int(decided.sum()),
        kappa=cohen_kappa(verdict[covered], truth[covered]),
        longest_wins=_mean(longer_hits[decided]),
        majority=max(right, 1.0 - right),
    )


def agreement_by_source(
    judge: Sequence[Label],
    human: Sequence[Sequence[int]],
    texts: Sequence[tuple[str, str]],
    sources: Sequence[str],
    *,
    samples: int = 2000,
    seed: int = 0,
) -> list[Agreement]:
    """One `Agreement` over all rows, named "all", then one per source, in the order in which sources first occur."""
    if len(sources) != len(judge):
        raise ValueError(f"{len(judge)} verdicts and {len(sources)} sources: the rows must match")
    rows = [agreement(judge, human, texts, samples=samples, seed=seed)]
    for source in dict.fromkeys(sources):
        keep = [i for i, name in enumerate(sources) if name == source]
        rows.append(
            agreement(
                [judge[i] for i in keep],
                [human[i] for i in keep],
                [texts[i] for i in keep],
                source=source,
                samples=samples,
                seed=seed,
            )
        )
    return rows


def labels_from_p(p_b: Probabilities | Sequence[float | None]) -> list[Label]:
    """Labels from probabilities that `b` is better; see `label_from_p`."""
    return [label_from_p(None if p is None else float(p)) for p in p_b]


def cohen_kappa(one: NDArray[np.int64], other: NDArray[np.int64]) -> float:
    """Cohen's kappa of two labellings [N] with labels 0, 1, 2: (observed - chance) / (1 - chance).

    NaN for no rows, or when both always give one same label, where chance already explains everything.
    """
    if not len(one):
        return float("nan")
    observed = float((one == other).mean())
    frequencies = [np.bincount(labels, minlength=3) / len(labels) for labels in (one, other)]
    chance = float(frequencies[0] @ frequencies[1])
    return (observed - chance) / (1.0 - chance) if chance < 1.0 else float("nan")


def _mean(values: NDArray) -> float:
    return float(np.mean(values)) if values.size else float("nan")
