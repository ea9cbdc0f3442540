"""Time slices: OpenSLO's budgeting methods that judge how good each piece of a window was, not each event.

A slice is judged once it is over. One in which nothing was counted tells nothing, and is not counted: a cluster
that rests is neither good nor bad.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from math import gcd
from typing import Final

from gradwatch_slo.counts import Counts, Group, Lost
from gradwatch_slo.durations import Duration
from gradwatch_slo.windows import TimeWindow, Window

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_MONTH: Final = Duration(1, "M")


@dataclass(frozen=True, slots=True)
class Slicing:
    """Slices of a ``length``, one after the other: from the start of a calendar window, else from 1970 in UTC.

    ``target``: the share of good events at which a slice is good (``Timeslices``); None (``RatioTimeslices``)
    if it is as good as its share.
    """

    length: Duration
    target: Decimal | None = None

    @property
    def is_in_part(self) -> bool:
        """Whether a slice may be bad in part."""
        return self.target is None

    def is_bad(self, counts: Counts) -> bool:
        """Whether a slice of these is bad, at least in part."""
        if self.target is None:
            return counts.bad > 0
        share, whole = self.target.as_integer_ratio()
        return counts.good * whole < counts.total * share


def edges(slicing: Slicing, rule: TimeWindow, window: Window, end: datetime) -> Sequence[int]:
    """Return where the slices within a window and before ``end`` begin, in order, and where the last one ends.

    In Unix nanoseconds. Days and longer ones of a calendar are those of its time zone; the others are evenly
    spaced, and a ``range``, as minutes of years are millions.
    """
    start, last, length = _nanoseconds(window.start - _EPOCH), _nanoseconds(end - _EPOCH), slicing.length
    if rule.calendar_start is None or length.is_exact:
        step = _nanoseconds(length.nominal)
        return range(-(-start // step) * step if window.rolling else start, last + 1, step)
    number = rule.number_at(window.start)
    first, unit, ahead, each = rule.start(number).astimezone(rule.zone), length, 0, 1
    if length.months and rule.duration.months:
        # A quarter from the 31st may begin on a 30th, but its other months begin on the 31st.
        first, unit, ahead, each = rule.start(0), _MONTH, number * rule.duration.months, length.months
    found = [start]
    while (edge := _nanoseconds(unit.shift(first, ahead + len(found) * each) - _EPOCH)) <= last:
        found.append(edge)
    return found


def _nanoseconds(length: timedelta) -> int:
    return length // _MICROSECOND * 1000


def step_of(slices: Sequence[int]) -> int:
    """Return the longest step that these slices are made of: of days an hour, where clocks change by one."""
    return slices.step if isinstance(slices, range) else gcd(*(end - start for start, end in pairwise(slices)))


def by_slice(
    counts: Mapping[tuple[int, Group], Counts], step: int, slices: Sequence[int]
) -> dict[tuple[int, Group], Counts]:
    """Return counts by slice, given those by the steps that the slices between these edges are made of."""
    if isinstance(slices, range):
        return dict(counts)
    found: defaultdict[tuple[int, Group], Counts] = defaultdict(Counts)
    for (number, group), each in counts.items():
        found[bisect_right(slices, slices[0] + number * step) - 1, group] += each
    return dict(found)


def judged(
    slicing: Slicing, counts: Mapping[tuple[int, Group], Counts]
) -> tuple[dict[Group, Counts], dict[Group, Lost]]:
    """Return what was counted by slice as `reports_of` takes it, by group.

    That is good and bad slices (``Timeslices``), or the events of all slices and how bad these were in all.
    """
    if slicing.target is None:
        return _in_part(counts)
    slices: Counter[Group] = Counter()
    bad: Counter[Group] = Counter()
    for (_, group), counted in counts.items():
        slices[group] += 1
        bad[group] += slicing.is_bad(counted)
    return {group: Counts(total - bad[group], bad[group]) for group, total in slices.items()}, {}


def _in_part(counts: Mapping[tuple[int, Group], Counts]) -> tuple[dict[Group, Counts], dict[Group, Lost]]:
    events: defaultdict[Group, Counts] = defaultdict(Counts)
    slices: Counter[Group] = Counter()
    # Sums of fractions are slow, and most slices have few events.
    bad_by_total: defaultdict[Group, Counter[int]] = defaultdict(Counter)
    for (_, group), counted in counts.items():
        events[group] += counted
        slices[group] += 1
        bad_by_total[group][counted.total] += counted.bad
    lost = {
        group: sum((Fraction(bad, total) for total, bad in by_total.items()), Fraction())
        for group, by_total in bad_by_total.items()
    }
    return dict(events), {group: (each, slices[group]) for group, each in lost.items()}
