"""What an objective's alerts would have done: over a history of counts by the hour, and how often by chance.

An alert looks at the end of each hour; what comes and goes within one is not seen. Whether an alert of the past
was right nobody can tell from the counts. What can be told is how often it would have fired if every event of
the same history were bad with just the probability that the target allows: then it is wrong each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from gradwatch_slo.burn_rules import BurnRule
from gradwatch_slo.counts import Counts
from gradwatch_slo.links import BurnRateAlert
from gradwatch_slo.objective import Objective
from gradwatch_slo.openslo import Operator
from gradwatch_slo.periods import MOMENT
from gradwatch_slo.rules import burn_rules
from gradwatch_slo.statistics import binomial_upper_tail
from gradwatch_slo.verdict import FEWEST_BAD, alerts
from gradwatch_slo.windows import TimeWindow

HISTORIES: Final = 400
SEED: Final = 2026
YEAR: Final = timedelta(days=365.25)
_HOUR: Final = timedelta(hours=1)
# Events of any window.
_MOST: Final = 2**62
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

Numbers = npt.NDArray[np.int64]
Truths = npt.NDArray[np.bool_]
# Whether an alert holds at the end of each hour: bad events by hour in, shape [..., hours].
Holds = Callable[[Numbers], Truths]


@dataclass(frozen=True, slots=True)
class Episode:
    """An alert that would have fired. ``start`` is None if it did before what is asked, ``end`` if it goes on.

    ``bad`` of ``total`` as it began, or as what is asked did.
    """

    start: datetime | None
    end: datetime | None
    bad: int
    total: int


@dataclass(frozen=True, slots=True)
class Simulated:
    """One rule over one history.

    ``by_chance``: how often a year it would fire if the objective were only just met, None of a history that is
    shorter than the window; ``quiet``: the share of such histories in which it never does.
    """

    rule: str
    episodes: tuple[Episode, ...]
    by_chance: float | None
    quiet: float


@dataclass(frozen=True, slots=True)
class History:
    """Events by hour, numbered from 1970 in UTC, from ``first`` on: shape ``[hours]`` both.

    The first ``lead`` hours only fill the windows: what an alert would have done in them is not asked.
    """

    first: int
    total: Numbers
    bad: Numbers
    lead: int = 0

    @classmethod
    def of(cls, counts: Mapping[int, Counts], first: int, after: int, lead: int = 0) -> History:
        """Return the hours from ``first`` up to and without ``after``."""
        hours = range(first, after)
        none = Counts()
        return cls(
            first,
            np.array([counts.get(hour, none).total for hour in hours], np.int64),
            np.array([counts.get(hour, none).bad for hour in hours], np.int64),
            lead,
        )

    @property
    def start(self) -> datetime:
        """When what is asked begins."""
        return _EPOCH + (self.first + self.lead) * _HOUR

    @property
    def length(self) -> timedelta:
        """From there to its end."""
        return (len(self.total) - self.lead) * _HOUR

    @property
    def counts(self) -> Counts:
        """What was counted from there on."""
        total, bad = int(self.total[self.lead :].sum()), int(self.bad[self.lead :].sum())
        return Counts(total - bad, bad)


def simulate(objective: Objective, history: History, *, seed: int = SEED) -> Iterator[Simulated]:
    """Yield what each of an objective's alerts would have done over a history of one of its groups.

    Raises:
        ValueError: its window is shorter than an hour, it judges slices of time, or no burn rate alerts.
    """
    if objective.slicing is not None:
        raise ValueError("it judges slices of time, which are not simulated")
    if objective.window.duration.nominal < _HOUR:
        raise ValueError(
            f"its window of {objective.window.duration} is shorter than the hours that are looked at"
        )
    rules = list(_rules(objective, history))
    if not rules:
        raise ValueError("it has no alert on how fast it burns its budget")
    random = np.random.default_rng(seed)
    allowed = float(1 - objective.target)
    chances = random.binomial(history.total, allowed, (HISTORIES, len(history.total))).astype(np.int64)
    is_long = history.length >= objective.window.duration.nominal
    for rule in rules:
        holds = rule.holds(chances)
        fired = _beginnings(holds)[..., history.lead :].sum(axis=-1)
        yield Simulated(
            rule=rule.name,
            episodes=tuple(_episodes(rule, history)),
            by_chance=float(fired.mean()) * (YEAR / history.length) if is_long else None,
            quiet=float((~holds[..., history.lead :].any(axis=-1)).mean()),
        )


@dataclass(frozen=True, slots=True)
class _Rule:
    """``starts``: by hour, the place in the history at which its window begins. Shape ``[hours]``."""

    name: str
    starts: Numbers
    holds: Holds


def _rules(objective: Objective, history: History) -> Iterator[_Rule]:
    if objective.unit == "run":
        yield _exact(objective, history)
    for rule in burn_rules(objective):
        yield _burning(rule, objective, history)
    for alert in objective.alerts:
        if alert.when_breaching:
            yield _of_policy(alert, objective.target, history)


def _exact(objective: Objective, history: History) -> _Rule:
    """The exact test over the objective's window."""
    starts = _starts(history, objective.window)
    totals = _within(history.total, starts)
    least = np.array([_least_bad(total, objective.target) for total in totals.tolist()], np.int64)
    return _Rule("exact test", starts, lambda bad: _within(bad, starts) >= least)


