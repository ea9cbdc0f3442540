"""Objectives evaluated over the stored runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from operator import itemgetter
from typing import Final

from sqlalchemy import ColumnElement, Connection

from gradwatch_collector.objectives.counting import Stretch, Tallies
from gradwatch_collector.objectives.indicator import Indicator
from gradwatch_collector.runs.facts import moment, nanos
from gradwatch_slo.counts import Counts, Group, Lost
from gradwatch_slo.objective import Objective
from gradwatch_slo.report import NOTHING_LOST, ObjectiveReport, reports_of
from gradwatch_slo.slices import Slicing, by_slice, edges, judged, step_of
from gradwatch_slo.windows import TimeWindow, Window

# What datetimes can tell apart.
_MOMENT: Final = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Counted:
    """What was counted for an objective in a window, by group; what both are see `reports_of`."""

    objective: Objective
    window: Window
    counts: Mapping[Group, Counts]
    lost: Mapping[Group, Lost]

    def reports(self) -> list[ObjectiveReport]:
        """Return how it stands for each group."""
        return reports_of(self.objective, self.window, self.counts, self.lost)


def evaluate_objectives(
    connection: Connection,
    objectives: Iterable[Objective],
    now: int,
    *conditions: ColumnElement[bool],
    quickly: bool = False,
    past: bool = False,
) -> list[ObjectiveReport]:
    """Evaluate objectives over the windows at ``now``, over the runs that meet all conditions.

    ``now`` in Unix nanoseconds: a moment in the past is judged by what is known today of the runs up to then.
    ``conditions`` are over ``schema.run``. Reports follow the order of the objectives. ``quickly``: those that
    many runs would have to be read for are left out until they are counted. ``past``: ``now`` has been, and
    what goes on today is not counted.
    """
    found = count_objectives(connection, objectives, now, *conditions, quickly=quickly, past=past)
    return [report for each in found for report in each.reports()]


def count_objectives(
    connection: Connection,
    objectives: Iterable[Objective],
    now: int,
    *conditions: ColumnElement[bool],
    quickly: bool = False,
    past: bool = False,
) -> list[Counted]:
    """Return what `evaluate_objectives` makes reports of."""
    tallies = Tallies(connection, *conditions)
    as_of = moment(now)
    known: dict[tuple[Indicator, TimeWindow, Slicing | None], _Counts] = {}
    found: list[Counted] = []
    for objective in objectives:
        indicator, window = Indicator.of(objective), objective.window.at(as_of)
        # Tiers and targets differ more often than what is counted.
        key = indicator, objective.window, objective.slicing
        if key not in known:
            if quickly and not tallies.is_quick(indicator, nanos(window.start), nanos(as_of)):
                continue
            known[key] = _count(tallies, objective, window, as_of, past=past)
        found.append(Counted(objective, window, *known[key]))
    return found


_Counts = tuple[Mapping[Group, Counts], Mapping[Group, Lost]]


def _count(tallies: Tallies, objective: Objective, window: Window, as_of: datetime, *, past: bool) -> _Counts:
    indicator, end = Indicator.of(objective), _end(window, as_of)
    if objective.slicing is not None:
        slices = edges(objective.slicing, objective.window, window, end)
        return count_slices(tallies, objective, objective.slicing, slices)
    # What goes on has not ended anywhere else: it belongs to the window that is open now, and to no other.
    ended = tallies.over(indicator, nanos(window.start), nanos(end))
    going_on = {} if past else tallies.open_at(indicator, nanos(as_of))
    groups = ended.keys() | going_on.keys()
    return {each: ended.get(each, Counts()) + going_on.get(each, Counts()) for each in groups}, NOTHING_LOST


def count_slices(tallies: Tallies, objective: Objective, slicing: Slicing, slices: Sequence[int]) -> _Counts:
    """Judge the slices between these edges (:func:`~gradwatch_slo.slices.edges`)."""
    return judged(slicing, _by_slice(tallies, objective, slices))


def bad_slices(
    tallies: Tallies, objective: Objective, slicing: Slicing, window: Window, as_of: datetime
) -> Mapping[Group, Mapping[Stretch, Counts]]:
    """Return the slices of a window that are bad, at least in part, and what was counted in each, by group."""
    slices = edges(slicing, objective.window, window, _end(window, as_of))
    found: defaultdict[Group, dict[Stretch, Counts]] = defaultdict(dict)
    for (number, group), counts in sorted(_by_slice(tallies, objective, slices).items(), key=itemgetter(0)):
        if slicing.is_bad(counts):
            found[group][slices[number], slices[number + 1]] = counts
    return found


def _by_slice(
    tallies: Tallies, objective: Objective, slices: Sequence[int]
) -> Mapping[tuple[int, Group], Counts]:
    if not slices or slices[0] == slices[-1]:
        return {}
    step = step_of(slices)
    periods = 0, (slices[-1] - slices[0]) // step
    counted = tallies.by_period(Indicator.of(objective), slices[0], step, periods)
    return by_slice(counted, step, slices)


def _end(window: Window, as_of: datetime) -> datetime:
    # A rolling window includes its end, a calendar one ends before the next; and nothing of the future counts.
    return as_of + _MOMENT if window.rolling else min(window.end, as_of + _MOMENT)
