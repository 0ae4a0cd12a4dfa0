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
* Several `samples` in one order: their probabilities are averaged. One that failed fails the order (it is asked again
  by the next job); refused and unparsable ones are left out as long as more than half of the samples gave a label.
* A rationale is asked for first; its text goes into the verdict's own request, whose answer is scored. Where no label
  can come of an order any more, no verdict is asked for.
* A principle is drawn per comparison, by the seed and the comparison's content: the same in both orders.
* `invert` turns an order's probability round, then `clamp` bounds it; both before re-alignment and averaging.
* `meta.outside` is the probability that a log-prob answer left to anything but the two options.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

from laif_jax.labeling.calls import Call, Endpoint, Truth
from laif_jax.labeling.critic import Critic, instruction_text, last_user_turn
from laif_jax.labeling.critic_parts import Principle, draw_principle
from laif_jax.labeling.pair_facts import told
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
    return _seeded(seed, comparison.id)


@lru_cache(maxsize=4096)  # asked for when a call is made, and when it is answered
def _seeded(seed: int, comparison_id: str) -> tuple[Order, ...]:
    digest = hashlib.sha256(f"{seed}:{comparison_id}".encode()).digest()
    return ("ba",) if digest[0] & 1 else ("ab",)


def principle_of(comparison: Comparison, critic: Critic, seed: int) -> Principle | None:
    """The principle by which a comparison is judged, in whatever order; None if the critic has none."""
    return draw_principle(critic.principles, seed, comparison.id) if critic.principles else None


def make_call(
    comparison: Comparison,
    order: Order,
    critic: Critic,
    endpoint: Endpoint,
    *,
    principle: Principle | None = None,
    rationale: str = "",
    sample: int = 0,
) -> Call:
    """The call that shows a comparison in one order and asks for the verdict."""
    shown = _shown(comparison, order)
    messages = critic.messages(*shown, principle=principle, rationale=rationale)
    truth = _truth(comparison, order, critic, endpoint, principle)
    return Call(endpoint, messages, critic.params, sample=sample if critic.temperature else 0, truth=truth)


def make_rationale_call(
    comparison: Comparison,
    order: Order,
    critic: Critic,
    endpoint: Endpoint,
    *,
    principle: Principle | None = None,
    sample: int = 0,
) -> Call:
    """The call that asks for the rationale of a comparison in one order."""
    messages = critic.rationale_messages(*_shown(comparison, order), principle=principle)
    truth = _truth(comparison, order, critic, endpoint, principle)
    if truth is not None:
        truth = replace(truth, task="rationale", parser=None)
    return Call(endpoint, messages, critic.rationale_params, sample=sample, truth=truth)


def _shown(comparison: Comparison, order: Order) -> tuple[str, str, str]:
    first, second = (comparison.a, comparison.b) if order == "ab" else (comparison.b, comparison.a)
    return instruction_text(comparison.prompt), first.text, second.text


def _truth(
    comparison: Comparison, order: Order, critic: Critic, endpoint: Endpoint, principle: Principle | None
) -> Truth | None:
    """What a simulated endpoint may know of a comparison; None for a real one."""
    if endpoint.simulated is None:
        return None
    first, second = (comparison.a, comparison.b) if order == "ab" else (comparison.b, comparison.a)
    planted = endpoint.simulated.world == "planted"
    return Truth(
        instruction=last_user_turn(comparison.prompt),
        first=first.text,
        second=second.text,
        quality=(planted_quality(first), planted_quality(second)) if planted else (None, None),
        parser=critic.reader,
        format_id=critic.format_id,
        task="" if critic.rationale is None else "verdict",
        invert=inverted(critic, principle),
    )


def inverted(critic: Critic, principle: Principle | None) -> bool:
    """Whether the worse response is asked for."""
    return critic.invert != (principle is not None and principle.invert)


def planted_quality(completion: Completion) -> float | None:
    """What the world "planted" reads: the completion's `meta.quality`."""
    quality = completion.meta.get("quality")
    return float(quality) if isinstance(quality, (int, float)) else None


