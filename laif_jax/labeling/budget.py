"""Money: whole nano-dollars everywhere, reserved before a call and settled after it.

The rule that keeps a cap hard: `spent + presumed + reserved <= cap` holds after every reservation, a reservation is an
upper bound of what its call can cost, and no call is sent before its reservation is committed. A call that gave no
answer we have (time-out, cut body, killed worker) may still be on the bill: its reservation becomes `presumed`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from laif_jax.config.money import NANOS, BudgetError, parse_money, show_money
from laif_jax.labeling.calls import Call
from laif_jax.labeling.schema import budgets

__all__ = [
    "NANOS",
    "SERVICE",
    "UNLIMITED",
    "Account",
    "BudgetError",
    "longest_completion",
    "most_completion",
    "most_tokens",
    "parse_money",
    "show_money",
]
SERVICE = "service"
UNLIMITED = 32_768  # tokens that are reserved for a completion whose request names no limit


def most_tokens(messages: Iterable[dict[str, str]]) -> int:
    """An upper bound of the prompt's tokens: no tokeniser makes more tokens than bytes, plus what frames a message."""
    return 16 + sum(16 + len(message["content"].encode("utf-8", "surrogatepass")) for message in messages)


_COMPLETION = ("max_tokens", "max_completion_tokens", "max_output_tokens", "maxOutputTokens")


def longest_completion(fields: Mapping[str, Any]) -> int:
    """The largest limit of a completion's tokens among a request's fields."""
    return max((fields[name] for name in _COMPLETION if isinstance(fields.get(name), int)), default=UNLIMITED)


def most_completion(call: Call) -> int:
    """An upper bound of the completion's tokens: the largest limit in the request, times its samples."""
    said = {**call.params, **call.endpoint.options}
    return longest_completion(said) * int(said.get("n") or 1)


@dataclass(frozen=True, slots=True)
class Account:
    """One scope's money, in nano-dollars. `cap`: None: no cap."""

    scope: str
    cap: int | None
    spent: int
    presumed: int
    reserved: int

    @property
    def room(self) -> int | None:
        """What can still be reserved; None: without limit."""
        return None if self.cap is None else self.cap - self.spent - self.presumed - self.reserved


@dataclass(slots=True)
class Change:
    """What a group of commits adds to one scope."""

    spent: int = 0
    presumed: int = 0
    reserved: int = 0

    def add(self, spent: int = 0, presumed: int = 0, reserved: int = 0) -> None:
        self.spent += spent
        self.presumed += presumed
        self.reserved += reserved


def ensure(connection: Connection, scopes: Sequence[str]) -> None:
    """Makes the rows of these scopes."""
    known = set(connection.execute(sa.select(budgets.c.scope).where(budgets.c.scope.in_(scopes))).scalars())
    for scope in sorted(set(scopes) - known):
        if connection.dialect.name == "sqlite":
            connection.execute(sa.insert(budgets).values(scope=scope).prefix_with("OR IGNORE"))
        else:
            connection.exec_driver_sql(
                "INSERT INTO budgets (scope) VALUES (%s) ON CONFLICT DO NOTHING", (scope,)
            )


def accounts(
    connection: Connection, scopes: Sequence[str] | None = None, *, lock: bool = False
) -> dict[str, Account]:
    """The scopes' money; with `lock` nobody else changes it before this transaction ends (PostgreSQL: row locks)."""
    columns = (budgets.c.scope, budgets.c.cap, budgets.c.spent, budgets.c.presumed, budgets.c.reserved)
    query = sa.select(*columns).order_by(budgets.c.scope)
    if scopes is not None:
        query = query.where(budgets.c.scope.in_(scopes))
    if lock:
        query = query.with_for_update()
    return {row[0]: Account(*row) for row in connection.execute(query)}


def set_cap(connection: Connection, scope: str, cap: int | None) -> None:
    """Sets, raises or lifts a cap."""
    ensure(connection, [scope])
    connection.execute(sa.update(budgets).where(budgets.c.scope == scope).values(cap=cap))


def apply(connection: Connection, changes: dict[str, Change]) -> None:
    """Adds the changes to their scopes, in one order for all workers (so that they never wait in a circle)."""
    if not changes:
        return
    ensure(connection, list(changes))
    for scope in sorted(changes):
        change = changes[scope]
        connection.execute(
            sa.update(budgets)
            .where(budgets.c.scope == scope)
            .values(
                spent=budgets.c.spent + change.spent,
                presumed=budgets.c.presumed + change.presumed,
                reserved=budgets.c.reserved + change.reserved,
            )
        )


def affordable(rooms: Iterable[int | None], costs: Sequence[int]) -> list[bool]:
    """Which of `costs`, taken in order, fit into all rooms together; one that does not fit leaves room for the next."""
    limits = [room for room in rooms if room is not None]
    left = min(limits) if limits else None
    granted = []
    for cost in costs:
        fits = left is None or cost <= left
        granted.append(fits)
        if fits and left is not None:
            left -= cost
    return granted
