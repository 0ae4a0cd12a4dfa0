"""What calls cost: a dated table of prices per model, and exact arithmetic in whole nano-dollars.

The table is data (`price_tables/*.yaml`). It says when it was taken down (`as_of`) and from where, and must be checked
against the providers' pages before a large run. Prices given with the endpoint always win.
"""

import datetime
import functools
import re
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from laif_jax.config.endpoints import EndpointSpec
from laif_jax.labeling.calls import Endpoint
from laif_jax.labeling.errors import EndpointError
from laif_jax.records import Usage

TABLES = Path(__file__).parent / "price_tables"
NANO = 10**9  # nano-dollars per dollar
_PER_TOKEN = Decimal(NANO) / 10**6  # nano-dollars per token at one dollar per million tokens
_SNAPSHOT = r"(-\d{4}-?\d{2}-?\d{2})?"  # -2025-08-07, -20250807
OLD = datetime.timedelta(days=180)


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens.

    Attributes:
      batch_discount: what a batch is cheaper by: 0.5 is half the price. `discount_cached`: of cached tokens too.
      long_above, long: another price of the whole call from so many prompt tokens on.
      as_of, source: of the table, or "the endpoint's own prices".
    """

    prompt: Decimal
    cached_prompt: Decimal
    completion: Decimal
    batch_discount: Decimal = Decimal(0)
    discount_cached: bool = True
    long_above: int | None = None
    long: "Price | None" = None
    as_of: datetime.date | None = None
    source: str = ""

    @property
    def free(self) -> bool:
        return not (self.prompt or self.cached_prompt or self.completion)

    def warning(self, on: datetime.date) -> str:
        """What a plan should say about the age of this price, "" if nothing."""
        if self.as_of is None or on - self.as_of < OLD:
            return ""
        return (
            f"this price is of {self.as_of} ({self.source}): check it, and give `prompt_price` and "
            "`completion_price` if it changed"
        )


FREE = Price(Decimal(0), Decimal(0), Decimal(0), source="a local model")


def price_of(endpoint: Endpoint | EndpointSpec, on: datetime.date) -> Price | None:
    """The price of an endpoint's model on a day; None if it is not known.

    The endpoint's own prices win; simulated and local models, and cassettes that are replayed, are free; then the
    table. An OpenAI-compatible server that is not OpenAI's is not in the table, whatever its models are called.
    """
    if endpoint.prompt_price is not None and endpoint.completion_price is not None:
        return _own(endpoint)
    if endpoint.provider in ("simulated", "llama_cpp", "checkpoint"):
        return FREE
    if endpoint.cassette and endpoint.cassette_mode == "replay":
        return FREE
    if isinstance(endpoint, Endpoint) and endpoint.identity.startswith(("gguf:", "checkpoint:")):
        return FREE
    host = urlsplit(endpoint.base_url or "").hostname
    for table in _tables():
        if table.provider == endpoint.provider and (host is None or host in table.hosts):
            return table.find(endpoint.model.removeprefix("models/"), on)
    return None


def need_price(endpoint: Endpoint | EndpointSpec, on: datetime.date) -> Price:
    """As `price_of`; for runs with a budget.

    Raises:
      EndpointError: the model has no price.
    """
    price = price_of(endpoint, on)
    if price is None:
        where = endpoint.base_url or endpoint.provider
        raise EndpointError(
            f"no price is known for {endpoint.model!r} at {where}, so no budget can hold. Give the endpoint "
            "`prompt_price` and `completion_price` (US dollars per million tokens; 0 if it costs nothing), and "
            "`cached_prompt_price` and `batch_discount` where they differ"
        )
    return price


def cost(price: Price, usage: Usage, *, batch: bool = False, calls: int = 1) -> int:
    """What a call costs, in nano-dollars, rounded up: exact integers, so that sums do not drift.

    Args:
      calls: of how many calls, alike in length, `usage` is the sum: long ones may have another price.
    """
    long = price.long_above is not None and usage.prompt_tokens > max(1, calls) * price.long_above
    if price.long is not None and long:
        price = price.long
    cached = min(usage.cached_tokens, usage.prompt_tokens)
    factor = 1 - price.batch_discount if batch else Decimal(1)
    dollars = (
        price.prompt * (usage.prompt_tokens - cached) * factor
        + price.cached_prompt * cached * (factor if price.discount_cached else 1)
        + price.completion * usage.completion_tokens * factor
    )
    return int((dollars * _PER_TOKEN).to_integral_value(ROUND_CEILING))


def paid(
    endpoint: Endpoint | EndpointSpec, usage: Usage | None, *, calls: int = 1, on: datetime.date | None = None
) -> float | None:
    """US dollars that usage costs at an endpoint's price on a day (None: this one); None if the price is not known.
    Nothing used costs nothing. `calls`: see `cost`."""
    if usage is None:
        return 0.0
    price = price_of(endpoint, on or datetime.datetime.now(datetime.UTC).date())
    return None if price is None else cost(price, usage, batch=endpoint.batch, calls=calls) / NANO


def most(price: Price, prompt_tokens: int, completion_tokens: int, *, batch: bool = False) -> int:
    """The most that a call of at most so many tokens can cost, in nano-dollars: to be reserved before it is made."""
    usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
    dearest = replace(price, cached_prompt=price.prompt)
    return max(cost(dearest, usage, batch=batch), cost(price, usage, batch=batch))


def dollars(nano: int) -> str:
    """ "1.2345 USD" of nano-dollars, for people."""
    return f"{Decimal(nano) / NANO:.4f} USD"


def _own(endpoint: Endpoint | EndpointSpec) -> Price:
    prompt = Decimal(str(endpoint.prompt_price))
    cached = endpoint.cached_prompt_price
    return Price(
        prompt=prompt,
        cached_prompt=prompt if cached is None else Decimal(str(cached)),
        completion=Decimal(str(endpoint.completion_price)),
        batch_discount=Decimal(str(endpoint.batch_discount or 0)),
        source="the endpoint's own prices",
    )


@dataclass(frozen=True)
class _Table:
    provider: str
    hosts: tuple[str, ...]
    rows: tuple[tuple[re.Pattern[str], datetime.date | None, Price], ...]

    def find(self, model: str, on: datetime.date) -> Price | None:
        """The price of the first pattern that fits; of several with dates the newest that has begun."""
        fitting = [row for row in self.rows if row[0].fullmatch(model)]
        if not fitting:
            return None
        same = [row for row in fitting if row[0].pattern == fitting[0][0].pattern]
        begun = [row for row in same if row[1] is None or row[1] <= on]
        return (begun[-1] if begun else same[0])[2]


@functools.cache
def _tables() -> tuple[_Table, ...]:
    return tuple(read_table(path) for path in sorted(TABLES.glob("*.yaml")))


def read_table(path: Path) -> _Table:
    """A table of prices; rows of one model stand in the order of their dates."""
    data = yaml.safe_load(path.read_text("utf-8"))
    shared = {
        "batch_discount": Decimal(str(data["batch_discount"])),
        "discount_cached": data.get("discount_cached", True),
        "as_of": data["as_of"],
        "source": data["source"],
    }
    rows = []
    for row in data["models"]:
        price = _price(row, shared)
        if "long" in row:
            price = replace(price, long_above=row["long"]["above"], long=_price(row["long"], shared))
        # A dot in a name is a dot.
        pattern = re.compile(str(row["match"]).replace(".", r"\.") + _SNAPSHOT)
        rows.append((pattern, row.get("from"), price))
    return _Table(data["provider"], tuple(data["hosts"]), tuple(rows))


def _price(row: dict[str, Any], shared: dict[str, Any]) -> Price:
    def number(name: str, default: Any = None) -> Decimal:
        return Decimal(str(row.get(name, default)))

    return Price(
        prompt=number("prompt"),
        cached_prompt=number("cached_prompt", row["prompt"]),
        completion=number("completion"),
        **shared,
    )
