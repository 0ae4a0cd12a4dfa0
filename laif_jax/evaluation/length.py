"""Lengths, and the baseline that every judge must be held against: "the longer answer wins".

GPT-4 prefers the longer answer in about 84% of the published AlpacaEval comparisons, so an accuracy or a win rate
without this baseline beside it says little. Lengths are in characters, as AlpacaEval's.
"""

from collections.abc import Sequence

import numpy as np

from laif_jax.evaluation.winrate import Probabilities, WinRate, win_rate


def mean_length(texts: Sequence[str]) -> float:
    """Mean length in characters; NaN for no texts."""
    return float(np.mean([len(text) for text in texts])) if texts else float("nan")


def length_summary(texts: Sequence[str]) -> dict[str, float]:
    """Mean, median and 90th percentile of lengths in characters, and the share of empty texts; {} for no texts."""
    if not texts:
        return {}
    lengths = np.array([len(text) for text in texts], dtype=np.float64)
    return {
        "mean": float(lengths.mean()),
        "median": float(np.median(lengths)),
        "p90": float(np.percentile(lengths, 90)),
        "empty": float((lengths == 0).mean()),
    }


def longest_wins(references: Sequence[str], outputs: Sequence[str]) -> Probabilities:
    """Verdicts `p` [N] of a judge that prefers the longer text: 1 if the output is longer, 0 if shorter, 0.5 if equal.

    Raises:
      ValueError: the lists differ in length.
    """
    pairs = zip(references, outputs, strict=True)
    return np.array([0.5 * (1 + np.sign(len(b) - len(a))) for a, b in pairs], dtype=np.float64)


def longest_wins_rate(references: Sequence[str], outputs: Sequence[str]) -> WinRate:
    """The win rate that the longer-answer judge would give."""
    return win_rate(longest_wins(references, outputs))


def longest_wins_accuracy(p: Probabilities, references: Sequence[str], outputs: Sequence[str]) -> float:
    """How often the judge's verdicts `p` [N] and "longer wins" name the same side, among rows where the judge named
    one; equal lengths count one half. NaN if the judge named none."""
    verdicts = np.asarray(p, dtype=np.float64)
    longer = longest_wins(references, outputs)
    decided = ~np.isnan(verdicts) & (verdicts != 0.5)
    if not decided.any():
        return float("nan")
    hits = np.where(longer == 0.5, 0.5, (verdicts > 0.5) == (longer > 0.5))
    return float(hits[decided].mean())
