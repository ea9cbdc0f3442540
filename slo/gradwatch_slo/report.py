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
from gradwatch_slo.counts import Counts, Group, Lost
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
from gradwatch_slo.statistics import binomial_upper_tail, wilson_interval
from gradwatch_slo.verdict import FEWEST_EVENTS, Verdict, alerts, verdict
from gradwatch_slo.windows import Window
from gradwatch_slo.wording import amount, counted

# What is true of a value that does not compare so.
_OTHERWISE: Final[Mapping[Operator, str]] = {"gt": "<=", "gte": "<", "lt": ">=", "lte": ">"}


NOTHING_LOST: Final[Mapping[Group, Lost]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveReport:
    """How one objective stands for one group of runs. ``sli`` is None when nothing was counted.

    ``good``, ``bad``, ``allowed`` (how many may be bad) are whole numbers, but of time slices that may be bad
    in part what these add up to, exactly. ``events``: those in such slices, else ``good`` and ``bad``.
    ``interval``: Wilson 95 %. ``p_value``: exact binomial P(X >= bad | total, 1 - target) of the events.
    ``share``: the SLI before it was rounded. ``previous``: how it stood in the window before, where that was
    asked for.
    """

    name: str
    indicator: str
    group: Mapping[str, str | None]
    target: Decimal
    sli: float | None
    good: int | Fraction
    bad: int | Fraction
    total: int
    allowed: int | Fraction
    events: Counts
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
        # The second implies the first, but where many bad ones may be in one of many time slices.
        return self.budget_remaining < 0 and alerts(self.events.bad, self.p_value)

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
        left = max(Fraction(), budget_remaining(self.bad, self.total, self.target))
        return timedelta(microseconds=int(whole // timedelta(microseconds=1) * left))


def reports_of(
    objective: Objective,
    window: Window,
    counts: Mapping[Group, Counts],
    lost: Mapping[Group, Lost] = NOTHING_LOST,
) -> list[ObjectiveReport]:
    """Return how an objective stands for each group, given what was counted in the window.

    ``lost``: of time slices that may be bad in part, where it is these that are judged; the counts are then of
    the events in them.

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
    objective: Objective, group: Mapping[str, str | None], window: Window, events: Counts, lost: Lost | None
) -> ObjectiveReport:
    target = objective.target
    bad, total = lost or (events.bad, events.total)
    good = total - bad
    share = Fraction(good) / total if total else None
    allowed = budget_allows(total, target) if lost is None else total * (1 - Fraction(target))
    return ObjectiveReport(
        name=objective.name,
        indicator=objective.indicator,
        group=MappingProxyType(group),
        target=target,
        sli=None if share is None else float(share),
        good=good,
        bad=bad,
        total=total,
        allowed=allowed,
        events=events,
        verdict=verdict(events.bad, events.total, target, lost),
        interval=wilson_interval(good, total),
        budget_remaining=float(budget_remaining(bad, total, target)),
        window=window,
        summary=_summary(objective, events, bad, total, allowed),
        p_value=binomial_upper_tail(events.bad, events.total, target),
        share=share,
    )


def _summary(
    objective: Objective, events: Counts, bad: int | Fraction, total: int, allowed: int | Fraction
) -> str:
    unit, what = _words(objective.measure)
    if objective.slicing is not None:
        of_events = f"({events.bad} of {counted(events.total, unit)} {what})"
        unit, what = "slice", f"were lost in all {of_events}" if objective.slicing.is_in_part else "were bad"
    if total == 0:
        return f"no {unit}s counted; the budget is unspent"
    seen, most = amount(bad, allowed), amount(allowed, bad)
    sentence = f"{seen} of {counted(total, unit)} {what}; the budget allows {most}"
    return sentence if total >= FEWEST_EVENTS else f"{sentence}; too few to judge, {FEWEST_EVENTS} are needed"


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
        "good": number(report.good),
        "bad": number(report.bad),
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


def number(count: int | Fraction) -> int | float:
    """Return a count as JSON has it: whole ones stay whole."""
    return float(count) if isinstance(count, Fraction) else count


def rfc3339(moment: datetime) -> str:
    """Return an aware datetime as RFC 3339 in UTC: ``2026-01-31T12:00:00Z``, fractions only where needed."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"
