"""How the budget of an objective was spent over its window: ``schemas/slo-course-list.schema.json``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from sqlalchemy import ColumnElement, Connection

from gradwatch_collector.api.shapes import Json, timestamp
from gradwatch_collector.objectives.counting import Tallies
from gradwatch_collector.objectives.courses import Course, Courses, pieces
from gradwatch_collector.objectives.evaluation import evaluate_objectives
from gradwatch_collector.objectives.indicator import Indicator
from gradwatch_collector.runs.facts import nanos
from gradwatch_slo.budget import budget_remaining
from gradwatch_slo.objective import Objective
from gradwatch_slo.report import ObjectiveReport


def list_courses(
    connection: Connection, objectives: Sequence[Objective], now: int, *conditions: ColumnElement[bool]
) -> Json:
    """Return ``{"courses": [...]}``: of each group of these objectives what was left of the budget, and when.

    The share is of what the window allows, by all events counted up to ``now`` (Unix nanoseconds): the last
    one is that of the report. Objectives of slices have no course: theirs are not single events.
    """
    courses: list[Json] = []
    tallies = Tallies(connection, *conditions)
    for objective in objectives:
        if objective.slicing is not None:
            continue
        reports = evaluate_objectives(connection, [objective], now, *conditions)
        start, end = nanos(reports[0].window.start), min(nanos(reports[0].window.end), now) + 1_000
        told = Courses(tallies, Indicator.of(objective), pieces(start, end))
        courses += [_course_json(report, told.of(tuple(report.group.values()))) for report in reports]
    return {"courses": courses}


def _course_json(report: ObjectiveReport, course: Course) -> Json:
    spent = [0, *accumulate(each.bad for each in course.counts)]
    # What goes on and is known to be bad is no part of any stretch.
    spent[-1] = report.events.bad
    return {
        "name": report.name,
        "group": dict(report.group),
        "window_end": timestamp(nanos(report.window.end)),
        "times": [timestamp(edge) for edge in course.edges],
        "bad": spent,
        "budget_remaining": [float(budget_remaining(bad, report.total, report.target)) for bad in spent],
    }
