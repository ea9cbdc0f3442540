"""The runs to look at: those that spent the budgets of the sickest objectives, and what made them bad."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import tzinfo
from typing import Final
from urllib.parse import quote

from gradwatch_collector.objectives.worst_runs import BadRun
from gradwatch_collector.reports import apart, wording
from gradwatch_collector.runs.facts import moment
from gradwatch_collector.runs.quality import WORST
from gradwatch_slo.indicators import (
    COMPARISONS,
    Convergence,
    CountRatio,
    Measure,
    Operator,
    SuccessRate,
    Threshold,
    UnitRatio,
)
from gradwatch_slo.objective import Objective
from gradwatch_slo.runs import Status
from gradwatch_slo.wording import counted

_SECOND: Final = 1_000_000_000
_WANTED: Final[Mapping[Operator, str]] = {
    "gt": "more than",
    "gte": "at least",
    "lt": "less than",
    "lte": "at most",
}
# Browsers take them for folders, however they are spelled.
_NO_PATHS: Final = (".", "..")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTold:
    """A run to look at: what it is bad for (an objective's name, and why), how to see more, and where."""

    run_id: str
    whose: str
    ended: str
    command: str
    link: str | None
    bad_for: list[tuple[str, str]] = field(default_factory=list)


def runs_told(
    found: Iterable[tuple[Objective, Iterable[BadRun]]], zone: tzinfo, url: str | None
) -> list[RunTold]:
    """Return each run once, with all that it was found for, in the order in which they were found.

    ``zone``: of dates. ``url``: of a collector that has a page of each.
    """
    told: dict[str, RunTold] = {}
    for objective, runs in found:
        for run in runs:
            each = told.setdefault(run.run_id, _told(run, zone, url))
            each.bad_for.append((objective.name, why(objective.measure, run)))
    return list(told.values())


def why(measure: Measure, run: BadRun) -> str:
    """Return why a run is bad by a measure."""
    match measure:
        case SuccessRate():
            return _ending(run)
        case CountRatio():
            return f"{_ending(run)}, counted as bad"
        case Convergence():
            took, granted = apart.durations([(each or 0.0) / _SECOND for each in (run.seen, run.limit)])
            how = f"{_ending(run)} without its target" if run.seen is None else f"{took} to its target"
            return f"{how}, {granted} granted"
        case Threshold(name, operator, bound, baseline_run=baseline):
            seen, limit = apart.numbers([_whole(each or 0.0) for each in (run.seen, run.limit)])
            seen = "not finite" if run.seen == WORST else seen
            if baseline is None:
                return f"{_words(name)} {seen}, {_WANTED[operator]} {bound.normalize():f} wanted"
            compared = _words(COMPARISONS[name])
            return f"{compared} {seen}, {_WANTED[operator]} {limit} wanted by that of {baseline}"
        case UnitRatio(unit, fault):
            return f"{run.bad} of {counted(int(run.limit or 0), unit)} {fault}"


def _told(run: BadRun, zone: tzinfo, url: str | None) -> RunTold:
    at = None if run.ended_at is None else moment(run.ended_at).astimezone(zone)
    has_page = url is not None and run.run_id not in _NO_PATHS
    return RunTold(
        run_id=run.run_id,
        whose=", ".join(filter(None, (run.job, run.team, run.tier))),
        ended="Goes on" if at is None else f"Ended {at:%Y-%m-%d %H:%M}",
        command=f"gradwatch runs report {shlex.quote(run.run_id)}",
        link=f"{(url or '').rstrip('/')}/runs/{quote(run.run_id, safe='')}" if has_page else None,
    )


def _ending(run: BadRun) -> str:
    lasted = wording.duration(run.lasted / _SECOND)
    if run.status is Status.RUNNING:
        return f"running for {lasted}"
    reason = f" ({run.reason})" if run.reason else ""
    return f"{run.status.value}{reason} after {lasted}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _whole(value: float) -> float:
    return int(value) if value.is_integer() and abs(value) < 1e15 else value
