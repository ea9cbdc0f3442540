"""Arithmetic with measured numbers: 0.8 less 0.7 is 0.1, and not 0.10000000000000009.

Bounds of objectives are decimals, and a value that is just at one must not fall to either side of it by how
binary fractions are rounded. So numbers are taken as they are written, the shortest decimals that are read as
them; and since those have 16 digits, and thirds need more, what comes of two is known to twelve.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from typing import Final

_GREATEST: Final = Fraction(sys.float_info.max)
_DIGITS: Final = 12


def written(value: float) -> Fraction:
    """Return a finite number as the shortest decimal that is read as it."""
    return Fraction(repr(float(value)))


def rounded(value: Fraction) -> float:
    """Return the nearest float; of what is beyond all of them the last."""
    return float(max(-_GREATEST, min(_GREATEST, value)))


def difference(value: float, other: float) -> float:
    """Return by how much the first is more, to twelve digits of the larger of them."""
    one, two = written(value), written(other)
    return rounded(_to(one - two, place(one, two)))


def ratio(value: float, other: float) -> float:
    """Return the first by the second, which is not 0, to twelve digits."""
    exact = written(value) / written(other)
    return rounded(_to(exact, place(exact)))


def place(*values: Fraction) -> Fraction:
    """Return what the twelfth digit of the largest of these counts, or a tenth of that; 0 of zeros."""
    largest = max(map(abs, values))
    digits = len(str(largest.numerator)) - len(str(largest.denominator))
    return Fraction(10) ** (digits - _DIGITS) if largest else Fraction(0)


def _to(value: Fraction, unit: Fraction) -> Fraction:
    return round(value / unit) * unit if unit else value


def median(values: Iterable[float]) -> float:
    """Return the median; there must be one. Of two in the middle it is the mean."""
    return rounded(statistics.median(map(written, values)))


def mean(values: Iterable[tuple[float, int]]) -> float:
    """Return the mean of values that are each there so often; there must be one."""
    counts: Counter[float] = Counter()
    for value, count in values:
        counts[value] += count
    total = sum((written(value) * count for value, count in counts.items()), Fraction()) / counts.total()
    return rounded(_to(total, place(total)))
