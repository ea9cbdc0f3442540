"""Ended runs that objectives over summaries do not count yet, as they are still to be summarised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from sqlalchemy import Connection, and_, func, or_, select

from gradwatch_collector.objectives.judging import selected, source_of
from gradwatch_collector.runs.facts import moment, nanos
from gradwatch_collector.storage import schema
from gradwatch_slo.objective import Objective

# More need not be counted to be told of.
_MOST: Final = 1000

_run, _summary, _due = schema.run.c, schema.run_summary.c, schema.summary_due.c


def not_summarised(connection: Connection, objectives: Iterable[Objective], now: int) -> Iterator[str]:
    """Yield a warning of runs that ended within objectives' windows at ``now`` and have no summary, if any do.

    ``now`` in Unix nanoseconds.
    """
    # Several objectives are of the same runs.
    asked = {
        (each.selection, nanos(each.window.at(moment(now)).start))
        for each in objectives
        if source_of(each.measure) is not schema.run
    }
    if not asked:
        return
    of_them = or_(*(and_(selected(selection), _run.ended_at >= start) for selection, start in asked))
    some = (
        select(_due.run_id)
        .distinct()
        .join(schema.run, _run.run_id == _due.run_id)
        .join(schema.run_summary, _summary.run_id == _due.run_id, isouter=True)
        .where(_summary.run_id.is_(None), _run.ended_at <= now, of_them)
        .limit(_MOST + 1)
    )
    count = connection.scalar(select(func.count()).select_from(some.subquery())) or 0
    if not count:
        return
    many = f"more than {_MOST}" if count > _MOST else str(count)
    are, them = ("1 ended run is", "it") if count == 1 else (f"{many} ended runs are", "them")
    yield f"{are} not summarised yet: the objectives of steps, devices and checkpoints do not count {them}"
