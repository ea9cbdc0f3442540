"""The verdict on few events: a miss must be both seen twice and surprising before anybody is told."""

from __future__ import annotations

from decimal import Decimal
from enum import StrEnum
from fractions import Fraction
from typing import Final

from gradwatch_slo.counts import Lost
from gradwatch_slo.statistics import binomial_upper_tail

FEWEST_EVENTS: Final = 5
FEWEST_BAD: Final = 2
BREACH_P_VALUE: Final = 0.05
# At 8 runs a week with a true rate right at a 90 % target, 0.05 would alarm falsely in three years of four.
ALERT_P_VALUE: Final = 0.01


class Verdict(StrEnum):
    """How an objective stands."""

    MET = "met"
    BREACHED = "breached"
    UNCERTAIN = "uncertain"
    INSUFFICIENT_DATA = "insufficient data"


def verdict(bad: int, total: int, target: Decimal, lost: Lost | None = None) -> Verdict:
    """Judge ``bad`` of ``total`` events against a target in [0, 1).

    ``lost``: of the time slices that the events are in, where it is these that the target is of. What is bad in
    part is no binomial event: what chance does is asked of the events.
    """
    spent, counted = lost or (bad, total)
    if counted < FEWEST_EVENTS:
        return Verdict.INSUFFICIENT_DATA
    if Fraction(counted - spent) / counted >= Fraction(target):
        return Verdict.MET
    if bad >= FEWEST_BAD and binomial_upper_tail(bad, total, target) < BREACH_P_VALUE:
        return Verdict.BREACHED
    return Verdict.UNCERTAIN


def alerts(bad: int, p_value: float) -> bool:
    """Return whether events are reason enough to notify somebody; ``p_value`` of the binomial test."""
    return bad >= FEWEST_BAD and p_value < ALERT_P_VALUE
