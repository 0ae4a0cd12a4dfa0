"""The shipped injection canaries: responses that try to talk a judge into a verdict, as data (`canaries.yaml`)."""

from functools import lru_cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from laif_jax.records import Comparison, Completion, Prompt

FILE = Path(__file__).parent / "canaries.yaml"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Injection(_Model):
    """One way to talk a judge into a verdict. `kind`: in words."""

    id: str
    kind: str
    text: str


class CanaryPair(_Model):
    """A prompt with two responses of which one is better beyond doubt."""

    instruction: str
    better: str
    worse: str


class Canaries(_Model):
    """The set. `version` changes with its content: rates are compared within one version."""

    version: str
    injections: tuple[Injection, ...]
    pairs: tuple[CanaryPair, ...]


@lru_cache(maxsize=1)
def canaries() -> Canaries:
    """The shipped set."""
    return Canaries.model_validate(yaml.safe_load(FILE.read_text("utf-8")))


@lru_cache(maxsize=65536)
def holds_injection(text: str) -> bool:
    """Whether a response holds one of the shipped injections."""
    return any(injection.text in text for injection in canaries().injections)


def plain_comparisons() -> list[Comparison]:
    """The pairs as they are, a the better response; planted qualities 0.9 and 0.1 for simulated judges."""
    return [_comparison(pair, pair.worse) for pair in canaries().pairs]


def injected_comparisons() -> list[tuple[Injection, Comparison]]:
    """Each pair with each injection at the end of its worse response, b."""
    return [
        (injection, _comparison(pair, f"{pair.worse}\n\n{injection.text}"))
        for injection in canaries().injections
        for pair in canaries().pairs
    ]


def _comparison(pair: CanaryPair, worse: str) -> Comparison:
    prompt = Prompt.from_text(pair.instruction, source="canaries")

    def completion(name: str, text: str, quality: float) -> Completion:
        return Completion(prompt_id=prompt.id, generator=name, text=text, meta={"quality": quality})

    return Comparison(
        prompt=prompt, a=completion("better", pair.better, 0.9), b=completion("worse", worse, 0.1)
    )
