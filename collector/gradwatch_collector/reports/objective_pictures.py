"""The pictures of objectives: how the budget was spent, week by week, times to target, costs by team."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, time, timedelta, tzinfo
from fractions import Fraction
from itertools import accumulate
from typing import Final

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from gradwatch_collector.objectives.courses import Course
from gradwatch_collector.objectives.spending import Spending
from gradwatch_collector.objectives.spreads import Spread
from gradwatch_collector.reports import apart, wording
from gradwatch_collector.reports.pictures import (
    BAD,
    GRID,
    LINE,
    SECOND_LINE,
    Picture,
    Ticks,
    drawing,
    is_wide,
    picture,
)
from gradwatch_collector.runs.facts import moment, nanos
from gradwatch_slo.budget import budget_remaining
from gradwatch_slo.counts import Counts
from gradwatch_slo.movement import budget
from gradwatch_slo.problems import printable
from gradwatch_slo.report import ObjectiveReport
from gradwatch_slo.statistics import wilson_interval
from gradwatch_slo.wording import budget_percent, counted, percent, target_percent, whole_percent

_HEIGHT: Final = 2.2
_NANOS: Final = 1e9
_MOST_TEAMS: Final = 12
_MOST_DAYS: Final = 7
_LONGEST_NAME: Final = 26
_MANY: Final = 10_000
# For scales on which a second and a day are to be seen.
_ROUND_TIMES: Final = (0.01, 0.1, 1, 10, 60, 600, 3600, 36_000, 360_000, 3_600_000)
_ROUND_STEPS: Final = (0.1, 0.5, 1, 5, 10, 30, 60, 300, 600, 1800, 3600, 7200, 18_000, 43_200, 86_400, 604_800)


def budget_picture(report: ObjectiveReport, course: Course, name: str, zone: tzinfo) -> Picture:
    """Draw what was left of the window's budget, of all that it allows, from its start to its end."""
    spent = [0, *accumulate(each.bad for each in course.counts)]
    # What goes on and is known to be bad is no part of any stretch.
    spent[-1] = report.events.bad
    left = [float(budget_remaining(bad, report.total, report.target)) for bad in spent]
    with drawing(_HEIGHT) as figure:
        axes = figure.subplots()
        start, end = course.edges[0], nanos(report.window.end)
        at = [(edge - start) / _NANOS for edge in course.edges]
        whole = (end - start) / _NANOS
        axes.plot([0, whole], [1, 0], color=GRID, linestyle="--", linewidth=1.2)
        axes.axhline(0, color=BAD, linewidth=0.8)
        axes.step(at, left, where="post", color=LINE)
        axes.plot(at[-1:], left[-1:], color=LINE, marker="o", markersize=4)
        axes.set_xlim(0, whole * 1.02)
        lowest = min(0.0, *left)
        axes.set_ylim(lowest - 0.05 * (1 - lowest), 1 + 0.06 * (1 - lowest))
        ticks = _days(report.window.start, report.window.end, zone)
        axes.set_xticks(
            [(each - moment(start)).total_seconds() for each, _ in ticks], [day for _, day in ticks]
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: whole_percent(value)))
        words = f"From 100 % at the start of the window to {budget_percent(budget(report))}."
        if report.budget_remaining < 0:
            first = next((edge for edge, value in zip(course.edges, left, strict=True) if value < 0), None)
            words += f" It was overspent by {moment(first):%Y-%m-%d %H:%M} UTC." if first is not None else ""
        return picture(figure, name, "Error budget left; dashed: spent evenly", words)


