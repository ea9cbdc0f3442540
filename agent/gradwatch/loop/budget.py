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
    """Decides which steps are observed, from what observed steps cost and how long steps last.

    Args:
        share: Share of step time the training thread may spend in the agent.
        every: Observe every n-th step whatever it costs; None lets the share decide.
        thin_cost: Nanoseconds that a step costs which is not observed.

    Attributes:
        background: Nanoseconds of processor time that our own threads take a step: they share Python's lock
            with training, so it is training's too. None until an export has shown it: half of what is allowed
            is theirs till then.
    """

    __slots__ = ("_observed", "_seen", "_step", "background", "every", "share", "thin_cost")

    def __init__(self, share: float, every: int | None = None, thin_cost: float = 0.0) -> None:
        self.share = share
        self.thin_cost = thin_cost
        self.background: float | None = None
        self.every = every
        self._observed = 0.0
        self._step = 0.0
        self._seen = 0

    def next_interval(self, spent: int, steps: int, lasted: int) -> int:
        """Say how many steps from now the next one is observed.

        Args:
            spent: Nanoseconds that the observed step which just ended cost.
            steps: Steps since the observed one before it, 0 for the first.
            lasted: Nanoseconds they took.
        """
        if steps:
            self._step = _smooth(self._step, lasted / steps)
        # The very first read pays for allocations and imports that no later one pays.
        if self._seen:
            self._observed = _smooth(self._observed, spent)
        self._seen += 1
        if self.every is not None:
            return self.every
        return self.interval()

    def interval(self) -> int:
        """Steps from one observed step to the next, as the costs stand."""
        if self._seen < _READS_TO_LEARN:
            return 1
        extra = self._observed - self.thin_cost
        allowed = self.share * self._step
        allowed -= self.thin_cost + (allowed / 2 if self.background is None else self.background)
        if extra <= 0:
            return 1
        if allowed <= 0:
            return MAX_INTERVAL
        return min(MAX_INTERVAL, max(1, math.ceil(extra / allowed)))


def _smooth(mean: float, value: float) -> float:
    if mean == 0.0:
        return value
    return mean + _SMOOTHING * (min(value, _OUTLIER * mean) - mean)
