"""Amounts of US dollars as people write them, in whole nano-dollars."""

import re
from decimal import Decimal, InvalidOperation

from laif_jax.records.errors import LaifError

NANOS = 10**9  # per dollar
MOST = 10**9  # dollars of one amount: sums of such amounts in nano-dollars are still integers of 64 bits
_MONEY = re.compile(r"^\s*(?:\$|usd)?\s*(\d[\d_]*(?:\.\d+)?)\s*(?:usd|\$|dollars?)?\s*$", re.IGNORECASE)


class BudgetError(LaifError, ValueError):
    """An amount of money that cannot be read."""


def parse_money(value: str) -> int:
    """Nano-dollars of "25USD", "$0.50", "1200" (dollars); fractions below a nano-dollar are cut off.

    Raises:
      BudgetError: anything else, or more than a billion.
    """
    match = _MONEY.match(value)
    try:
        dollars = Decimal((match.group(1) if match else "").replace("_", ""))
    except InvalidOperation as error:
        raise BudgetError(
            f"{value[:100]!r} is no amount of US dollars; write for example 25USD or 0.50USD"
        ) from error
    if dollars > MOST:
        raise BudgetError(f"{value[:100]!r} is more than ${MOST:,}; without a cap, leave the budget out")
    return int(dollars * NANOS)


def show_money(nanos: int | None) -> str:
    """Dollars, with the digits that matter: $25.00, $0.0031."""
    if nanos is None:
        return "unknown"
    dollars = Decimal(nanos) / NANOS
    digits = 2 if nanos == 0 or abs(dollars) >= 1 else 4 if abs(dollars) >= Decimal("0.001") else 9
    shown = f"${dollars:,.{digits}f}"
    return shown.rstrip("0") if digits == 9 else shown
