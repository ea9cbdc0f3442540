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
LARGEST: Final = 1e100
# So that the median of second differences of a normal distribution tells its standard deviation.
_PER_BEND: Final = 1.4826 / 6**0.5


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
    edges = np.searchsorted(groups, np.arange(int(total // size) + 1))
    rows = _rows(means, edges)
    known = np.isfinite(rows[:, 0]) if rows.size else np.zeros(0, bool)
    rows, ends = rows[known], edges[1:][known] - 1
    bends = np.abs(np.diff(rows, 2, axis=1))
    return Levels(told[ends], times[ends], _medians(rows), np.nan_to_num(_PER_BEND * _medians(bends), nan=0.0))


def _rows(values: Doubles, edges: npt.NDArray[np.int64]) -> Doubles:
    """Return the finite values between each two edges as a row, in their order, filled up with NaN."""
    lengths = np.diff(edges)
    inside = np.arange(np.max(lengths, initial=0)) < lengths[:, np.newaxis]
    rows = np.full(inside.shape, np.nan)
    rows[inside] = np.clip(values[edges[0] : edges[-1]], -LARGEST, LARGEST)
    rows[inside] = np.where(np.isfinite(values[edges[0] : edges[-1]]), rows[inside], np.nan)
    order = np.argsort(np.isnan(rows), axis=1, kind="stable")
    return np.take_along_axis(rows, order, axis=1)


def _medians(rows: Doubles) -> Doubles:
    """Return the median of what is not NaN in each row; NaN where there is nothing."""
    if not rows.shape[1]:
        return np.full(len(rows), np.nan)
    ordered = np.sort(rows, axis=1)
    count = np.sum(~np.isnan(rows), axis=1)
    low, high = np.maximum((count - 1) // 2, 0), np.minimum(count // 2, rows.shape[1] - 1)
    each = np.arange(len(rows))
    middle: Doubles = (ordered[each, low] + ordered[each, high]) / 2
    return middle


def finite(values: npt.ArrayLike) -> Doubles:
    """Return the finite values, none larger than what can be reckoned with."""
    numbers = np.asarray(values, np.float64)
    return np.clip(numbers[np.isfinite(numbers)], -LARGEST, LARGEST)


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
    return float(_PER_BEND * np.median(np.abs(bends))) if len(bends) else 0.0


def rounded(value: float) -> float | None:
    """Return a number for evidence, of four digits; None where it is not finite."""
    return float(f"{value:.4g}") if np.isfinite(value) else None
