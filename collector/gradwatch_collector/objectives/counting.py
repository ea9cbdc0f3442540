"""Counting over a stretch of time: whole hours from what is kept, the rest from the runs themselves.

What is kept (`counters.py`) never decides what comes out: hours that are not complete, that have changed since,
or were never counted are read from the runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Select, and_, func, or_, select

from gradwatch_collector.objectives.changes import HOUR, load_changed
from gradwatch_collector.objectives.exclusions import load_periods
from gradwatch_collector.objectives.indicator import Indicator, key
from gradwatch_collector.objectives.judging import (
    Judgement,
    Pinned,
    judge_ended,
    judge_open,
    not_excluded,
    selected,
    source_of,
)
from gradwatch_collector.objectives.pinned import load_pinned
from gradwatch_collector.storage import schema
from gradwatch_slo.counts import Counts, Group
from gradwatch_slo.indicators import Measure

# More stretches than this make one: a statement has its limits, and the runs between are soon read.
_MOST_STRETCHES: Final = 100
# Read in some ten milliseconds.
_FEW_RUNS: Final = 20_000

_run, _count = schema.run.c, schema.slo_count.c
Stretch = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Kept:
    """An indicator's row: hours from ``counted_from`` up to and without ``counted_to`` were counted."""

    indicator_id: int
    counted_from: int
    counted_to: int


@dataclass(frozen=True, slots=True)
class _Parts:
    """A stretch of time: kept ``hours`` of an indicator, and ``raw`` stretches in Unix nanoseconds."""

    indicator_id: int | None = None
    hours: Sequence[Stretch] = ()
    raw: Sequence[Stretch] = ()


