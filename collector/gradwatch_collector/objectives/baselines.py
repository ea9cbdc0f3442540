"""What is usual for a job: how long a run may take to its target if nobody says, and what it is compared with.

Time to target: 1.5 x the median time to target of the newest runs of the same job, model and dataset that had
reached theirs and ended ``succeeded`` when the run started. It is frozen then: later runs and corrections do
not move it, but for one of the run's own start. Whether an earlier run met its own threshold does not matter:
otherwise the first five, which have none, could never found a baseline, and a job that became slower for good
would be measured by its past for ever.

Everything else: the median of the newest 20 such runs of which the value is known, or for quality the newest
that had the same aim; whether they reached a target or not. It is looked up when the run is summarised first.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Select, literal_column, select

from gradwatch_collector.objectives.exclusions import load_periods
from gradwatch_collector.objectives.judging import not_excluded
from gradwatch_collector.runs.facts import RunRow
from gradwatch_collector.runs.quality import WORST, Aim, aims_at
from gradwatch_collector.runs.written import median
from gradwatch_collector.storage import schema

FEWEST_RUNS: Final = 5
# The `N` of "the last N good runs".
MOST_RUNS: Final = 20
# How much longer than usual a run may take to its target.
GRANTED: Final = Fraction(3, 2)
_run = schema.run.c


def baseline(
    connection: Connection, job: str, model: str | None, dataset: str | None, started_at: int
) -> int | None:
    """Return the threshold of a run that starts then, in nanoseconds; None if too few runs are known.

    ``started_at`` in Unix nanoseconds.
    """
    took = connection.scalars(
        select(_run.target_reached_at - _run.started_at)
        .where(
            # What took no time has a clock that nobody knows.
            _run.target_reached_at > _run.started_at,
            *_good_before(connection, job, model, dataset, started_at),
        )
        # By their ids where they ended in one moment: what is stored first must not decide.
        .order_by(_run.ended_at.desc(), _run.run_id)
        .limit(MOST_RUNS)
    ).all()
    return threshold(took) if len(took) >= FEWEST_RUNS else None


def usual(connection: Connection, run: RunRow, value: str, *conditions: ColumnElement[bool]) -> float | None:
    """Return the median of a column of `run_summary` over the runs before this one; None if too few tell it.

    ``conditions`` are over ``schema.run_summary``.
    """
    found = _summarised_before(connection, run, schema.run_summary.c[value]).where(*conditions)
    told = connection.scalars(found.limit(MOST_RUNS)).all()
    return median(told) if len(told) >= FEWEST_RUNS else None


def quality_before(connection: Connection, run: RunRow) -> float | None:
    """Return the quality of the newest run before this one that had the same aim and did not diverge."""
    aim, quality = Aim.of(run.target), schema.run_summary.c.quality
    if aim is None:
        return None
    # Whatever came after one that diverged would be better.
    found = _summarised_before(connection, run, quality).where(aims_at(aim), quality > WORST)
    known: float | None = connection.scalar(found.limit(1))
    return known


def _summarised_before(connection: Connection, run: RunRow, column: ColumnElement[Any]) -> Select[Any]:
    return (
        select(column)
        .select_from(schema.run.join(schema.run_summary, _run.run_id == schema.run_summary.c.run_id))
        .where(
            column.is_not(None),
            _run.run_id != run.run_id,
            *_good_before(connection, run.job, run.model, run.dataset, run.started_at),
        )
        .order_by(_run.ended_at.desc(), _run.run_id)
    )


def _good_before(
    connection: Connection, job: str, model: str | None, dataset: str | None, started_at: int
) -> Sequence[ColumnElement[bool]]:
    return (
        _run.job == job,
        _is(_run.model, model),
        _is(_run.dataset, dataset),
        # Spelled as in the indexes `run_good_idx` and `run_succeeded_idx`, or SQLite does not use them.
        _run.status == literal_column("'succeeded'"),
        _run.ended_at <= started_at,
        not_excluded(load_periods(connection)),
    )


def threshold(took: Sequence[int]) -> int:
    """Return 1.5 x the median, in the same unit, rounded down: exact for whatever is compared with it."""
    in_order = sorted(took)
    doubled = in_order[(len(in_order) - 1) // 2] + in_order[len(in_order) // 2]
    return int(GRANTED * doubled / 2)


def _is(column: ColumnElement[str], value: str | None) -> ColumnElement[bool]:
    # Not `IS NOT DISTINCT FROM`: PostgreSQL has no index for that.
    return column.is_(None) if value is None else column == value
