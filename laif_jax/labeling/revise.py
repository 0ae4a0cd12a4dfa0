"""Critique and revision: a model criticises its own answer by a principle and revises it, n times over (SL-CAI, Bai et
al. 2022). The revisions are completions, and targets of supervised fine-tuning.

* Each step draws one principle, uniformly, by the seed, the prompt and the step.
* Each critique and each revision is a request of its own, asked once the answer before it is stored: a chain that was
  killed goes on where it was, and what was answered is not paid for again.
* A step whose critique or revision is refused or fails ends the chain: its item is a `Failure`, and the steps before it
  are kept.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from laif_jax.config.endpoints import TOKENS_MOST
from laif_jax.labeling.calls import Call, Endpoint, Truth
from laif_jax.labeling.complete import Failure
from laif_jax.labeling.critic import instruction_text, last_user_turn, sections
from laif_jax.labeling.critic_parts import PLACEHOLDER, Principle, draw_principle, load_principles
from laif_jax.labeling.errors import CriticError
from laif_jax.labeling.judge import planted_quality, sum_usage
from laif_jax.labeling.scheduler import Outcome
from laif_jax.labeling.work import Result
from laif_jax.records import Completion, Prompt, Status, content_id, fingerprint

REVISERS = Path(__file__).parent / "revisers"
_FIELDS = {
    "critique": {"instruction", "response", "principle"},
    "revision": {"instruction", "response", "principle", "critique", "request"},
}


class Reviser(BaseModel):
    """How answers are criticised and revised.

    Attributes:
      critique, revision: texts of `critique.txt` and `revision.txt`: chat prompts with {instruction}, {response},
        {principle}, and for the revision {critique} and {request} (what the principle asks of a revision).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    version: str = "1"
    description: str = ""
    temperature: float = Field(default=1.0, ge=0)
    critique_tokens: int = Field(default=512, gt=0, le=TOKENS_MOST)
    revision_tokens: int = Field(default=512, gt=0, le=TOKENS_MOST)
    principles: tuple[Principle, ...] = Field(min_length=1)
    critique: str
    revision: str

    @model_validator(mode="after")
    def _check(self) -> "Reviser":
        for name, fields in _FIELDS.items():
            text = getattr(self, name)
            sections(f"{name}.txt", text)
            if (used := set(PLACEHOLDER.findall(text))) != fields:
                raise ValueError(f"{name}.txt needs the placeholders {sorted(fields)}; it has {sorted(used)}")
        if without := [principle.id for principle in self.principles if not principle.revision]:
            raise ValueError(
                f"the principles {', '.join(without)} have no `revision`: what a revision is to do"
            )
        return self

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything that decides a revision."""
        return fingerprint(self.model_dump(mode="json", exclude={"description"}))

    def messages(self, name: str, values: Mapping[str, str]) -> tuple[dict[str, str], ...]:
        """The chat messages of a "critique" or a "revision", filled in one pass."""
        return tuple(
            {"role": role, "content": PLACEHOLDER.sub(lambda match: values[match.group(1)], text)}
            for role, text in sections(f"{name}.txt", getattr(self, name))
        )


def load_reviser(name: str | Path = "constitutional", principles: str | Path | None = None) -> Reviser:
    """A shipped reviser by name, or one from a folder of your own; with a file of principles instead of its own.

    Raises:
      CriticError: no such reviser, or a malformed file.
    """
    shipped = sorted(path.parent.name for path in REVISERS.glob("*/reviser.yaml"))
    folder = REVISERS / name if str(name) in shipped else Path(name)
    try:
        values = yaml.safe_load((folder / "reviser.yaml").read_text("utf-8"))
        values |= {part: (folder / f"{part}.txt").read_text("utf-8") for part in _FIELDS}
        values["principles"] = load_principles(principles or folder / "principles.yaml")
        return Reviser.model_validate(values)
    except OSError as error:
        raise CriticError(
            f"reviser {str(name)!r}: {error.filename} cannot be read. The shipped revisers are {', '.join(shipped)}; a "
            "folder of your own needs reviser.yaml, critique.txt, revision.txt and principles.yaml"
        ) from error
    except (yaml.YAMLError, ValidationError, TypeError) as error:
        raise CriticError(f"reviser {folder}: {error}") from error


class ReviseWork:
    """The completions of a `revise` job, each with its prompt, and `steps` revisions of each."""

    kind = "revise"
    most_calls = 1

    def __init__(
        self,
        endpoint: Endpoint,
        reviser: Reviser,
        items: Sequence[tuple[Prompt, Completion]],
        *,
        steps: int,
        seed: int,
        generator: str,
    ) -> None:
        self.endpoint, self.critic, self._reviser, self._items = endpoint, reviser.name, reviser, items
        self._steps, self._seed, self._generator = steps, seed, generator
        self.stages = 2 * steps

    @cached_property
    def id(self) -> str:
        items = [
            (prompt.id, completion.id, planted_quality(completion)) for prompt, completion in self._items
        ]
        asked = [self._reviser.hash, self._steps, self._seed, self._generator]
        return content_id([self.kind, self.endpoint.key, asked, items])

    def __len__(self) -> int:
        return len(self._items)

    def calls(self, position: int) -> list[Call]:
        return [self._call(position, [])]

    def further(self, position: int, outcomes: Sequence[Outcome]) -> list[Call]:
        if len(outcomes) == 2 * self._steps or _ended(outcomes[-1]):
            return []
        return [self._call(position, outcomes)]

    def _principle(self, position: int, step: int) -> Principle:
        prompt, completion = self._items[position]
        content = (prompt.id, str(completion.sample_index), str(step))
        return draw_principle(self._reviser.principles, self._seed, *content)

    def _call(self, position: int, outcomes: Sequence[Outcome]) -> Call:
        """The critique or revision that follows from the answers so far."""
        prompt, completion = self._items[position]
        step, revises = divmod(len(outcomes), 2)
        principle, texts = self._principle(position, step), [o.answer.text for o in outcomes if o.answer]
        response = texts[2 * step - 1] if step else completion.text
        values = {
            "instruction": instruction_text(prompt),
            "response": response,
            "principle": principle.text,
            "request": principle.revision,
            "critique": texts[-1] if revises else "",
        }
        reviser, name = self._reviser, "revision" if revises else "critique"
        tokens = reviser.revision_tokens if revises else reviser.critique_tokens
        truth = None
        if self.endpoint.simulated is not None:
            planted = self.endpoint.simulated.world == "planted" and step == 0
            truth = Truth(
                instruction=last_user_turn(prompt),
                first=response,
                quality=(planted_quality(completion) if planted else None, None),
                task="revision" if revises else "critique",
            )
        params = {"temperature": reviser.temperature, "max_tokens": tokens}
        messages = reviser.messages(name, values)
        return Call(self.endpoint, messages, params, sample=completion.sample_index, truth=truth)

    def results(self, position: int, outcomes: Sequence[Outcome]) -> list[Result]:
        steps, failure = self._chain(position, outcomes), None
        if len(steps) < self._steps:
            failure = self._failure(position, outcomes)
        final = failure or self._final(position, steps, outcomes)
        status = failure.status if failure else Status.OK
        records: list[Completion | Failure] = [final, *steps]
        return [
            self._result(position, record, status if part == 0 else Status.OK, outcomes, part)
            for part, record in enumerate(records)
        ]

    def _chain(self, position: int, outcomes: Sequence[Outcome]) -> list[Completion]:
        """The revision of each complete step, with what led to it."""
        prompt, source = self._items[position]
        found = []
        for step, (critique, revision) in enumerate(zip(outcomes[::2], outcomes[1::2], strict=False)):
            if critique.answer is None or revision.answer is None or _ended(revision):
                break
            told = {
                "principle": self._principle(position, step).id,
                "critique": critique.answer.text,
                "revision": revision.answer.text,
            }
            found.append(
                Completion(
                    prompt_id=prompt.id,
                    generator=self._generator,
                    text=revision.answer.text,
                    finish_reason=revision.answer.finish_reason,
                    sample_index=source.sample_index,
                    usage=sum_usage([critique.answer.usage, revision.answer.usage]),
                    meta={
                        "step": step + 1,
                        "revises": source.id,
                        "reviser": self._reviser.name,
                        "reviser_hash": self._reviser.hash,
                        "steps": [told],
                        "requests": [critique.key, revision.key],
                        "request": revision.key,
                    },
                )
            )
        return found

    def _final(self, position: int, steps: Sequence[Completion], outcomes: Sequence[Outcome]) -> Completion:
        """The last revision, with all steps, and the usage of all calls."""
        meta: dict[str, Any] = {
            **steps[-1].meta,
            "steps": [told for step in steps for told in step.meta["steps"]],
            "requests": [outcome.key for outcome in outcomes],
        }
        return steps[-1].model_copy(update={"meta": meta, "usage": sum_usage(step.usage for step in steps)})

    def _failure(self, position: int, outcomes: Sequence[Outcome]) -> Failure:
        prompt, source = self._items[position]
        last = outcomes[-1]
        step, revises = divmod(len(outcomes) - 1, 2)
        what = f"{'revision' if revises else 'critique'} {step + 1} of {self._steps}"
        status = Status.FAILED if last.answer is None else Status.REFUSED
        reason = last.reason if last.answer is None else last.answer.refusal
        return Failure(
            prompt_id=prompt.id,
            generator=self._generator,
            sample_index=source.sample_index,
            status=status,
            reason=f"{what}: {reason}",
            passing=last.passing,
        )

    def _result(
        self,
        position: int,
        record: Completion | Failure,
        status: Status,
        outcomes: Sequence[Outcome],
        part: int,
    ) -> Result:
        # The first answer and what was asked for decide the chain; each step has a row of its own.
        key = [self._items[position][1].id, self._generator, self._seed, self._steps, outcomes[0].key, part]
        return Result(
            key=content_id(key),
            kind="completion",
            item=self._items[position][0].id,
            status=status.value,
            critic_hash=self._reviser.hash,
            record=record.model_dump_json(),
            part=part,
        )


def _ended(outcome: Outcome) -> bool:
    answer = outcome.answer
    return answer is None or (bool(answer.refusal) and not answer.text.strip())
