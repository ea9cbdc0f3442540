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
        zone = UTC if self.duration.is_exact else self.zone
        # Within a zone Python counts by the clock on the wall.
        anchor = self.calendar_start.astimezone(zone)

        def start(period: int) -> datetime:
            return self.duration.shift(anchor, period).astimezone(UTC)

        period = self.duration.periods_between(anchor, moment.astimezone(zone))
        # Of an hour that clocks show twice they do not say which it is.
        if start(period) > moment:
            period -= 1
        elif start(period + 1) <= moment:
            period += 1
        return Window(str(self.duration), False, start(period), start(period + 1))
