"""Judgements from rankings: all responses to a prompt are ranked in one call; each comparison reads its pair from it.

* The comparisons of one prompt in a job make one list: its different texts, in an order drawn from the seed and the
  content. In both orders the list is shown a second time the other way round, so that each pair is seen in both.
* A pair's probability is 0, 1, or 1/2 where the ranking calls it a tie; both orders are averaged as in `judge`.
* What a call used is counted once, with the first comparison of its list.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, Literal

from laif_jax.labeling.calls import Call, Endpoint, Truth
from laif_jax.labeling.critic import Critic, instruction_text, last_user_turn
from laif_jax.labeling.errors import CriticError
from laif_jax.labeling.judge import ComparisonWork, Order, identical, merge, planted_quality, refuses
from laif_jax.labeling.listwise import Ranking
from laif_jax.labeling.pair_facts import told
from laif_jax.labeling.scheduler import Outcome
from laif_jax.labeling.work import Result
from laif_jax.records import Comparison, Completion, Judgement, Prompt, Status


def all_pairs(prompt: Prompt, completions: Sequence[Completion]) -> list[Comparison]:
    """Every pair of a prompt's completions, the earlier one as a."""
    return [Comparison(prompt=prompt, a=a, b=b) for a, b in combinations(completions, 2)]


class ListJudgeWork(ComparisonWork):
    """Comparisons by a critic that ranks lists."""

    def __init__(
        self,
        endpoint: Endpoint,
        critic: Critic,
        comparisons: Sequence[Comparison],
        order: Literal["both", "seeded"],
        seed: int,
    ) -> None:
        super().__init__(endpoint, critic, comparisons, order, seed)
        self._lists: dict[str, list[Completion]] = {}
        self._first: dict[str, int] = {}  # of each prompt, the comparison with which its calls are counted
        self._fill()

    def _fill(self) -> None:
        by_text: dict[str, dict[str, Completion]] = defaultdict(dict)
        for position, comparison in enumerate(self._comparisons):
            if comparison.a.text != comparison.b.text:
                self._first.setdefault(comparison.prompt.id, position)
                for side in (comparison.a, comparison.b):
                    by_text[comparison.prompt.id].setdefault(side.text, side)
        for prompt, sides in by_text.items():
            if len(sides) > self._critic.ranker.options.most:
                raise CriticError(
                    f"critic {self._critic.name!r} ranks at most {self._critic.ranker.options.most} responses in one "
                    f"list (`options.most`), and prompt {prompt} has {len(sides)}"
                )
            # The draw must not depend on the order in which the comparisons came.
            drawn = sorted(sides.values(), key=lambda side: self._draw(prompt, side.text))
            self._lists[prompt] = drawn

    def _draw(self, prompt: str, text: str) -> bytes:
        return hashlib.sha256(f"{self._seed}:{prompt}:{text}".encode("utf-8", "surrogatepass")).digest()

    def calls(self, position: int) -> list[Call]:
        comparison = self._comparisons[position]
        if comparison.a.text == comparison.b.text:
            return []
        shown = self._lists[comparison.prompt.id]
        return [self._call(comparison.prompt, side) for side in self._shown(shown)]

    def _shown(self, drawn: list[Completion]) -> list[list[Completion]]:
        return [drawn, drawn[::-1]] if self._order == "both" else [drawn]

    def _call(self, prompt: Prompt, shown: Sequence[Completion]) -> Call:
        texts, truth = tuple(side.text for side in shown), None
        if self.endpoint.simulated is not None:
            planted = self.endpoint.simulated.world == "planted"
            truth = Truth(
                instruction=last_user_turn(prompt),
                texts=texts,
                quality=tuple(planted_quality(side) if planted else None for side in shown),
                parser=self._critic.ranker,
                format_id=self._critic.format_id,
                task="listwise",
            )
        messages = self._critic.listwise_messages(instruction_text(prompt), texts)
        return Call(self.endpoint, messages, self._critic.params, truth=truth)

    def results(self, position: int, outcomes: Sequence[Outcome]) -> list[Result]:
        comparison = self._comparisons[position]
        if not outcomes:
            tie = identical(comparison, self._critic, self._order)
            return [self._result(comparison, told(tie, comparison))]
        lists = self._shown(self._lists[comparison.prompt.id])
        counted = self._first[comparison.prompt.id] == position
        singles = sorted(
            (self._read(comparison, shown, outcome, counted) for shown, outcome in zip(lists, outcomes)),
            key=lambda judgement: judgement.order,
        )
        if len(singles) == 1:
            final = self._result(comparison, told(singles[0], comparison))
            return [final, replace(final, part=1)]
        finals = [told(merge(comparison, self._critic, singles), comparison), *singles]
        return [self._result(comparison, judgement, part) for part, judgement in enumerate(finals)]

    def _read(
        self, comparison: Comparison, shown: Sequence[Completion], outcome: Outcome, counted: bool
    ) -> Judgement:
        places = {side.text: place for place, side in enumerate(shown)}
        a, b = places[comparison.a.text], places[comparison.b.text]
        order: Order = "ab" if a < b else "ba"
        answer, critic = outcome.answer, self._critic
        meta: dict[str, Any] = {"critic_version": critic.version, "calls": int(counted), "places": [a, b]}
        common: dict[str, Any] = {
            "comparison_id": comparison.id,
            "critic": critic.name,
            "critic_hash": critic.hash,
            "order": order,
            "date": outcome.date,
        }
        if answer is None:
            return Judgement(
                status=Status.FAILED,
                reason=outcome.reason,
                meta={**meta, "passing": outcome.passing},
                **common,
            )
        ranking = Ranking(Status.REFUSED, reason=answer.refusal) if answer.refusal else None
        ranking = ranking or critic.ranker.parse(answer, len(shown))
        if ranking.status is Status.UNPARSABLE and refuses(answer.text):
            ranking = Ranking(Status.REFUSED, reason="the critic declined to rank")
        p_b, status = None, ranking.status
        if ranking.ranks is not None:
            difference = ranking.ranks[a] - ranking.ranks[b]
            p_b, status = (0.5, Status.TIE) if difference == 0 else (float(difference > 0), Status.OK)
        return Judgement(
            status=status,
            p_b=p_b,
            raw=answer.text,
            reason=ranking.reason,
            usage=answer.usage if counted else None,
            latency=outcome.latency if counted else 0.0,
            provider_fingerprint="/".join(filter(None, (answer.model, answer.fingerprint))),
            meta={**meta, "request": outcome.key},
            **common,
        )

    def _result(self, comparison: Comparison, judgement: Judgement, part: int = 0) -> Result:
        # A pair may be ranked again among others: that is another label.
        listed = [side.id for side in self._lists.get(comparison.prompt.id, ())]
        key = [
            judgement.comparison_id,
            self._critic.hash,
            self.endpoint.key,
            judgement.order,
            self._seed,
            listed,
        ]
        return self._stored(key, judgement, part)
