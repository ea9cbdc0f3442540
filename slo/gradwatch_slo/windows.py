"""Windows over which an objective is judged."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from gradwatch_slo.durations import Duration


@dataclass(frozen=True, slots=True)
class Window:
    """One window in time, UTC. A rolling one includes both ends; a calendar one ends where the next begins."""

    duration: str
    rolling: bool
    start: datetime
    end: datetime

    def contains(self, moment: datetime) -> bool:
        """Return whether something that ended at ``moment`` belongs to the window."""
        return self.start <= moment and (moment <= self.end if self.rolling else moment < self.end)


@dataclass(frozen=True, slots=True)
class TimeWindow:
    """A rule for windows: rolling without ``calendar_start``, else aligned to it (UTC)."""

    duration: Duration
    calendar_start: datetime | None = None

    def at(self, moment: datetime) -> Window:
        """Return the window that ends at ``moment`` (rolling) or contains it (calendar)."""
        if self.calendar_start is None:
            return Window(str(self.duration), True, self.duration.shift(moment, -1), moment)
        periods = self.duration.periods_between(self.calendar_start, moment)
        return Window(
            str(self.duration),
            False,
            self.duration.shift(self.calendar_start, periods),
            self.duration.shift(self.calendar_start, periods + 1),
        )
