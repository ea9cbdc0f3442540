"""How fast objectives burn their budgets now, over the look-backs that their alert rules read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy import Connection

from gradwatch_collector.objectives.counting import Tallies
from gradwatch_collector.objectives.indicator import Indicator
from gradwatch_collector.runs.facts import moment, nanos
from gradwatch_slo.budget import burn_rate
from gradwatch_slo.counts import Counts, Group
from gradwatch_slo.durations import Duration
from gradwatch_slo.objective import Objective
from gradwatch_slo.rules import look_backs


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
    counted: dict[tuple[Indicator, str], Mapping[Group, Counts]] = {}
    found: list[BurnRate] = []
    for objective in objectives:
        indicator = Indicator.of(objective)
        for look_back in look_backs(objective):
            if (indicator, look_back) not in counted:
                counted[indicator, look_back] = _count(tallies, indicator, look_back, now)
            for group, counts in counted[indicator, look_back].items():
                rate = burn_rate(counts.bad, counts.total, objective.target)
                if rate is not None:
                    fields = dict(zip(objective.group_by, group, strict=True))
                    found.append(BurnRate(objective.name, fields, look_back, float(rate)))
    return found


def _count(tallies: Tallies, indicator: Indicator, look_back: str, now: int) -> Mapping[Group, Counts]:
    start = nanos(Duration.parse(look_back).shift(moment(now), -1))
    return tallies.over(indicator, start, now + 1) if tallies.is_quick(indicator, start, now) else {}
