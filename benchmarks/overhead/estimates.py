"""Medians with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_DRAWS = 4000


@dataclass(frozen=True)
class Estimate:
    """A median and its 95 % interval. NaN where nothing was measured; no interval from a single value."""

    median: float
    low: float
    high: float

    def scaled(self, factor: float, shift: float = 0.0) -> Estimate:
        """``factor`` (above 0) times this, plus ``shift``."""
        return Estimate(*(factor * value + shift for value in (self.median, self.low, self.high)))


NOTHING = Estimate(math.nan, math.nan, math.nan)


def estimate(values: Sequence[float]) -> Estimate:
    """Median and percentile-bootstrap 95 % interval of the median (Efron 1979)."""
    if not values:
        return NOTHING
    if len(values) == 1:
        return Estimate(values[0], math.nan, math.nan)
    sample = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(0).choice(sample, (_DRAWS, len(sample)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return Estimate(float(np.median(sample)), float(low), float(high))