@dataclass(frozen=True, slots=True)
class Sample:
    """What was answered for one sample of one order: the verdict, and the rationale before it where one was asked for.
    `answer` is None if the verdict was not asked for, because the rationale was none."""

    answer: Outcome | None
    rationale: Outcome | None = None

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome for outcome in (self.rationale, self.answer) if outcome is not None]


def read_judgement(comparison: Comparison, order: Order, critic: Critic, outcome: Outcome) -> Judgement:
    """The judgement in one order, re-aligned: p_b is the probability that the comparison's own `b` is better."""
    return read_samples(comparison, order, critic, [Sample(outcome)])


def read_samples(
    comparison: Comparison,
    order: Order,
    critic: Critic,
    samples: Sequence[Sample],
    principle: Principle | None = None,
) -> Judgement:
    """The judgement in one order from its samples (see the module's rules), re-aligned."""
    outcomes = list({o.key: o for sample in samples for o in sample.outcomes}.values())
    common: dict[str, Any] = {
        "comparison_id": comparison.id,
        "critic": critic.name,
        "critic_hash": critic.hash,
        "principle": principle.id if principle else "",
        "order": order,
        "date": max((o.date for o in outcomes), default=""),
        "usage": sum_usage(o.answer.usage for o in outcomes if o.answer is not None),
    }
    failed = [outcome for outcome in outcomes if outcome.answer is None]
    meta: dict[str, Any] = {"critic_version": critic.version, "calls": len(outcomes)}
    if failed:
        meta |= {"passing": all(outcome.passing for outcome in failed)}
        return Judgement(status=Status.FAILED, reason=failed[0].reason, meta=meta, **common)
    verdicts = [_read(critic, sample) for sample in samples]
    labels = [verdict for verdict in verdicts if verdict.p_second is not None]
    answers = [sample.answer.answer for sample in samples if sample.answer and sample.answer.answer]
    last = outcomes[-1]
    assert last.answer is not None
    meta |= {"request": last.key}
    if len(outcomes) > 1:
        meta["requests"] = [outcome.key for outcome in outcomes]
    common |= {
        "raw": _texts([answer.text for answer in answers]),
        "rationale": _texts(_rationales(samples, verdicts)),
        "latency": sum(outcome.latency for outcome in outcomes),
        "provider_fingerprint": "/".join(filter(None, (last.answer.model, last.answer.fingerprint))),
    }
    if len(labels) * 2 <= len(samples):
        worst = next((v for v in verdicts if v.status is Status.REFUSED), None)
        worst = worst or next(v for v in verdicts if v.p_second is None)
        return Judgement(status=worst.status, reason=worst.reason, meta=worst.meta | meta, **common)
    p_second = sum(verdict.p_second or 0.0 for verdict in labels) / len(labels)
    meta = (labels[0].meta if len(samples) == 1 else {}) | meta
    outside = [1.0 - verdict.meta["mass"] for verdict in labels if "mass" in verdict.meta]
    if outside:
        meta["outside"] = round(sum(outside) / len(outside), 6)
    turn = inverted(critic, principle)
    p_b = _label(p_second, critic, turn, order)
    if len(samples) > 1:
        meta["samples"] = [
            None if v.p_second is None else _align(1.0 - v.p_second if turn else v.p_second, order)
            for v in verdicts
        ]
    reason = next((v.reason for v in verdicts if v.p_second is None), "") or labels[0].reason
    return Judgement(
        status=Status.TIE if p_b == 0.5 else Status.OK, p_b=p_b, reason=reason, meta=meta, **common
    )


def _label(p_second: float, critic: Critic, turn: bool, order: Order) -> float:
    """The label of an order from the critic's own probability."""
    p = 1.0 - p_second if turn else p_second
    if critic.clamp is not None:
        p = min(max(p, critic.clamp[0]), critic.clamp[1])
    return 0.5 if abs(p - 0.5) < 1e-12 else _align(p, order)


def _align(p_second: float, order: Order) -> float:
    return p_second if order == "ab" else 1.0 - p_second


