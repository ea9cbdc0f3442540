"""What an indicator counts, as SQL over ``schema.run``: which runs, and how many good and bad each adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Double,
    FromClause,
    Numeric,
    and_,
    case,
    cast,
    false,
    func,
    literal,
    null,
    or_,
    select,
    true,
)

from gradwatch_collector.runs.quality import Aim, aims_at
from gradwatch_collector.storage import schema
from gradwatch_slo.indicators import (
    COMPARISONS,
    Convergence,
    CountRatio,
    Measure,
    Operator,
    Selection,
    SuccessRate,
    Threshold,
    UnitFault,
    UnitRatio,
)
from gradwatch_slo.runs import REASON_PREEMPTED, Status

# Start (inclusive) and end (exclusive) in Unix nanoseconds, and which of the runs that ended between.
Period = tuple[int, int, Selection]

_run = schema.run.c
_summary = schema.run_summary.c
_MICROSECOND: Final = 1_000
# How many have a fault, and of how many that is known.
_FAULTS: Final[Mapping[UnitFault, tuple[ColumnElement[int], ColumnElement[int]]]] = {
    "unhealthy": (_summary.unhealthy_steps, _summary.observed_steps),
    "nonfinite": (_summary.nonfinite_steps, _summary.steps),
    "failed": (_summary.failed_checkpoints, _summary.checkpoints),
}


@dataclass(frozen=True, slots=True)
class Judgement:
    """SQL over one run: how many good and how many bad events it adds. Neither is ever NULL."""

    good: ColumnElement[int]
    bad: ColumnElement[int]

    @classmethod
    def of(cls, good: ColumnElement[bool], bad: ColumnElement[bool]) -> Judgement:
        """Return that of a run that is one event: good, bad, or (neither) not counted."""
        return cls(case((good, 1), else_=0), case((bad, 1), else_=0))


def source_of(measure: Measure) -> FromClause:
    """Return the tables that the SQL of a measure is over."""
    if isinstance(measure, Threshold | UnitRatio):
        return schema.run.join(schema.run_summary, _run.run_id == _summary.run_id)
    return schema.run


def selected(selection: Selection) -> ColumnElement[bool]:
    """Return which runs a selection is about."""
    return and_(true(), *(_run[name].in_(values) for name, values in selection.fields))


@dataclass(frozen=True, slots=True)
class Pinned:
    """What a measure holds runs against where it names a run for that (`pinned.py`); None is not known.

    ``granted``: nanoseconds to the target, for convergence. ``bound``: what the value by itself is compared
    with, of runs of the same ``aim`` and ``currency``.
    """

    run_id: str
    granted: int | None = None
    bound: float | None = None
    aim: Aim | None = None
    currency: str | None = None


def judge_ended(measure: Measure, pinned: Pinned | None = None) -> Judgement:
    """Return what a run adds that has ended."""
    match measure:
        case SuccessRate(min_duration):
            succeeded = _run.status == Status.SUCCEEDED
            failed = _run.status.in_((Status.FAILED, Status.LOST))
            preempted = func.coalesce(_run.reason, "") == REASON_PREEMPTED
            return Judgement.of(succeeded & ~_is_short(min_duration), failed & ~preempted)
        case CountRatio(of, matching, inverted, min_duration):
            chosen = selected(of) & ~((_run.status == Status.SUCCEEDED) & _is_short(min_duration))
            # A field that is not known is none of the values, rather than unknown.
            matches = func.coalesce(selected(matching), false())
            others, these = chosen & ~matches, chosen & matches
            return Judgement.of(others, these) if inverted else Judgement.of(these, others)
        case Convergence():
            in_time, late = _reached(measure, pinned)
            counted = _has_threshold(measure, pinned)
            return Judgement.of(counted & in_time, counted & (late | _run.target_reached_at.is_(None)))
        case Threshold(_, operator, _, min_duration):
            value, limit = held_against(measure, pinned)
            known = ~_is_short(min_duration) & value.is_not(None)
            if pinned is not None:
                known &= _comparable(pinned)
            holds = _compared(value, operator, limit)
            return Judgement.of(known & holds, known & ~holds)
        case UnitRatio():
            faulty, total = held_against(measure)
            known = faulty.is_not(None) & total.is_not(None)
            return Judgement(case((known, total - faulty), else_=0), case((known, faulty), else_=0))


def held_against(
    measure: Measure, pinned: Pinned | None = None
) -> tuple[ColumnElement[Any], ColumnElement[Any]]:
    """Return what of a run is held against what; NULL twice where only how it ended is looked at.

    The time to the target against the threshold, in nanoseconds; a value against its bound; the units that have
    the fault against all of which that is known.
    """
    match measure:
        case Convergence():
            return _run.target_reached_at - _run.started_at, _threshold(measure, pinned)
        case Threshold(name, _, bound):
            if pinned is None:
                return _summary[name], literal(bound, Numeric(asdecimal=True))
            return _summary[COMPARISONS[name]], literal(pinned.bound, Double)
        case UnitRatio(_, fault):
            return _FAULTS[fault]
        case _:
            return null(), null()


def judge_open(measure: Measure, as_of: int, pinned: Pinned | None = None) -> Judgement | None:
    """Return what a run adds that goes on at ``as_of`` (Unix nanoseconds); None where such runs add nothing."""
    if not isinstance(measure, Convergence):
        return None
    in_time, late = _reached(measure, pinned)
    by_then = func.coalesce(_run.target_reached_at <= as_of, false())
    passed = as_of - _run.started_at > _threshold(measure, pinned)
    counted = _has_threshold(measure, pinned)
    return Judgement.of(counted & by_then & in_time, counted & ((by_then & late) | (~by_then & passed)))


def excluded_by(period: Period) -> ColumnElement[bool]:
    """Return which runs the exclusion of a period is about; never NULL, what goes on is not among them."""
    start, end, selection = period
    return func.coalesce(and_(_run.ended_at >= start, _run.ended_at < end, selected(selection)), false())


def not_excluded(periods: Sequence[Period]) -> ColumnElement[bool]:
    """Return which runs no exclusion is about; given the periods that are excluded."""
    exclusion = schema.exclusion.c
    single = select(exclusion.single_run).where(
        exclusion.single_run.is_not(None), exclusion.withdrawn_at.is_(None)
    )
    return ~or_(_run.run_id.in_(single), *map(excluded_by, periods))


def _is_short(min_duration: timedelta) -> ColumnElement[bool]:
    return _run.ended_at - _run.started_at < nanoseconds(min_duration)


def _has_threshold(measure: Convergence, pinned: Pinned | None) -> ColumnElement[bool]:
    return _run.target.is_not(None) & _threshold(measure, pinned).is_not(None)


def _reached(measure: Convergence, pinned: Pinned | None) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    took, threshold = held_against(measure, pinned)
    reached = _run.target_reached_at.is_not(None)
    return reached & (took <= threshold), reached & (took > threshold)


def _threshold(measure: Convergence, pinned: Pinned | None) -> ColumnElement[int]:
    own = cast(func.round(_run.deadline_seconds * 1e6), BigInteger) * _MICROSECOND
    if measure.deadline is not None:
        return func.coalesce(own, literal(nanoseconds(measure.deadline), BigInteger), _run.baseline)
    if pinned is not None:
        return func.coalesce(own, case((_run.run_id != pinned.run_id, literal(pinned.granted, BigInteger))))
    return func.coalesce(own, _run.baseline)


def _comparable(pinned: Pinned) -> ColumnElement[bool]:
    """Return which runs can be held against a pinned one: not itself, and none of another aim or currency."""
    others = (_run.run_id != pinned.run_id) & (true() if pinned.bound is not None else false())
    if pinned.aim is not None:
        others &= aims_at(pinned.aim)
    if pinned.currency is not None:
        others &= same_currency(pinned.currency)
    return others


def same_currency(currency: str | None) -> ColumnElement[bool]:
    """Return which runs' costs are of a currency; those from before currencies were kept are taken to be."""
    return _summary.currency.is_(None) | (_summary.currency == currency)


def _compared(value: ColumnElement[Any], operator: Operator, bound: ColumnElement[Any]) -> ColumnElement[bool]:
    match operator:
        case "gt":
            return value > bound
        case "gte":
            return value >= bound
        case "lt":
            return value < bound
        case "lte":
            return value <= bound


def nanoseconds(length: timedelta) -> int:
    """Return a length exactly."""
    return length // timedelta(microseconds=1) * _MICROSECOND
