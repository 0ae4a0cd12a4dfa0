"""Whether a critic still answers as it did: rounds of the same comparisons against the first one."""

from collections.abc import Mapping
from typing import Any

from laif_jax.evaluation.agreement import label_from_p
from laif_jax.evaluation.resample import SAMPLES, mean, share

NEAR = 0.02  # a probability that moved by less is the same verdict, on whichever side of 1/2 it ended


def drift(
    rounds: Mapping[str, Mapping[str, float | None]], *, samples: int = SAMPLES, seed: int = 0
) -> list[dict[str, Any]]:
    """One row per round after the first (rounds are in order of their names, which are dates).

    Args:
      rounds: by name, the probability that b is better of each comparison; None: no label.

    Returns:
      round, first; n: comparisons with a label in both; changed: how many verdicts differ; same: the share of those
      that do not; moved: mean |p - p of the first|; lost, gained: labels that only one of the two has.
    """
    names = sorted(rounds)
    rows = []
    for name in names[1:]:
        before, after = rounds[names[0]], rounds[name]
        pairs = [(p, q) for item, p in before.items() if p is not None and (q := after.get(item)) is not None]
        same = [label_from_p(p) == label_from_p(q) or abs(p - q) < NEAR for p, q in pairs]
        had, have = ({item for item, p in one.items() if p is not None} for one in (before, after))
        rows.append(
            {
                "round": name,
                "first": names[0],
                "n": len(pairs),
                "changed": same.count(False),
                "same": share(same, samples=samples, seed=seed).to_dict(),
                "moved": mean([abs(p - q) for p, q in pairs], samples=samples, seed=seed).to_dict(),
                "lost": len(had - have),
                "gained": len(have - had),
            }
        )
    return rows
