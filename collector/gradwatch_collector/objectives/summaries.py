"""Keeping every ended run summarised, so that objectives can be judged by what is known of it.

Whoever changes an ended run or stores more of its telemetry says so in `summary_due` (`changes.py`). Whoever
holds the evaluator's lease reads such runs one by one, outside of any transaction that writes, as one may have
thousands of ranks; and writes what it found together with taking away the rows that it had seen before it read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, Final

from sqlalchemy import Connection, Engine, case, delete, select
from sqlalchemy.exc import SQLAlchemyError

from gradwatch_collector.objectives.baselines import last_qualities, usual
from gradwatch_collector.objectives.changes import tell_changed
from gradwatch_collector.runs.facts import RunRow, load_runs
from gradwatch_collector.runs.quality import WORST, Aim
from gradwatch_collector.runs.summary import Summary, summarise
from gradwatch_collector.runs.turns import take_turns
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import batched, of_one_moment
from gradwatch_collector.storage.upsert import upsert
from gradwatch_slo.cost import PriceTable

logger = logging.getLogger(__name__)

# The last of what its ranks tell is mostly there by then, and need not be read again.
SETTLES_AFTER: Final = 5 * 1_000_000_000
# Of a run that failed by one rank the others may tell for hours.
AGAIN_AFTER: Final = 60 * 1_000_000_000
_RUNS_AT_ONCE: Final = 100

_due, _run = schema.summary_due.c, schema.run.c
_COLUMNS: Final = tuple(column.name for column in schema.run_summary.c if not column.primary_key)
Begin = Callable[[], AbstractContextManager[Connection]]


def summarise_due(
    engine: Engine,
    begin: Begin,
    prices: PriceTable | None,
    now: int,
    go_on: Callable[[], bool] = lambda: True,
) -> bool:
    """Summarise runs that are due, for as long as it may ``go_on``; return whether these were all.

    ``begin`` begins a transaction that writes, and which nobody else does this in meanwhile. ``now`` in Unix
    nanoseconds.
    """
    known = schema.run_summary.c
    with engine.connect() as connection:
        told = connection.scalars(
            select(_due.run_id)
            .join(schema.run_summary, known.run_id == _due.run_id, isouter=True)
            .where(_due.told_at <= case((known.run_id.is_(None), now - SETTLES_AFTER), else_=now - AGAIN_AFTER))
            .order_by(_due.due_id)
            .limit(_RUNS_AT_ONCE)
        ).all()
    for run_id in dict.fromkeys(told):
        if not go_on():
            return False
        with of_one_moment(engine).connect() as connection:
            # First of all: what is told from here on may be of what is not seen here.
            seen = connection.scalars(select(_due.due_id).where(_due.run_id == run_id)).all()
            values = _values_of(connection, run_id, prices)
        with begin() as connection:
            _write(connection, run_id, values)
            for some in batched(seen):
                connection.execute(delete(schema.summary_due).where(_due.due_id.in_(some)))
    return len(told) < _RUNS_AT_ONCE


def _values_of(connection: Connection, run_id: str, prices: PriceTable | None) -> Mapping[str, Any] | None:
    """Return a run's row; None if the run is not over any more, or gone."""
    runs = load_runs(connection, _run.run_id == run_id, _run.ended_at.is_not(None))
    if not runs:
        return None
    try:
        return _compared(connection, runs[0], summarise(connection, runs[0], prices))
    except SQLAlchemyError:
        raise  # the database may be away for a while
    except Exception:
        # One odd run must not keep all others from being summarised.
        logger.exception("the run %s cannot be summarised", run_id)
        return dict.fromkeys(_COLUMNS)


def _compared(connection: Connection, run: RunRow, summary: Summary) -> Mapping[str, Any]:
    return {
        **asdict(summary),
        "collective_p95_ratio": _ratio(summary.collective_p95, usual(connection, run, "collective_p95")),
        "step_cost_ratio": _ratio(summary.step_cost, usual(connection, run, "step_cost")),
        "quality_delta": _quality_delta(connection, run, summary.quality),
    }


def _ratio(value: float | None, baseline: float | None) -> float | None:
    return None if value is None or not baseline else value / baseline


def _quality_delta(connection: Connection, run: RunRow, quality: float | None) -> float | None:
    """Return how much better a run is than the last good one that had the same aim."""
    if quality is None:
        return None
    aim = Aim.of(run.target)
    before = (told for target, told in last_qualities(connection, run) if Aim.of(target) == aim)
    last: float | None = next(before, None)
    return None if last is None else max(WORST, quality - last)


def _write(connection: Connection, run_id: str, values: Mapping[str, Any] | None) -> None:
    known = schema.run_summary.c
    # Who deletes the run deletes its summary, too.
    take_turns(connection, [run_id])
    ended_at = connection.scalar(select(_run.ended_at).where(_run.run_id == run_id))
    if values is None or ended_at is None:
        return
    before = connection.execute(select(schema.run_summary).where(known.run_id == run_id)).mappings().first()
    if before is None or any(before[name] != values[name] for name in _COLUMNS):
        connection.execute(
            upsert(connection, schema.run_summary, update=_COLUMNS), {"run_id": run_id, **values}
        )
        tell_changed(connection, [ended_at])
