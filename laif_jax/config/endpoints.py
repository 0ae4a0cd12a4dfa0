"""Schemas of endpoints, teachers, critics and the labelling service."""

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from laif_jax.config.base import Fraction, Positive, Spec
from laif_jax.config.money import parse_money

_NOT_OPTIONS = {
    "model",
    "messages",
    "contents",
    "system",
    "stream",
    "n",
    "candidateCount",
    "logprobs",
    "top_logprobs",
}

TOKENS_MOST = 10**8  # of one answer: what more could cost does not fit a database's integers
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "maxOutputTokens")
_SECRET = re.compile(r"api_?-?key|secret|password|authorization", re.IGNORECASE)


def _check_options(options: dict[str, Any]) -> dict[str, Any]:
    """More fields of a request's body: they are stored with each request, so no secrets, and nothing that calls set."""
    if taken := sorted(_NOT_OPTIONS & set(options)):
        raise ValueError(f"`options` must not hold {', '.join(taken)}: the calls themselves set them")
    if secret := sorted({name for name in _names(options) if _SECRET.search(name)}):
        raise ValueError(f"`options` must not hold {', '.join(secret)}: they are stored. Use `api_key_env`")
    for name, value in options.items():
        if name in TOKEN_LIMITS and isinstance(value, int) and value > TOKENS_MOST:
            raise ValueError(f"`options.{name}` is more than {TOKENS_MOST:,}")
    try:
        json.dumps(options, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`options` must be plain JSON values: {error}") from error
    return options


def _names(value: Any) -> Iterator[str]:
    """Names of fields, those of inner objects too."""
    if isinstance(value, dict):
        yield from (name for name in value if isinstance(name, str))
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for item in inner:
        yield from _names(item)


def _check_variable(name: str) -> str:
    """A variable's name, so that a key that was written here by mistake is not kept. (It is not shown either.)"""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(
            "give the *name* of an environment variable (letters, digits and _), not the key itself"
        )
    return name


VariableName = Annotated[str, AfterValidator(_check_variable)]
Options = Annotated[dict[str, Any], AfterValidator(_check_options)]


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
      noise: standard deviation of what is added to the logit of each verdict that is sampled (temperature above 0).
      gullibility: chance that a response which holds one of the shipped injections wins by it.
      failure_rate, rate_limit_rate, refusal_rate, garbage_rate, empty_rate: chances of that misbehaviour per attempt.
      timeout_rate, truncated_rate, malformed_rate: chances per attempt that no answer comes in time, that its body
        breaks off, or that it is JSON of another shape.
      retry_after: seconds that a rate limit asks to wait.
      drift: chance that the present `version` answers an item otherwise than version 0 would: the draw is made anew.
        version: of the model behind the name, as its fingerprint tells.
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
    noise: float = Field(default=0.0, ge=0)
    gullibility: Fraction = 0.0
    failure_rate: Fraction = 0.0
    rate_limit_rate: Fraction = 0.0
    refusal_rate: Fraction = 0.0
    garbage_rate: Fraction = 0.0
    empty_rate: Fraction = 0.0
    timeout_rate: Fraction = 0.0
    truncated_rate: Fraction = 0.0
    malformed_rate: Fraction = 0.0
    retry_after: float = Field(default=0.0, ge=0, le=1e6)
    drift: Fraction = 0.0
    version: int = Field(default=0, ge=0)
    latency: float = Field(default=0.0, ge=0, le=1e6)
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> "SimulatedSpec":
        # Only the value that asks for something: the service gets all fields, defaults included.
        if self.world == "planted" and self.errors == "habitual":
            raise ValueError(
                "`errors: habitual` has no effect with `world: planted`; it is used by `world: symbols`"
            )
        return self


_REMOTE = ("openai", "anthropic", "google")


class EndpointSpec(Spec):
    """A model that answers requests: a teacher, a critic or a judge.

    Attributes:
      provider: "openai": any OpenAI-compatible endpoint at `base_url`; "anthropic"; "google": Gemini, by API key, or on
        Vertex AI with `project`; "simulated": planted truth; "llama_cpp": a llama.cpp server over the local file
        `gguf`, started and stopped by `laif run`; "checkpoint": our own model server over the folder `checkpoint`,
        likewise.
      reward: `checkpoint` is a reward model's folder; as a critic or judge it compares by its scores.
      api_key_env: the *name* of the environment variable that holds the key; keys are never written in a config.
      api_key_file: a file with the key alone, mode 600; one of the two.
      project, location: of Vertex AI, with Google's application default credentials instead of a key.
      options: more fields of each request's body (`reasoning_effort: low`); null leaves a field out.
      client: of "openai": "sdk" is the official package; "plain" needs no extra package and costs less per call.
      cassette: a file of recorded exchanges. cassette_mode: "record" adds to it, "replay" answers from it alone.
      concurrency: calls in flight at most. timeout: seconds per call. max_attempts: tries per call.
      batch: ask through the provider's batch API: half the price, answers within a day.
      batch_folder: of Vertex AI's batches: a folder for their files, gs://bucket/folder.
      prompt_price, completion_price: US dollars per million tokens; None: those of the price table.
      cached_prompt_price: of prompt tokens that the endpoint had cached; None: as `prompt_price`.
      batch_discount: what a batch is cheaper by (0.5: half the price); None: nothing, with prices given here.
    """

    provider: Literal["openai", "anthropic", "google", "simulated", "llama_cpp", "checkpoint"]
    model: str = "default"
    base_url: str | None = None
    api_key_env: VariableName | None = None
    api_key_file: str | None = None
    project: str | None = None
    location: str | None = None
    options: Options = Field(default_factory=dict)
    client: Literal["sdk", "plain"] = "sdk"
    cassette: str | None = None
    cassette_mode: Literal["replay", "record"] = "replay"
    batch: bool = False
    batch_folder: str | None = None
    gguf: str | None = None
    checkpoint: str | None = None
    reward: bool = False
    simulated: SimulatedSpec | None = None
    context_length: Positive = 2048
    concurrency: Positive = 8
    timeout: float = Field(default=120.0, gt=0, le=1e6)
    max_attempts: Positive = 6
    prompt_price: float | None = Field(default=None, ge=0, le=1e6)
    completion_price: float | None = Field(default=None, ge=0, le=1e6)
    cached_prompt_price: float | None = Field(default=None, ge=0, le=1e6)
    batch_discount: Fraction | None = None

    @model_validator(mode="after")
    def _check(self) -> "EndpointSpec":
        needs = {
            "openai": "base_url",
            "anthropic": "model",
            "google": "model",
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
        for option in ("cached_prompt_price", "batch_discount"):
            if getattr(self, option) is not None and self.prompt_price is None:
                raise ValueError(f"`{option}` needs `prompt_price` and `completion_price` beside it")
        if self.provider in ("anthropic", "google") and "model" not in self.model_fields_set:
            raise ValueError(f"`provider: {self.provider}` needs `model`, the name of one of its models")
        if self.api_key_env and self.api_key_file:
            raise ValueError("give one of `api_key_env` and `api_key_file`")
        if self.project and (self.api_key_env or self.api_key_file):
            raise ValueError("`project` asks Vertex AI, with Google's own credentials: remove the API key")
        if self.cassette and not self.cassette.endswith(".jsonl"):
            raise ValueError("the file of `cassette` must end in .jsonl")
        if self.batch and self.cassette:
            raise ValueError("`batch` and `cassette` do not go together: remove one")
        if self.batch and self.project and not self.batch_folder:
            raise ValueError("a batch on Vertex AI needs `batch_folder`, for example gs://bucket/folder")
        if self.batch_folder and not (self.batch and self.project):
            raise ValueError(
                "`batch_folder` is for batches on Vertex AI: it needs `batch: true` and `project`"
            )
        if self.location and not self.project:
            raise ValueError("`location` is Vertex AI's: it needs `project`")
        return self

    def unused(self) -> dict[str, tuple[str, str]]:
        users = {
            "base_url": _REMOTE,
            "api_key_env": _REMOTE,
            "api_key_file": _REMOTE,
            "project": ("google",),
            "location": ("google",),
            "options": (*_REMOTE, "llama_cpp", "checkpoint"),
            "client": ("openai",),
            "cassette": _REMOTE,
            "cassette_mode": _REMOTE,
            "batch": _REMOTE,
            "batch_folder": ("google",),
            "simulated": ("simulated",),
            "gguf": ("llama_cpp",),
            "checkpoint": ("checkpoint",),
            "reward": ("checkpoint",),
            "context_length": ("llama_cpp",),
        }
        choice = f"`provider: {self.provider}`"
        unused = {
            option: (choice, f"`provider: {names[0]}`")
            for option, names in users.items()
            if self.provider not in names
        }
        if self.cassette is None:
            unused.setdefault("cassette_mode", ("no `cassette`", "`cassette`"))
        return unused


class EndpointList(Spec):
    """The endpoints that a labelling service asks for others: `laif serve labels --endpoints FILE`."""

    endpoints: dict[str, EndpointSpec] = Field(min_length=1)


class TeacherSpec(Spec):
    """Who writes the completions of supervised fine-tuning: give `endpoint`, or `completions`, the name of a column
    of completions that the data already holds.

    Attributes:
      revisions: how many times over `endpoint` criticises and revises each answer; the last revision is the target.
      reviser: prompts and principles of that: a shipped one's name, or a folder. principles: a file instead of its own.
    """

    endpoint: str | None = None
    completions: str | None = None
    system: str | None = None
    temperature: float = Field(default=1.0, ge=0)
    max_tokens: Positive = 512
    revisions: int = Field(default=0, ge=0, le=64)
    reviser: str = "constitutional"
    principles: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "TeacherSpec":
        if (self.endpoint is None) == (self.completions is None):
            raise ValueError(
                "give one of `endpoint` (a model to ask) and `completions` (a column of the data)"
            )
        return self

    def unused(self) -> dict[str, tuple[str, str]]:
        found: dict[str, tuple[str, str]] = {}
        if self.revisions == 0:
            found = dict.fromkeys(("reviser", "principles"), ("no `revisions`", "`revisions`"))
        if self.completions is not None:
            names = ("system", "temperature", "max_tokens", "revisions")
            found |= dict.fromkeys(names, ("`completions`", "`endpoint`"))
        return found

    def resolved(self) -> dict[str, Any]:
        # What was made before revisions existed keeps its key.
        return {name: v for name, v in super().resolved().items() if name != "revisions" or v}


class VoiceSpec(Spec):
    """One critic and who is asked.

    Attributes:
      critic: the name of a critic data file (prompt, parser, options), or a path.
      order: "both" orders averaged, or one "seeded" order per comparison.
      samples, shots, temperature, clamp, invert, delimiters: instead of the critic's own (see its `critic.yaml`);
        `temperature` is that of the rationale where the critic asks for one.
      principles: a file of principles instead of the critic's own.
    """

    endpoint: str
    critic: str = "laif_basic"
    order: Literal["both", "seeded"] = "both"
    samples: Positive | None = None
    shots: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0)
    clamp: tuple[float, float] | None = None
    invert: bool | None = None
    delimiters: bool | None = None
    principles: str | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """What is set instead of the critic's own."""
        names = ("samples", "shots", "temperature", "clamp", "invert", "delimiters", "principles")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def resolved(self) -> dict[str, Any]:
        # Options that are not set are left out: what was made before they existed keeps its key.
        return {
            name: value
            for name, value in super().resolved().items()
            if name in ("endpoint", "critic", "order") or value not in (None, [])
        }


class StrongSpec(VoiceSpec):
    """The second tier. `below`: it is asked where the first tier's |p_b - 1/2| is below this, or gave no label."""

    below: float = Field(default=0.2, gt=0, le=0.5)


class CriticSpec(VoiceSpec):
    """Who compares two responses.

    Attributes:
      ensemble: further critics; the label is the mean of all their probabilities.
      strong: a second, stronger critic that is asked only where the first one (or the ensemble) is not sure.
    """

    ensemble: tuple[VoiceSpec, ...] = ()
    strong: StrongSpec | None = None

    @property
    def voices(self) -> tuple[VoiceSpec, ...]:
        """All critics that are asked: this one, the rest of the ensemble, the strong one."""
        return (self, *self.ensemble, *((self.strong,) if self.strong else ()))

    @property
    def alone(self) -> bool:
        """Whether there is one critic only."""
        return len(self.voices) == 1


class LabelingSpec(Spec):
    """The labelling service. `url`: None: `laif run` starts one for the study, with its store at `store`.

    Attributes:
      token_env: the *name* of the environment variable that holds the token of the service at `url`.
      budget: a hard cap on what all calls from this store may cost, over all runs, as in "25USD"; "none" lifts it, None
        leaves it as it was set before.
      job_budget: a hard cap on each job: one stage's questions to one endpoint.
      min_coverage: least share of the items that must be answered; with fewer a stage ends, and keeps what came.
      max_wait: seconds that a stage waits, beyond each call's own attempts, for an endpoint that is down to come back,
        counted from its last answer, before it ends so.
      probe: a drift probe: `shipped`, or a file of pairs, which each critic judges anew once a day.
    """

    url: str | None = None
    token_env: VariableName | None = None
    store: str | None = None
    budget: str | None = None
    job_budget: str | None = None
    poll: float = Field(default=0.2, gt=0)
    min_coverage: Fraction = 0.9
    max_wait: float = Field(default=300.0, ge=0)
    probe: str | None = None

    @field_validator("budget", "job_budget")
    @classmethod
    def _amount(cls, budget: str | None, info: ValidationInfo) -> str | None:
        if budget is not None and not (budget == "none" and info.field_name == "budget"):
            parse_money(budget)
        return budget

    def unused(self) -> dict[str, tuple[str, str]]:
        if self.url is None:
            return {"token_env": ("no `url`", "`url`, the address of a service that has a token")}
        ours = "a service that `laif run` starts"
        held = f"{ours} (`laif serve labels --budget`, or `laif label budget`, sets the budget of another)"
        return {"store": ("`url`", ours), "budget": ("`url`", held)}
