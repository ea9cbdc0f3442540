"""Time slices: OpenSLO's budgeting methods that judge how good each piece of a window was, not each event.

A slice is judged once it is over. One in which nothing was counted tells nothing, and is not counted: a cluster
that rests is neither good nor bad.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction

from gradwatch_slo.counts import Counts, Group


@dataclass(frozen=True, slots=True)
class Slicing:
    """Slices of a fixed ``length``, one after the other from the start of the calendar, else from 1970 in UTC.

    ``target``: the share of good events at which a slice is good (``Timeslices``); None (``RatioTimeslices``)
    if it is as good as its share.
    """

    length: timedelta
    target: Decimal | None = None


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


def whole(start: int, end: int, origin: int, length: int) -> tuple[int, int]:
    """Return the number of the first slice within [start, end), and of the one after the last."""
    first = -(-(start - origin) // length)
    return first, max(first, (end - origin) // length)
