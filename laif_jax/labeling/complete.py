"""From prompts to a teacher's completions."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from laif_jax.labeling.calls import Call, Endpoint, Truth
from laif_jax.labeling.critic import last_user_turn
from laif_jax.labeling.scheduler import Outcome
from laif_jax.labeling.work import Result
from laif_jax.records import Completion, Prompt, Status, content_id
from laif_jax.records.types import Record


class Failure(Record):
    """A completion that was asked for and did not come; it never becomes training text.

    Attributes:
      status: "failed" or "refused". reason: why, and what to do.
      passing: it may come when it is asked for again: nobody was reached, or there were too many calls.
    """

    prompt_id: str
    generator: str
    sample_index: int = 0
    status: Status
    reason: str
    passing: bool = False


class CompleteWork:
    """The prompts of a `complete` job, `n` samples each, in the order prompt 0 sample 0, prompt 0 sample 1, ..."""

    kind = "complete"
    critic = ""

    def __init__(
        self,
        endpoint: Endpoint,
        prompts: Sequence[Prompt],
        *,
        generator: str,
        system: str | None,
        params: dict[str, Any],
        n: int,
        seed: int | None,
    ) -> None:
        self.endpoint, self._prompts, self._generator = endpoint, prompts, generator
        self._system, self._params, self._n, self._seed = system, params, n, seed

    @cached_property
    def id(self) -> str:
        prompts = [prompt.id for prompt in self._prompts]
        asked = [self._generator, self._system, self._params, self._n, self._seed]
        return content_id([self.kind, self.endpoint.key, asked, prompts])

    def __len__(self) -> int:
        return len(self._prompts) * self._n

    def calls(self, position: int) -> list[Call]:
        prompt, sample = self._prompts[position // self._n], position % self._n
        messages = tuple({"role": m.role, "content": m.content} for m in prompt.messages)
        if self._system is not None:
            messages = ({"role": "system", "content": self._system}, *messages)
        params = dict(self._params)
        if self._seed is not None:
            # Each prompt and sample has its own: with one seed for all, their random draws would be the same.
            digest = hashlib.sha256(f"{self._seed}:{prompt.id}:{sample}".encode()).digest()
            params["seed"] = int.from_bytes(digest[:4], "big") >> 1
        truth = Truth(last_user_turn(prompt)) if self.endpoint.provider == "simulated" else None
        return [Call(self.endpoint, messages, params, sample=sample, truth=truth)]

    def results(self, position: int, outcomes: Sequence[Outcome]) -> list[Result]:
        prompt, sample, outcome = self._prompts[position // self._n], position % self._n, outcomes[0]
        record, status = self._record(prompt, sample, outcome)
        return [
            Result(
                key=content_id([outcome.key, self._generator]),
                kind="completion",
                item=prompt.id,
                status=status.value,
                critic_hash="",
                record=record.model_dump_json(),
            )
        ]

    def _record(self, prompt: Prompt, sample: int, outcome: Outcome) -> tuple[Completion | Failure, Status]:
        answer = outcome.answer
        if answer is None or (answer.refusal and not answer.text.strip()):
            status = Status.FAILED if answer is None else Status.REFUSED
            reason = outcome.reason if answer is None else answer.refusal
            failure = Failure(
                prompt_id=prompt.id,
                generator=self._generator,
                sample_index=sample,
                status=status,
                reason=reason,
                passing=outcome.passing,
            )
            return failure, status
        completion = Completion(
            prompt_id=prompt.id,
            generator=self._generator,
            text=answer.text,
            finish_reason=answer.finish_reason,
            sample_index=sample,
            usage=answer.usage,
            meta={"request": outcome.key, "model": answer.model},
        )
        return completion, Status.OK
