"""Error budgets in exact arithmetic: nothing is rounded before it is compared."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from fractions import Fraction


def budget_allows(total: int, target: Decimal) -> int:
    """Return how many of ``total`` events may be bad: floor(n (1 - target))."""
    return int(total * (1 - Fraction(target)))


def budget_remaining(bad: int | Fraction, total: int, target: Decimal) -> Fraction:
    """Return the unspent share, 1 - bad / (n (1 - target)): negative when overspent, 1 when nothing counted."""
    if total == 0:
        return Fraction(1)
    return 1 - bad / (total * (1 - Fraction(target)))


def burn_rate(bad: int | Fraction, total: int, target: Decimal) -> Fraction | None:
    """Return the error rate by the rate that the target allows: 1 spends the budget just by the window's end.

    At most 1 / (1 - target); None when nothing counted.
    """
    return Fraction(bad) / total / (1 - Fraction(target)) if total else None


def budget_time(window: timedelta, total: int, target: Decimal) -> timedelta | None:
    """Return for how long everything may fail in a window, at its average rate: window x (1 - target).

    None where one bad event is more than the budget: then no length of time says anything.
    """
    share = 1 - Fraction(target)
    if total * share < 1:
        return None
    return timedelta(microseconds=int(window // timedelta(microseconds=1) * share))
