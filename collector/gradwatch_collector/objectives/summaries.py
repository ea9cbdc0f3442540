"""Keeping every ended run summarised, so that objectives can be judged by what is known of it.

Whoever changes an ended run or stores more of its telemetry says so in `summary_due` (`changes.py`). Whoever
holds the evaluator's lease reads such runs one by one, outside of any transaction that writes, as one may have
thousands of ranks; and writes what it found together with taking away the rows that it had seen before it read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Final

from sqlalchemy import BigInteger, Connection, Engine, case, delete, func, insert, literal, select, update
from sqlalchemy.exc import SQLAlchemyError

from gradwatch_collector.objectives.baselines import quality_before, usual
from gradwatch_collector.objectives.changes import tell_changed
from gradwatch_collector.objectives.judging import same_currency
from gradwatch_collector.runs.facts import RunRow, load_runs
from gradwatch_collector.runs.quality import WORST
from gradwatch_collector.runs.summary import Summary, summarise
from gradwatch_collector.runs.turns import take_all_turns, take_turns
from gradwatch_collector.runs.written import difference, ratio
from gradwatch_collector.service import audit
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import batched, of_one_moment
from gradwatch_collector.storage.upsert import upsert
from gradwatch_slo.cost import PriceTable
from gradwatch_slo.runs import Status

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
            # Of those first nothing is known: others may be many, once they are summarised anew.
            .order_by(known.run_id.is_not(None), _due.due_id)
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


def summarise_anew(connection: Connection, start: int, end: int, *, now: int) -> int:
    """Have the runs that ended in [start, end) read again, and what is usual looked up anew; return how many.

    In Unix nanoseconds. What is known of them counts until that is done.
    """
    take_all_turns(connection)
    ended = (_run.ended_at >= start) & (_run.ended_at < end) & (_run.status != Status.RUNNING)
    known = schema.run_summary.c
    of_them = known.run_id.in_(select(_run.run_id).where(ended))
    connection.execute(update(schema.run_summary).where(of_them).values(compared=False))
    # In their order, whatever is due already: what is usual is made of those before.
    connection.execute(delete(schema.summary_due).where(_due.run_id.in_(select(_run.run_id).where(ended))))
    due = select(_run.run_id, literal(now, BigInteger)).where(ended).order_by(_run.ended_at, _run.run_id)
    connection.execute(insert(schema.summary_due).from_select(["run_id", "told_at"], due))
    audit.record(connection, audit.operator(), "slo.summarised", "runs", {"start": start, "end": end}, now=now)
    return connection.scalar(select(func.count()).select_from(schema.run).where(ended)) or 0


def _values_of(connection: Connection, run_id: str, prices: PriceTable | None) -> Mapping[str, Any] | None:
    """Return a run's row; None if the run is not over any more, or gone."""
    runs = load_runs(connection, _run.run_id == run_id, _run.ended_at.is_not(None))
    if not runs:
        return None
    try:
        summary = summarise(connection, runs[0], prices)
        return _compared(summary, _usual(connection, runs[0], summary))
    except SQLAlchemyError:
        raise  # the database may be away for a while
    except Exception:
        # One odd run must not keep all others from being summarised.
        logger.exception("the run %s cannot be summarised", run_id)
        return {**dict.fromkeys(_COLUMNS), "compared": True}


@dataclass(frozen=True, slots=True)
class _Usual:
    """What a run is compared with. Columns of ``run_summary``."""

    collective_p95_usual: float | None
    step_cost_usual: float | None
    quality_before: float | None


def _usual(connection: Connection, run: RunRow, summary: Summary) -> _Usual:
    """Look it up, or return what was found at first: what others become later changes nothing of it."""
    known = schema.run_summary.c
    before = connection.execute(
        select(schema.run_summary).where(known.run_id == run.run_id, known.compared)
    ).one_or_none()
    costs_alike = before is not None and (
        before.currency == summary.currency or (before.currency is None and before.step_cost is not None)
    )
    return _Usual(
        before.collective_p95_usual if before is not None else usual(connection, run, "collective_p95"),
        before.step_cost_usual
        if before is not None and costs_alike
        else usual(connection, run, "step_cost", same_currency(summary.currency)),
        before.quality_before if before is not None else quality_before(connection, run),
    )


def _compared(summary: Summary, usually: _Usual) -> Mapping[str, Any]:
    return {
        **asdict(summary),
        **asdict(usually),
        "collective_p95_ratio": _ratio(summary.collective_p95, usually.collective_p95_usual),
        "step_cost_ratio": _ratio(summary.step_cost, usually.step_cost_usual),
        "quality_delta": _delta(summary.quality, usually.quality_before),
        "compared": True,
    }


def _ratio(value: float | None, usually: float | None) -> float | None:
    return None if value is None or not usually else ratio(value, usually)


def _delta(quality: float | None, before: float | None) -> float | None:
    if quality is None or before is None:
        return None
    return WORST if quality == WORST else difference(quality, before)


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
