"""Arithmetic with numbers as they are written: 0.8 less 0.7 is 0.1, and not 0.10000000000000009.

Bounds of objectives are decimals, and a value that is exactly at one must not fall to either side of it by how
binary fractions are rounded.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from typing import Final

_GREATEST: Final = Fraction(sys.float_info.max)


def written(value: float) -> Fraction:
    """Return a finite number as the shortest decimal that is read as it."""
    return Fraction(repr(float(value)))


def rounded(value: Fraction) -> float:
    """Return the nearest float; of what is beyond all of them the last."""
    return float(max(-_GREATEST, min(_GREATEST, value)))


def median(values: Iterable[float]) -> float:
    """Return the median; there must be one. Of two in the middle it is the mean."""
    return rounded(statistics.median(map(written, values)))


def mean(values: Iterable[tuple[float, int]]) -> float:
    """Return the mean of values that are each there so often; there must be one."""
    counts: Counter[float] = Counter()
    for value, count in values:
        counts[value] += count
    total = sum((written(value) * count for value, count in counts.items()), Fraction())
    return rounded(total / counts.total())