def _texts(texts: Sequence[str]) -> str:
    """One text as it came; several with their numbers."""
    if len(texts) <= 1:
        return texts[0] if texts else ""
    return "\n\n".join(f"[sample {number}] {text}" for number, text in enumerate(texts, 1))


def _rationales(samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> list[str]:
    asked = [s.rationale.answer.text for s in samples if s.rationale and s.rationale.answer]
    return asked or [verdict.rationale for verdict in verdicts if verdict.rationale]


def no_rationale(outcome: Outcome) -> Verdict | None:
    """Why no verdict can be asked for after this rationale; None if one can."""
    answer = outcome.answer
    assert answer is not None
    if answer.refusal:
        return Verdict(Status.REFUSED, reason=answer.refusal)
    if refuses(answer.text):
        return Verdict(Status.REFUSED, reason="the critic declined to discuss the responses")
    return None


def _read(critic: Critic, sample: Sample) -> Verdict:
    if sample.rationale is not None and (none := no_rationale(sample.rationale)):
        return none
    if sample.answer is None:  # most of the other samples' were refused: their reason is the order's
        return Verdict(Status.UNPARSABLE, reason="no verdict was asked for: most rationales were refused")
    answer = sample.answer.answer
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
        "principle": parts[0].principle,
        "order": "both",
        "usage": sum_usage(part.usage for part in parts),
        "latency": sum(part.latency or 0.0 for part in parts),
        "provider_fingerprint": parts[0].provider_fingerprint,
        "date": max(part.date for part in parts),
        "parts": tuple(part.id for part in parts),
    }
    counted = {"calls": sum(part.meta.get("calls", 0) for part in parts)}
    for status in _SEVERITY:
        bad = [part for part in parts if part.status is status]
        if bad:
            reason = "; ".join(f"order {part.order}: {part.reason}" for part in bad)
            passing = (
                {"passing": all(part.meta["passing"] for part in bad)} if status is Status.FAILED else {}
            )
            return Judgement(status=status, reason=reason, meta={**counted, **passing}, **common)
    meta: dict[str, Any] = {f"p_{part.order}": part.p_b for part in parts} | counted
    outside = [part.meta["outside"] for part in parts if "outside" in part.meta]
    if outside:
        meta["outside"] = round(sum(outside) / len(outside), 6)
    if "critic_version" in parts[0].meta:
        meta["critic_version"] = parts[0].meta["critic_version"]
    p_b = sum(part.p_b or 0.0 for part in parts) / len(parts)
    tie = abs(p_b - 0.5) < 1e-12
    rationale = "\n\n".join(f"[{part.order}] {part.rationale}" for part in parts if part.rationale)
    return Judgement(
        status=Status.TIE if tie else Status.OK,
        p_b=0.5 if tie else p_b,
        rationale=rationale,
        meta=meta,
        **common,
    )


def sum_usage(usages: Iterable[Usage | None]) -> Usage | None:
    """All tokens together; None if nothing is known."""
    known = [usage for usage in usages if usage is not None]
    if len(known) <= 1:
        return known[0] if known else None
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in known),
        completion_tokens=sum(usage.completion_tokens for usage in known),
        cached_tokens=sum(usage.cached_tokens for usage in known),
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


class ComparisonWork:
    """What all that judges comparisons has: the comparisons of a `judge` job, and its identity."""

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
        self.stages = 1 if critic.rationale is None else 2
        self.most_calls = 2 * critic.samples

    @property
    def _seed_that_matters(self) -> int | None:
        """The seed, or None where another one would ask for the very same."""
        return self._seed

    @cached_property
    def id(self) -> str:
        items = [
            (comparison.id, planted_quality(comparison.a), planted_quality(comparison.b))
            for comparison in self._comparisons
        ]
        key = [self.kind, self.endpoint.key, self._critic.hash, self._order, self._seed_that_matters, items]
        return content_id(key)

    def __len__(self) -> int:
        return len(self._comparisons)

    def _stored(self, key: Sequence[Any], judgement: Judgement, part: int) -> Result:
        """A judgement as a result, under the content of `key`."""
        return Result(
            key=content_id(key),
            kind="judgement",
            item=judgement.comparison_id,
            status=judgement.status.value,
            critic_hash=self._critic.hash,
            record=judgement.model_dump_json(),
            part=part,
        )


