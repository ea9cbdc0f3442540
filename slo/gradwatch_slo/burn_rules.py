"""When a budget burns too fast: standard alerts on burn rates, scaled to the window; and what can burn at all.

Over a long look-back and a short one (Site Reliability Workbook, chapter 5): the long one says that it matters,
the short one that it still goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Final

from gradwatch_slo.durations import Duration
from gradwatch_slo.links import BurnRateAlert
from gradwatch_slo.openslo import Operator
from gradwatch_slo.source import Unit

PAGE: Final = "page"
TICKET: Final = "ticket"
# The last rule asks for 0.933 over 28 days, which is meant. Below that an alert would tell of what is met.
_LEAST_RATE: Final = Fraction(9, 10)


@dataclass(frozen=True, slots=True)
class BurnRule:
    """An alert on ``share`` of a window's budget spent within ``long``, and still over a twelfth of that.

    ``least``: what a look-back needs to have a burn rate.
    """

    share: Fraction
    long: timedelta
    severity: str
    least: timedelta = timedelta(0)

    @property
    def short(self) -> timedelta:
        """The look-back that shows that it goes on."""
        return max(self.long / 12, self.least)

    def rate(self, window: timedelta) -> Fraction:
        """Return the burn rate that spends the share in time: 13.44 for 2 % of 28 days within an hour."""
        minute = timedelta(minutes=1)
        return self.share * Fraction(window // minute, self.long // minute)


BURN_RULES: Final = (
    BurnRule(Fraction(2, 100), timedelta(hours=1), PAGE),
    BurnRule(Fraction(5, 100), timedelta(hours=6), PAGE),
    BurnRule(Fraction(10, 100), timedelta(days=1), TICKET),
    BurnRule(Fraction(10, 100), timedelta(days=3), TICKET),
)


def least_look_back(time_slice: Duration | None) -> timedelta:
    """Return how long a look-back must be to always hold a whole slice: one may be cut, and one go on."""
    return timedelta(0) if time_slice is None else 2 * time_slice.nominal


def fitting(target: Decimal, window: Duration, time_slice: Duration | None) -> list[BurnRule]:
    """Return the rules for a target over a window, of which slices are judged, or events (None).

    Left out is a rate that nothing but bad events does not reach, one at which an objective is still met, and
    one over less than two slices.
    """
    most, least = 1 / (1 - Fraction(target)), least_look_back(time_slice)
    return [
        replace(rule, least=least)
        for rule in BURN_RULES
        if _LEAST_RATE <= rule.rate(window.nominal) < most and least <= rule.long
    ]


def is_alerted(
    unit: Unit,
    target: Decimal,
    window: Duration,
    time_slice: Duration | None,
    alerts: Iterable[BurnRateAlert],
) -> bool:
    """Return whether anybody can ever be told of an objective: by the exact test, a rule, or a policy."""
    return (
        unit == "run"
        or bool(fitting(target, window, time_slice))
        or any(alert.when_no_data or can_breach(alert, target, time_slice) for alert in alerts)
    )


def can_breach(alert: BurnRateAlert, target: Decimal, time_slice: Duration | None) -> bool:
    """Return whether a policy's alert can ever fire at a burn rate."""
    return (
        alert.when_breaching
        and reachable(alert.operator, alert.threshold, target)
        and has_rates(alert.look_back, time_slice)
    )


def has_rates(look_back: Duration, time_slice: Duration | None) -> bool:
    """Return whether a look-back ever has a burn rate; one of a slice's length fits it for a mere instant."""
    return time_slice is None or look_back.nominal > time_slice.nominal


def reachable(operator: Operator, threshold: Decimal, target: Decimal) -> bool:
    """Return whether some burn rate compares so; they go from 0 to 1 / (1 - target): every event is bad."""
    return holds_within(operator, threshold, 0, 1 / (1 - Fraction(target)))


def holds_within(
    operator: Operator, threshold: Decimal, least: Fraction | int | None, most: Fraction | int | None
) -> bool:
    """Return whether some number from ``least`` to ``most`` compares so; None is without bound."""
    bound = Fraction(threshold)
    return {
        "gt": most is None or most > bound,
        "gte": most is None or most >= bound,
        "lt": least is None or least < bound,
        "lte": least is None or least <= bound,
    }[operator]
