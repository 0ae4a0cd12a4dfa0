"""A critic's question read back: from the chat messages to the instruction and the two responses in them.

A critic fills a template, so its question is the template's own text around the instruction and the responses. Reading
it back looks for that text. Where a response itself holds such text, the message may be cut in more than one way, and
nothing in it says which is meant: then no cut is taken, and the question is refused.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from laif_jax.labeling.critic import Critic, load_critic, shipped_critics
from laif_jax.labeling.errors import CriticError
from laif_jax.records import Message
from laif_jax.records.errors import LaifError

FIELDS = ("instruction", "output_1", "output_2")
MAX_QUESTION = 400_000  # characters; looking for a template in more takes too long
_SPEAKER = re.compile(r"(?:\A|\n\n)(System|Human|Assistant): ")
_ROLES = {"System": "system", "Human": "user", "Assistant": "assistant"}


class QuestionError(LaifError, ValueError):
    """A question that cannot be read back. `code`: "unknown_question", "ambiguous_question" or "question_too_long"."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Question:
    """What a critic was asked: which of two responses to an instruction is better."""

    critic: Critic
    instruction: str
    first: str
    second: str

    @property
    def conversation(self) -> list[Message]:
        """The instruction as messages."""
        return conversation(self.instruction)


@dataclass(frozen=True)
class _Form:
    """A critic's template. messages: per message its role and, alternating, literal text and the names of fields."""

    critic: Critic
    messages: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def of(cls, critic: Critic) -> "_Form":
        marks = {name: f"\x00{name}\x00" for name in FIELDS}
        split = re.compile("\x00(" + "|".join(FIELDS) + ")\x00")
        return cls(
            critic,
            tuple(
                (message["role"], tuple(split.split(message["content"])))
                for message in critic.messages(*(marks[name] for name in FIELDS))
            ),
        )

    def read(self, messages: Sequence[Mapping[str, str]]) -> tuple[bool, dict[str, str]] | None:
        """(whether there is only one way to read them, the fields); None: not this critic's question."""
        if [role for role, _ in self.messages] != [message["role"] for message in messages]:
            return None
        unique, found = True, {}
        for (_, parts), message in zip(self.messages, messages, strict=True):
            text = message["content"]
            if not (text.startswith(parts[0]) and text.endswith(parts[-1])):
                return None
            # The first and the last of all ways, in the order of where the fields end: one way if they are the same.
            first, last = (
                _pattern(parts, tuple(found.items()), lazy).fullmatch(text) for lazy in (True, False)
            )
            if first is None or last is None:
                return None
            unique &= first.groupdict() == last.groupdict()
            found |= first.groupdict()
        return unique, found


@lru_cache(maxsize=64)
def _pattern(parts: tuple[str, ...], known: tuple[tuple[str, str], ...], lazy: bool) -> re.Pattern[str]:
    """The expression that a message of this form matches; fields take as little as they can (`lazy`), or as much."""
    values, seen, pieces = dict(known), set[str](), [re.escape(parts[0])]
    for name, literal in zip(parts[1::2], parts[2::2], strict=True):
        if name in values:
            pieces.append(re.escape(values[name]))
        elif name in seen:
            pieces.append(f"(?P={name})")
        else:
            pieces.append(f"(?P<{name}>.*{'?' if lazy else ''})")
            seen.add(name)
        pieces.append(re.escape(literal))
    return re.compile("".join(pieces), re.DOTALL)


def answerable(critic: Critic) -> bool:
    """Whether two scores answer the critic's question: it compares two responses, at once, and shows nothing but them
    and the instruction. A rationale, a principle, "which is worse?" or delimiters are for models that read."""
    asks_more = critic.rationale or critic.principles or critic.examples or critic.invert or critic.delimiters
    return critic.kind == "comparison" and not asks_more


def readable_critics() -> list[str]:
    """The shipped critics that a reward model can answer."""
    return [name for name in shipped_critics("comparison") if answerable(load_critic(name))]


class QuestionReader:
    """Reads the questions of a set of critics.

    Args:
      critics: names of shipped critics, or folders; None: all shipped critics that are `answerable`.

    Raises:
      CriticError: no such critic, or one whose question two scores do not answer.
    """

    def __init__(self, critics: Iterable[str] | None = None) -> None:
        names = list(critics) if critics is not None else readable_critics()
        loaded = [load_critic(name) for name in names]
        for critic in loaded:
            _ = critic.reader  # raises if it rates
            if not answerable(critic):
                raise CriticError(
                    f"critic `{critic.name}` asks for more than a comparison of two texts (a rationale, a principle, "
                    "examples, delimiters or the worse one), which a reward model cannot answer; use one of "
                    f"{', '.join(readable_critics())}"
                )
        self._forms = [_Form.of(critic) for critic in loaded]
        self.critics = [critic.name for critic in loaded]

    def read(self, messages: Sequence[Mapping[str, str]]) -> Question:
        """The question in chat messages ({"role", "content"} each).

        Raises:
          QuestionError: it is no known critic's, or there is more than one way to read it.
        """
        size = sum(len(message["content"]) for message in messages)
        if size > MAX_QUESTION:
            raise QuestionError(
                f"the question has {size} characters, more than the {MAX_QUESTION} that are looked through; shorten it",
                "question_too_long",
            )
        matches = [
            (form.critic, *match) for form in self._forms if (match := form.read(messages)) is not None
        ]
        if not matches:
            raise QuestionError(
                "a reward model compares two responses, asked as one of these critics asks: "
                f"{', '.join(self.critics)}. The messages are none of their questions; use one of these critics, or "
                "start the server with the folder of yours (`--critic`)",
                "unknown_question",
            )
        critic, unique, fields = matches[0]
        same = all(other.format_id == critic.format_id and values == fields for other, _, values in matches)
        if not unique or not same:
            raise QuestionError(
                f"the question of the critic {critic.name} can be read in more than one way: the instruction or a "
                "response holds the critic's own headings, so that where a response ends is not known. Leave this "
                "pair out, or ask it through another critic",
                "ambiguous_question",
            )
        return Question(critic, *(fields[name] for name in FIELDS))


def conversation(instruction: str) -> list[Message]:
    """The messages that `instruction_text` wrote as `instruction`.

    A longer conversation is written with its speakers ("Human: ...", blank line, "Assistant: ..."). What does not read
    as one (an optional system turn, then user and assistant in turn, the user last) is a single user turn.
    """
    parts = _SPEAKER.split(instruction)
    turns = [
        Message.model_validate({"role": _ROLES[name], "content": content})
        for name, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
    roles = [turn.role for turn in turns]
    body = roles[1:] if roles[:1] == ["system"] else roles
    alternates = all(role == ("user", "assistant")[i % 2] for i, role in enumerate(body))
    if parts[0] or len(turns) < 2 or len(body) % 2 == 0 or not alternates:
        return [Message(role="user", content=instruction)]
    return turns
