"""A call: what is sent to an endpoint, and the key under which its answer is kept."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from laif_jax.config.endpoints import Options, VariableName
from laif_jax.config.schema import EndpointSpec, SimulatedSpec
from laif_jax.labeling.errors import EndpointError
from laif_jax.labeling.listwise import ListwiseParser
from laif_jax.labeling.parsers import Parser
from laif_jax.labeling.rating import RatingParser
from laif_jax.labeling.wires import WIRES
from laif_jax.records import content_id
from laif_jax.records.hashing import canonical_json

KEY_VERSION = 1  # part of every request key: raise it if the meaning of a stored request changes


def checked_url(url: str) -> str:
    """`url` without a trailing slash.

    Raises:
      EndpointError: not an http(s) address, or one that carries a user name, password or query: secrets belong in
        the environment variable that `api_key_env` names, not in an address that is stored and logged.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EndpointError(f"base_url {url!r} is not an address such as http://127.0.0.1:8080/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise EndpointError(
            f"base_url at {parts.hostname} carries a user name, password or query. Put the key in an environment "
            "variable, name the variable in `api_key_env`, and give the plain address"
        )
    return url.rstrip("/")


SERVICES = {
    "anthropic": "https://api.anthropic.com",
    "google": "https://generativelanguage.googleapis.com",
}
# Settings of simulated endpoints that came after the first release.
_SINCE = ("timeout_rate", "truncated_rate", "malformed_rate", "drift", "noise", "gullibility")
VERTEX = "https://aiplatform.googleapis.com"


class Endpoint(BaseModel):
    """An endpoint as the service calls it.

    Attributes:
      identity: what tells this endpoint from every other one in a request's key: for a remote endpoint its address,
        for a local model the hash of its weights (the port changes from run to run), for a simulated one its settings,
        for a replayed cassette that it is one.
      base_url: of "openai" always; of the others None for the provider's own.
      api_key_env, api_key_file: where the key is found *on the service's machine*; the key itself is never sent or
        stored.
      project, location: of "google": models on Vertex AI, with Google's application default credentials.
      options: more fields of the request's body; null removes one. They are part of a request's key.
      client: of "openai": "sdk", the official package, or "plain", which needs no extra package.
      cassette: a file of recorded exchanges: "record" adds to it, "replay" answers from it and never goes out.
      batch, batch_folder, prompt_price, cached_prompt_price, completion_price, batch_discount: see `EndpointSpec`.
    """

    # An address that is refused may hold a secret: errors do not quote it.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    provider: Literal["openai", "anthropic", "google", "simulated"]
    model: str = "default"
    identity: str = ""
    base_url: str | None = None
    api_key_env: VariableName | None = None
    api_key_file: str | None = None
    project: str | None = None
    location: str | None = None
    options: Options = Field(default_factory=dict)
    client: Literal["sdk", "plain"] = "sdk"
    cassette: str | None = None
    cassette_mode: Literal["replay", "record"] = "replay"
    simulated: SimulatedSpec | None = None
    concurrency: int = Field(default=8, gt=0)
    timeout: float = Field(default=120.0, gt=0, le=1e6)
    max_attempts: int = Field(default=6, gt=0)
    prompt_price: float | None = Field(default=None, ge=0, le=1e6)
    cached_prompt_price: float | None = Field(default=None, ge=0, le=1e6)
    completion_price: float | None = Field(default=None, ge=0, le=1e6)
    batch_discount: float | None = Field(default=None, ge=0, le=1)
    batch: bool = False
    batch_folder: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "Endpoint":
        if (self.prompt_price is None) != (self.completion_price is None):
            raise ValueError("give both of `prompt_price` and `completion_price`, or none")
        if self.provider == "simulated":
            if self.simulated is None:
                raise ValueError("a simulated endpoint needs `simulated`")
            # Latency does not change an answer, so it does not re-ask; nobody tells us of a new version.
            settings = self.simulated.model_dump(mode="json", exclude={"latency", "version", "retry_after"})
            for name in _SINCE:
                if settings[name] == SimulatedSpec.model_fields[name].default:
                    del settings[name]  # older answers keep their key
            object.__setattr__(self, "identity", f"simulated:{content_id(settings)}")
            return self
        if self.provider == "openai" and self.base_url is None:
            raise ValueError("an OpenAI-compatible endpoint needs `base_url`")
        if self.api_key_env and self.api_key_file:
            raise ValueError("give one of `api_key_env` and `api_key_file`")
        if self.cassette and not self.cassette.endswith(".jsonl"):
            # A job names the file: it must not be one that means something else to this machine.
            raise ValueError("the file of `cassette` must end in .jsonl")
        if self.base_url is not None:
            object.__setattr__(self, "base_url", checked_url(self.base_url))
        if not self.identity:
            home = VERTEX if self.project else SERVICES.get(self.provider, "")
            object.__setattr__(self, "identity", self.base_url or home)
        if self.cassette and self.cassette_mode == "replay" and not self.identity.startswith("cassette:"):
            # What was played back never passes for an answer of the real endpoint.
            object.__setattr__(self, "identity", f"cassette:{self.identity}")
        return self

    @classmethod
    def from_spec(cls, spec: EndpointSpec, *, base_url: str | None = None, identity: str = "") -> "Endpoint":
        """The endpoint of a configuration.

        Args:
          base_url, identity: of the running server, for `llama_cpp` and `checkpoint`
            (`local_servers.running(spec)` starts it and fills both).
        """
        names = (
            *("model", "concurrency", "timeout", "max_attempts", "options"),
            *("prompt_price", "cached_prompt_price", "completion_price", "batch_discount"),
        )
        shared = {name: getattr(spec, name) for name in names}
        if spec.provider == "simulated":
            return cls(provider="simulated", simulated=spec.simulated, **shared)
        if spec.provider in ("openai", "anthropic", "google"):
            remote = {name: getattr(spec, name) for name in REMOTE_FIELDS}
            return cls(provider=spec.provider, **remote, **shared)
        if base_url is None:
            raise EndpointError(
                f"`provider: {spec.provider}` needs its server running: "
                "use `with laif_jax.labeling.running(spec) as endpoint`"
            )
        # A local server needs nothing of the official package.
        return cls(provider="openai", client="plain", base_url=base_url, identity=identity, **shared)

    @property
    def name(self) -> str:
        """For messages: model and place."""
        return f"{self.model} at {self.base_url or self.identity}"

    @cached_property
    def key(self) -> str:
        """Short hash of what makes this endpoint this endpoint (not of its concurrency, time-out or address's port)."""
        asked = [self.provider, self.identity, self.model]
        return content_id([*asked, self.options] if self.options else asked)

    @cached_property
    def _hash(self) -> int:
        return hash(self.model_dump_json())

    def __hash__(self) -> int:
        return self._hash