def _burning(rule: BurnRule, objective: Objective, history: History) -> _Rule:
    """Too fast over a long look-back and over a short one, of an hour at least."""
    rate = rule.rate(objective.window.duration.nominal)
    long, short = (_back(history, length) for length in (rule.long, max(rule.short, _HOUR)))
    reached = [_at_rate(history, starts, objective.target, "gt", rate) for starts in (long, short)]
    name = f"{_percent(rule.share)} of the budget in {rule.long // _HOUR} h"
    return _Rule(name, long, lambda bad: reached[0](bad) & reached[1](bad))


def _of_policy(alert: BurnRateAlert, target: Decimal, history: History) -> _Rule:
    starts = _starts(history, TimeWindow(alert.look_back))
    reached = _at_rate(history, starts, target, alert.operator, Fraction(alert.threshold))
    counted = _within(history.total, starts) > 0
    hold = 0 if alert.alert_after is None else -(-alert.alert_after.nominal // _HOUR)

    def holds(bad: Numbers) -> Truths:
        now = reached(bad) & counted
        if not hold:
            return now
        since = np.arange(now.shape[-1])
        last_not = np.maximum.accumulate(np.where(now, -1, since), axis=-1)
        return now & (since - last_not > hold)

    return _Rule(f"policy {alert.policy}", starts, holds)


def _at_rate(history: History, starts: Numbers, target: Decimal, operator: Operator, rate: Fraction) -> Holds:
    """Compare burn rates since ``starts``: exactly, as a product of floats is not what was written."""
    # So many bad events are the rate. Whole ones compare with a whole number just the same.
    bounds = [rate * (1 - Fraction(target)) * total for total in _within(history.total, starts).tolist()]
    whole = math.floor if operator in ("gt", "lte") else math.ceil
    compare = {"gt": np.greater, "gte": np.greater_equal, "lt": np.less, "lte": np.less_equal}[operator]
    # A rate may be any number; there are never so many events.
    limit = np.array([max(-1, min(_MOST, whole(bound))) for bound in bounds], np.int64)

    def holds(bad: Numbers) -> Truths:
        found: Truths = compare(_within(bad, starts), limit)
        return found

    return holds


def _starts(history: History, window: TimeWindow) -> Numbers:
    """Return where the window of each hour's end begins; it holds that hour at least."""
    own = np.arange(len(history.total))
    found = (window.at(_end_of(history, place) - MOMENT).start for place in own.tolist())
    starts = np.array([-((_EPOCH - start) // _HOUR) - history.first for start in found], np.int64)
    return np.clip(starts, 0, own)


def _back(history: History, length: timedelta) -> Numbers:
    return np.maximum(0, np.arange(1, len(history.total) + 1) - length // _HOUR)


def _within(numbers: Numbers, starts: Numbers) -> Numbers:
    """Sum what lies between each start and the end of its hour."""
    sums = np.concatenate((np.zeros((*numbers.shape[:-1], 1), np.int64), np.cumsum(numbers, axis=-1)), axis=-1)
    found: Numbers = sums[..., 1:] - sums[..., starts]
    return found


@cache
def _least_bad(total: int, target: Decimal) -> int:
    """Return how many bad events of ``total`` are reason enough to notify somebody; may be more than all."""
    low, high = FEWEST_BAD, total + 1
    while low < high:
        middle = (low + high) // 2
        if middle > total or alerts(middle, binomial_upper_tail(middle, total, target)):
            high = middle
        else:
            low = middle + 1
    return low


def _beginnings(holds: Truths) -> Truths:
    return holds & ~np.concatenate((np.zeros_like(holds[..., :1]), holds[..., :-1]), axis=-1)


def _episodes(rule: _Rule, history: History) -> Iterator[Episode]:
    holds = rule.holds(history.bad)
    bad, total = _within(history.bad, rule.starts), _within(history.total, rule.starts)
    for start in (history.lead + np.flatnonzero(_beginnings(holds[history.lead :]))).tolist():
        later = np.flatnonzero(~holds[start:])
        fired_before = start == history.lead > 0 and holds[start - 1]
        yield Episode(
            start=None if fired_before else _end_of(history, start),
            end=_end_of(history, start + int(later[0])) if later.size else None,
            bad=int(bad[start]),
            total=int(total[start]),
        )


def _end_of(history: History, place: int) -> datetime:
    return _EPOCH + (history.first + place + 1) * _HOUR


def _percent(share: Fraction) -> str:
    return f"{float(share * 100):g} %"
