"""The runs that spent an objective's budget: those that its own judgement counts as bad."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Double, Row, cast, select

from gradwatch_collector.objectives.counting import Stretch
from gradwatch_collector.objectives.exclusions import load_periods
from gradwatch_collector.objectives.judging import (
    Judgement,
    held_against,
    judge_ended,
    judge_open,
    not_excluded,
    selected,
    source_of,
)
from gradwatch_collector.objectives.pinned import load_pinned
from gradwatch_collector.storage import schema
from gradwatch_slo.counts import Counts
from gradwatch_slo.indicators import UnitRatio
from gradwatch_slo.objective import Objective
from gradwatch_slo.runs import Status

MOST_RUNS: Final = 4
_run = schema.run.c


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRun:
    """A run that an objective counts as bad. Texts are telemetry's own; moments and times in nanoseconds.

    ``ended_at``: None while it goes on. ``lasted``: until then, or until the moment that was asked about.
    ``bad``: how many bad events it adds. ``seen`` was held against ``limit``: see `judging.held_against`.
    """

    run_id: str
    job: str
    team: str | None
    tier: str
    status: Status
    reason: str | None
    ended_at: int | None
    lasted: int
    bad: int
    seen: float | None
    limit: float | None


def worst_runs(
    connection: Connection,
    objective: Objective,
    group: Mapping[str, str | None],
    stretches: Mapping[Stretch, Counts],
    *,
    going_on: int,
    now: int,
) -> list[BadRun]:
    """Return a few runs that an objective counts as bad: the newest, or those with most bad steps.

    Args:
        connection: Of the moment at which the objective was evaluated.
        objective: Bad is what adds bad events.
        group: Of its runs.
        stretches: Of its window, or its bad slices, and what was counted in each: only those in which something
            was bad are read, and no more than it takes.
        going_on: How many runs that go on it counts as bad. They are first.
        now: Of the evaluation, Unix nanoseconds.
    """
    measure, pinned = objective.measure, load_pinned(connection, objective.measure)
    has_many = isinstance(measure, UnitRatio)
    about = (
        selected(objective.selection),
        *(_run[name].is_not_distinct_from(value) for name, value in group.items()),
        not_excluded(load_periods(connection)),
    )

    def read(
        judgement: Judgement, *when: ColumnElement[bool], most: int, first: Iterable[ColumnElement[Any]]
    ) -> list[BadRun]:
        seen, limit = held_against(measure, pinned)
        rows = connection.execute(
            select(
                schema.run,
                judgement.bad.label("bad"),
                cast(seen, Double).label("seen"),
                cast(limit, Double).label("limit"),
            )
            .select_from(source_of(measure))
            .where(*when, judgement.bad > 0, *about)
            .order_by(*first, _run.run_id)
            .limit(most)
        )
        return [_bad_run(row, now) for row in rows]

    found: list[BadRun] = []
    open_judgement = judge_open(measure, now, pinned) if going_on else None
    if open_judgement is not None:
        is_open = (_run.started_at <= now) & _run.ended_at.is_(None)
        found = read(open_judgement, is_open, most=min(going_on, MOST_RUNS), first=(_run.started_at,))
    judgement = judge_ended(measure, pinned)
    # No run of a stretch can have more bad events than all of them have, and most measures count a run once.
    bad = [(*stretch, counts.bad if has_many else 1) for stretch, counts in stretches.items() if counts.bad]
    for start, end, at_most in sorted(bad, key=lambda stretch: (-stretch[2], -stretch[0])):
        if len(found) == MOST_RUNS and found[-1].bad >= at_most:
            break
        found += read(
            judgement,
            _run.ended_at >= start,
            _run.ended_at < end,
            most=MOST_RUNS,
            # By one event each the newest are found by their index.
            first=(judgement.bad.desc(), _run.ended_at.desc()) if has_many else (_run.ended_at.desc(),),
        )
        found = sorted(found, key=lambda run: -run.bad)[:MOST_RUNS]
    return found


def _bad_run(row: Row[Any], now: int) -> BadRun:
    same = ("run_id", "job", "team", "tier", "reason", "ended_at", "bad", "seen", "limit")
    return BadRun(
        **{name: getattr(row, name) for name in same},
        status=Status(row.status),
        lasted=(now if row.ended_at is None else row.ended_at) - row.started_at,
    )
