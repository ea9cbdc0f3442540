"""Keeping indicators counted by the hour, so that a report and a tick cost the same however long the history.

An hour is counted once it is over, and again when `run_change` names it: a run that ended in it was corrected,
excluded, or told of later. Hours from before an indicator was first asked for are counted little by little,
backwards. Only the holder of the evaluator's lease does this.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, get_args

from sqlalchemy import Connection, delete, func, insert, select, update

from gradwatch_collector.objectives.changes import HOUR
from gradwatch_collector.objectives.counting import (
    Kept,
    Stretch,
    Tallies,
    load_kept,
    not_empty,
    stretches,
)
from gradwatch_collector.objectives.indicator import Indicator
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import batched
from gradwatch_slo.source import GroupField

# Of hours that changed, what one call counts again; each for all indicators.
_CHANGED_AT_ONCE: Final = 12
# Of other hours, what is counted at once for one indicator: those in which so many runs ended.
_RUNS_AT_ONCE: Final = 30_000
# What ends within an hour is mostly known soon after it. Until then it is read from the runs.
_SETTLES_AFTER: Final = 120 * 1_000_000_000

_indicator, _count, _change, _run = (
    table.c for table in (schema.slo_indicator, schema.slo_count, schema.run_change, schema.run)
)


def keep_counted(
    connection: Connection,
    indicators: Collection[Indicator],
    now: int,
    go_on: Callable[[], bool] = lambda: True,
) -> bool:
    """Count what is not counted, for as long as it may ``go_on``; return whether that was all.

    In a transaction that nobody else does this in meanwhile; ``now`` in Unix nanoseconds. Of indicators that
    are not given nothing is kept.
    """
    tallies = Tallies(connection)
    over = (now - _SETTLES_AFTER) // HOUR
    wanted = {tallies.key(indicator): indicator for indicator in indicators}
    kept = _keep_only(connection, wanted, over)
    changed = _Changed.some(connection)
    for key, row in kept.items():
        again = [hour for hour in changed.hours if row.counted_from <= hour < row.counted_to]
        _forget(connection, row, again)
        _count_hours(connection, tallies, wanted[key], row, stretches(again))
    for some in batched(changed.ids):
        connection.execute(delete(schema.run_change).where(_change.change_id.in_(some)))
    # In turns, so that one that is new does not keep the others waiting.
    due = deque(kept.items())
    earlier = _Earlier(connection)
    while due and go_on():
        key, row = due.popleft()
        # First what is over by now; then backwards. A clock that is set back makes nothing uncounted.
        until = max(over, row.counted_to)
        since = row.counted_from if row.counted_to < until else earlier.than(row.counted_from)
        more = replace(row, counted_from=since, counted_to=until)
        if more != row:
            new = not_empty([(more.counted_from, row.counted_from), (row.counted_to, more.counted_to)])
            _count_hours(connection, tallies, wanted[key], row, new)
            _tell_kept(connection, more)
            due.append((key, more))
    return changed.all and not due


class _Earlier:
    """Where to go on backwards. New indicators of one start take the same steps."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._known: dict[int, int] = {}

    def than(self, hour: int) -> int:
        """Return an hour before this one, with not too many runs between them; the same if there are none."""
        if hour not in self._known:
            some = (
                select(_run.ended_at)
                .where(_run.ended_at < hour * HOUR)
                .order_by(_run.ended_at.desc())
                .limit(_RUNS_AT_ONCE)
                .subquery()
            )
            oldest = self._connection.scalar(select(func.min(some.c.ended_at)))
            self._known[hour] = hour if oldest is None else oldest // HOUR
        return self._known[hour]


@dataclass(frozen=True, slots=True)
class _Changed:
    """Some hours that are to be counted again, and the rows that say so; ``all``: there are no others."""

    hours: Sequence[int]
    ids: Sequence[int]
    all: bool

    @classmethod
    def some(cls, connection: Connection) -> _Changed:
        """Return the first few hours."""
        hours = connection.scalars(
            select(_change.hour).group_by(_change.hour).order_by(_change.hour).limit(_CHANGED_AT_ONCE + 1)
        ).all()
        some = hours[:_CHANGED_AT_ONCE]
        # By their ids: rows that are committed after this tell of what the counting may not see.
        ids = connection.scalars(select(_change.change_id).where(_change.hour.in_(some))).all()
        return cls(some, ids, all=len(hours) == len(some))


def _keep_only(connection: Connection, wanted: Mapping[str, Indicator], over: int) -> dict[str, Kept]:
    """Return what is kept of the wanted indicators, new ones included; forget the others."""
    kept = load_kept(connection)
    forgotten = [row.indicator_id for key, row in kept.items() if key not in wanted]
    for some in batched(forgotten):
        connection.execute(delete(schema.slo_count).where(_count.indicator_id.in_(some)))
        connection.execute(delete(schema.slo_indicator).where(_indicator.indicator_id.in_(some)))
    new = [key for key in wanted if key not in kept]
    if not new and not forgotten:
        return kept
    if new:
        rows = [{"key": key, "counted_from": over, "counted_to": over} for key in new]
        connection.execute(insert(schema.slo_indicator), rows)
    return load_kept(connection)


def _tell_kept(connection: Connection, row: Kept) -> None:
    connection.execute(
        update(schema.slo_indicator)
        .where(_indicator.indicator_id == row.indicator_id)
        .values(counted_from=row.counted_from, counted_to=row.counted_to)
    )


def _forget(connection: Connection, row: Kept, hours: Sequence[int]) -> None:
    if hours:
        of_hours = (_count.indicator_id == row.indicator_id) & _count.hour.in_(hours)
        connection.execute(delete(schema.slo_count).where(of_hours))


def _count_hours(
    connection: Connection, tallies: Tallies, indicator: Indicator, row: Kept, hours: Sequence[Stretch]
) -> None:
    """Count hours of which nothing is kept, and keep that."""
    if not hours:
        return
    numbers: Counter[int] = Counter()
    rows = []
    for hour, group, counts in tallies.by_hour(indicator, hours):
        rows.append(
            {
                "indicator_id": row.indicator_id,
                "hour": hour,
                "number": numbers[hour],
                **dict.fromkeys(get_args(GroupField)),
                **dict(zip(indicator.group_by, group, strict=True)),
                "good": counts.good,
                "bad": counts.bad,
            }
        )
        numbers[hour] += 1
    if rows:
        connection.execute(insert(schema.slo_count), rows)
