"""Whether a critic agrees with itself: asked again, and over three responses to one prompt."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Protocol

import numpy as np

from laif_jax.evaluation import reliability
from laif_jax.evaluation.agreement import label_from_p
from laif_jax.evaluation.resample import Floats, estimate, mean, ratio, share

MOST_TEXTS = 40  # per prompt; further ones would be 10,000 triples and more


class Compared(Protocol):
    """Of a comparison: its prompt and the names of its texts."""

    @property
    def prompt(self) -> str: ...

    @property
    def texts(self) -> tuple[str, str] | None: ...


def repeats(
    samples_of: Mapping[str, Mapping[str, Sequence[float]]],
    prompts: Mapping[str, str],
    *,
    samples: int,
    seed: int,
) -> dict[str, Any] | None:
    """Test-retest: the same comparison, in the same order, asked several times.

    Args:
      samples_of: by comparison and order, the probabilities that b is better. prompts: by comparison.

    Returns:
      n: comparisons in one order. same: how often two of the answers name the same side (or both a tie); chance: how
      often two answers to different questions would; alpha: beyond chance. spread: mean standard deviation of the
      probabilities. None where nothing was asked twice.
    """
    rows = [
        (prompts.get(name, name), list(values))
        for name, orders in samples_of.items()
        for _, values in sorted(orders.items())
        if len(values) > 1
    ]
    if not rows:
        return None
    counts = np.zeros((len(rows), 3))
    for i, (_, values) in enumerate(rows):
        for value in values:
            label = label_from_p(value)
            assert label is not None
            counts[i, label] += 1
    names = [prompt for prompt, _ in rows]
    size = counts.sum(axis=1)
    same = (counts * (counts - 1)).sum(axis=1) / (size * (size - 1))
    marginal = counts.sum(axis=0) / counts.sum()
    spread = [float(np.std(values, ddof=1)) for _, values in rows]
    options = {"samples": samples, "seed": seed}
    return {
        "n": len(rows),
        "answers": int(size.sum()),
        "same": share(same, names, **options).to_dict(),
        "alpha": reliability.alpha(counts, names, **options).to_dict(),
        "spread": mean(spread, names, **options).to_dict(),
        "random": {"same": float((marginal**2).sum())},
    }


def transitivity(p: Floats, pairs: Sequence[Compared], *, samples: int, seed: int) -> dict[str, Any] | None:
    """Cycles: of triples of texts of one prompt that were all compared, and each decided, the share with a > b > c > a.

    Coins give 1/4, the longer text 0. Comparisons of the same two texts are averaged. None without such a triple.
    """
    judged: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for value, pair in zip(p, pairs, strict=True):
        if pair.texts is None or np.isnan(value) or pair.texts[0] == pair.texts[1]:
            continue
        one, other = pair.texts
        key, second = ((one, other), value) if one < other else ((other, one), 1.0 - value)
        judged[pair.prompt][key].append(float(second))
    names, table, left_out = [], [], 0
    for prompt, values in judged.items():
        wins = {key: np.mean(second) > 0.5 for key, second in values.items() if np.mean(second) != 0.5}
        texts = sorted({name for key in wins for name in key})
        left_out += max(0, len(texts) - MOST_TEXTS)
        triples, cycles = _cycles(texts[:MOST_TEXTS], wins)
        if triples:
            names.append(prompt)
            table.append((cycles, triples))
    if not table:
        return None
    array = np.array(table, dtype=np.float64)
    count = int(array[:, 1].sum())
    options = {"samples": samples, "seed": seed}
    if not array[:, 0].any():  # no spread to resample: the exact interval, over prompts
        found = share(np.zeros(len(array)), names, **options).to_dict()
    else:
        found = estimate(array, ratio, clusters=names, **options).to_dict()
    return {
        "triples": count,
        "prompts": len(table),
        "texts_left_out": left_out,
        "cycles": found | {"n": count},
        "random": {"cycles": 0.25},
        "longest_wins": {"cycles": 0.0},
    }


def _cycles(texts: Sequence[str], wins: Mapping[tuple[str, str], Any]) -> tuple[int, int]:
    """(triples that were compared in all three pairs, those of them that are a cycle)."""
    triples = cycles = 0
    for a, b, c in combinations(texts, 3):
        sides = wins.get((a, b)), wins.get((b, c)), wins.get((a, c))
        if any(side is None for side in sides):
            continue
        triples += 1
        # b beats a, c beats b, and yet a beats c; or all three the other way round.
        cycles += bool(sides[0]) == bool(sides[1]) != bool(sides[2])
    return triples, cycles
