"""Objectives evaluated over the stored runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import ColumnElement, Connection

from gradwatch_collector.objectives.counting import Tallies, added
from gradwatch_collector.objectives.indicator import Indicator
from gradwatch_collector.runs.facts import moment, nanos
from gradwatch_slo.objective import Objective
from gradwatch_slo.report import Counts, Group, ObjectiveReport, reports_of
from gradwatch_slo.windows import Window

# What datetimes can tell apart.
_MOMENT: Final = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Counted:
    """What was counted for an objective in a window, by the values of its ``group_by``."""

    objective: Objective
    window: Window
    counts: Mapping[Group, Counts]


def evaluate_objectives(
    connection: Connection,
    objectives: Iterable[Objective],
    now: int,
    *conditions: ColumnElement[bool],
    quickly: bool = False,
) -> list[ObjectiveReport]:
    """Evaluate objectives over the windows at ``now``, over the runs that meet all conditions.

    ``now`` in Unix nanoseconds: a moment in the past is judged by what is known today of the runs up to then.
    ``conditions`` are over ``schema.run``. Reports follow the order of the objectives. ``quickly``: those that
    many runs would have to be read for are left out until they are counted.
    """
    found = count_objectives(connection, objectives, now, *conditions, quickly=quickly)
    return [report for each in found for report in reports_of(each.objective, each.window, each.counts)]


def count_objectives(
    connection: Connection,
    objectives: Iterable[Objective],
    now: int,
    *conditions: ColumnElement[bool],
    quickly: bool = False,
) -> list[Counted]:
    """Return what `evaluate_objectives` makes reports of."""
    tallies = Tallies(connection, *conditions)
    as_of = moment(now)
    counted: dict[tuple[Indicator, Window], dict[Group, Counts]] = {}
    found: list[Counted] = []
    for objective in objectives:
        indicator, window = Indicator.of(objective), objective.window.at(as_of)
        # Tiers and targets differ more often than what is counted.
        if (indicator, window) not in counted:
            if quickly and not tallies.is_quick(indicator, nanos(window.start), nanos(as_of)):
                continue
            counted[indicator, window] = _count(tallies, indicator, window, as_of)
        found.append(Counted(objective, window, counted[indicator, window]))
    return found


def _count(tallies: Tallies, indicator: Indicator, window: Window, as_of: datetime) -> dict[Group, Counts]:
    # A rolling window includes its end, a calendar one ends before the next; and nothing of the future counts.
    end = as_of + _MOMENT if window.rolling else min(window.end, as_of + _MOMENT)
    # What goes on has not ended anywhere else: it belongs to the window that is open.
    return added(
        [tallies.over(indicator, nanos(window.start), nanos(end)), tallies.open_at(indicator, nanos(as_of))]
    )
