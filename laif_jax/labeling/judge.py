"""From a comparison to a judgement: which calls, how their answers are read, and how two orders become one label.

Rules:

* Identical outputs are a tie, and nobody is asked.
* Order "both": the critic sees a first and then b first; each answer is re-aligned to the comparison's own a and b, and
  the two probabilities are averaged. A hard disagreement therefore averages to 1/2, which is a tie.
* Order "seeded": one order per comparison, drawn from the seed and the comparison's content.
* If one of the two orders gave no label, the merged judgement gives none: half an average would carry the critic's
  position bias. Its status is the worse one of the two (failed, refused, unparsable, in that order).
* `meta.passing` of a failed one says whether it may be over when the comparison is put again: nobody was reached, or
  there were too many calls, not a request that is never accepted.
* The critic's text that only refuses is `refused`; any other text that the parser cannot read is `unparsable`.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from laif_jax.labeling.calls import Call, Endpoint, Truth
from laif_jax.labeling.critic import Critic, instruction_text, last_user_turn
from laif_jax.labeling.parsers import Verdict
from laif_jax.labeling.scheduler import Outcome
from laif_jax.labeling.work import Result
from laif_jax.records import Comparison, Completion, Judgement, Status, Usage, content_id

Order = Literal["ab", "ba"]
_SEVERITY = (Status.FAILED, Status.REFUSED, Status.UNPARSABLE)
_REFUSES = re.compile(
    r"^\W*(?:i(?:'|’| a)?m (?:very |so )?(?:sorry|unable)|(?:i )?apologi[sz]e|sorry,|as an ai\b|"
    r"i (?:can(?:no|'|’)t|will not|won(?:'|’)t|am not able to|must decline))",
    re.IGNORECASE,
)


def orders(comparison: Comparison, order: Literal["both", "seeded"], seed: int) -> tuple[Order, ...]:
    """The orders in which a comparison is shown; none if its outputs are identical."""
    if comparison.a.text == comparison.b.text:
        return ()
    if order == "both":
        return ("ab", "ba")
    digest = hashlib.sha256(f"{seed}:{comparison.id}".encode()).digest()
    return ("ba",) if digest[0] & 1 else ("ab",)


def make_call(comparison: Comparison, order: Order, critic: Critic, endpoint: Endpoint) -> Call:
    """The call that shows a comparison in one order."""
    first, second = (comparison.a, comparison.b) if order == "ab" else (comparison.b, comparison.a)
    messages = critic.messages(instruction_text(comparison.prompt), first.text, second.text)
    truth = None
    if endpoint.simulated is not None:
        truth = Truth(
            instruction=last_user_turn(comparison.prompt),
            first=first.text,
            second=second.text,
            quality=(planted_quality(first), planted_quality(second))
            if endpoint.simulated.world == "planted"
            else (None, None),
            parser=critic.reader,
            format_id=critic.format_id,
        )
    return Call(endpoint, messages, critic.params, truth=truth)


def planted_quality(completion: Completion) -> float | None:
    """What the world "planted" reads: the completion's `meta.quality`."""
    quality = completion.meta.get("quality")
    return float(quality) if isinstance(quality, (int, float)) else None


def read_judgement(comparison: Comparison, order: Order, critic: Critic, outcome: Outcome) -> Judgement:
    """The judgement in one order, re-aligned: p_b is the probability that the comparison's own `b` is better."""
    answer = outcome.answer
    common: dict[str, Any] = {
        "comparison_id": comparison.id,
        "critic": critic.name,
        "critic_hash": critic.hash,
        "order": order,
        "date": outcome.date,
    }
    if answer is None:
        return Judgement(
            status=Status.FAILED, reason=outcome.reason, meta={"passing": outcome.passing}, **common
        )
    verdict = _read(critic, outcome)
    p_second = verdict.p_second
    return Judgement(
        status=verdict.status,
        p_b=p_second if p_second is None or order == "ab" else 1.0 - p_second,
        raw=answer.text,
        reason=verdict.reason,
        rationale=verdict.rationale,
        usage=answer.usage,
        latency=outcome.latency,
        provider_fingerprint="/".join(filter(None, (answer.model, answer.fingerprint))),
        meta={**verdict.meta, "request": outcome.key},
        **common,
    )


def _read(critic: Critic, outcome: Outcome) -> Verdict:
    answer = outcome.answer
    assert answer is not None
    if answer.refusal:
        return Verdict(Status.REFUSED, reason=answer.refusal)
    verdict = critic.reader.parse(answer)
    if verdict.status is Status.UNPARSABLE and refuses(answer.text):
        return Verdict(Status.REFUSED, reason="the critic declined to compare")
    return verdict