class JudgeWork(ComparisonWork):
    """Each comparison put to the critic by itself."""

    @property
    def _seed_that_matters(self) -> int | None:
        # It has no effect on both orders, if it does not draw principles.
        return self._seed if self._order == "seeded" or self._critic.principles else None

    def comparison(self, position: int) -> Comparison:
        """What an item asks about."""
        return self._comparisons[position]

    def calls(self, position: int) -> list[Call]:
        comparison, critic = self._comparisons[position], self._critic
        make = make_call if critic.rationale is None else make_rationale_call
        principle = self._principle(comparison)
        return [
            make(comparison, order, critic, self.endpoint, principle=principle, sample=sample)
            for order, sample in self._slots(comparison)
        ]

    def further(self, position: int, outcomes: Sequence[Outcome]) -> list[Call]:
        comparison, critic = self._comparisons[position], self._critic
        slots = self._slots(comparison)
        if critic.rationale is None or not slots or len(outcomes) > len(slots):
            return []
        return [
            make_call(
                comparison,
                order,
                critic,
                self.endpoint,
                principle=self._principle(comparison),
                rationale=outcome.answer.text,
                sample=sample,
            )
            for (order, sample), outcome in self._usable(slots, outcomes)
            if outcome.answer is not None
        ]

    def results(self, position: int, outcomes: Sequence[Outcome]) -> list[Result]:
        comparison, critic = self._comparisons[position], self._critic
        if not outcomes:
            return [self._result(told(identical(comparison, critic, self._order), comparison))]
        slots = self._slots(comparison)
        if critic.rationale is None:
            samples = [Sample(outcome) for outcome in outcomes]
        else:
            first, second = outcomes[: len(slots)], outcomes[len(slots) :]
            asked = [slot for slot, _ in self._usable(slots, first)] if second else []
            answers = dict(zip(asked, second, strict=True))
            samples = [Sample(answers.get(slot), outcome) for slot, outcome in zip(slots, first, strict=True)]
        singles = []
        for order in orders(comparison, self._order, self._seed):
            mine = [sample for (shown, _), sample in zip(slots, samples, strict=True) if shown == order]
            singles.append(read_samples(comparison, order, critic, mine, self._principle(comparison)))
        if len(singles) == 1:
            final = self._result(told(singles[0], comparison))
            return [final, final.at(1)]
        merged = told(merge(comparison, critic, singles), comparison)
        return [self._result(merged)] + [self._result(single, part) for part, single in enumerate(singles, 1)]

    def _slots(self, comparison: Comparison) -> list[tuple[Order, int]]:
        """(order, sample) of the first stage's calls."""
        shown = orders(comparison, self._order, self._seed)
        return [(order, sample) for order in shown for sample in range(self._critic.samples)]

    def _usable(
        self, slots: Sequence[tuple[Order, int]], rationales: Sequence[Outcome]
    ) -> list[tuple[tuple[Order, int], Outcome]]:
        """The rationales that a verdict is asked for, with their slots: none of an order in which one failed or too
        many were refused, for then that order has no label whatever the verdicts."""
        usable = []
        for order in dict.fromkeys(order for order, _ in slots):
            mine = [(slot, o) for slot, o in zip(slots, rationales, strict=True) if slot[0] == order]
            if any(outcome.answer is None for _, outcome in mine):
                continue
            good = [(slot, outcome) for slot, outcome in mine if no_rationale(outcome) is None]
            usable += good if 2 * len(good) > self._critic.samples else []
        return usable

    def _principle(self, comparison: Comparison) -> Principle | None:
        return principle_of(comparison, self._critic, self._seed)

    def _result(self, judgement: Judgement, part: int = 0) -> Result:
        # One row per comparison, critic, endpoint, order and principle: a label that is made again takes the old one's
        # place.
        key = [judgement.comparison_id, self._critic.hash, self.endpoint.key, judgement.order]
        return self._stored([*key, judgement.principle] if judgement.principle else key, judgement, part)