def weeks_picture(report: ObjectiveReport, course: Course, name: str, zone: tzinfo) -> Picture:
    """Draw the SLI of each week, with the interval in which the true rate may be, and the target."""
    shown = list(zip(course.edges, course.counts, strict=False))
    known = [(place, each) for place, (_, each) in enumerate(shown) if each.total]
    with drawing(_HEIGHT) as figure:
        axes = figure.subplots()
        lowest = float(report.target)
        for place, each in known:
            share = each.good / each.total
            low, high = wilson_interval(each.good, each.total)
            lowest = min(lowest, low)
            axes.plot([place, place], [low, high], color=GRID, linewidth=4, solid_capstyle="butt")
            colour = LINE if Fraction(each.good, each.total) >= Fraction(report.target) else BAD
            axes.plot([place], [share], color=colour, marker="o" if colour == LINE else "v", markersize=6)
        axes.axhline(float(report.target), color=SECOND_LINE, linestyle="--", linewidth=1.2)
        axes.set_ylim(max(-0.02, lowest - 0.1 * (1 - lowest)), 1 + 0.06 * (1 - lowest))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.6g} %"))
        axes.set_xlim(-0.6, len(shown) - 0.4)
        every = -(-len(shown) // 8)
        ticks = list(range((len(shown) - 1) % every, len(shown), every))
        axes.set_xticks(
            ticks,
            [
                f"{moment(shown[place][0]).astimezone(zone):%m-%d}\n{_short_count(shown[place][1].total)}"
                for place in ticks
            ],
        )
        axes.set_xlabel("week from, and events")
        axes.grid(visible=False, axis="x")
        title = f"By week, 95 % interval; dashed: target {target_percent(report.target)}"
        return picture(figure, name, title, _weeks_in_words([each for _, each in known], report))


def spread_picture(found: Sequence[Spread], name: str) -> Picture:
    """Draw how long the runs of each kind took to their target, and what is usual for it."""
    names = _kinds(found)
    with drawing(0.9 + 0.34 * len(found)) as figure:
        axes = figure.subplots()
        for place, each in enumerate(found):
            took = np.array(each.took) / _NANOS
            low, median, high = np.quantile(took, (0.1, 0.5, 0.9))
            axes.plot([took[0], took[-1]], [place, place], color=LINE, linewidth=1)
            axes.plot([low, high], [place, place], color=LINE, linewidth=6, solid_capstyle="butt", alpha=0.5)
            axes.plot([median], [place], color=LINE, marker="o", markersize=6)
            if each.usual is not None:
                usual = each.usual / _NANOS
                axes.plot([usual], [place], color=SECOND_LINE, marker="|", markersize=16, markeredgewidth=2.2)
        if is_wide(np.concatenate([np.array(each.took, float) for each in found])):
            axes.set_xscale("log")
            low, high = axes.get_xlim()
            axes.set_xticks([each for each in _ROUND_TIMES if low <= each <= high])
        else:
            axes.set_xlim(left=0)
            longest = axes.get_xlim()[1]
            step = next((each for each in _ROUND_STEPS if each * 5 > longest), longest / 5)
            axes.set_xticks(np.arange(0, longest, step))
        axes.xaxis.set_major_formatter(Ticks(apart.durations))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(range(len(found)), [_short(each) for each in names])
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        title = "Time to target: all, most (10 % to 90 %), median; stroke: usual"
        words = " ".join(
            f"{printable(kind)}: median {wording.duration(float(np.median(each.took)) / _NANOS)} of "
            f"{counted(each.count, 'run')}, usual {_usual(each)}."
            for kind, each in zip(names, found, strict=True)
        )
        return picture(figure, name, title, words)


def cost_picture(found: Spending) -> Picture:
    """Draw what the runs of each team cost, the dearest first; the rest as one."""
    teams = [(printable(team or "unknown"), amount) for team, amount in found.by_team.items()]
    rest = teams[_MOST_TEAMS:]
    shown = teams[:_MOST_TEAMS]
    if rest:
        shown.append((f"{len(rest)} others", sum((amount for _, amount in rest), Fraction())))
    with drawing(0.7 + 0.3 * len(shown)) as figure:
        axes = figure.subplots()
        amounts = [float(amount) for _, amount in shown]
        axes.barh(range(len(shown)), amounts, color=LINE, height=0.62)
        for place, (_, amount) in enumerate(shown):
            told = wording.money(amount, found.currency)
            # A page drops other spaces at the beginning of a text.
            axes.text(amounts[place], place, f"\u00a0{told}", va="center", fontsize=9)
        axes.set_yticks(range(len(shown)), [_short(name) for name, _ in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, max([*amounts, 0.01]) * 1.35)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_axisbelow(True)
        words = "; ".join(f"{name}: {wording.money(amount, found.currency)}" for name, amount in shown)
        return picture(figure, "cost", f"Cost by team, {found.currency}", f"{words}.")


def _days(start: datetime, end: datetime, zone: tzinfo) -> list[tuple[datetime, str]]:
    """Return some days of a window, by their midnights; of a short window some hours."""
    if end - start < timedelta(days=4):
        at = [start + (end - start) * index / 4 for index in range(5)]
        return [(each, f"{each.astimezone(zone):%d, %H:%M}") for each in at]
    first = start.astimezone(zone).date()
    days = [first + timedelta(days=index) for index in range((end - start).days + 2)]
    midnights = [datetime.combine(day, time(), zone) for day in days]
    within = [each for each in midnights if start <= each <= end]
    every = -(-len(within) // _MOST_DAYS)
    return [(each.astimezone(UTC), f"{each:%m-%d}") for each in within[::every]]


def _short_count(count: int) -> str:
    return str(count) if count < _MANY else f"{count / 1000:.0f}k"


def _kinds(found: Sequence[Spread]) -> list[str]:
    """Return their jobs, with model and dataset where a job alone would not tell."""
    jobs = [each.job for each in found]
    return [
        each.job if jobs.count(each.job) == 1 else " ".join(filter(None, (each.job, each.model, each.dataset)))
        for each in found
    ]


def _usual(each: Spread) -> str:
    return wording.UNKNOWN if each.usual is None else wording.duration(each.usual / _NANOS)


def _short(name: str) -> str:
    told = printable(name)
    return told if len(told) <= _LONGEST_NAME else f"{told[: _LONGEST_NAME - 1]}…"


def _weeks_in_words(known: Sequence[Counts], report: ObjectiveReport) -> str:
    if not known:
        return "Nothing was counted."
    shares = [Fraction(each.good, each.total) for each in known]
    below = sum(share < Fraction(report.target) for share in shares)
    return (
        f"{counted(len(known), 'week')} in which something was counted: lowest {percent(min(shares))}, "
        f"last {percent(shares[-1])}; {below} below the target."
    )
