"""Numbers and times beside each other, with as many digits as tell them apart. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from gradwatch_collector.reports import wording

# Those that a double is made of.
_MOST_DIGITS: Final = 17
_LONG: Final = 1e6
# Up to how many seconds a unit is of use, and how many of it a second has.
_UNITS: Final = ((0.001, 1e6, "µs"), (0.1, 1e3, "ms"), (math.inf, 1.0, "s"))


def numbers(values: Sequence[float]) -> list[str]:
    """Return them as `wording.number` does, with more digits where those that differ would look alike."""
    told = list(map(wording.number, values))
    return told if _are_apart(told, values) else _with_digits(values)


def durations(seconds: Sequence[float]) -> list[str]:
    """Return them as `wording.duration` does; where those that differ would look alike, all in one unit."""
    told = list(map(wording.duration, seconds))
    if _are_apart(told, seconds):
        return told
    greatest = max(map(abs, seconds))
    many, unit = next((many, unit) for below, many, unit in _UNITS if greatest < below)
    return [f"{each} {unit}" for each in _with_digits([each * many for each in seconds])]


def _are_apart(told: Sequence[str], values: Sequence[float]) -> bool:
    return len(set(told)) >= len(set(values)) or not all(map(math.isfinite, values))


def _with_digits(values: Sequence[float]) -> list[str]:
    different = sorted(set(values))
    # Rounding moves none by more than a fiftieth of the least step between two.
    most = min(after - before for before, after in pairwise(different)) / 50
    greatest = max(map(abs, different))
    # 7200 must not become 7.2e+03.
    digits = len(str(int(greatest))) if greatest < _LONG else 1
    while digits < _MOST_DIGITS and any(abs(float(f"{each:.{digits}g}") - each) > most for each in different):
        digits += 1
    return [f"{each:#.{digits}g}".rstrip(".") for each in values]
