"""Objectives and what was counted for them, for the tests of reports, with everything ordinary filled in."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from gradwatch_slo.counts import Counts, Group
from gradwatch_slo.durations import Duration
from gradwatch_slo.indicators import Measure, Selection, SuccessRate
from gradwatch_slo.objective import Objective
from gradwatch_slo.objectives import default_objectives
from gradwatch_slo.report import ObjectiveReport, reports_of
from gradwatch_slo.windows import TimeWindow

NOW = datetime(2026, 3, 29, 12, tzinfo=UTC)
SUCCESS = SuccessRate()
# Those of success and convergence, which everybody has runs for.
DEFAULTS = default_objectives().objectives[:3]


def objective(measure: Measure = SUCCESS, **changes: Any) -> Objective:
    """A 90 % objective over 28 rolling days."""
    ordinary: dict[str, Any] = {
        "name": "an-objective",
        "indicator": "an-indicator",
        "target": Decimal("0.9"),
        "window": TimeWindow(Duration(28, "d")),
        "selection": Selection(),
    }
    return Objective(measure=measure, **(ordinary | changes))


def reports(each: Objective, counts: Mapping[Group, Counts]) -> list[ObjectiveReport]:
    """What an objective reports now."""
    return reports_of(each, each.window.at(NOW), counts)


def report(bad: int, total: int, measure: Measure = SUCCESS, **changes: Any) -> ObjectiveReport:
    """The report of an objective without groups."""
    (only,) = reports(objective(measure, **changes), {(): Counts(total - bad, bad)})
    return only


def of_production(bad: int, total: int) -> list[ObjectiveReport]:
    """All default objectives, of which only the first has counted anything."""
    first, *others = DEFAULTS
    return [
        *reports(first, {("production",): Counts(total - bad, bad)}),
        *(each for other in others for each in reports(other, {})),
    ]
