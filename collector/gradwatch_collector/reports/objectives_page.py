"""The report of objectives as a page of one file: verdicts in words, pictures, costs, runs to look at."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from fractions import Fraction
from typing import Final
from urllib.parse import quote

from sqlalchemy import Connection

from gradwatch_collector.objectives.counting import Tallies
from gradwatch_collector.objectives.courses import Courses, mondays, pieces
from gradwatch_collector.objectives.indicator import Indicator
from gradwatch_collector.objectives.spending import Spending, spending
from gradwatch_collector.objectives.spreads import spreads
from gradwatch_collector.objectives.worst_runs import WorstRun, about, worst_runs
from gradwatch_collector.reports import wording
from gradwatch_collector.reports.objective_pictures import (
    budget_picture,
    cost_picture,
    spread_picture,
    weeks_picture,
)
from gradwatch_collector.reports.page import render_page
from gradwatch_collector.reports.pictures import Picture
from gradwatch_collector.runs.facts import moment, nanos
from gradwatch_slo.cost import PriceTable
from gradwatch_slo.indicators import Convergence
from gradwatch_slo.movement import movement, sli_change
from gradwatch_slo.objective import Objective
from gradwatch_slo.periods import MOMENT
from gradwatch_slo.render import budget_left, sli
from gradwatch_slo.report import ObjectiveReport
from gradwatch_slo.verdict import Verdict
from gradwatch_slo.windows import Window
from gradwatch_slo.wording import amount, counted, group, length, percent, target_percent, whole_percent

# A page that can be sent: pictures of the sickest, and no more rows than people read.
_MOST_PICTURED: Final = 12
_MOST_LISTED: Final = 500
_RUNS: Final = "/api/v1/runs/"
_SECOND: Final = 1_000_000_000
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
    pictures: tuple[Picture, ...]
    unpictured: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTold:
    """A run to look at: what is wrong with it, how to see more, and where."""

    run_id: str
    whose: str
    ended: str
    what: str
    tone: str
    command: str
    link: str | None


def objectives_page(
    connection: Connection,
    reports: Sequence[tuple[Objective, ObjectiveReport]],
    warnings: Sequence[str],
    now: int,
    options: PageOptions,
) -> str:
    """Return the page. ``now``: the moment that the reports are of, Unix nanoseconds."""
    pictured = _pictured(connection, reports, moment(now), options.zone)
    told = [
        _told(objective, report, pictured.get(place, ()), options.zone)
        for place, (objective, report) in enumerate(reports)
    ]
    start, end = _span([report.window for _, report in reports], now)
    chosen = about(connection, [objective for objective, _ in reports], start, end)
    counts = Counter(report.verdict for _, report in reports)
    spent = None if options.prices is None else spending(connection, chosen, options.prices)
    return render_page(
        "objectives.html",
        headline=", ".join(f"{counts[each]} {each.value}" for each in _SICKEST_FIRST if counts[each]),
        tone=next((_TONES[each] for each in _SICKEST_FIRST if counts[each]), "soft"),
        warnings=warnings,
        listed=told[:_MOST_LISTED],
        unlisted=max(0, len(told) - _MOST_LISTED),
        detailed=[told[place] for place in sorted(pictured)],
        is_cut=sum(report.total > 0 for _, report in reports) > len(pictured),
        cost=cost_picture(spent) if spent is not None and spent.by_team else None,
        cost_words=_cost_words(spent),
        worst=[_run_told(each, options) for each in worst_runs(connection, chosen)],
        span=_window_words(moment(start), moment(end), options.zone),
        as_of=_time(moment(now), options.zone),
        zone=str(options.zone),
    )


def _span(windows: Sequence[Window], now: int) -> tuple[int, int]:
    """Return from when to when the windows go together, as far as they have been."""
    if not windows:
        return now, now
    ends = max(nanos(_end(each)) for each in windows)
    return min(nanos(each.start) for each in windows), min(ends, now + 1000)


def _end(window: Window) -> datetime:
    return window.end + MOMENT if window.rolling else window.end


def _pictured(
    connection: Connection,
    reports: Sequence[tuple[Objective, ObjectiveReport]],
    as_of: datetime,
    zone: tzinfo,
) -> dict[int, tuple[Picture, ...]]:
    """Return the pictures of the sickest, by their place among the reports."""
    tallies = Tallies(connection)
    courses: dict[tuple[Indicator, Window], tuple[Courses, Courses]] = {}
    found: dict[int, tuple[Picture, ...]] = {}
    places = [place for place, (_, report) in enumerate(reports) if report.total]
    for place in sorted(places, key=lambda place: _sickness(reports[place][1]))[:_MOST_PICTURED]:
        objective, report = reports[place]
        indicator, window = Indicator.of(objective), report.window
        start, end = nanos(window.start), nanos(min(_end(window), as_of + MOMENT))
        pictures: list[Picture] = []
        # Courses are of events, and the report of slices would be contradicted by them.
        if objective.slicing is None:
            if (indicator, window) not in courses:
                weeks = [nanos(at) for at in mondays(window.start, min(_end(window), as_of + MOMENT), zone)]
                courses[indicator, window] = (
                    Courses(tallies, indicator, pieces(start, end)),
                    Courses(tallies, indicator, weeks),
                )
            spent, by_week = courses[indicator, window]
            values = tuple(report.group.values())
            pictures += [
                budget_picture(report, spent.of(values), f"budget-{place}", zone),
                weeks_picture(report, by_week.of(values), f"weeks-{place}", zone),
            ]
        if isinstance(objective.measure, Convergence) and (
            kinds := spreads(connection, objective, report.group, start, end)
        ):
            pictures.append(spread_picture(kinds, f"spread-{place}"))
        found[place] = tuple(pictures)
    return found


def _sickness(report: ObjectiveReport) -> tuple[int, float]:
    return _SICKEST_FIRST.index(report.verdict), report.budget_remaining


def _told(
    objective: Objective, report: ObjectiveReport, pictures: tuple[Picture, ...], zone: tzinfo
) -> ObjectiveTold:
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
        pictures=pictures,
        unpictured="" if objective.slicing is None else _UNPICTURED,
    )


def _facts(report: ObjectiveReport, zone: tzinfo) -> Iterator[tuple[str, str]]:
    low, high = (percent(Fraction(each)) for each in report.interval)
    rate = f"{sli(report)}; the true rate may be {low} to {high}"
    yield "Good", f"{amount(report.good)} of {report.total}, {rate}"
    yield "Target", target_percent(report.target)
    budget = f"{counted(report.allowed, 'bad event')} allowed, {amount(report.bad)} seen: "
    yield "Budget", f"{budget}{whole_percent(report.budget_remaining)} left"
    whole, left = report.budget_time, report.budget_time_left
    if whole is not None and left is not None:
        rest = f"{length(left)} of them left" if left else "all of it spent"
        yield "As time", f"{length(whole)} in which everything might fail, {rest}"
    window = report.window
    yield "Window", f"{window.duration}, {_window_words(window.start, window.end, zone)}"


def _cost_words(found: Spending | None) -> str:
    if found is None:
        return "Left out: there are no prices (--prices FILE)."
    if not found.priced:
        return f"Left out: of {counted(found.seen, 'run')} that were looked at none has a known cost."
    words = f"Of {counted(found.total, 'run')} that ended"
    if found.seen < found.total:
        words = f"Of the {found.seen} longest runs, {wording.share(float(found.seen_time))} of the time of all"
    unknown = found.seen - found.priced
    return f"{words}; {'the cost of each is known' if not unknown else f'the cost of {unknown} is not known'}."


def _run_told(run: WorstRun, options: PageOptions) -> RunTold:
    what = run.status.value + (f" ({run.reason})" if run.reason else "")
    took = wording.duration(run.took / _SECOND)
    if run.granted is None:
        words, tone = f"{what} after {took}", "bad"
    else:
        granted = wording.duration(run.granted / _SECOND)
        words, tone = f"slow: {took} to its target, {granted} granted", "doubt"
    return RunTold(
        run_id=run.run_id,
        whose=", ".join(filter(None, (run.job, run.team, run.tier))),
        ended=_time(moment(run.ended_at), options.zone),
        what=words,
        tone=tone,
        command=f"gradwatch runs report {shlex.quote(run.run_id)}",
        link=None if options.url is None else f"{options.url.rstrip('/')}{_RUNS}{quote(run.run_id, safe='')}",
    )


def _window_words(start: datetime, end: datetime, zone: tzinfo) -> str:
    return f"{_time(start, zone)} to {_time(end, zone)}"


def _time(at: datetime, zone: tzinfo) -> str:
    return f"{at.astimezone(zone):%Y-%m-%d %H:%M}"
