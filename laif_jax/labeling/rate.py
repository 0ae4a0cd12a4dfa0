"""From a completion to a rating: which call, and how its answer is read.

The critic's text that only refuses is `refused`; any other text that the parser cannot read is `unparsable`; a call
without an answer is `failed`. None of them carries a number.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from laif_jax.labeling.calls import Call, Endpoint, Truth
from laif_jax.labeling.critic import Critic, instruction_text, last_user_turn
from laif_jax.labeling.judge import planted_quality, refuses
from laif_jax.labeling.rating import Score
from laif_jax.labeling.scheduler import Outcome
from laif_jax.labeling.work import Result
from laif_jax.records import Completion, Prompt, Rating, Status, content_id

Item = tuple[Prompt, Completion]


def make_call(prompt: Prompt, completion: Completion, critic: Critic, endpoint: Endpoint) -> Call:
    """The call that shows one completion."""
    truth = None
    if endpoint.simulated is not None:
        planted = endpoint.simulated.world == "planted"
        truth = Truth(
            instruction=last_user_turn(prompt),
            first=completion.text,
            quality=(planted_quality(completion) if planted else None, None),
            parser=critic.rater,
            format_id=critic.format_id,
        )
    messages = critic.rating_messages(instruction_text(prompt), completion.text)
    return Call(endpoint, messages, critic.params, truth=truth)


def read_rating(prompt: Prompt, completion: Completion, critic: Critic, outcome: Outcome) -> Rating:
    """The rating in an outcome. `meta.request` is the request's key; `meta.passing` of a failure says whether it may be
    over when the completion is rated again."""
    common: dict[str, Any] = {
        "completion_id": completion.id,
        "prompt_id": prompt.id,
        "critic": critic.name,
        "critic_hash": critic.hash,
        "date": outcome.date,
    }
    answer = outcome.answer
    if answer is None:
        meta = {"request": outcome.key, "passing": outcome.passing}
        return Rating(status=Status.FAILED, reason=outcome.reason, meta=meta, **common)
    found = critic.rater.parse(answer) if not answer.refusal else Score(Status.REFUSED, reason=answer.refusal)
    if found.status is Status.UNPARSABLE and refuses(answer.text):
        found = Score(Status.REFUSED, reason="the critic declined to rate")
    return Rating(
        status=found.status,
        score=found.score,
        p=found.p,
        mass=found.mass,
        ambiguous=found.ambiguous,
        raw=answer.text,
        reason=found.reason,
        usage=answer.usage,
        latency=outcome.latency,
        provider_fingerprint="/".join(filter(None, (answer.model, answer.fingerprint))),
        meta={**found.meta, "request": outcome.key},
        **common,
    )


class RateWork:
    """The completions of a `rate` job, each with its prompt."""

    kind = "rate"

    def __init__(self, endpoint: Endpoint, critic: Critic, items: Sequence[Item]) -> None:
        self.endpoint, self.critic, self._critic, self._items = endpoint, critic.name, critic, items

    @cached_property
    def id(self) -> str:
        items = [
            (prompt.id, completion.id, planted_quality(completion)) for prompt, completion in self._items
        ]
        return content_id([self.kind, self.endpoint.key, self._critic.hash, items])

    def __len__(self) -> int:
        return len(self._items)

    def calls(self, position: int) -> list[Call]:
        return [make_call(*self._items[position], self._critic, self.endpoint)]

    def results(self, position: int, outcomes: Sequence[Outcome]) -> list[Result]:
        prompt, completion = self._items[position]
        rating = read_rating(prompt, completion, self._critic, outcomes[0])
        return [
            Result(
                # A rating that is made again takes the old one's place.
                key=content_id([completion.id, self._critic.hash, self.endpoint.key]),
                kind="rating",
                item=completion.id,
                status=rating.status.value,
                critic_hash=self._critic.hash,
                record=rating.model_dump_json(),
            )
        ]
