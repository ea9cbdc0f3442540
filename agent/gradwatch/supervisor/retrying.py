"""Is a failed attempt worth another one, and after how long?"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from gradwatch.life.endings import FAILED
from gradwatch.supervisor.deaths import Death

# A command used wrongly, not executable, not found: no other attempt will do better.
_USAGE_CODES: Final = frozenset({2, 126, 127})
_LONGEST_PAUSE: Final = 600.0


@dataclass(frozen=True, slots=True)
class Again:
    """Start it again after so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Leave it at that; ``why`` is worth telling, where it is not empty."""

    why: str = ""


class RetryPolicy:
    """Decides after each attempt. Pauses double, and are shortened by up to a half at random.

    Args:
        retries: Attempts after the first.
        first_pause: Seconds before the second attempt.
        chance: From 0 to 1: what failed together must not come back together.
    """

    def __init__(
        self,
        retries: int,
        first_pause: float,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._left = retries
        self._pause = first_pause
        self._chance = chance
        self._before: tuple[str | None, int, int | None] | None = None

    def after(self, death: Death, last_step: int | None) -> Again | GiveUp:
        """What to do after an attempt that ended so; ``last_step`` is None where none has ended."""
        if death.status != FAILED:
            return GiveUp()
        failure = (death.reason, death.exit_code, last_step)
        before, self._before = self._before, failure
        if not self._left:
            return GiveUp()
        if death.exit_code in _USAGE_CODES:
            return GiveUp(f"exit code {death.exit_code} is not worth another attempt")
        if failure == before:
            step = "before the first step" if last_step is None else f"after step {last_step}"
            return GiveUp(f"it failed twice in the same way ({death.reason}, {step})")
        self._left -= 1
        pause, self._pause = self._pause, min(_LONGEST_PAUSE, 2 * self._pause)
        return Again(pause * (0.5 + 0.5 * self._chance()))
