"""Objectives evaluated over runs: one report for every objective and group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import product
from types import MappingProxyType
from typing import Any

from gradwatch_slo.baseline import baseline_thresholds
from gradwatch_slo.budget import budget_allows, budget_remaining
from gradwatch_slo.indicators import Convergence, Measure, Quality, SuccessRate
from gradwatch_slo.objective import Objective
from gradwatch_slo.runs import RunFacts
from gradwatch_slo.standing import Standing, standings
from gradwatch_slo.statistics import binomial_upper_tail, wilson_interval
from gradwatch_slo.verdict import FEWEST_EVENTS, Verdict, alerts, verdict
from gradwatch_slo.windows import Window

Group = tuple[str | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveReport:
    """How one objective stands for one group of runs. ``sli`` is None when nothing was counted.

    ``interval``: Wilson 95 %. ``p_value``: exact binomial P(X >= bad | total, 1 - target); not in
    the JSON.
    """

    name: str
    indicator: str
    group: Mapping[str, str | None]
    target: Decimal
    sli: float | None
    good: int
    bad: int
    total: int
    verdict: Verdict
    interval: tuple[float, float]
    budget_remaining: float
    window: Window
    summary: str
    p_value: float

    @property
    def alerting(self) -> bool:
        """Whether the bad events are reason enough to notify somebody."""
        return alerts(self.bad, self.p_value)


def evaluate(
    objectives: Iterable[Objective], runs: Iterable[RunFacts], now: datetime, *, as_of: datetime | None = None
) -> list[ObjectiveReport]:
    """Evaluate objectives by what is known at ``now``, over the windows at ``as_of`` (default: now).

    ``runs``: all that are known, older than the windows too: they are the baseline of time-to-convergence.
    Reports follow the order of the objectives. When ``where`` limits every field of ``groupBy``, each of its
    values is reported, runs or no runs; else the groups that have runs, sorted. An objective never vanishes.
    """
    moment = now if as_of is None else as_of
    known = standings(runs, now, moment)
    objectives = list(objectives)
    needs_baselines = any(isinstance(objective.measure, Convergence) for objective in objectives)
    baselines = baseline_thresholds(known) if needs_baselines else {}
    return [report for objective in objectives for report in _reports(objective, known, moment, baselines)]


def _reports(
    objective: Objective, known: Sequence[Standing], as_of: datetime, baselines: Mapping[str, timedelta]
) -> list[ObjectiveReport]:
    window = objective.window.at(as_of)
    expected = list(_expected_groups(objective))
    tallies = {group: _Tally() for group in expected}
    for standing in known:
        # What goes on has not ended anywhere else: it belongs to the window that is open.
        within = standing.ended is None or window.contains(standing.ended)
        if not within or not objective.selection.matches(standing):
            continue
        group = tuple(getattr(standing.run, name) for name in objective.group_by)
        tallies.setdefault(group, _Tally()).add(_judge(objective.measure, standing, as_of, baselines))
    if not tallies:
        return [_report(objective, (), window, 0, 0)]
    return [
        _report(objective, group, window, tally.good, tally.bad)
        for group, tally in (tallies.items() if expected else sorted(tallies.items(), key=_by_name))
    ]


@dataclass(slots=True)
class _Tally:
    good: int = 0
    bad: int = 0

    def add(self, quality: Quality) -> None:
        self.good += quality is Quality.GOOD
        self.bad += quality is Quality.BAD


def _by_name(item: tuple[Group, _Tally]) -> list[str]:
    return [value or "" for value in item[0]]


def _expected_groups(objective: Objective) -> Iterable[Group]:
    """Yield the groups that exist by definition: all their fields are limited to listed values."""
    limits = dict(objective.selection.fields)
    if all(name in limits for name in objective.group_by):
        return product(*(limits[name] for name in objective.group_by))
    return ()


def _judge(
    measure: Measure, standing: Standing, as_of: datetime, baselines: Mapping[str, timedelta]
) -> Quality:
    if isinstance(measure, Convergence):
        return measure.judge(standing, as_of, baselines)
    return measure.judge(standing)


def _report(objective: Objective, group: Group, window: Window, good: int, bad: int) -> ObjectiveReport:
    total = good + bad
    return ObjectiveReport(
        name=objective.name,
        indicator=objective.indicator,
        group=MappingProxyType(dict(zip(objective.group_by, group, strict=False))),
        target=objective.target,
        sli=good / total if total else None,
        good=good,
        bad=bad,
        total=total,
        verdict=verdict(bad, total, objective.target),
        interval=wilson_interval(good, total),
        budget_remaining=float(budget_remaining(bad, total, objective.target)),
        window=window,
        summary=_summary(objective.measure, bad, total, objective.target),
        p_value=binomial_upper_tail(bad, total, objective.target),
    )


def _summary(measure: Measure, bad: int, total: int, target: Decimal) -> str:
    if total == 0:
        return "no runs counted; the budget is unspent"
    match measure:
        case SuccessRate():
            what = "failed"
        case Convergence():
            what = "did not reach the target in time"
        case _:
            what = "counted as bad"
    runs = "run" if total == 1 else "runs"
    sentence = f"{bad} of {total} {runs} {what}; the budget allows {budget_allows(total, target)}"
    return sentence if total >= FEWEST_EVENTS else f"{sentence}; too few to judge, {FEWEST_EVENTS} are needed"


def to_json(report: ObjectiveReport) -> dict[str, Any]:
    """Return the ``objective`` of the JSON interface; the schema is ``schemas/objective.schema.json``."""
    window = report.window
    return {
        "name": report.name,
        "indicator": report.indicator,
        "group": dict(report.group),
        "target": float(report.target),
        "sli": report.sli,
        "good": report.good,
        "bad": report.bad,
        "total": report.total,
        "verdict": report.verdict.value,
        "interval": list(report.interval),
        "budget_remaining": report.budget_remaining,
        "window": {
            "duration": window.duration,
            "rolling": window.rolling,
            "from": rfc3339(window.start),
            "to": rfc3339(window.end),
        },
        "summary": report.summary,
    }


def rfc3339(moment: datetime) -> str:
    """Return an aware datetime as RFC 3339 in UTC: ``2026-01-31T12:00:00Z``, fractions only where needed."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"
