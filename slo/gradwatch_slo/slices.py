"""Time slices: OpenSLO's budgeting methods that judge how good each piece of a window was, not each event.

A slice is judged once it is over. One in which nothing was counted tells nothing, and is not counted: a cluster
that rests is neither good nor bad.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Final

from gradwatch_slo.counts import Counts, Group
from gradwatch_slo.durations import Duration
from gradwatch_slo.windows import TimeWindow, Window

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Slicing:
    """Slices of a ``length``, one after the other: from the start of a calendar window, else from 1970 in UTC.

    ``target``: the share of good events at which a slice is good (``Timeslices``); None (``RatioTimeslices``)
    if it is as good as its share.
    """

    length: Duration
    target: Decimal | None = None


def edges(slicing: Slicing, rule: TimeWindow, window: Window, end: datetime) -> list[datetime]:
    """Return where the slices within a window and before ``end`` begin, in order, and where the last one ends.

    Days and longer ones of a calendar are those of its time zone.
    """
    if rule.calendar_start is None:
        length = slicing.length.nominal
        first = _EPOCH - (_EPOCH - window.start) // length * length
        found = [first + length * number for number in range(max(0, (end - first) // length) + 1)]
    else:
        zone = UTC if slicing.length.is_exact else rule.zone
        start, found = window.start.astimezone(zone), [window.start]
        while (following := slicing.length.shift(start, len(found)).astimezone(UTC)) <= end:
            found.append(following)
    return found


def by_slice(
    counts: Mapping[tuple[int, Group], Counts], begins: datetime, step: timedelta, slices: Sequence[datetime]
) -> dict[tuple[int, Group], Counts]:
    """Return counts by slice, given those by steps from ``begins`` on that the slices are made of."""
    found: defaultdict[tuple[int, Group], Counts] = defaultdict(Counts)
    for (number, group), each in counts.items():
        place = bisect_right(slices, begins + number * step) - 1
        if 0 <= place < len(slices) - 1:
            found[place, group] += each
    return dict(found)


def judged(
    slicing: Slicing, counts: Mapping[tuple[int, Group], Counts]
) -> tuple[dict[Group, Counts], dict[Group, Fraction]]:
    """Return good and bad slices by group, and how bad they were in all, exactly; given counts by slice."""
    lost: dict[Group, Fraction] = {}
    total: dict[Group, int] = {}
    for (_, group), counted in counts.items():
        lost[group] = lost.get(group, Fraction(0)) + _lost(slicing, counted)
        total[group] = total.get(group, 0) + 1
    return {group: Counts(total[group] - int(each), int(each)) for group, each in lost.items()}, lost


def _lost(slicing: Slicing, counts: Counts) -> Fraction:
    bad = Fraction(counts.bad, counts.total)
    if slicing.target is None:
        return bad
    return Fraction(1 - bad < Fraction(slicing.target))
