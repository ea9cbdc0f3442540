"""How long runs took to their target, and what is usual for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, func, select

from gradwatch_collector.objectives.baselines import GRANTED
from gradwatch_collector.objectives.exclusions import load_periods
from gradwatch_collector.objectives.judging import not_excluded, selected
from gradwatch_collector.storage import schema
from gradwatch_slo.objective import Objective

_MOST_KINDS: Final = 8
_MOST_RUNS: Final = 200
_run = schema.run.c


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Runs of one job, model and dataset that reached their target. Times in nanoseconds.

    ``took``: of the newest ones, ascending; ``count``: of how many. ``usual``: the median that the newest one's
    baseline was made of, None without one.
    """

    job: str
    model: str | None
    dataset: str | None
    count: int
    took: tuple[int, ...]
    usual: int | None


def spreads(
    connection: Connection, objective: Objective, group: Mapping[str, str | None], start: int, end: int
) -> list[Spread]:
    """Return the kinds of which most runs reached their target, of those of a group of an objective.

    They ended in [start, end), Unix nanoseconds.
    """
    kind = (_run.job, _run.model, _run.dataset)
    about = (
        _run.ended_at >= start,
        _run.ended_at < end,
        _run.target_reached_at.is_not(None),
        selected(objective.selection),
        *(_run[name].is_not_distinct_from(value) for name, value in group.items()),
        not_excluded(load_periods(connection)),
    )
    count = func.count().label("runs")
    kinds = connection.execute(
        select(*kind, count).where(*about).group_by(*kind).order_by(count.desc(), *kind).limit(_MOST_KINDS)
    ).all()
    return [_spread(connection, row, about) for row in kinds]


def _spread(connection: Connection, row: Any, about: tuple[Any, ...]) -> Spread:
    rows = connection.execute(
        select(_run.target_reached_at - _run.started_at, _run.baseline)
        .where(
            _run.job == row.job,
            _run.model.is_not_distinct_from(row.model),
            _run.dataset.is_not_distinct_from(row.dataset),
            *about,
        )
        # By the index of a job's runs.
        .order_by(_run.started_at.desc())
        .limit(_MOST_RUNS)
    ).all()
    baseline = next((each for _, each in rows if each is not None), None)
    return Spread(
        job=row.job,
        model=row.model,
        dataset=row.dataset,
        count=row.runs,
        took=tuple(sorted(took for took, _ in rows)),
        usual=None if baseline is None else int(baseline / GRANTED),
    )
