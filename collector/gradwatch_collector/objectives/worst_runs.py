"""The runs to look at first: those that failed, were lost, or were slowest to their target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import BigInteger, ColumnElement, Connection, Double, cast, func, or_, select

from gradwatch_collector.objectives.exclusions import load_periods
from gradwatch_collector.objectives.judging import not_excluded, selected
from gradwatch_collector.storage import schema
from gradwatch_slo.objective import Objective
from gradwatch_slo.runs import REASON_PREEMPTED, Status

_MOST_OF_A_KIND: Final = 8
_run = schema.run.c
_NANOS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstRun:
    """A run that ended badly, or late. Texts are telemetry's own; moments and times in nanoseconds.

    ``took``: until its target where it is among the slow ones, else until its end. ``granted``: how long it had
    for that, None if it ended badly.
    """

    run_id: str
    job: str
    team: str | None
    tier: str
    status: Status
    reason: str | None
    ended_at: int
    took: int
    granted: int | None = None


def about(connection: Connection, objectives: Sequence[Objective], start: int, end: int) -> ColumnElement[bool]:
    """Return which runs that ended in [start, end), Unix nanoseconds, any of the objectives is about."""
    return (
        (_run.ended_at >= start)
        & (_run.ended_at < end)
        & or_(*(selected(each.selection) for each in objectives))
        & not_excluded(load_periods(connection))
    )


def worst_runs(connection: Connection, chosen: ColumnElement[bool]) -> list[WorstRun]:
    """Return the newest failed and lost ones, and the slowest by what they were granted; each run once."""
    found = [
        *_ended(connection, chosen, Status.FAILED),
        *_ended(connection, chosen, Status.LOST),
        *_slowest(connection, chosen),
    ]
    return list({each.run_id: each for each in reversed(found)}.values())[::-1]


def _ended(connection: Connection, chosen: ColumnElement[bool], status: Status) -> list[WorstRun]:
    rows = connection.execute(
        select(schema.run)
        .where(chosen, _run.status == status, func.coalesce(_run.reason, "") != REASON_PREEMPTED)
        .order_by(_run.ended_at.desc(), _run.run_id)
        .limit(_MOST_OF_A_KIND)
    )
    return [_worst(row, row.ended_at - row.started_at) for row in rows]


def _slowest(connection: Connection, chosen: ColumnElement[bool]) -> list[WorstRun]:
    own = cast(_run.deadline_seconds * _NANOS, BigInteger)
    granted = func.coalesce(own, _run.baseline)
    took = _run.target_reached_at - _run.started_at
    slowness = cast(took, Double) / func.nullif(granted, 0)
    rows = connection.execute(
        select(schema.run, took.label("took"), granted.label("granted"))
        .where(chosen, _run.target.is_not(None), took > granted)
        .order_by(slowness.desc(), _run.run_id)
        .limit(_MOST_OF_A_KIND)
    )
    return [_worst(row, row.took, row.granted) for row in rows]


def _worst(row: Any, took: int, granted: int | None = None) -> WorstRun:
    known = {name: getattr(row, name) for name in ("run_id", "job", "team", "tier", "reason", "ended_at")}
    return WorstRun(**known, status=Status(row.status), took=took, granted=granted)
