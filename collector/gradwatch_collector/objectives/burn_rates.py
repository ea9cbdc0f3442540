"""How fast objectives burn their budgets now, over the look-backs that their alert rules read."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from sqlalchemy import Connection

from gradwatch_collector.objectives.counting import Tallies
from gradwatch_collector.objectives.evaluation import count_slices
from gradwatch_collector.objectives.indicator import Indicator
from gradwatch_collector.runs.facts import moment, nanos
from gradwatch_slo.budget import burn_rate
from gradwatch_slo.counts import Group
from gradwatch_slo.durations import Duration
from gradwatch_slo.objective import Objective
from gradwatch_slo.rules import look_backs
from gradwatch_slo.slices import Slicing, edges
from gradwatch_slo.windows import TimeWindow


@dataclass(frozen=True, slots=True)
class BurnRate:
    """Of one objective and group: the error rate over a look-back such as ``1h``, by what the target allows."""

    name: str
    group: Mapping[str, str | None]
    look_back: str
    rate: float


def burn_rates(connection: Connection, objectives: Iterable[Objective], now: int) -> list[BurnRate]:
    """Return the burn rates of objectives that count many events, and what alert policies ask for of others.

    ``now`` in Unix nanoseconds. What a run had counts when it ended. There is no rate where nothing was
    counted, nor where many runs would have to be read, until they are counted.
    """
    tallies = Tallies(connection)
    counted: dict[tuple[Indicator, TimeWindow, Slicing | None, str], Mapping[Group, Rate]] = {}
    found: list[BurnRate] = []
    for objective in objectives:
        indicator = Indicator.of(objective)
        for look_back in look_backs(objective):
            # Slices are those of the window.
            key = indicator, objective.window, objective.slicing, look_back
            if key not in counted:
                counted[key] = _rates(tallies, objective, look_back, now)
            for group, (bad, total) in counted[key].items():
                rate = burn_rate(bad, total, objective.target)
                if rate is not None:
                    fields = dict(zip(objective.group_by, group, strict=True))
                    found.append(BurnRate(objective.name, fields, look_back, float(rate)))
    return found


# How many of how many events were bad; of slices as much of them as was.
Rate = tuple[int | Fraction, int]


def _rates(tallies: Tallies, objective: Objective, look_back: str, now: int) -> Mapping[Group, Rate]:
    indicator, as_of = Indicator.of(objective), moment(now)
    since = Duration.parse(look_back).shift(as_of, -1)
    if not tallies.is_quick(indicator, nanos(since), now):
        return {}
    if objective.slicing is None:
        ended = tallies.over(indicator, nanos(since), now + 1)
        return {group: (each.bad, each.total) for group, each in ended.items()}
    window = objective.window.at(as_of)
    slices = edges(objective.slicing, objective.window, window, as_of)
    within = slices[bisect_left(slices, nanos(since)) :]
    counts, lost = count_slices(tallies, objective, objective.slicing, within)
    return {group: lost.get(group, (each.bad, each.total)) for group, each in counts.items()}
