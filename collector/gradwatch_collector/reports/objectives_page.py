"""The report of objectives as a page of one file: verdicts in words, pictures, costs, runs to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from fractions import Fraction
from functools import cache, partial
from typing import Final

from sqlalchemy import Connection

from gradwatch_collector.objectives.counting import Tallies
from gradwatch_collector.objectives.courses import Courses, mondays, pieces
from gradwatch_collector.objectives.evaluation import bad_slices
from gradwatch_collector.objectives.indicator import Indicator
from gradwatch_collector.objectives.spending import Spending, about, spending
from gradwatch_collector.objectives.spreads import spreads
from gradwatch_collector.objectives.worst_runs import MOST_RUNS, BadRun, worst_runs
from gradwatch_collector.reports import wording
from gradwatch_collector.reports.objective_pictures import (
    budget_picture,
    cost_picture,
    spread_picture,
    weeks_picture,
)
from gradwatch_collector.reports.page import render_page
from gradwatch_collector.reports.pictures import Picture
from gradwatch_collector.reports.runs_to_look_at import runs_told
from gradwatch_collector.runs.facts import moment, nanos
from gradwatch_slo.cost import PriceTable
from gradwatch_slo.indicators import Convergence
from gradwatch_slo.movement import budget, movement, sli_change
from gradwatch_slo.objective import Objective
from gradwatch_slo.periods import MOMENT
from gradwatch_slo.render import budget_left, sli
from gradwatch_slo.report import ObjectiveReport
from gradwatch_slo.verdict import Verdict
from gradwatch_slo.windows import Window
from gradwatch_slo.wording import amount, budget_percent, counted, group, length, percent, target_percent

# A page that can be sent: pictures and runs of the sickest, and no more rows than people read.
_MOST_PICTURED: Final = 12
_MOST_LISTED: Final = 500
_Reports = Sequence[tuple[Objective, ObjectiveReport]]
# Courses are made once for all groups and objectives that share them: of an indicator, by edges.
_Courses = Callable[[Indicator, tuple[int, ...]], Courses]
_TONES: Final = {
    Verdict.MET: "good",
    Verdict.BREACHED: "bad",
    Verdict.UNCERTAIN: "doubt",
    Verdict.INSUFFICIENT_DATA: "soft",
}
_UNPICTURED: Final = (
    "It is judged by slices of time: the pictures of its budget and weeks, which are of single events,"
    " are left out."
)
_SICKEST_FIRST: Final = (Verdict.BREACHED, Verdict.UNCERTAIN, Verdict.MET, Verdict.INSUFFICIENT_DATA)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageOptions:
    """``zone``: of dates. ``prices``: for costs. ``url``: of a collector that runs are linked to."""

    zone: tzinfo
    prices: PriceTable | None = None
    url: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveTold:
    """An objective of one group, in words. ``meter``: per cent of the budget left, from 0 to 100.

    ``unpictured``: which pictures are left out and why; empty where all are there.
    """

    name: str
    group: str
    verdict: str
    tone: str
    sli: str
    target: str
    budget_left: str
    meter: int
    summary: str
    facts: tuple[tuple[str, str], ...]
    movement: str
    movement_tone: str
    unpictured: str


def objectives_page(
    connection: Connection, reports: _Reports, warnings: Sequence[str], now: int, options: PageOptions
) -> str:
    """Return the page. ``now``: the moment that the reports are of, Unix nanoseconds."""
    as_of, zone = moment(now), options.zone
    reports = sorted(reports, key=lambda each: _sickness(each[1]))
    tallies = Tallies(connection)
    courses = cache(partial(Courses, tallies))
    pictured = [each for each in reports if each[1].total][:_MOST_PICTURED]
    sick = [each for each in reports if each[1].bad][:_MOST_PICTURED]
    start, end = _span([report.window for _, report in reports], as_of)
    spent = None
    if options.prices is not None:
        chosen = about([objective for objective, _ in reports], start, end)
        spent = spending(connection, chosen, options.prices)
    verdicts = [report.verdict for _, report in reports]
    return render_page(
        "objectives.html",
        headline=_how_many(verdicts),
        tone=_TONES[verdicts[0]] if verdicts else "soft",
        warnings=warnings,
        listed=[_told(*each, zone) for each in reports[:_MOST_LISTED]],
        unlisted=_how_many(verdicts[_MOST_LISTED:]),
        detailed=[
            (_told(*each, zone), tuple(_pictures(connection, *each, courses, as_of, zone, place)))
            for place, each in enumerate(pictured)
        ],
        is_cut=sum(report.total > 0 for _, report in reports) > len(pictured),
        cost=cost_picture(spent) if spent is not None and spent.by_team else None,
        cost_words=_cost_words(spent, _window_words(moment(start), moment(end), zone)),
        runs=runs_told(_bad_runs(connection, sick, tallies, courses, as_of), zone, options.url),
        most_objectives=_MOST_PICTURED,
        most_runs=MOST_RUNS,
        as_of=_time(as_of, zone),
        zone=str(zone),
    )


def _how_many(verdicts: Iterable[Verdict]) -> str:
    counts = Counter(verdicts)
    return ", ".join(f"{counts[each]} {each.value}" for each in _SICKEST_FIRST if counts[each])


def _span(windows: Sequence[Window], as_of: datetime) -> tuple[int, int]:
    """Return from when to when the windows go together, as far as they have been."""
    stretches = [_stretch(each, as_of) for each in windows]
    return (
        min((start for start, _ in stretches), default=nanos(as_of)),
        max((end for _, end in stretches), default=nanos(as_of)),
    )


def _stretch(window: Window, as_of: datetime) -> tuple[int, int]:
    return nanos(window.start), nanos(min(_end(window), as_of + MOMENT))


def _end(window: Window) -> datetime:
    return window.end + MOMENT if window.rolling else window.end


def _pictures(
    connection: Connection,
    objective: Objective,
    report: ObjectiveReport,
    courses: _Courses,
    as_of: datetime,
    zone: tzinfo,
    place: int,
) -> Iterator[Picture]:
    start, end = _stretch(report.window, as_of)
    # Courses are of events, and the report of slices would be contradicted by them.
    if objective.slicing is None:
        values, indicator = tuple(report.group.values()), Indicator.of(objective)
        weeks = mondays(report.window.start, min(_end(report.window), as_of + MOMENT), zone)
        spent = courses(indicator, tuple(pieces(start, end))).of(values)
        by_week = courses(indicator, tuple(map(nanos, weeks))).of(values)
        yield budget_picture(report, spent, f"budget-{place}", zone)
        yield weeks_picture(report, by_week, f"weeks-{place}", zone)
    if isinstance(objective.measure, Convergence) and (
        kinds := spreads(connection, objective, report.group, start, end)
    ):
        yield spread_picture(kinds, f"spread-{place}")


def _bad_runs(
    connection: Connection, sick: _Reports, tallies: Tallies, courses: _Courses, as_of: datetime
) -> Iterator[tuple[Objective, list[BadRun]]]:
    for objective, report in sick:
        values, going_on = tuple(report.group.values()), 0
        if objective.slicing is not None:
            slices = bad_slices(tallies, objective, objective.slicing, report.window, as_of)
            stretches = slices.get(values, {})
        else:
            edges = tuple(pieces(*_stretch(report.window, as_of)))
            stretches = courses(Indicator.of(objective), edges).of(values).stretches
            # What goes on and is known to be bad is no part of any.
            going_on = report.events.bad - sum(each.bad for each in stretches.values())
        runs = worst_runs(connection, objective, report.group, stretches, going_on=going_on, now=nanos(as_of))
        yield objective, runs


def _sickness(report: ObjectiveReport) -> tuple[int, float, bool]:
    return _SICKEST_FIRST.index(report.verdict), report.budget_remaining, report.total == 0


def _told(objective: Objective, report: ObjectiveReport, zone: tzinfo) -> ObjectiveTold:
    change = sli_change(report)
    return ObjectiveTold(
        name=report.name,
        group=group(report.group),
        verdict=report.verdict.value,
        tone=_TONES[report.verdict],
        sli=sli(report),
        target=target_percent(report.target),
        budget_left=budget_left(report),
        meter=round(100 * max(0.0, min(1.0, report.budget_remaining))),
        summary=report.summary,
        facts=tuple(_facts(report, zone)),
        movement=movement(report),
        movement_tone="" if not change else "good" if change > 0 else "bad",
        unpictured="" if objective.slicing is None else _UNPICTURED,
    )


def _facts(report: ObjectiveReport, zone: tzinfo) -> Iterator[tuple[str, str]]:
    low, high = (percent(Fraction(each)) for each in report.interval)
    rate = f"{sli(report)}; the true rate may be {low} to {high}"
    yield "Good", f"{amount(report.good, report.total)} of {report.total}, {rate}"
    yield "Target", target_percent(report.target)
    plural = "" if report.allowed == 1 else "s"
    events = f"{amount(report.allowed, report.bad)} bad event{plural} allowed"
    events += f", {amount(report.bad, report.allowed)} seen"
    yield "Budget", f"{events}: {budget_percent(budget(report))} left"
    whole, left = report.budget_time, report.budget_time_left
    if whole is not None and left is not None:
        rest = f"{length(left)} of them left" if left else "all of it spent"
        yield "As time", f"{length(whole)} in which everything might fail, {rest}"
    window = report.window
    yield "Window", f"{window.duration}, {_window_words(window.start, window.end, zone)}"


def _cost_words(found: Spending | None, span: str) -> str:
    if found is None:
        return "Left out: there are no prices (--prices FILE)."
    if not found.priced:
        return f"Left out: of {counted(found.seen, 'run')} that were looked at none has a known cost."
    words = f"Of {counted(found.total, 'run')} that ended, {span}"
    if found.seen < found.total:
        share = wording.share(float(found.seen_time))
        words = f"Of the {found.seen} longest of {found.total} runs that ended, {span}: {share} of all time"
    unknown = found.seen - found.priced
    known = "the cost of each is known" if not unknown else f"the cost of {unknown} is not known"
    return f"{words}; {known}. Runs that no objective counts (cancelled, excluded) are among them."


def _window_words(start: datetime, end: datetime, zone: tzinfo) -> str:
    return f"{_time(start, zone)} to {_time(end, zone)}"


def _time(at: datetime, zone: tzinfo) -> str:
    return f"{at.astimezone(zone):%Y-%m-%d %H:%M}"
