"""What is usual for a job: how long a run may take to its target if nobody says.

1.5 x the median time to target of the newest runs of the same job, model and dataset that had reached theirs
and ended ``succeeded`` when the run started. It is frozen then: later runs and corrections do not move it.
Whether an earlier run met its own threshold does not matter: otherwise the first five, which have none, could
never found a baseline, and a job that became slower for good would be measured by its past for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sqlalchemy import ColumnElement, Connection, literal_column, select

from gradwatch_collector.objectives.exclusions import load_periods
from gradwatch_collector.objectives.judging import not_excluded
from gradwatch_collector.storage import schema

FEWEST_RUNS: Final = 5
MOST_RUNS: Final = 20
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
            _run.job == job,
            _is(_run.model, model),
            _is(_run.dataset, dataset),
            # Spelled as in the index `run_good_idx`, or SQLite does not use it.
            _run.status == literal_column("'succeeded'"),
            _run.target_reached_at.is_not(None),
            _run.ended_at <= started_at,
            not_excluded(load_periods(connection)),
        )
        .order_by(_run.ended_at.desc())
        .limit(MOST_RUNS)
    ).all()
    return threshold(took) if len(took) >= FEWEST_RUNS else None


def threshold(took: Sequence[int]) -> int:
    """Return 1.5 x the median, in the same unit, rounded down: exact for whatever is compared with it."""
    in_order = sorted(took)
    middle = in_order[(len(in_order) - 1) // 2] + in_order[len(in_order) // 2]
    return 3 * middle // 4


def _is(column: ColumnElement[str], value: str | None) -> ColumnElement[bool]:
    # Not `IS NOT DISTINCT FROM`: PostgreSQL has no index for that.
    return column.is_(None) if value is None else column == value
