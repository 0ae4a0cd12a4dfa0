"""Several critics for one label: ensembles, and a cheap critic with a strong one behind it.

Each member is a judge job of its own, so every answer is stored under its own request, counts against the budget, and
is never paid twice, whoever else asks. What is here is pure: it combines the members' judgements.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from laif_jax.labeling.judge import sum_usage
from laif_jax.records import Comparison, Judgement, Status, fingerprint

_SEVERITY = (Status.FAILED, Status.REFUSED, Status.UNPARSABLE)


@dataclass(frozen=True)
class Voice:
    """What one member said: `final`, one judgement per comparison; `single`, the verdicts in one order behind them."""

    final: list[Judgement]
    single: list[Judgement] = field(default_factory=list)


@dataclass(frozen=True)
class Panel:
    """A panel's labels. `final`: one per comparison, in order; `single`: all single-order verdicts; `summary`: what the
    members said and what a first tier saved, as plain JSON values, {} for a panel of one."""

    final: list[Judgement]
    single: list[Judgement]
    summary: dict[str, Any]


Ask = Callable[[int, Sequence[Comparison]], Voice]


def ask_panel(
    ask: Ask, members: int, comparisons: Sequence[Comparison], *, below: float | None = None
) -> Panel:
    """The labels of a panel.

    Args:
      ask: asks one member, by its number, for judgements of comparisons: 0 .. members - 1, whose probabilities are
        averaged; with `below`, number `members` is the strong critic.
      below: the strong critic is asked where the first tier's |p_b - 1/2| is below it, or where it gave no label.
    """
    voices = [ask(number, comparisons) for number in range(members)]
    final = voices[0].final if members == 1 else average([voice.final for voice in voices])
    single = [judgement for voice in voices for judgement in voice.single]
    summary: dict[str, Any] = {}
    if members > 1:
        summary["agreement"] = unanimity([voice.final for voice in voices])
    if below is not None:
        doubtful = unsure(final, below)
        strong = ask(members, [comparisons[i] for i in doubtful]) if doubtful else Voice([])
        single += strong.single
        summary["tiers"] = tier_summary(final, strong.final)
        final = escalate(final, dict(zip(doubtful, strong.final, strict=True)))
    return Panel(final, single, summary)


def average(panels: Sequence[Sequence[Judgement]]) -> list[Judgement]:
    """One judgement per comparison: the mean of the members' p_b.

    A member that failed fails the label, since the next run asks it again. Members that refused or were unparsable are
    left out as long as more than half of the members gave a label.
    """
    return [_average(members) for members in zip(*panels, strict=True)]


def _average(members: Sequence[Judgement]) -> Judgement:
    orders, principles = {m.order for m in members}, [m.principle for m in members if m.principle]
    labels = [member for member in members if member.p_b is not None]
    costs = [member.cost for member in members]
    common: dict[str, Any] = {
        "comparison_id": members[0].comparison_id,
        "critic": "+".join(dict.fromkeys(member.critic for member in members)),
        "critic_hash": fingerprint([member.critic_hash for member in members]),
        "order": orders.pop() if len(orders) == 1 else "both",
        "principle": "+".join(principles),
        "usage": sum_usage(member.usage for member in members),
        "cost": None if None in costs else sum(cost for cost in costs if cost is not None),
        "latency": sum(member.latency or 0.0 for member in members),
        "date": max(member.date for member in members),
        "parts": tuple(member.id for member in members),
    }
    failed = [member for member in members if member.status is Status.FAILED]
    if failed or 2 * len(labels) <= len(members):
        status = next(s for s in _SEVERITY if any(member.status is s for member in members))
        bad = [member for member in members if member.status is status]
        meta = {"passing": all(m.meta.get("passing", False) for m in failed)} if failed else {}
        return Judgement(
            status=status, reason="; ".join(f"{m.critic}: {m.reason}" for m in bad), meta=meta, **common
        )
    p_b = statistics.fmean(member.p_b for member in labels if member.p_b is not None)
    tie = abs(p_b - 0.5) < 1e-12
    outside = [member.meta["outside"] for member in labels if "outside" in member.meta]
    meta: dict[str, Any] = {"members": [member.p_b for member in members]}
    if outside:
        meta["outside"] = statistics.fmean(outside)
    return Judgement(
        status=Status.TIE if tie else Status.OK,
        p_b=0.5 if tie else p_b,
        rationale="\n\n".join(f"[{m.critic}] {m.rationale}" for m in labels if m.rationale),
        meta=meta,
        **common,
    )


def unanimity(panels: Sequence[Sequence[Judgement]]) -> float | None:
    """Share of the comparisons on which all members named the same side, among those that all of them labelled."""
    same = [
        len({(p > 0.5) - (p < 0.5) for p in found}) == 1
        for members in zip(*panels, strict=True)
        if len(found := [m.p_b for m in members if m.p_b is not None]) == len(members)
    ]
    return statistics.fmean(same) if same else None


def unsure(judgements: Sequence[Judgement], below: float) -> list[int]:
    """Positions that go to the strong critic: |p_b - 1/2| < below, or no label. Identical outputs do not."""
    return [
        position
        for position, judgement in enumerate(judgements)
        if judgement.p_b is None
        or (abs(judgement.p_b - 0.5) < below and not judgement.reason.startswith("identical outputs"))
    ]


def escalate(first: Sequence[Judgement], strong: Mapping[int, Judgement]) -> list[Judgement]:
    """The strong critic's label where it was asked, the first tier's elsewhere; `meta.tier` says whose it is. Usage and
    cost are those of both. A strong critic that failed fails the label: the next run asks it again."""
    final = []
    for position, judgement in enumerate(first):
        better = strong.get(position)
        if better is None:
            final.append(_with(judgement, meta={**judgement.meta, "tier": 1}))
            continue
        meta = {**better.meta, "tier": 2, "first_tier": judgement.id, "first_tier_p": judgement.p_b}
        costs = [judgement.cost, better.cost]
        final.append(
            _with(
                better,
                meta=meta,
                usage=sum_usage([judgement.usage, better.usage]),
                cost=None if None in costs else sum(cost for cost in costs if cost is not None),
            )
        )
    return final


def _with(judgement: Judgement, **changes: Any) -> Judgement:
    return judgement.model_copy(update=changes)


class Tier(TypedDict):
    """What one critic was asked: comparisons, calls, tokens, US dollars (None: its price is not known)."""

    comparisons: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


def tier_summary(first: Sequence[Judgement], strong: Sequence[Judgement]) -> dict[str, Any]:
    """What each tier was asked, and what that saved against the strong critic alone.

    What the strong critic alone would have used is its mean over the comparisons that it was asked, times all of them:
    an estimate, since those that a cheap critic doubts may be longer or shorter than the rest. Nothing can be said
    where it was not asked at all.

    Returns:
      first, strong: `Tier`. share_strong: share of the comparisons that went on. strong_alone: `Tier`, estimated.
      saved: strong_alone less first and strong, of calls, tokens and cost; negative where two tiers cost more than one.
    """
    asked = [_tier(first), _tier(strong)]
    summary: dict[str, Any] = {
        "first": asked[0],
        "strong": asked[1],
        "share_strong": len(strong) / len(first) if first else None,
        "strong_alone": None,
        "saved": None,
    }
    if strong:
        scale = len(first) / len(strong)
        alone: dict[str, float | None] = {"comparisons": len(first)}
        saved: dict[str, float | None] = {}
        for key in ("calls", "prompt_tokens", "completion_tokens", "cost"):
            one, two = asked[0][key], asked[1][key]
            alone[key] = None if two is None else two * scale
            saved[key] = None if one is None or two is None else two * scale - one - two
        summary["strong_alone"], summary["saved"] = alone, saved
    return summary


def _tier(judgements: Sequence[Judgement]) -> Tier:
    used = sum_usage(judgement.usage for judgement in judgements)
    costs = [judgement.cost for judgement in judgements if judgement.usage is not None]
    return Tier(
        comparisons=len(judgements),
        calls=sum(judgement.meta.get("calls", 0) for judgement in judgements),
        prompt_tokens=used.prompt_tokens if used else 0,
        completion_tokens=used.completion_tokens if used else 0,
        cost=None if None in costs else sum(cost for cost in costs if cost is not None),
    )
