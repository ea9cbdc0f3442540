"""Is a failed attempt worth another one, and after how long?"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from gradwatch.life.endings import FAILED
from gradwatch.supervisor.deaths import Death
from gradwatch.supervisor.progress import Progress

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
        self._before: tuple[Death, Progress] | None = None

    def after(self, death: Death, came: Progress) -> Again | GiveUp:
        """What to do after an attempt that ended so, and came so far."""
        if death.status != FAILED:
            return GiveUp()
        before, self._before = self._before, (death, came)
        if not self._left:
            return GiveUp()
        if death.exit_code in _USAGE_CODES:
            return GiveUp(f"exit code {death.exit_code} is not worth another attempt")
        if before is not None and _is_same(before, (death, came)):
            step = "before the first step" if came.last_step is None else f"after step {came.last_step}"
            why = ", ".join(sorted(came.failures)) or death.reason
            return GiveUp(f"it failed twice in the same way ({why}, {step})")
        self._left -= 1
        pause, self._pause = self._pause, min(_LONGEST_PAUSE, 2 * self._pause)
        return Again(pause * (0.5 + 0.5 * self._chance()))


def _is_same(before: tuple[Death, Progress], now: tuple[Death, Progress]) -> bool:
    """Whether one failure is the other again, as far as one can tell.

    Who told its ending told the exception and the step. Who could not was last heard of some steps before.
    """
    (death, came), (latest, latest_came) = before, now
    if (death.reason, death.exit_code) != (latest.reason, latest.exit_code):
        return False
    if came.failures != latest_came.failures and not came.failures & latest_came.failures:
        return False
    if came.last_step is None or latest_came.last_step is None:
        return came.last_step is latest_came.last_step
    # Do the steps that either may have died at overlap?
    return (
        came.last_step <= latest_came.last_step + latest_came.unseen
        and latest_came.last_step <= came.last_step + came.unseen
    )
