"""Windows over which an objective is judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from typing import Final

from gradwatch_slo.durations import Duration

# Unix nanoseconds in 64 bits end in 2262.
YEARS: Final = range(1970, 2200)


@dataclass(frozen=True, slots=True)
class Window:
    """One window in time, UTC. A rolling one includes both ends; a calendar one ends where the next begins."""

    duration: str
    rolling: bool
    start: datetime
    end: datetime


@dataclass(frozen=True, slots=True)
class TimeWindow:
    """A rule for windows: rolling without ``calendar_start``, else aligned to it in its own time zone.

    Days and longer are the zone's: a day in which clocks change has 23 or 25 hours. Hours and minutes always
    have the same length. Where clocks skip the start it comes as much later as they skip; where they show it
    twice it is the first of the two.
    """

    duration: Duration
    calendar_start: datetime | None = None
    # Told apart by it, too: datetimes of two zones that are the same moment are equal, and their days are not.
    zone: tzinfo = field(init=False)

    def __post_init__(self) -> None:
        start = self.calendar_start
        object.__setattr__(self, "zone", UTC if start is None or start.tzinfo is None else start.tzinfo)

    def at(self, moment: datetime) -> Window:
        """Return the window that ends at ``moment`` (rolling) or contains it (calendar)."""
        if self.calendar_start is None:
            return Window(str(self.duration), True, self.duration.shift(moment, -1), moment)
        number = self.number_at(moment)
        start, end = (self.start(each).astimezone(UTC) for each in (number, number + 1))
        return Window(str(self.duration), False, start, end)

    def start(self, number: int) -> datetime:
        """Return when a window of the calendar starts by the clock on the wall, which may skip that time.

        The calendar starts with that of ``number`` 0.
        """
        assert self.calendar_start is not None
        # Within a zone Python counts by the clock on the wall.
        return self.duration.shift(
            self.calendar_start.astimezone(UTC if self.duration.is_exact else self.zone), number
        )

    def number_at(self, moment: datetime) -> int:
        """Return which window of the calendar contains ``moment``."""
        first = self.start(0)
        number = self.duration.periods_between(first, moment.astimezone(first.tzinfo))
        # Of an hour that clocks show twice they do not say which it is, and of one that they skip nothing.
        if self.start(number).astimezone(UTC) > moment:
            return number - 1
        return number + (self.start(number + 1).astimezone(UTC) <= moment)