def refuses(text: str) -> bool:
    """Whether a critic's answer only declines."""
    return _REFUSES.match(text) is not None


def merge(comparison: Comparison, critic: Critic, parts: Sequence[Judgement]) -> Judgement:
    """One judgement from both orders (see the module's rules)."""
    common: dict[str, Any] = {
        "comparison_id": comparison.id,
        "critic": critic.name,
        "critic_hash": critic.hash,
        "order": "both",
        "usage": _sum_usage(parts),
        "latency": sum(part.latency or 0.0 for part in parts),
        "provider_fingerprint": parts[0].provider_fingerprint,
        "date": max(part.date for part in parts),
        "parts": tuple(part.id for part in parts),
    }
    for status in _SEVERITY:
        bad = [part for part in parts if part.status is status]
        if bad:
            reason = "; ".join(f"order {part.order}: {part.reason}" for part in bad)
            passing = (
                {"passing": all(part.meta["passing"] for part in bad)} if status is Status.FAILED else {}
            )
            return Judgement(status=status, reason=reason, meta=passing, **common)
    by_order = {f"p_{part.order}": part.p_b for part in parts}
    p_b = sum(part.p_b or 0.0 for part in parts) / len(parts)
    tie = abs(p_b - 0.5) < 1e-12
    rationale = "\n\n".join(f"[{part.order}] {part.rationale}" for part in parts if part.rationale)
    return Judgement(
        status=Status.TIE if tie else Status.OK,
        p_b=0.5 if tie else p_b,
        rationale=rationale,
        meta=by_order,
        **common,
    )


def _sum_usage(parts: Sequence[Judgement]) -> Usage | None:
    known = [part.usage for part in parts if part.usage is not None]
    if not known:
        return None
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in known),
        completion_tokens=sum(usage.completion_tokens for usage in known),
    )


def identical(comparison: Comparison, critic: Critic, order: Literal["both", "seeded"]) -> Judgement:
    """The tie of two identical outputs, for which nobody is asked."""
    return Judgement(
        comparison_id=comparison.id,
        critic=critic.name,
        critic_hash=critic.hash,
        order="both" if order == "both" else "ab",
        status=Status.TIE,
        p_b=0.5,
        reason="identical outputs: nobody was asked",
    )


class JudgeWork:
    """The comparisons of a `judge` job."""

    kind = "judge"

    def __init__(
        self,
        endpoint: Endpoint,
        critic: Critic,
        comparisons: Sequence[Comparison],
        order: Literal["both", "seeded"],
        seed: int,
    ) -> None:
        self.endpoint, self.critic, self._critic = endpoint, critic.name, critic
        self._comparisons, self._order, self._seed = comparisons, order, seed

    @cached_property
    def id(self) -> str:
        items = [
            (comparison.id, planted_quality(comparison.a), planted_quality(comparison.b))
            for comparison in self._comparisons
        ]
        # The seed has no effect on both orders.
        seed = self._seed if self._order == "seeded" else None
        return content_id([self.kind, self.endpoint.key, self._critic.hash, self._order, seed, items])

    def __len__(self) -> int:
        return len(self._comparisons)

    def calls(self, position: int) -> list[Call]:
        comparison = self._comparisons[position]
        return [
            make_call(comparison, order, self._critic, self.endpoint)
            for order in orders(comparison, self._order, self._seed)
        ]

    def results(self, position: int, outcomes: Sequence[Outcome]) -> list[Result]:
        comparison, critic = self._comparisons[position], self._critic
        if not outcomes:
            return [self._result(identical(comparison, critic, self._order))]
        shown = orders(comparison, self._order, self._seed)
        singles = [
            read_judgement(comparison, order, critic, outcome)
            for order, outcome in zip(shown, outcomes, strict=True)
        ]
        if len(singles) == 1:
            final = self._result(singles[0])
            return [final, replace(final, part=1)]
        merged = merge(comparison, critic, singles)
        return [self._result(merged)] + [self._result(single, part) for part, single in enumerate(singles, 1)]

    def _result(self, judgement: Judgement, part: int = 0) -> Result:
        # One row per comparison, critic, endpoint and order: a label that is made again takes the old one's place.
        key = content_id([judgement.comparison_id, self._critic.hash, self.endpoint.key, judgement.order])
        return Result(
            key=key,
            kind="judgement",
            item=judgement.comparison_id,
            status=judgement.status.value,
            critic_hash=self._critic.hash,
            record=judgement.model_dump_json(),
            part=part,
        )
