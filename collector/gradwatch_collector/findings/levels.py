"""Levels of a noisy number over its steps, by medians: what rules tell a change from chance by."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from gradwatch_collector.findings.run_view import Course, Doubles, Levels
from gradwatch_collector.records import Times

# Chance in a median of so many is a fifth of that in one value.
LEAST: Final = 20
# Beyond it squares and sums overflow, and it is as bad as any number can be.
_LARGEST: Final = 1e100
# So that of a normal distribution it is the standard deviation.
_MAD: Final = 1.4826


def levels(course: Course) -> Levels:
    """Return the levels of all of a number's values."""
    return levels_of(course.times, course.mean, course.finite + course.nonfinite)


def levels_of(times: Times, means: Doubles, counts: Doubles) -> Levels:
    """Return levels of at most 256 groups, by means of so many values each: of at least 20 values a group.

    What is left at the end, of fewer, is in none; nor is a group without a finite value.
    """
    told = np.cumsum(counts)
    total = told[-1] if len(told) else 0.0
    size = max(LEAST, total / 256)
    groups = ((told - 1) // size).astype(np.int64)
    places, values, noises = list[int](), list[float](), list[float]()
    for group in range(int(total // size)):
        part = slice(*map(int, np.searchsorted(groups, (group, group + 1))))
        known = finite(means[part])
        if len(known):
            places.append(part.stop - 1)
            values.append(float(np.median(known)))
            noises.append(noise(known))
    return Levels(told[places], times[places], np.array(values), np.array(noises))


def finite(values: npt.ArrayLike) -> Doubles:
    """Return the finite values, none larger than what can be reckoned with."""
    numbers = np.asarray(values, np.float64)
    return np.clip(numbers[np.isfinite(numbers)], -_LARGEST, _LARGEST)


def median(values: npt.ArrayLike) -> float:
    """Return the median of the finite values, NaN where there is none."""
    known = finite(values)
    return float(np.median(known)) if len(known) else float("nan")


def sliding_medians(values: Doubles) -> Doubles:
    """Return the median of each 20 finite values in a row, shape ``[n - 19]``."""
    if len(values) < LEAST:
        return np.empty(0)
    medians: Doubles = np.median(np.lib.stride_tricks.sliding_window_view(values, LEAST), axis=1)
    return medians


def noise(values: npt.ArrayLike) -> float:
    """Return the standard deviation that values have by chance; 0.0 of fewer than three.

    By how their changes change, so that a trend counts for nothing.
    """
    bends = np.diff(finite(values), 2)
    return float(_MAD * np.median(np.abs(bends)) / np.sqrt(6)) if len(bends) else 0.0


def rounded(value: float) -> float | None:
    """Return a number for evidence, of four digits; None where it is not finite."""
    return float(f"{value:.4g}") if np.isfinite(value) else None
