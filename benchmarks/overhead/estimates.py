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
    low, high = np.quantile(_medians(values, seed=0), (0.025, 0.975))
    return Estimate(float(np.median(values)), float(low), float(high))


def quotient(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Median of ``above`` over that of ``below``, each resampled for itself; NOTHING where that may be 0."""
    if len(above) < 2 or len(below) < 2:
        return NOTHING
    lower = _medians(below, seed=1)
    if np.quantile(lower, 0.025) <= 0:
        return NOTHING
    low, high = np.quantile(_medians(above, seed=0) / lower, (0.025, 0.975))
    return Estimate(float(np.median(above) / np.median(below)), float(low), float(high))


def _medians(values: Sequence[float], seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    sample = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).choice(sample, (_DRAWS, len(sample)))
    return np.asarray(np.median(draws, axis=1), dtype=np.float64)