REMOTE_FIELDS = (
    *("base_url", "api_key_env", "api_key_file", "project", "location", "client"),
    *("cassette", "cassette_mode", "batch", "batch_folder"),
)


@dataclass(frozen=True, slots=True)
class Truth:
    """What a simulated endpoint may look at beside the messages. Real endpoints never see it.

    Attributes:
      instruction: the prompt's last user turn.
      first, second: the responses in the order shown: two of a comparison, `first` of a rating, none of a completion.
      texts: the responses in the order shown, of a ranking.
      quality: their planted qualities, in that order, for the world "planted".
      task: what is asked for where it is not a completion, a plain verdict or a rating: "rationale", "verdict" (on the
        rationale in the messages), "listwise" (a ranking), "critique" or "revision" (of `first`).
      invert: the worse response is asked for.
      parser: writes a verdict or a rating in the format that the critic asks for; `format_id` names it in the key.
    """

    instruction: str
    first: str | None = None
    second: str | None = None
    quality: tuple[float | None, ...] = (None, None)
    parser: Parser | RatingParser | ListwiseParser | None = None
    format_id: str = ""
    texts: tuple[str, ...] = ()
    task: Literal["", "rationale", "verdict", "listwise", "critique", "revision"] = ""
    invert: bool = False


_LIMITS = ("max_tokens", "max_completion_tokens", "maxOutputTokens")


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One request to one endpoint.

    Attributes:
      params: temperature, max_tokens, and where set top_p, seed, stop, n, top_logprobs. Raises `EndpointError` for
        one that the provider does not have: nothing is sent then.
      sample: index of the sample, so that the same request may be asked several times.
      request: canonical JSON of everything that decides the answer. key: its SHA-256, the store's primary key.
        Neither holds a key, an address's port of a local server, a time-out or a concurrency.
    """

    endpoint: Endpoint
    messages: tuple[dict[str, str], ...]
    params: dict[str, Any]
    sample: int = 0
    truth: Truth | None = None
    request: str = field(init=False)
    key: str = field(init=False)

    def __post_init__(self) -> None:
        endpoint = self.endpoint
        value: dict[str, Any] = {
            "v": KEY_VERSION,
            "provider": endpoint.provider,
            "endpoint": endpoint.identity,
            "model": endpoint.model,
            "messages": self.messages,
            "params": self.params,
            "sample": self.sample,
        }
        if endpoint.options:
            value["options"] = endpoint.options
        WIRES[endpoint.provider].check(self.params)
        if endpoint.provider == "simulated" and self.truth is not None:
            value["truth"] = [self.truth.format_id, *self.truth.quality]
        text = canonical_json(value)
        # A lone surrogate (half an emoji cut by truncation) is not UTF-8; SQLite and HTTP need UTF-8.
        data = text.encode("utf-8", "surrogatepass")
        object.__setattr__(self, "request", data.decode("utf-8", "replace"))
        object.__setattr__(self, "key", hashlib.sha256(data).hexdigest())

    @property
    def max_tokens(self) -> int | None:
        """Completion tokens that may be billed at most, all samples together; None: nothing bounds them."""
        options = self.endpoint.options
        limits = [options[name] for name in _LIMITS if isinstance(options.get(name), int)]
        limit = max(limits) if limits else self.params.get("max_tokens")
        return None if limit is None else limit * self.params.get("n", 1)

    @property
    def needs_logprobs(self) -> bool:
        return "top_logprobs" in self.params

    def body(self) -> dict[str, Any]:
        """The JSON body of the request, in the provider's wire format."""
        return WIRES[self.endpoint.provider].body(self)
