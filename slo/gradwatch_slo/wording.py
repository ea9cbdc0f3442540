"""Shares, changes and lengths of time as people read them. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta, tzinfo
from decimal import Decimal
from fractions import Fraction

from gradwatch_slo.problems import printable


def percent(share: Fraction, *others: Fraction) -> str:
    """Return a share with at most two decimals, cut and not rounded: 99.996 % must not read as 100 %.

    There are more where it would else read as one of ``others`` that it is not.
    """
    return _percent(share, others, 2, math.floor)


def budget_percent(share: Fraction, *others: Fraction) -> str:
    """Return what is left of a budget, rounded to whole per cents; unspent and spent only if it is.

    There are decimals where it would else read as one of ``others`` that it is not.
    """
    return _percent(share, (Fraction(0), Fraction(1), *others), 0, round)


def sli_percent(share: Fraction, target: Decimal, *others: Fraction) -> str:
    """Return the share of good events beside its target; it reads as the target, or as none, only if it is."""
    return percent(share, Fraction(0), Fraction(target), *others)


def points(change: Fraction) -> str:
    """Return by how many percentage points a share changed, without the sign; cut and not rounded."""
    cut = Decimal(int(abs(change) * 10_000)) / 100
    if change and not cut:
        return "less than 0.01 points"
    return f"{cut:f} point{'' if cut == 1 else 's'}"


def target_percent(target: Decimal) -> str:
    """Return a target as it was written, in per cent."""
    return f"{(target * 100).normalize():f} %"


def whole_percent(share: float) -> str:
    """Return a share without decimals; never as -0 %."""
    return f"{round(share * 100)} %"


def length(time: timedelta) -> str:
    """Return a length of time: ``42 s``, ``3m07s``, ``26h00m``."""
    seconds = time // timedelta(seconds=1)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def minute(at: datetime, zone: tzinfo) -> str:
    """Return a moment to the minute, as clocks of a time zone show it: ``2026-10-05 12:00``."""
    return f"{at.astimezone(zone):%Y-%m-%d %H:%M}"


def group(values: Mapping[str, str | None]) -> str:
    """Return ``tier=production, team=vision``, or ``all`` where nothing is grouped."""
    return ", ".join(f"{name}={printable(value or 'unknown')}" for name, value in values.items()) or "all"


def amount(count: int | Fraction, *others: int | Fraction) -> str:
    """Return a count with four decimals at most, cut and not rounded: ``3``, ``0.9333``.

    There are more where it would else read as one of ``others`` that it is not, or as none.
    """
    return _apart(Fraction(count), [Fraction(other) for other in (0, *others)], 4, math.floor)


def counted(count: int | Fraction, what: str) -> str:
    """Return ``1 run``, ``3 runs``."""
    return f"{amount(count)} {what}{'' if count == 1 else 's'}"


def _apart(value: Fraction, others: Iterable[Fraction], places: int, whole: Callable[[Fraction], int]) -> str:
    """Return a number with so many decimals, or as many as it takes not to read as one that it is not."""
    told = whole(value * 10**places)
    if any(whole(other * 10**places) == told for other in others if other != value):
        return _apart(value, others, places + 1, whole)
    digits = f"{Decimal(f'{told}E-{places}'):f}"
    return digits.rstrip("0").rstrip(".") if places else digits


def _percent(share: Fraction, others: Iterable[Fraction], places: int, whole: Callable[[Fraction], int]) -> str:
    return f"{_apart(100 * share, [100 * other for other in others], places, whole)} %"
