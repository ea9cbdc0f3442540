"""What several rules work out of a run's numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import LARGEST, median
from gradwatch_collector.findings.run_view import Number, Recent, RunView

SECOND: Final = 1_000_000_000
# The agent's default, and what is believed of other senders.
_EXPORT_SECONDS: Final = 5.0
_LEAST_EXPORT: Final = 0.2
_LONGEST_EXPORT: Final = 120.0


def finite(recent: Recent) -> Recent:
    """Return those of the newest values that are numbers, none larger than what can be reckoned with."""
    good = np.isfinite(recent.values)
    return Recent(recent.times[good], np.clip(recent.values[good], -LARGEST, LARGEST))


def newest(number: Number | None) -> float | None:
    """Return the last value that is a number."""
    if number is None:
        return None
    known = finite(number.recent)
    return float(known.values[-1]) if len(known) else None


def between(recent: Recent, after: int, until: int) -> Recent:
    """Return the values of after a time up to another, in Unix nanoseconds."""
    start, end = np.searchsorted(recent.times, (after, until), side="right")
    return Recent(recent.times[start:end], recent.values[start:end])


def total(number: Number, after: int, until: int) -> tuple[float, float]:
    """Return sum and number of the finite values of after a time up to another, in Unix nanoseconds.

    As they were sent, where that is still known; else by the course of all, in which a stretch that reaches
    beyond the window counts by its share of the time.
    """
    recent = number.recent
    if len(recent) and (recent.times[0] <= after or number.course.width == 1):
        values = finite(between(recent, after, until)).values
        return float(np.sum(values)), float(len(values))
    course = number.course
    if not len(course):
        return 0.0, 0.0
    sums = np.where(course.finite > 0, np.clip(course.mean, -LARGEST, LARGEST) * course.finite, 0.0)
    sums[~np.isfinite(sums)] = 0.0
    edges = np.array([after, until], np.float64)
    times = course.times.astype(np.float64)
    summed, counted = (np.diff(np.interp(edges, times, np.cumsum(each))) for each in (sums, course.finite))
    return float(summed[0]), float(counted[0])


def by_rank(numbers: Iterable[Number]) -> dict[int, Number]:
    """Return the first number of each rank."""
    found: dict[int, Number] = {}
    for number in numbers:
        found.setdefault(number.rank, number)
    return found


def export_seconds(view: RunView) -> float:
    """Return how long an export interval is: by the newest numbers that are told once in each."""
    once = view.first(c.PROCESS_MEMORY) or view.first(c.DEVICE_MEMORY_HEADROOM)
    if once is None or len(once.recent) < 3:
        return _EXPORT_SECONDS
    # The last export of a process comes early.
    return min(max(median(np.diff(once.recent.times[-9:])) / SECOND, _LEAST_EXPORT), _LONGEST_EXPORT)


def step_ends(view: RunView) -> Mapping[int, int]:
    """Return when the newest step of each rank ended, by its own clock, in Unix nanoseconds."""
    return {
        rank: int(number.recent.times[-1])
        for rank, number in by_rank(view.every(c.STEP_INDEX)).items()
        if len(number.recent)
    }
