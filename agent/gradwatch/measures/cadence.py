"""When a measurement that is too dear for every observed step is taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

# The first steps pay for allocations and warm-up; a run of a minute should still show something.
_EARLY: Final = 10
SLOW_SECONDS: Final = 30.0


class Cadence:
    """Due at the 10th time of asking, and then at most once in ``seconds``."""

    __slots__ = ("_asked", "_monotonic", "_next", "_seconds")

    def __init__(self, seconds: float = SLOW_SECONDS, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._monotonic = monotonic
        self._asked = 0
        self._next = float("-inf")

    def due(self) -> bool:
        """Whether to measure now; asked whenever it could be."""
        self._asked += 1
        if self._asked < _EARLY:
            return False
        now = self._monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True