class Tallies:
    """What there is to count in one transaction.

    Args:
        connection: Only read; best of one moment
            (:func:`~gradwatch_collector.storage.database.of_one_moment`).
        conditions: Only runs that meet all of these (over ``schema.run``) count.
    """

    def __init__(self, connection: Connection, *conditions: ColumnElement[bool]) -> None:
        self._connection = connection
        # Before the counts and the runs: what changes meanwhile is then read as it was or as it is.
        self._changed = load_changed(connection)
        # Of some runs only there is nothing kept.
        self._kept = {} if conditions else load_kept(connection)
        self._pinned: dict[Measure, Pinned | None] = {}
        self._conditions = (not_excluded(load_periods(connection)), *conditions)

    def over(self, indicator: Indicator, start: int, end: int) -> dict[Group, Counts]:
        """Count the runs that ended from ``start`` (inclusive) to ``end`` (exclusive), Unix nanoseconds."""
        parts = self._parts(indicator, start, end)
        found: defaultdict[Group, Counts] = defaultdict(Counts)
        for group, counts in (*self._of_hours(indicator, parts), *self._of_runs(indicator, parts.raw)):
            found[tuple(group)] += counts
        return dict(found)

    def by_period(
        self, indicator: Indicator, origin: int, length: int, periods: Stretch
    ) -> dict[tuple[int, Group], Counts]:
        """Count the runs that ended in each of some periods, numbered from ``origin`` on; Unix nanoseconds.

        ``periods``: the first, and the one after the last. What counts nothing is not there.
        """
        start, end = (origin + number * length for number in periods)
        by_hours = origin % HOUR == 0 and length % HOUR == 0
        parts = self._parts(indicator, start, end) if by_hours else _Parts(raw=((start, end),))
        hours = ((_count.hour * HOUR - origin) // length).label("period")
        runs = ((_run.ended_at - origin) // length).label("period")
        found: defaultdict[tuple[int, Group], Counts] = defaultdict(Counts)
        for (period, *group), counts in (
            *self._of_hours(indicator, parts, hours),
            *self._of_runs(indicator, parts.raw, runs),
        ):
            found[period, tuple(group)] += counts
        return dict(found)

    def is_quick(self, indicator: Indicator, start: int, end: int) -> bool:
        """Return whether `over` has few runs to read: most is kept, or there are not many."""
        kept = self._kept.get(self.key(indicator))
        missing = [(start, end)]
        if kept is not None:
            missing = [(start, min(end, kept.counted_from * HOUR)), (max(start, kept.counted_to * HOUR), end)]
        if not not_empty(missing):
            return True
        some = select(_run.run_id).where(_ended_in(not_empty(missing))).limit(_FEW_RUNS + 1).subquery()
        return (self._connection.scalar(select(func.count()).select_from(some)) or 0) <= _FEW_RUNS

    def open_at(self, indicator: Indicator, as_of: int) -> dict[Group, Counts]:
        """Count the runs that go on now (Unix nanoseconds) and whose result is known already."""
        judgement = judge_open(indicator.measure, as_of, self._pinned_by(indicator.measure))
        if judgement is None:
            return {}
        going_on = (_run.started_at <= as_of) & _run.ended_at.is_(None)
        return {
            tuple(group): counts for group, counts in self._rows(self._select(indicator, judgement, going_on))
        }

    def key(self, indicator: Indicator) -> str:
        """Return under which its counts are kept: another once a run that others are held against changes."""
        return key(indicator, self._pinned_by(indicator.measure))

    def by_hour(self, indicator: Indicator, hours: Sequence[Stretch]) -> Iterable[tuple[int, Group, Counts]]:
        """Count the runs that ended in these stretches of hours, hour by hour, from the runs themselves."""
        ended = [(first * HOUR, last * HOUR) for first, last in hours]
        for (hour, *group), counts in self._of_runs(indicator, ended, (_run.ended_at // HOUR).label("hour")):
            yield hour, tuple(group), counts

    def _parts(self, indicator: Indicator, start: int, end: int) -> _Parts:
        """Return what of a stretch of time is kept, and what has to be read from the runs."""
        kept = self._kept.get(self.key(indicator))
        if kept is None:
            return _Parts(raw=((start, end),))
        first, last = max(-(-start // HOUR), kept.counted_from), min(end // HOUR, kept.counted_to)
        if first >= last:
            return _Parts(raw=((start, end),))
        changed = stretches(hour for hour in self._changed if first <= hour < last)
        edges = [(start, first * HOUR), *((a * HOUR, b * HOUR) for a, b in changed), (last * HOUR, end)]
        return _Parts(kept.indicator_id, between(changed, first, last), not_empty(edges))

    def _of_runs(
        self, indicator: Indicator, when: Sequence[Stretch], *by: ColumnElement[Any]
    ) -> Iterable[tuple[list[Any], Counts]]:
        """Yield what runs that ended then add, by these columns and the group's."""
        if not when:
            return []
        judgement = judge_ended(indicator.measure, self._pinned_by(indicator.measure))
        return self._rows(self._select(indicator, judgement, _ended_in(when), *by))

    def _of_hours(
        self, indicator: Indicator, parts: _Parts, *by: ColumnElement[Any]
    ) -> Iterable[tuple[list[Any], Counts]]:
        if not parts.hours:
            return []
        columns = [*by, *(_count[name] for name in indicator.group_by)]
        return self._rows(
            select(*columns, func.sum(_count.good), func.sum(_count.bad))
            .where(
                _count.indicator_id == parts.indicator_id,
                or_(*(and_(_count.hour >= first, _count.hour < last) for first, last in parts.hours)),
            )
            .group_by(*columns)
        )

    def _pinned_by(self, measure: Measure) -> Pinned | None:
        if measure not in self._pinned:
            self._pinned[measure] = load_pinned(self._connection, measure)
        return self._pinned[measure]

    def _rows(self, statement: Select[Any]) -> Iterable[tuple[list[Any], Counts]]:
        for *columns, good, bad in self._connection.execute(statement):
            if good or bad:  # without any column to group by, SQL sums nothing to NULL
                yield columns, Counts(int(good), int(bad))

    def _select(
        self, indicator: Indicator, judgement: Judgement, when: ColumnElement[bool], *by: ColumnElement[Any]
    ) -> Select[Any]:
        columns = [*by, *(_run[name] for name in indicator.group_by)]
        return (
            select(*columns, func.sum(judgement.good), func.sum(judgement.bad))
            .select_from(source_of(indicator.measure))
            .where(when, selected(indicator.selection), *self._conditions)
            .group_by(*columns)
        )


def load_kept(connection: Connection) -> dict[str, Kept]:
    """Return what is kept, by the indicator's key."""
    rows = connection.execute(select(schema.slo_indicator))
    return {row.key: Kept(row.indicator_id, row.counted_from, row.counted_to) for row in rows}


def stretches(hours: Iterable[int]) -> list[Stretch]:
    """Return ascending hours as half-open stretches; too many become one from the first to the last."""
    found: list[Stretch] = []
    for hour in hours:
        if found and found[-1][1] == hour:
            found[-1] = (found[-1][0], hour + 1)
        else:
            found.append((hour, hour + 1))
    return found if len(found) <= _MOST_STRETCHES else [(found[0][0], found[-1][1])]


def between(taken: Sequence[Stretch], first: int, last: int) -> list[Stretch]:
    """Return what is left of [first, last) without the stretches taken, which lie in it in order."""
    edges = [first, *(edge for stretch in taken for edge in stretch), last]
    return not_empty(list(zip(edges[::2], edges[1::2], strict=True)))


def not_empty(candidates: Iterable[Stretch]) -> list[Stretch]:
    """Return the stretches that have a length."""
    return [(start, end) for start, end in candidates if start < end]


def _ended_in(when: Sequence[Stretch]) -> ColumnElement[bool]:
    return or_(*(and_(_run.ended_at >= start, _run.ended_at < end) for start, end in when))
