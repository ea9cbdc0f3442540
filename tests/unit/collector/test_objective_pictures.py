"""The pictures of objectives draw what their titles say, at its place."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from gradwatch_collector.objectives.courses import Course
from gradwatch_collector.objectives.spreads import Spread
from gradwatch_collector.reports.objective_pictures import budget_picture, spread_picture
from gradwatch_collector.reports.pictures import Picture
from gradwatch_collector.runs.facts import nanos
from gradwatch_slo.counts import Counts
from gradwatch_slo.durations import Duration
from gradwatch_slo.indicators import Selection, SuccessRate
from gradwatch_slo.objective import Objective
from gradwatch_slo.report import ObjectiveReport, reports_of
from gradwatch_slo.windows import TimeWindow

END = datetime(2025, 10, 29, tzinfo=UTC)
SECOND = 1_000_000_000
Points = list[tuple[float, float]]


def lines(picture: Picture, *styles: str) -> list[Points]:
    """The points of the lines drawn in these styles, in the order in which they were drawn."""
    paths = re.findall(r'<path d="([^"]*)"[^>]* style="([^"]*)"', picture.svg)
    return [
        [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]
        for path, style in paths
        if set(styles) <= set(style.split("; "))
    ]


def report(counts: Counts) -> ObjectiveReport:
    objective = Objective(
        name="success", indicator="success", target=Decimal("0.9"), window=TimeWindow(Duration(28, "d")),
        measure=SuccessRate(), selection=Selection(),
    )  # fmt: skip
    (found,) = reports_of(objective, objective.window.at(END), {(): counts})
    return found


def course(*bad: int) -> Course:
    """Of the window's four weeks."""
    edges = tuple(nanos(END - timedelta(days=28 - 7 * week)) for week in range(5))
    return Course(edges, tuple(Counts(3, count) for count in bad))


@pytest.mark.parametrize("going_on", [0, 1, 3])
def test_the_budget_ends_where_the_report_says_with_what_goes_on_and_is_bad(going_on: int) -> None:
    stood = report(Counts(12, 1 + going_on))
    drawn = budget_picture(stood, course(0, 1, 0, 0), "budget", UTC)
    (evenly,) = lines(drawn, "stroke: var(--rule)", "stroke-width: 1.2")
    (zero,) = lines(drawn, "stroke: var(--bad)")
    course_drawn, *_ = lines(drawn, "stroke: var(--line)", "stroke-width: 1.3")
    all_left, none_left, at_the_end = evenly[0][1], zero[0][1], course_drawn[-1][1]
    left = (none_left - at_the_end) / (none_left - all_left)
    assert left == pytest.approx(stood.budget_remaining, abs=0.01)
    # Which is when it was spent, where no run that has ended had.
    assert ("It was overspent by 2025-10-29" in drawn.description) is (going_on > 0)


def test_most_are_those_from_the_tenth_to_the_ninetieth_per_cent() -> None:
    took = tuple(range(100 * SECOND, 201 * SECOND, SECOND))
    found = [Spread(job="digits", model=None, dataset=None, count=101, took=took, usual=None)]
    drawn = spread_picture(found, "spread")
    whole, *_ = lines(drawn, "stroke: var(--line)", "stroke-linecap: square")
    (most,) = lines(drawn, "stroke: var(--line)", "stroke-width: 6")
    first, last = whole[0][0], whole[-1][0]
    assert [(x - first) / (last - first) for x, _ in most] == pytest.approx([0.1, 0.9], abs=0.005)
