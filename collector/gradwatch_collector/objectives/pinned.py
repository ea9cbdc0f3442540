"""The run that others are held against where an objective names one: ``baseline: {run: RUN_ID}``.

As it is known now, for the past as well: what is corrected of it changes what was counted against it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction

from sqlalchemy import Connection, select

from gradwatch_collector.objectives.baselines import threshold
from gradwatch_collector.objectives.judging import Pinned
from gradwatch_collector.runs.quality import WORST, Aim
from gradwatch_collector.runs.written import place, rounded, written
from gradwatch_collector.storage import schema
from gradwatch_slo.indicators import COMPARISONS, Measure, Threshold, pinned_run
from gradwatch_slo.objective import Objective
from gradwatch_slo.problems import printable

_run, _summary = schema.run.c, schema.run_summary.c


def load_pinned(connection: Connection, measure: Measure) -> Pinned | None:
    """Return what a measure holds runs against; None if it names no run for that."""
    run_id = pinned_run(measure)
    if run_id is None:
        return None
    value = COMPARISONS[measure.value] if isinstance(measure, Threshold) else None
    row = connection.execute(
        select(
            _run.target,
            (_run.target_reached_at - _run.started_at).label("took"),
            *([] if value is None else [_summary[value].label("value"), _summary.currency]),
        )
        .select_from(schema.run.join(schema.run_summary, _summary.run_id == _run.run_id, isouter=True))
        .where(_run.run_id == run_id)
    ).first()
    if row is None:
        return Pinned(run_id)
    if not isinstance(measure, Threshold):
        is_known = row.took is not None and row.took > 0
        return Pinned(run_id, granted=threshold([row.took]) if is_known else None)
    return Pinned(
        run_id,
        bound=_bound(measure, row.value),
        aim=Aim.of(row.target) if measure.value == "quality_delta" else None,
        currency=row.currency if measure.value == "step_cost_ratio" else None,
    )


def unknown_pinned(connection: Connection, objectives: Iterable[Objective]) -> Iterator[str]:
    """Yield a warning for each objective that holds runs against one of which too little is known."""
    for name, measure in dict.fromkeys((each.name, each.measure) for each in objectives):
        pinned = load_pinned(connection, measure)
        if pinned is None or pinned.granted is not None or pinned.bound is not None:
            continue
        lacks = measure.value if isinstance(measure, Threshold) else "time to a target"
        yield (
            f"{printable(name)}: the baseline {printable(pinned.run_id)} has no known {lacks},"
            " so that nothing is held against it"
        )


def _bound(measure: Threshold, pinned: float | None) -> float | None:
    """Return what the value of a run by itself is compared with."""
    if pinned is None or not math.isfinite(pinned):
        return None
    against, bound = written(pinned), Fraction(measure.bound)
    if measure.value == "quality_delta":
        if pinned == WORST:
            return None  # whatever came after one that diverged would be better
        limit = against + bound
        unit = place(against, limit)
    elif pinned <= 0:
        return None
    else:
        limit = against * bound
        unit = place(limit)
    # What is not told apart by twelve digits is the same: at most so much, and no more than it.
    return rounded(limit + unit / 2 if measure.operator in ("lte", "gt") else limit - unit / 2)
