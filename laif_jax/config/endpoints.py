"""Schemas of endpoints, teachers, critics and the labelling service."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from laif_jax.config.base import Fraction, Positive, Spec


class SimulatedSpec(Spec):
    """A simulated endpoint with planted truth.

    Attributes:
      world: whose notion of quality is the truth: "symbols" (computed by program) or "planted" (read from each
        completion's `meta.quality`).
      skill: of a teacher: probability that each step of an instruction is carried out correctly.
      errors: of a teacher of the world "symbols": "independent" draws, or "habitual": decided once by operation,
        length and first symbol, as a model that is asked again errs again.
      accuracy: of a critic: probability that it names the better response when the two differ.
      sharpness: of a critic that gives log-probs: how far its probability is from 1/2 (logit of its verdict).
      tie_rate, position_bias (logit towards the first shown), length_bias (logit per unit of relative length).
      failure_rate, rate_limit_rate, refusal_rate, garbage_rate, empty_rate: chances of that misbehaviour per attempt.
      latency: seconds per call.
    """

    world: Literal["symbols", "planted"] = "symbols"
    skill: Fraction = 1.0
    errors: Literal["independent", "habitual"] = "independent"
    accuracy: Fraction = 1.0
    sharpness: float = Field(default=4.0, gt=0)
    tie_rate: Fraction = 0.0
    position_bias: float = 0.0
    length_bias: float = 0.0
    failure_rate: Fraction = 0.0
    rate_limit_rate: Fraction = 0.0
    refusal_rate: Fraction = 0.0
    garbage_rate: Fraction = 0.0
    empty_rate: Fraction = 0.0
    latency: float = Field(default=0.0, ge=0)
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> "SimulatedSpec":
        # Only the value that asks for something: the service gets all fields, defaults included.
        if self.world == "planted" and self.errors == "habitual":
            raise ValueError(
                "`errors: habitual` has no effect with `world: planted`; it is used by `world: symbols`"
            )
        return self


class EndpointSpec(Spec):
    """A model that answers requests: a teacher, a critic or a judge.

    Attributes:
      provider: "openai": any OpenAI-compatible endpoint at `base_url`; "simulated": planted truth; "llama_cpp": a
        llama.cpp server over the local file `gguf`, started and stopped by `laif run`; "checkpoint": our own model
        server over the folder `checkpoint`, likewise.
      api_key_env: the *name* of the environment variable that holds the key; keys are never written in a config.
      concurrency: calls in flight at most. timeout: seconds per call. max_attempts: tries per call.
      prompt_price, completion_price: US dollars per million tokens, for the report's costs; None: not known.
    """

    provider: Literal["openai", "simulated", "llama_cpp", "checkpoint"]
    model: str = "default"
    base_url: str | None = None
    api_key_env: str | None = None
    gguf: str | None = None
    checkpoint: str | None = None
    simulated: SimulatedSpec | None = None
    context_length: Positive = 2048
    concurrency: Positive = 8
    timeout: float = Field(default=120.0, gt=0)
    max_attempts: Positive = 6
    prompt_price: float | None = Field(default=None, ge=0)
    completion_price: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "EndpointSpec":
        needs = {
            "openai": "base_url",
            "simulated": "simulated",
            "llama_cpp": "gguf",
            "checkpoint": "checkpoint",
        }
        if getattr(self, needs[self.provider]) is None:
            raise ValueError(f"`provider: {self.provider}` needs `{needs[self.provider]}`")
        parts = urlsplit(self.base_url or "")
        if parts.username or parts.password or parts.query:
            # The resolved configuration is written to the study's folder.
            raise ValueError(
                "`base_url` carries a user name, password or query. Put the key in an environment variable, name the "
                "variable in `api_key_env`, and give the plain address"
            )
        if (self.prompt_price is None) != (self.completion_price is None):
            raise ValueError("give both of `prompt_price` and `completion_price`, or none")
        return self

    def unused(self) -> dict[str, tuple[str, str]]:
        users = {
            "base_url": ("openai",),
            "api_key_env": ("openai",),
            "simulated": ("simulated",),
            "gguf": ("llama_cpp",),
            "checkpoint": ("checkpoint",),
            "context_length": ("llama_cpp",),
        }
        choice = f"`provider: {self.provider}`"
        return {
            option: (choice, f"`provider: {names[0]}`")
            for option, names in users.items()
            if self.provider not in names
        }


class TeacherSpec(Spec):
    """Who writes the completions of supervised fine-tuning: give `endpoint`, or `completions`, the name of a column
    of completions that the data already holds."""

    endpoint: str | None = None
    completions: str | None = None
    system: str | None = None
    temperature: float = Field(default=1.0, ge=0)
    max_tokens: Positive = 512

    @model_validator(mode="after")
    def _check(self) -> "TeacherSpec":
        if (self.endpoint is None) == (self.completions is None):
            raise ValueError(
                "give one of `endpoint` (a model to ask) and `completions` (a column of the data)"
            )
        return self

    def unused(self) -> dict[str, tuple[str, str]]:
        if self.completions is None:
            return {}
        return dict.fromkeys(("system", "temperature", "max_tokens"), ("`completions`", "`endpoint`"))


class CriticSpec(Spec):
    """Who compares two responses. `critic`: the name of a critic data file (prompt, parser, options), or a path.
    `order`: "both" orders averaged, or one "seeded" order per comparison."""

    endpoint: str
    critic: str = "laif_basic"
    order: Literal["both", "seeded"] = "both"


class LabelingSpec(Spec):
    """The labelling service. `url`: None: `laif run` starts one for the study, with its store at `store`."""

    url: str | None = None
    store: str | None = None
    poll: float = Field(default=0.2, gt=0)
    min_coverage: Fraction = 0.9

    def unused(self) -> dict[str, tuple[str, str]]:
        return {} if self.url is None else {"store": ("`url`", "a service that `laif run` starts")}
