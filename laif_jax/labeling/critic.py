"""Critics are data: a folder with `critic.yaml` (parser, options, sampling) and `prompt.txt` (the chat prompt), and, as
its protocol asks for them, `rationale.txt`, `examples.yaml` and `principles.yaml` (see `critic_parts`)."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from laif_jax.config.endpoints import TOKENS_MOST
from laif_jax.labeling.critic_parts import (
    PLACEHOLDER,
    Examples,
    Principle,
    Rationale,
    check_ids,
    delimiter_for,
    fence,
    load_principles,
    read_parts,
)
from laif_jax.labeling.errors import CriticError
from laif_jax.labeling.listwise import ListwiseParser
from laif_jax.labeling.parsers import LISTWISE, RATING, Parser, make_parser
from laif_jax.labeling.rating import RatingParser
from laif_jax.records import Prompt, fingerprint

CRITICS = Path(__file__).parent / "critics"
PLACEHOLDERS = {
    "comparison": ("instruction", "output_1", "output_2"),
    "rating": ("instruction", "output"),
    "listwise": ("instruction", "outputs"),
}
Kind = Literal["comparison", "rating", "listwise"]
_DOES = {
    "comparison": "compares two responses",
    "rating": "rates single responses",
    "listwise": "ranks several responses at once",
}
# Came after the first release: a critic that uses none of them keeps its hash.
_SINCE = ("samples", "rationale", "examples", "shots", "principles", "invert", "clamp", "delimiters")
_OF_COMPARISONS = ("samples", "rationale", "examples", "shots", "principles", "invert", "clamp")
_SECTION = re.compile(r"^\[(system|user|assistant)\][ \t]*$", re.MULTILINE)


class Critic(BaseModel):
    """A critic: what is asked, and how the answer is read. It compares two responses, or rates one (parser `rating`).

    Attributes:
      prompt: text of `prompt.txt`: sections `[system]`, `[user]`, `[assistant]`, each on its own line, with the
        placeholders {instruction}, {output_1} and {output_2}, or, of a critic that rates, {instruction} and {output}.
      top_logprobs: how many alternatives per token are asked for; None: no log-probs.
      samples: answers per order, whose probabilities are averaged (self-consistency); with a rationale, rationales.
      rationale: asked for first, in a call of its own; the verdict's prompt shows it as {rationale}.
      examples, shots: worked examples, and how many of them {examples} shows.
      principles: one is drawn per comparison, by the job's seed, and shown as {principle}.
      invert: the question is which response is *worse* ("the more harmful one"); probabilities are turned round.
      clamp: [lo, hi], to which the probability of one order is clamped, after samples are averaged; lo + hi = 1.
      delimiters: instruction and responses stand between random delimiters, which {delimiter} names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    version: str = "1"
    description: str = ""
    parser: str
    options: dict[str, Any] = Field(default_factory=dict)
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=50, gt=0, le=TOKENS_MOST)
    top_logprobs: int | None = Field(default=None, gt=0, le=20)
    prompt: str
    samples: int = Field(default=1, ge=1, le=64)
    rationale: Rationale | None = None
    examples: Examples | None = None
    shots: int = Field(default=0, ge=0)
    principles: tuple[Principle, ...] = ()
    invert: bool = False
    clamp: tuple[float, float] | None = None
    delimiters: bool = False

    @model_validator(mode="after")
    def _check(self) -> "Critic":
        parser = make_parser(self.parser, self.options)
        if parser.needs_logprobs != (self.top_logprobs is not None):
            verb = "needs" if parser.needs_logprobs else "does not read"
            raise ValueError(f"the parser {self.parser!r} {verb} `top_logprobs`")
        sections("prompt.txt", self.prompt)
        self._check_prompt("prompt.txt", self.prompt, rationale=self.rationale is not None)
        if self.rationale is not None:
            sections("rationale.txt", self.rationale.prompt)
            self._check_prompt("rationale.txt", self.rationale.prompt, rationale=False)
        self._check_protocol()
        return self

    def _check_prompt(self, file: str, text: str, *, rationale: bool) -> None:
        needed = set(PLACEHOLDERS[self.kind])
        needed |= {"principle"} if self.principles else set()
        needed |= {"delimiter"} if self.delimiters else set()
        needed |= {"rationale"} if rationale else set()
        used, allowed = set(PLACEHOLDER.findall(text)), needed | ({"examples"} if self.examples else set())
        if unknown := used - allowed:
            hints = {"rationale": "rationale.txt", "examples": "examples.yaml", "principle": "principles"}
            files = sorted({hints[name] for name in unknown if name in hints and file == "prompt.txt"})
            raise ValueError(
                f"{file} has unknown placeholders {sorted(unknown)}; with `parser: {self.parser}` there are "
                f"{tuple(sorted(allowed))}" + (f". They need {', '.join(files)}" if files else "")
            )
        if missing := needed - used:
            raise ValueError(f"{file} lacks the placeholders {sorted(missing)}")

    def _check_protocol(self) -> None:
        if self.kind != "comparison":
            for name in _OF_COMPARISONS:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"`{name}` is for critics that compare; this one {_DOES[self.kind]}")
        asked = self.temperature if self.rationale is None else self.rationale.temperature
        if self.samples > 1 and asked == 0:
            name = "temperature" if self.rationale is None else "rationale.temperature"
            raise ValueError(
                f"{self.samples} `samples` need a `{name}` above 0: at 0 all of them would be the same answer"
            )
        if self.shots > (len(self.examples.examples) if self.examples else 0):
            raise ValueError(
                f"`shots: {self.shots}` are more than the examples in examples.yaml "
                f"({len(self.examples.examples) if self.examples else 'there is none'})"
            )
        if self.examples and not any(
            "{examples}" in text for text in (self.prompt, self.rationale.prompt if self.rationale else "")
        ):
            raise ValueError("examples.yaml is of no use: no prompt has the placeholder {examples}")
        check_ids(self.principles, f"critic {self.name!r}")
        if self.clamp is not None and not (
            0 <= self.clamp[0] < 0.5 and abs(self.clamp[0] + self.clamp[1] - 1) < 1e-9
        ):
            raise ValueError(
                f"`clamp: {list(self.clamp)}` must be [lo, 1 - lo] with 0 <= lo < 0.5: bounds that are not "
                "symmetric would prefer one of the two places"
            )

    @property
    def kind(self) -> Kind:
        """What it does: compare two responses, rate one, or rank several."""
        return {RATING: "rating", LISTWISE: "listwise"}.get(self.parser, "comparison")  # ty: ignore[invalid-explicit-return]

    @cached_property
    def _template(self) -> list[tuple[str, list[str]]]:
        return _split(sections("prompt.txt", self.prompt))

    @cached_property
    def _rationale_template(self) -> list[tuple[str, list[str]]]:
        assert self.rationale is not None
        return _split(sections("rationale.txt", self.rationale.prompt))

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything that decides a label (not of the description); stored with each label."""
        fields = type(self).model_fields
        unused = {name for name in _SINCE if getattr(self, name) == fields[name].default}
        return fingerprint(self.model_dump(mode="json", exclude={"description", *unused}))

    @cached_property
    def format_id(self) -> str:
        """Hash of the answer's format."""
        return fingerprint([self.parser, self.options])[:16]

    def require(self, kind: Kind) -> None:
        """Raises `CriticError` if this critic is of the other kind."""
        if kind != self.kind:
            raise CriticError(
                f"critic {self.name!r} {_DOES[self.kind]}; take one that {_DOES[kind]}: "
                f"{', '.join(shipped_critics(kind))}"
            )

    @cached_property
    def reader(self) -> Parser:
        """Reads comparisons; raises `CriticError` if this critic does not compare."""
        self.require("comparison")
        return make_parser(self.parser, self.options)

    @cached_property
    def rater(self) -> RatingParser:
        """Reads ratings; raises `CriticError` if this critic compares."""
        self.require("rating")
        return make_parser(self.parser, self.options)

    @cached_property
    def ranker(self) -> ListwiseParser:
        """Reads rankings; raises `CriticError` if this critic does not rank lists."""
        self.require("listwise")
        return make_parser(self.parser, self.options)

    @property
    def judges(self) -> bool:
        """Whether it gives labels of comparisons: it compares, or ranks lists in which each pair is a label."""
        return self.kind != "rating"

    @cached_property
    def params(self) -> dict[str, Any]:
        """Sampling parameters of the calls."""
        params: dict[str, Any] = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        if self.top_logprobs is not None:
            params["top_logprobs"] = self.top_logprobs
        return params

    @cached_property
    def rationale_params(self) -> dict[str, Any]:
        """Sampling parameters of the calls that ask for a rationale."""
        assert self.rationale is not None
        return {"temperature": self.rationale.temperature, "max_tokens": self.rationale.max_tokens}

    @property
    def calls_per_order(self) -> int:
        """How many calls one verdict in one order takes."""
        return self.samples * (1 if self.rationale is None else 2)

    def messages(
        self,
        instruction: str,
        output_1: str,
        output_2: str,
        *,
        principle: Principle | None = None,
        rationale: str = "",
    ) -> tuple[dict[str, str], ...]:
        """The chat messages of a comparison. All placeholders are filled in one pass over the *template*, so a response
        that itself contains "{output_2}" or "[user]" is only text."""
        shown = {"instruction": instruction, "output_1": output_1, "output_2": output_2}
        return self._fill(self._template, shown, rationale=rationale, **self._fixed(principle))

    def rationale_messages(
        self, instruction: str, output_1: str, output_2: str, *, principle: Principle | None = None
    ) -> tuple[dict[str, str], ...]:
        """The chat messages that ask for a rationale, filled likewise."""
        shown = {"instruction": instruction, "output_1": output_1, "output_2": output_2}
        return self._fill(self._rationale_template, shown, **self._fixed(principle))

    def rating_messages(self, instruction: str, output: str) -> tuple[dict[str, str], ...]:
        """The chat messages of a rating, filled likewise."""
        return self._fill(self._template, {"instruction": instruction, "output": output})

    def listwise_messages(self, instruction: str, outputs: Sequence[str]) -> tuple[dict[str, str], ...]:
        """The chat messages that ask for a ranking, filled likewise: {outputs} is all of them, numbered from 1."""
        delimiter = delimiter_for(instruction, *outputs) if self.delimiters else ""
        shown = [fence(text, delimiter) if delimiter else text for text in outputs]
        listed = "\n\n".join(f"[Response {number}]\n{text}" for number, text in enumerate(shown, 1))
        asked = fence(instruction, delimiter) if delimiter else instruction
        return self._fill(self._template, {}, instruction=asked, outputs=listed, delimiter=delimiter)

    def _fixed(self, principle: Principle | None) -> dict[str, str]:
        """What does not come from others."""
        fixed = {"examples": self.examples.text(self.shots) if self.examples else ""}
        if self.principles:
            fixed["principle"] = (principle or self.principles[0]).text
        return fixed

    def _fill(
        self, template: list[tuple[str, list[str]]], shown: Mapping[str, str], **others: str
    ) -> tuple[dict[str, str], ...]:
        if self.delimiters and shown:
            delimiter = delimiter_for(*shown.values())
            shown = {name: fence(text, delimiter) for name, text in shown.items()}
            others = {"delimiter": delimiter, **others}
        values = {**others, **shown}
        messages = []
        for role, parts in template:
            filled = parts.copy()
            filled[1::2] = [values[name] for name in parts[1::2]]
            messages.append({"role": role, "content": "".join(filled)})
        return tuple(messages)

    def adapted(self, **changes: Any) -> "Critic":
        """This critic with other options: `samples`, `shots`, `clamp`, `temperature`, ..., or `principles`, a path.

        Raises:
          CriticError: they do not fit this critic.
        """
        if isinstance(changes.get("principles"), str | Path):
            changes["principles"] = load_principles(changes["principles"])
        if self.rationale is not None and "temperature" in changes:
            # What is sampled is the rationale; the verdict on it stays as it is.
            rationale = self.rationale.model_copy(update={"temperature": changes.pop("temperature")})
            changes["rationale"] = rationale
        try:
            own = {name: getattr(self, name) for name in type(self).model_fields}
            return Critic.model_validate(own | changes)
        except ValidationError as error:
            raise CriticError(f"critic {self.name!r} with {', '.join(changes)}: {error}") from error


