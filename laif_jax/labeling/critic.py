"""Critics are data: a folder with `critic.yaml` (parser, options, sampling) and `prompt.txt` (the chat prompt)."""

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from laif_jax.labeling.errors import CriticError
from laif_jax.labeling.parsers import RATING, Parser, make_parser
from laif_jax.labeling.rating import RatingParser
from laif_jax.records import Prompt, fingerprint

CRITICS = Path(__file__).parent / "critics"
PLACEHOLDERS = {
    "comparison": ("instruction", "output_1", "output_2"),
    "rating": ("instruction", "output"),
}
_PLACEHOLDER = re.compile(r"\{([a-z][a-z0-9_]*)\}")
_SECTION = re.compile(r"^\[(system|user|assistant)\][ \t]*$", re.MULTILINE)


class Critic(BaseModel):
    """A critic: what is asked, and how the answer is read. It compares two responses, or rates one (parser `rating`).

    Attributes:
      prompt: text of `prompt.txt`: sections `[system]`, `[user]`, `[assistant]`, each on its own line, with the
        placeholders {instruction}, {output_1} and {output_2}, or, of a critic that rates, {instruction} and {output}.
      top_logprobs: how many alternatives per token are asked for; None: no log-probs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    version: str = "1"
    description: str = ""
    parser: str
    options: dict[str, Any] = Field(default_factory=dict)
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=50, gt=0)
    top_logprobs: int | None = Field(default=None, gt=0, le=20)
    prompt: str

    @model_validator(mode="after")
    def _check(self) -> "Critic":
        parser = make_parser(self.parser, self.options)
        if parser.needs_logprobs != (self.top_logprobs is not None):
            verb = "needs" if parser.needs_logprobs else "does not read"
            raise ValueError(f"the parser {self.parser!r} {verb} `top_logprobs`")
        if not self._template:
            raise ValueError(
                "prompt.txt needs at least one section: a line [system] or [user], then its text"
            )
        used, known = set(_PLACEHOLDER.findall(self.prompt)), PLACEHOLDERS[self.kind]
        if unknown := used - set(known):
            raise ValueError(
                f"prompt.txt has unknown placeholders {sorted(unknown)}; with `parser: {self.parser}` there are {known}"
            )
        if missing := set(known) - used:
            raise ValueError(f"prompt.txt lacks the placeholders {sorted(missing)}")
        return self

    @property
    def kind(self) -> Literal["comparison", "rating"]:
        """What it does: compare two responses, or rate one."""
        return "rating" if self.parser == RATING else "comparison"

    @cached_property
    def _template(self) -> list[tuple[str, str]]:
        parts = _SECTION.split(self.prompt.replace("\r\n", "\n"))
        if parts[0].strip():
            raise ValueError("prompt.txt has text before its first section")
        return [(role, text.strip("\n")) for role, text in zip(parts[1::2], parts[2::2])]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything that decides a label (not of the description); stored with each label."""
        return fingerprint(self.model_dump(mode="json", exclude={"description"}))

    @cached_property
    def format_id(self) -> str:
        """Hash of the answer's format."""
        return fingerprint([self.parser, self.options])[:16]

    def require(self, kind: Literal["comparison", "rating"]) -> None:
        """Raises `CriticError` if this critic is of the other kind."""
        if kind != self.kind:
            does = {"comparison": "compares two responses", "rating": "rates single responses"}
            raise CriticError(
                f"critic {self.name!r} {does[self.kind]}; take one that {does[kind]}: "
                f"{', '.join(shipped_critics(kind))}"
            )

    @cached_property
    def reader(self) -> Parser:
        """Reads comparisons; raises `CriticError` if this critic rates."""
        self.require("comparison")
        return make_parser(self.parser, self.options)

    @cached_property
    def rater(self) -> RatingParser:
        """Reads ratings; raises `CriticError` if this critic compares."""
        self.require("rating")
        return make_parser(self.parser, self.options)

    @cached_property
    def params(self) -> dict[str, Any]:
        """Sampling parameters of the calls."""
        params: dict[str, Any] = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        if self.top_logprobs is not None:
            params["top_logprobs"] = self.top_logprobs
        return params

    def messages(self, instruction: str, output_1: str, output_2: str) -> tuple[dict[str, str], ...]:
        """The chat messages of a comparison. All placeholders are filled in one pass over the *template*, so a response
        that itself contains "{output_2}" or "[user]" is only text."""
        return self._fill({"instruction": instruction, "output_1": output_1, "output_2": output_2})

    def rating_messages(self, instruction: str, output: str) -> tuple[dict[str, str], ...]:
        """The chat messages of a rating, filled likewise."""
        return self._fill({"instruction": instruction, "output": output})

    def _fill(self, values: Mapping[str, str]) -> tuple[dict[str, str], ...]:
        return tuple(
            {"role": role, "content": _PLACEHOLDER.sub(lambda match: values[match.group(1)], text)}
            for role, text in self._template
        )


def shipped_critics(kind: Literal["comparison", "rating"] | None = None) -> list[str]:
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
        return Critic.model_validate({**values, "prompt": prompt.read_text("utf-8")})
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
