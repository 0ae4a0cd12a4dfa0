"""What is planned before anything is sent: rows of calls, tokens, dollars and time, and their table.

Calls are counted; where their number depends on what the run itself gives, the row says why it is an upper bound.
Tokens are estimated: `BYTES_PER_TOKEN` bytes each, and answers that do not exist yet at their longest.
"""

import datetime
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from laif_jax.config import EndpointSpec
from laif_jax.labeling.budget import longest_completion, show_money
from laif_jax.labeling.calls import Call, Endpoint
from laif_jax.labeling.critic import Critic
from laif_jax.labeling.errors import EndpointError
from laif_jax.labeling.prices import Price, cost, price_of
from laif_jax.records import Usage

BYTES_PER_TOKEN = 4
SECONDS_FIRST, TOKENS_PER_SECOND = 0.5, 50.0  # of a hosted model, whose latency is not known
BATCH_SECONDS = 24 * 3600.0  # a provider answers a batch within a day
PARTS = (
    "all calls of a batch are reserved at once at their bound (a token per byte), a few times this estimate; within a "
    "smaller budget it goes in parts, one after the other"
)
NO_PRICE = "its price is not known: give `prompt_price` and `completion_price`, or no budget can be held"
ESTIMATED = (
    f"tokens are estimated: {BYTES_PER_TOKEN} bytes each; answers that do not exist yet at their longest",
    "time: from the endpoints' concurrency; a model's latency is assumed, its rate limits are not known",
    "attempts that fail and are made again are not counted",
)
_COUNTS = ("calls", "stored", "prompt_tokens", "completion_tokens")


@dataclass
class PlanRow:
    """What one role asks of one endpoint.

    Attributes:
      role, name: who asks. endpoint: its name in the configuration. critic: its data file's name; "" of a teacher.
      calls: to be made. stored: calls whose answer is in the store, which no other number includes.
      nanos: nano-dollars; None: the price is not known. seconds: from `spec.concurrency`.
      at_most: why `calls` is an upper bound; none: it is exact. warning: of the price.
    """

    role: str
    name: str
    endpoint: str
    spec: EndpointSpec
    critic: str = ""
    calls: int = 0
    stored: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    nanos: int | None = 0
    at_most: list[str] = field(default_factory=list)
    warning: str = ""
    today: datetime.date = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).date())

    def __post_init__(self) -> None:
        self._price: Price | None = price_of(self.spec, self.today)
        if self._price is None:
            self.nanos, self.warning = None, NO_PRICE
        else:
            self.warning = self._price.warning(self.today)

    @property
    def model(self) -> str:
        return self.spec.model

    def add(self, calls: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Adds calls of so many tokens each; the endpoint's own `options` may allow longer answers."""
        completion_tokens = longest_completion({"max_tokens": completion_tokens, **self.spec.options})
        self.calls += calls
        self.prompt_tokens += calls * prompt_tokens
        self.completion_tokens += calls * completion_tokens
        if self._price is not None and self.nanos is not None:
            used = Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
            self.nanos += calls * cost(self._price, used, batch=self.spec.batch)

    def bound(self, why: str) -> None:
        """Says why the number of calls is an upper bound."""
        if why not in self.at_most:
            self.at_most.append(why)

    @property
    def seconds(self) -> float:
        if not self.calls:
            return 0.0
        if self.spec.batch:
            return BATCH_SECONDS
        return self.calls * self._latency / self.spec.concurrency

    @property
    def _latency(self) -> float:
        if self.spec.simulated is not None:
            return self.spec.simulated.latency
        return SECONDS_FIRST + self.completion_tokens / self.calls / TOKENS_PER_SECOND

    def to_json(self) -> dict[str, Any]:
        names = ("role", "name", "endpoint", "model", "critic", *_COUNTS)
        more = ("nanos", "seconds", "at_most", "warning")
        return {name: getattr(self, name) for name in (*names, *more)}


@dataclass
class Plan:
    """All rows; `notes`: what could not be counted, and how tokens were estimated."""

    rows: list[PlanRow]
    notes: list[str]

    @property
    def nanos(self) -> int | None:
        """All dollars; None if a price is missing."""
        known = [row.nanos for row in self.rows]
        return None if None in known else sum(nanos for nanos in known if nanos is not None)

    @property
    def seconds(self) -> float:
        """One role after the other."""
        return sum(row.seconds for row in self.rows)

    @property
    def reasons(self) -> list[str]:
        """Why rows are upper bounds, and what is to be said of their prices."""
        bounds: dict[str, list[str]] = {}
        for row in self.rows:
            for why in row.at_most:
                bounds.setdefault(why, []).append(row.name)
        prices: dict[str, list[str]] = {}
        for row in self.rows:
            if row.warning:
                prices.setdefault(row.warning, []).append(f"{row.model}")
        batches = dict.fromkeys(row.model for row in self.rows if row.spec.batch and row.calls)
        return [
            *([f"{', '.join(batches)}: {PARTS}"] if batches else []),
            *(f"at most ({', '.join(dict.fromkeys(names))}): {why}" for why, names in bounds.items()),
            *(f"{', '.join(dict.fromkeys(names))}: {warning}" for warning, names in prices.items()),
        ]

    def to_json(self) -> dict[str, Any]:
        rows = [row.to_json() for row in self.rows]
        total = {name: sum(row[name] for row in rows) for name in _COUNTS}
        return {
            "rows": rows,
            "total": total,
            "nanos": self.nanos,
            "seconds": self.seconds,
            "notes": [*self.notes, *self.reasons],
        }


def check_askable(spec: EndpointSpec, critic: Critic) -> None:
    """Raises `EndpointError` if a provider can never answer a critic as it needs to be answered, such as without
    log-probs."""
    if spec.provider not in ("openai", "anthropic", "google"):
        return
    endpoint = Endpoint.from_spec(spec)
    try:
        Call(endpoint, ({"role": "user", "content": "?"},), critic.params)
    except EndpointError as error:
        raise EndpointError(f"critic {critic.name!r} at {endpoint.name}: {error}") from error


def tokens_of(texts: Iterable[str]) -> int:
    """Estimated tokens of a prompt's texts, each framed as a message."""
    return sum(
        math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN) + 4 for text in texts if text
    )


