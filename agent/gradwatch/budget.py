"""Keeps the agent's share of step time within its budget by reading gradients at every k-th step only."""

from __future__ import annotations

import math
from typing import Final

# However slow the agent is against the step, gradients are read now and then: a share of 1/1000 of a read
# that costs a whole step is 0.1 %.
MAX_INTERVAL: Final = 1000
_SMOOTHING: Final = 0.1
_READS_TO_LEARN: Final = 3
# One slow read (a page fault, another process) must not thin the next hundred steps.
_OUTLIER: Final = 4.0


class Budget:
    """Decides which steps are observed, from what observed and unobserved steps cost.

    Args:
        share: Share of step time the training thread may spend in the agent.
        every: Observe every n-th step whatever it costs; None lets the share decide.
    """

    __slots__ = (
        "_every",
        "_left",
        "_observed",
        "_seen",
        "_step",
        "_steps",
        "_thin",
        "_thins",
        "_time",
        "share",
    )

    def __init__(self, share: float, every: int | None = None) -> None:
        self.share = share
        self._every = every
        self._observed = 0.0
        self._thin = 0.0
        self._step = 0.0
        self._seen = 0
        self._left = 1
        # Sums since the last observed step: cheaper, on the steps that must be, than a running mean.
        self._time = self._steps = 0
        self._thins = 0

    def observes_next(self, spent: int, duration: int | None, observed: bool) -> bool:
        """Take what the step that ended cost and lasted (nanoseconds); say whether to observe the next one."""
        if duration is not None:
            self._time += duration
            self._steps += 1
        if observed:
            self._learn(spent)
            self._left = self._every or self.interval()
        else:
            self._thins += spent
        self._left -= 1
        return self._left <= 0

    def _learn(self, spent: int) -> None:
        if self._steps:
            self._step = _smooth(self._step, self._time / self._steps)
            if self._steps > 1:
                self._thin = _smooth(self._thin, self._thins / (self._steps - 1))
        # The very first read pays for allocations and imports that no later one pays.
        if self._seen:
            self._observed = _smooth(self._observed, spent)
        self._seen += 1
        self._time = self._steps = self._thins = 0

    def interval(self) -> int:
        """Steps from one observed step to the next, as the costs stand."""
        if self._seen < _READS_TO_LEARN:
            return 1
        extra = self._observed - self._thin
        allowed = self.share * self._step - self._thin
        if extra <= 0:
            return 1
        if allowed <= 0:
            return MAX_INTERVAL
        return min(MAX_INTERVAL, max(1, math.ceil(extra / allowed)))


def _smooth(mean: float, value: float) -> float:
    if mean == 0.0:
        return value
    return mean + _SMOOTHING * (min(value, _OUTLIER * mean) - mean)
