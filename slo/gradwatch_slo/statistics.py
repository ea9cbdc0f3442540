"""Exact small-sample statistics, right for five runs and for five million steps."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from statistics import NormalDist
from typing import Final

_Z95: Final = NormalDist().inv_cdf(0.975)
_HALF_LOG_TWO_PI: Final = 0.5 * math.log(2 * math.pi)


def binomial_upper_tail(bad: int, total: int, target: Decimal) -> float:
    """Return P(X >= bad) for X ~ Binomial(total, 1 - target).

    How surprising ``bad`` or more bad events among ``total`` would be if the target just held. One at
    ``bad == 0``. ``target`` in [0, 1). The relative error stays below 1e-9 for totals of millions (the tests
    compare with exact fractions and with scipy).
    """
    if bad <= 0:
        return 1.0
    if bad > total:
        return 0.0
    failure = float(1 - target)
    if failure == 1.0:
        return 1.0
    # Sum the side of the distribution that `bad` is on: nothing cancels, and terms only shrink.
    if bad > total * failure:
        return min(1.0, _sum_from(bad, total, failure, float(target), 1))
    return max(0.0, 1.0 - _sum_from(bad - 1, total, failure, float(target), -1))


def _sum_from(k: int, n: int, p: float, q: float, direction: int) -> float:
    # Each term from its neighbour: pmf(k + 1) / pmf(k) = (n - k) / (k + 1) * p / q.
    term = total = _binomial_pmf(k, n, p, q)
    while term > total * 1e-18:
        if direction > 0:
            term *= (n - k) / (k + 1) * (p / q)
        else:
            term *= k / (n - k + 1) * (q / p)
        k += direction
        total += term
    return total


def _binomial_pmf(k: int, n: int, p: float, q: float) -> float:
    # Loader, "Fast and accurate computation of binomial probabilities" (2000): deviances instead of the
    # logarithms of factorials, whose differences lose seven digits at a million.
    if k == 0:
        return math.exp(n * math.log1p(-p))
    if k == n:
        return math.exp(n * math.log(p))
    log_pmf = (
        _stirling_error(n)
        - _stirling_error(k)
        - _stirling_error(n - k)
        - _deviance(k, n * p)
        - _deviance(n - k, n * q)
    )
    return math.exp(log_pmf) * math.sqrt(n / (2 * math.pi * k * (n - k)))


def _stirling_error(n: int) -> float:
    """Return log(n!) less Stirling's approximation of it."""
    if n <= 30:
        return math.lgamma(n + 1) - (n + 0.5) * math.log(n) + n - _HALF_LOG_TWO_PI
    square = n * n
    return (1 / 12 - (1 / 360 - (1 / 1260 - 1 / 1680 / square) / square) / square) / n


def _deviance(x: float, mean: float) -> float:
    """Return ``x log(x / mean) + mean - x`` without cancellation where x is close to the mean."""
    if abs(x - mean) >= 0.1 * (x + mean):
        return x * math.log(x / mean) + mean - x
    ratio = (x - mean) / (x + mean)
    total, power, odd = (x - mean) * ratio, 2 * x * ratio, 1
    while True:
        power *= ratio * ratio
        odd += 2
        refined = total + power / odd
        if refined == total:
            return total
        total = refined


def wilson_interval(good: int | Fraction, total: int) -> tuple[float, float]:
    """Return the 95 % score interval of the share ``good / total``; all of [0, 1] when nothing was counted.

    Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
    """
    if total == 0:
        return 0.0, 1.0
    share, square = float(Fraction(good) / total), _Z95 * _Z95
    centre = (share + square / (2 * total)) / (1 + square / total)
    spread = _Z95 / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    # Exact at the ends, where rounding would leave 1e-17.
    low = 0.0 if good == 0 else max(0.0, centre - spread)
    return low, 1.0 if good == total else min(1.0, centre + spread)
