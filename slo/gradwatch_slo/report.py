"""How objectives stand, given what was counted: one report for every objective and group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import product
from types import MappingProxyType
from typing import Any, Final

from gradwatch_slo.budget import budget_allows, budget_remaining, budget_time
from gradwatch_slo.counts import Counts, Group
from gradwatch_slo.indicators import (
    Convergence,
    CountRatio,
    Measure,
    Operator,
    SuccessRate,
    Threshold,
    UnitRatio,
)
from gradwatch_slo.objective import Objective
from gradwatch_slo.slices import Slicing
from gradwatch_slo.statistics import binomial_upper_tail, wilson_interval
from gradwatch_slo.verdict import FEWEST_EVENTS, Verdict, alerts, verdict
from gradwatch_slo.windows import Window

# What is true of a value that does not compare so.
_OTHERWISE: Final[Mapping[Operator, str]] = {"gt": "<=", "gte": "<", "lt": ">=", "lte": ">"}


NOTHING_LOST: Final[Mapping[Group, Fraction]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveReport:
    """How one objective stands for one group of runs. ``sli`` is None when nothing was counted.

    ``interval``: Wilson 95 %. ``p_value``: exact binomial P(X >= bad | total, 1 - target). ``share``: the SLI
    before it was rounded. These two are not in the JSON. ``previous``: how it stood in the window before, where
    that was asked for.
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
    share: Fraction | None
    previous: ObjectiveReport | None = None

    @property
    def alerting(self) -> bool:
        """Whether the bad events are reason enough to notify somebody."""
        return alerts(self.bad, self.p_value)

    @property
    def lost(self) -> Fraction:
        """How many events were bad, exactly: of time slices as much as they were."""
        return Fraction(0) if self.share is None else self.total * (1 - self.share)

    @property
    def budget_time(self) -> timedelta | None:
        """For how long everything might fail within the window (`budget.budget_time`)."""
        return budget_time(self.window.end - self.window.start, self.total, self.target)

    @property
    def budget_time_left(self) -> timedelta | None:
        """What is left of `budget_time`: nothing once it is overspent."""
        whole = self.budget_time
        if whole is None:
            return None
        left = max(Fraction(), budget_remaining(self.lost, self.total, self.target))
        return timedelta(microseconds=int(whole // timedelta(microseconds=1) * left))


def reports_of(
    objective: Objective,
    window: Window,
    counts: Mapping[Group, Counts],
    lost: Mapping[Group, Fraction] = NOTHING_LOST,
) -> list[ObjectiveReport]:
    """Return how an objective stands for each group, given what was counted in the window.

    ``lost``: how many events were bad, where some were so in part and the counts tell whole ones (time slices).

    When the objective's selection limits every field of ``group_by``, each of its values is reported, counted
    or not; else the groups of which something was counted, sorted. An objective never vanishes: where nothing
    was counted it is reported once, by the fields that its selection pins to one value.
    """
    groups = list(_expected_groups(objective)) or sorted(counts, key=_by_name)
    if not groups:
        return [_report(objective, _pinned(objective), window, Counts(), None)]
    return [
        _report(
            objective,
            dict(zip(objective.group_by, group, strict=True)),
            window,
            counts.get(group, Counts()),
            lost.get(group),
        )
        for group in groups
    ]


def _by_name(group: Group) -> list[str]:
    return [value or "" for value in group]


def _expected_groups(objective: Objective) -> Iterable[Group]:
    """Yield the groups that exist by definition: all their fields are limited to listed values."""
    limits = dict(objective.selection.fields)
    if all(name in limits for name in objective.group_by):
        return product(*(limits[name] for name in objective.group_by))
    return ()


def _pinned(objective: Objective) -> dict[str, str]:
    limits = dict(objective.selection.fields)
    return {name: limits[name][0] for name in objective.group_by if len(limits.get(name, ())) == 1}


def _report(
    objective: Objective, group: Mapping[str, str | None], window: Window, counts: Counts, lost: Fraction | None
) -> ObjectiveReport:
    good, bad, total = counts.good, counts.bad, counts.total
    exactly = bad if lost is None else lost
    share = Fraction(total - exactly) / total if total else None
    return ObjectiveReport(
        name=objective.name,
        indicator=objective.indicator,
        group=MappingProxyType(group),
        target=objective.target,
        sli=None if share is None else float(share),
        good=good,
        bad=bad,
        total=total,
        verdict=verdict(exactly, total, objective.target),
        interval=wilson_interval(good, total),
        budget_remaining=float(budget_remaining(exactly, total, objective.target)),
        window=window,
        summary=_summary(objective, exactly, total),
        p_value=binomial_upper_tail(bad, total, objective.target),
        share=share,
    )


def _summary(objective: Objective, bad: int | Fraction, total: int) -> str:
    unit, what = _words(objective.measure) if objective.slicing is None else _words_of(objective.slicing)
    target = objective.target
    if total == 0:
        return f"no {unit}s counted; the budget is unspent"
    units = unit if total == 1 else f"{unit}s"
    said = str(int(bad)) if bad == int(bad) else f"{float(bad):.4g}"
    sentence = f"{said} of {total} {units} {what}; the budget allows {budget_allows(total, target)}"
    return sentence if total >= FEWEST_EVENTS else f"{sentence}; too few to judge, {FEWEST_EVENTS} are needed"


def _words_of(slicing: Slicing) -> tuple[str, str]:
    return "slice", "were bad" if slicing.target is not None else "were lost in all"


def _words(measure: Measure) -> tuple[str, str]:
    """Return what is counted, and what is said of the bad ones."""
    match measure:
        case SuccessRate():
            return "run", "failed"
        case Convergence():
            return "run", "did not reach the target in time"
        case CountRatio():
            return "run", "counted as bad"
        case Threshold(value, operator, bound):
            return "run", f"had {value.replace('_', ' ')} {_OTHERWISE[operator]} {bound.normalize():f}"
        case UnitRatio(unit, fault):
            return unit, "failed" if fault == "failed" else f"were {fault}"


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