def sections(file: str, text: str) -> list[tuple[str, str]]:
    """(role, text) of the sections of a chat prompt."""
    parts = _SECTION.split(text.replace("\r\n", "\n"))
    if parts[0].strip():
        raise ValueError(f"{file} has text before its first section")
    if len(parts) < 3:
        raise ValueError(f"{file} needs at least one section: a line [system] or [user], then its text")
    return [(role, text.strip("\n")) for role, text in zip(parts[1::2], parts[2::2])]


def _split(template: list[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """(role, parts): every second part is a placeholder's name, the others are text."""
    return [(role, PLACEHOLDER.split(text)) for role, text in template]


def shipped_critics(kind: Kind | None = None) -> list[str]:
    """Names of the critics that come with the package: all, or those of one kind."""
    names = sorted(path.parent.name for path in CRITICS.glob("*/critic.yaml"))
    return names if kind is None else [name for name in names if load_critic(name).kind == kind]


def load_critic(name: str | Path) -> Critic:
    """A shipped critic by name, or one from a folder of your own.

    Raises:
      CriticError: no such critic, or a malformed file; the message names file and field.
    """
    folder = CRITICS / name if str(name) in shipped_critics() else Path(name)
    file, prompt = folder / "critic.yaml", folder / "prompt.txt"
    for path in (file, prompt):
        if not path.is_file():
            raise CriticError(
                f"critic {str(name)!r}: no file {path}. The shipped critics are "
                f"{', '.join(shipped_critics())}; a folder of your own needs critic.yaml and prompt.txt"
            )
    try:
        values = yaml.safe_load(file.read_text("utf-8"))
        if not isinstance(values, Mapping):
            raise CriticError(f"{file}: a mapping of fields is expected")
        return Critic.model_validate({**read_parts(folder, values), "prompt": prompt.read_text("utf-8")})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CriticError(f"{file}: {error}") from error
    except ValidationError as error:
        raise CriticError(f"{file}: {error}") from error


def instruction_text(prompt: Prompt) -> str:
    """What stands for {instruction}: the text of a single user turn byte for byte; a longer conversation is written
    out with its roles."""
    if len(prompt.messages) == 1:
        return prompt.messages[0].content
    names = {"system": "System", "user": "Human", "assistant": "Assistant"}
    return "\n\n".join(f"{names[message.role]}: {message.content}" for message in prompt.messages)


def last_user_turn(prompt: Prompt) -> str:
    """The text of the last user turn, "" if there is none."""
    return next((message.content for message in reversed(prompt.messages) if message.role == "user"), "")