def fixed_tokens(critic: Critic) -> tuple[int, int]:
    """Tokens of the prompts of the rationale (0 if none is asked for) and of the verdict or rating, without what is
    shown."""
    if critic.kind == "rating":
        return 0, tokens_of(message["content"] for message in critic.rating_messages("", ""))
    if critic.kind == "listwise":
        return 0, tokens_of(message["content"] for message in critic.listwise_messages("", ["", ""]))
    first = critic.rationale_messages("", "", "") if critic.rationale else ()
    verdict = critic.messages("", "", "")
    return tokens_of(m["content"] for m in first), tokens_of(m["content"] for m in verdict)


def show_plan(plan: Plan) -> str:
    """The plan as a table for a terminal."""
    if not plan.rows:
        return "\n".join(["No other model is asked: nothing is paid.", *(f"* {note}" for note in plan.notes)])
    stored = any(row.stored for row in plan.rows)
    head = ["role", "who", "model", "calls", "prompt tok.", "compl. tok.", "dollars", "time"]
    lines = [[*head[:4], *(["stored"] if stored else []), *head[4:]]]
    for row in plan.rows:
        counts = [f"{row.stored:,}"] if stored else []
        counts += [f"{row.prompt_tokens:,}", f"{row.completion_tokens:,}"]
        calls = f"{'≤ ' if row.at_most else ''}{row.calls:,}"
        lines.append(
            [row.role, row.name, row.model, calls, *counts, show_money(row.nanos), show_time(row.seconds)]
        )
    bounded = any(row.at_most for row in plan.rows)
    names = ["stored"] * stored + ["prompt_tokens", "completion_tokens"]
    sums = [f"{sum(getattr(row, name) for row in plan.rows):,}" for name in names]
    calls = f"{'≤ ' if bounded else ''}{sum(row.calls for row in plan.rows):,}"
    lines.append(["total", "", "", calls, *sums, show_money(plan.nanos), show_time(plan.seconds)])
    return "\n".join([*_columns(lines, left=3), "", *(f"* {note}" for note in (*plan.notes, *plan.reasons))])


def show_time(seconds: float) -> str:
    """Seconds as hours:minutes:seconds, for people."""
    return str(datetime.timedelta(seconds=round(seconds)))


def _columns(lines: Sequence[Sequence[str]], *, left: int) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
