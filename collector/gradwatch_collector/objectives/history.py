"""The past of an objective, hour by hour."""

from __future__ import annotations

from collections import defaultdict
from datetime import timedelta

from sqlalchemy import Connection

from gradwatch_collector.objectives.changes import HOUR
from gradwatch_collector.objectives.counting import Tallies
from gradwatch_collector.objectives.indicator import Indicator
from gradwatch_collector.runs.facts import moment, nanos
from gradwatch_slo.counts import Counts, Group
from gradwatch_slo.objective import Objective
from gradwatch_slo.periods import MOMENT
from gradwatch_slo.simulation import History
from gradwatch_slo.windows import TimeWindow


def load_history(connection: Connection, objective: Objective, start: int, end: int) -> dict[Group, History]:
    """Return what ended within the whole hours of [start, end), Unix nanoseconds, by group.

    With what fills the windows before; a history begins with the hour in which the first event of any group was
    counted.
    """
    first_asked, after = -(-start // HOUR), end // HOUR
    # With what filled the windows just before: an alert that fired then may go on.
    before = moment(first_asked * HOUR) - MOMENT
    begins = [objective.window.at(before).start]
    for alert in objective.alerts:
        held = timedelta(0) if alert.alert_after is None else alert.alert_after.nominal
        begins.append(TimeWindow(alert.look_back).at(before - held).start)
    hours = max(0, nanos(min(begins)) // HOUR), after
    counted = Tallies(connection).by_period(Indicator.of(objective), 0, HOUR, hours)
    if not counted:
        return {}
    first = min(hour for hour, _ in counted)
    by_group: defaultdict[Group, dict[int, Counts]] = defaultdict(dict)
    for (hour, group), counts in counted.items():
        by_group[group][hour] = counts
    lead = max(0, first_asked - first)
    return {group: History.of(counts, first, after, lead) for group, counts in by_group.items()}
