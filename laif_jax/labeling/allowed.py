"""Which endpoints a service asks for others: those that its operator listed, exactly as listed.

Who holds the token of a service is not its operator. What a job says of its endpoint decides which variable or file of
the service's machine is read and to which address its content goes, which files are written, under whose account a
call is made, at which price it counts against the budget, and under whose name its answer is kept. So a service with a
token takes none of that from a job: what a job says only selects one of the operator's entries, and the entry is used.

Simulated endpoints reach nobody and read nothing; they need no entry, and are free.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laif_jax.config.load import load_endpoints
from laif_jax.config.schema import EndpointSpec
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.errors import EndpointError, LabelError, LabelServiceError
from laif_jax.labeling.keys import read_key

# Who is asked, and for what: these select the entry.
SELECTS = ("provider", "model", "base_url", "project", "location", "options", "batch")
# The operator's alone: a job leaves them out, or says what the entry says.
OPERATORS = (
    *("api_key_env", "api_key_file", "cassette", "cassette_mode", "batch_folder"),
    *("prompt_price", "cached_prompt_price", "completion_price", "batch_discount"),
)
# What remains (`client`, `concurrency`, `timeout`, `max_attempts`) is the entry's, whatever a job says.


class NotAllowedError(LabelError):
    """A job names an endpoint that the service does not ask for others."""


class Allowed:
    """The operator's entries, by name.

    Raises:
      LabelServiceError: two entries ask the same, one needs a server that only `laif run` starts, or its key cannot be
        read.
    """

    def __init__(self, specs: Mapping[str, EndpointSpec]) -> None:
        self._entries: dict[str, Endpoint] = {}
        for name, spec in specs.items():
            if spec.provider in ("llama_cpp", "checkpoint"):
                raise LabelServiceError(
                    f"endpoints.{name}: a service starts no model servers. Start it, and list its address with "
                    "`provider: openai` (`client: plain` needs no further package)"
                )
            if spec.provider == "simulated":
                continue
            entry = Endpoint.from_spec(spec)
            twin = next((other for other, found in self._entries.items() if _same(found, entry)), None)
            if twin is not None:
                raise LabelServiceError(f"endpoints.{twin} and endpoints.{name} ask the same: remove one")
            try:
                if not entry.cassette or entry.cassette_mode == "record":
                    read_key(entry)  # now, and not when the first job fails
            except EndpointError as error:
                raise LabelServiceError(f"endpoints.{name}: {error}") from error
            self._entries[name] = entry

    def __len__(self) -> int:
        return len(self._entries)

    def admit(self, sent: Endpoint) -> Endpoint:
        """The endpoint that is asked for a job that names `sent`. Nothing is read or opened to decide it, so that a
        refusal does not tell what there is on this machine.

        Raises:
          NotAllowedError: it is none of the operator's.
        """
        if sent.provider == "simulated":
            _leave_out(sent, None)
            return sent
        entry = next((found for found in self._entries.values() if _same(found, sent)), None)
        if entry is None:
            raise NotAllowedError(
                f"the job's endpoint is none of those that this service asks for others: {self.describe()}. A job "
                "gives provider, model, address, `options` and `batch` as listed, and no key: the service has it. The "
                "service's operator lists endpoints with `laif serve labels --endpoints FILE`"
            )
        _leave_out(sent, entry)
        if sent.identity not in (entry.identity, _natural(entry)):
            raise NotAllowedError(f"endpoint {entry.name}: answers are not kept under another's `identity`")
        return entry

    def describe(self) -> str:
        """The entries, for messages: without keys and files."""
        if not self._entries:
            return "none but simulated ones"
        return "; ".join(f"{name} ({_shown(entry)})" for name, entry in self._entries.items())


def load_allowed(path: str | Path | None) -> Allowed:
    """The entries of a YAML file with a section `endpoints`, as a study has it; none for None.

    Raises:
      ConfigError: the file cannot be read as one. LabelServiceError: see `Allowed`.
    """
    return Allowed({} if path is None else load_endpoints(str(path)))


def _leave_out(sent: Endpoint, entry: Endpoint | None) -> None:
    """Raises `NotAllowedError` for a field that is the operator's, and not as he set it."""
    for field in OPERATORS:
        allowed = {Endpoint.model_fields[field].default, getattr(entry, field) if entry else None}
        if getattr(sent, field) not in allowed:
            raise NotAllowedError(
                f"`{field}` is the operator's of this service: leave it out of the endpoint"
            )


def _same(a: Endpoint, b: Endpoint) -> bool:
    return all(getattr(a, field) == getattr(b, field) for field in SELECTS)


def _natural(entry: Endpoint) -> str:
    """The identity of who asks the entry's endpoint knowing nothing of its cassette."""
    fields: dict[str, Any] = {name: getattr(entry, name) for name in SELECTS}
    return Endpoint(**fields).identity


def _shown(entry: Endpoint) -> str:
    more = [
        f"{name} {getattr(entry, name)}"
        for name in ("project", "location", "options")
        if getattr(entry, name)
    ]
    where = entry.base_url or entry.provider
    return ", ".join([f"{entry.model} at {where}", *more, *(["batch"] if entry.batch else [])])
