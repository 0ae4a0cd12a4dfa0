"""What a critic may hold beside its prompt: a rationale asked for first, worked examples, principles, delimiters.

Files of a critic's folder, each of them optional:

* `rationale.txt`: the chat prompt that asks for a rationale. The verdict's own prompt then shows it as {rationale}: two
  calls (RLAIF, Lee et al. 2023).
* `examples.yaml`: worked examples (few-shot), shown as {examples}.
* `principles.yaml`: a constitution, one principle of which is drawn per comparison and shown as {principle}
  (Constitutional AI, Bai et al. 2022).
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from laif_jax.config.endpoints import TOKENS_MOST
from laif_jax.labeling.errors import CriticError
from laif_jax.records import fingerprint

PLACEHOLDER = re.compile(r"\{([a-z][a-z0-9_]*)\}")
_EXAMPLE_FIELDS = {"instruction", "output_1", "output_2", "answer", "rationale", "number"}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rationale(_Part):
    """The first of two calls. `prompt`: text of `rationale.txt`; `temperature` above 0 with several `samples`."""

    prompt: str
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=512, gt=0, le=TOKENS_MOST)


class Example(_Part):
    """A worked example: two responses and the answer that the critic is to give (`rationale`: and why)."""

    instruction: str
    output_1: str
    output_2: str
    answer: str
    rationale: str = ""


class Examples(_Part):
    """Worked examples in the order in which they are used, and how they are written into the prompt.

    Attributes:
      template: of one example, with {instruction}, {output_1}, {output_2}, {answer}, and maybe {rationale}, {number}.
      before, after: what stands before the first and after the last one.
    """

    template: str
    before: str = ""
    after: str = ""
    examples: tuple[Example, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> "Examples":
        used = set(PLACEHOLDER.findall(self.template))
        if unknown := used - _EXAMPLE_FIELDS:
            raise ValueError(f"`template` has unknown placeholders {sorted(unknown)}")
        if missing := {"instruction", "output_1", "output_2", "answer"} - used:
            raise ValueError(f"`template` lacks the placeholders {sorted(missing)}")
        return self

    def text(self, shots: int) -> str:
        """The first `shots` examples written out; "" for none."""
        if shots == 0:
            return ""
        shown = []
        for number, example in enumerate(self.examples[:shots], 1):
            values = {**example.model_dump(), "number": str(number)}
            shown.append(PLACEHOLDER.sub(lambda match, v=values: v[match.group(1)], self.template))
        return self.before + "".join(shown) + self.after


class Principle(_Part):
    """One principle of a constitution.

    Attributes:
      text: what it asks of the better response, or how a response is to be criticised.
      revision: how a response is to be revised by it (only of critique and revision).
      invert: it asks for the *worse* response.
    """

    id: str = Field(min_length=1)
    text: str = Field(min_length=1)
    revision: str = ""
    invert: bool = False


def draw_principle(principles: Sequence[Principle], seed: int, *content: str) -> Principle:
    """One of the principles, uniformly, by the seed and the content alone."""
    digest = hashlib.sha256(":".join(["principle", str(seed), *content]).encode()).digest()
    return principles[int.from_bytes(digest[:8], "big") % len(principles)]


def load_principles(path: str | Path) -> tuple[Principle, ...]:
    """A constitution from a file.

    Three forms, YAML or JSON: a list of mappings with the fields of `Principle`; a list of texts (then the ids are
    "<file's name>-<number>"); and the published critique and revision instructions, a mapping from names to
    {"prompt": [critique request], "edit_request": revision request}, whose markers are taken off.

    Raises:
      CriticError: no such file, or another form; the message says what and where.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        principles = tuple(_principle(entry, path.stem) for entry in _entries(value))
    except OSError as error:
        raise CriticError(f"principles: {path} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        raise CriticError(
            f"principles: {path} is none of: a list of mappings with `id` and `text`, a list of texts, a mapping from "
            f"names to `prompt` and `edit_request` ({error})"
        ) from error
    if not principles:
        raise CriticError(f"principles: {path} holds none")
    check_ids(principles, str(path))
    return principles


def check_ids(principles: Sequence[Principle], where: str) -> None:
    """Raises `CriticError` if two principles have one id."""
    ids = [principle.id for principle in principles]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise CriticError(f"principles: {where} has the ids {', '.join(twice)} more than once")


def _entries(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(str(name), entry) for name, entry in value.items()]
    if isinstance(value, list):
        return [(str(number), entry) for number, entry in enumerate(value)]
    raise TypeError(f"a list or a mapping is expected, not {type(value).__name__}")


def _principle(entry: tuple[str, Any], stem: str) -> Principle:
    name, value = entry
    if isinstance(value, str):
        return Principle(id=f"{stem}-{name}", text=_bare(value))
    if "edit_request" in value:
        prompt = value["prompt"]
        request = prompt if isinstance(prompt, str) else prompt[0]
        return Principle(id=name, text=_bare(request), revision=_bare(value["edit_request"]))
    return Principle.model_validate(value)


_MARKERS = re.compile(r"^\s*(?:CritiqueRequest|RevisionRequest):\s*|\s*(?:Critique:|Revision:|Options:)\s*$")


def _bare(text: str) -> str:
    """The request without the markers of the published prompts' own format."""
    return _MARKERS.sub("", text).strip()


# ---- delimiters ------------------------------------------------------------------------------------------------

_LOOKS_LIKE = re.compile(r"<<<(?=[0-9a-f]{16})|(?<=[0-9a-f]{16})>>>")


def delimiter_for(*content: str) -> str:
    """Sixteen hexadecimal digits that nobody who wrote a part of the content could know: they follow from all of it.
    The same whatever the order of its parts, so that both orders of a comparison differ by nothing but the order."""
    return fingerprint(["delimiter", sorted(content)])[:16]


def fence(text: str, delimiter: str) -> str:
    """The text between delimiters. What looks like a delimiter inside it, this one or any other, is broken."""
    inside = _LOOKS_LIKE.sub(lambda match: "\\".join(match.group()), text).replace(
        delimiter, f"{delimiter[:8]}\\{delimiter[8:]}"
    )
    return f"<<<{delimiter}\n{inside}\n{delimiter}>>>"


# ---- files -----------------------------------------------------------------------------------------------------


def read_parts(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a critic's `critic.yaml` with what the folder's other files add.

    Raises:
      CriticError: a malformed file, or a field of `critic.yaml` for a file that is not there.
    """
    found = dict(values)
    rationale, examples, principles = (
        folder / name for name in ("rationale.txt", "examples.yaml", "principles.yaml")
    )
    if rationale.is_file():
        found["rationale"] = {**(values.get("rationale") or {}), "prompt": rationale.read_text("utf-8")}
    elif values.get("rationale") is not None:
        raise CriticError(f"{folder / 'critic.yaml'}: `rationale` needs the file {rationale}")
    if examples.is_file():
        try:
            found["examples"] = Examples.model_validate(yaml.safe_load(examples.read_text("utf-8")))
        except (ValidationError, yaml.YAMLError) as error:
            raise CriticError(f"{examples}: {error}") from error
    if principles.is_file():
        found["principles"] = load_principles(principles)
    return found
