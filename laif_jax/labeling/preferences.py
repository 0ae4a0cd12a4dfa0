"""From judgements to the training rows of preference optimisation."""

from collections.abc import Iterable, Sequence

from laif_jax.records import Comparison, Judgement, Preference, Status


def to_preferences(
    comparisons: Sequence[Comparison], judgements: Iterable[Judgement], *, keep_ties: bool = False
) -> tuple[list[Preference], dict[str, int]]:
    """One preference per comparison that has a label; the more probable response is `chosen`.

    Args:
      judgements: the final ones, at most one per comparison (what `LabelClient.judge` returns), in any order.
      keep_ties: keep p = 1/2 as a row with `chosen` = a and p_chosen = 0.5; otherwise ties are dropped and counted.

    Returns:
      The preferences in the order of the comparisons, and counts: `comparisons`, one per status (`ok`, `tie`,
      `unparsable`, `refused`, `failed`), `missing` (no judgement), and `preferences` (rows returned).

    Raises:
      ValueError: two judgements of one comparison.
    """
    by_comparison: dict[str, Judgement] = {}
    for judgement in judgements:
        if judgement.comparison_id in by_comparison:
            raise ValueError(
                f"two judgements of comparison {judgement.comparison_id}: give the final ones, not the single orders"
            )
        by_comparison[judgement.comparison_id] = judgement
    counts = {"comparisons": len(comparisons), **{status.value: 0 for status in Status}, "missing": 0}
    preferences = []
    for comparison in comparisons:
        judgement = by_comparison.get(comparison.id)
        if judgement is None:
            counts["missing"] += 1
            continue
        counts[judgement.status.value] += 1
        p_b = judgement.p_b
        if p_b is None or (p_b == 0.5 and not keep_ties):
            continue
        chosen, rejected = (comparison.b, comparison.a) if p_b > 0.5 else (comparison.a, comparison.b)
        preferences.append(
            Preference(
                prompt=comparison.prompt,
                chosen=chosen,
                rejected=rejected,
                p_chosen=max(p_b, 1.0 - p_b),
                judgement_ids=(judgement.id, *judgement.parts),
            )
        )
    return preferences, {**counts, "preferences": len(preferences)}
