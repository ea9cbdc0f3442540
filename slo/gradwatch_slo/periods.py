"""Windows and moments as a person names them: ``7d``, ``2026-Q4``, ``2026-10``, ``2026-10-05``. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import Final
from zoneinfo import ZoneInfo, available_timezones

from gradwatch_slo.durations import Duration
from gradwatch_slo.problems import suggestion
from gradwatch_slo.windows import YEARS, TimeWindow, Window

# What moments can tell apart.
MOMENT: Final = timedelta(microseconds=1)
_PERIOD: Final = re.compile(r"([0-9]{4})(?:-(?:Q([1-4])|([0-9]{2})(?:-([0-9]{2}))?))?")
_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_RFC_3339: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


@dataclass(frozen=True, slots=True)
class ChosenWindow:
    """A window instead of the objectives' own. ``last``: the last moment of a period; None if it is rolling."""

    window: TimeWindow
    last: datetime | None = None

    def judged_at(self, as_of: datetime) -> datetime:
        """Return when to look at it: at ``as_of``, or when the period was over.

        Raises:
            ValueError: the period begins later.
        """
        if self.last is None:
            return as_of
        if self.window.at(self.last).start > as_of:
            raise ValueError("found a period that is still to come, expected one that has begun")
        return min(as_of, self.last)


def read_window(text: str, zone: tzinfo) -> ChosenWindow:
    """Read a duration, or a year, quarter, month or day of a time zone.

    Raises:
        ValueError: with what is expected.
    """
    try:
        if _PERIOD.fullmatch(text):
            return _period(text, zone)
        return ChosenWindow(TimeWindow(Duration.parse(text)))
    except ValueError as error:
        raise ValueError(
            f"found {text!r}, expected a duration such as 7d, or a period such as 2026, 2026-Q4, 2026-10 or"
            " 2026-10-05"
        ) from error


def read_moment(text: str, zone: tzinfo, now: datetime) -> datetime:
    """Read a moment that has been: RFC 3339, or a date, which is its end in the time zone; today's is ``now``.

    Raises:
        ValueError: with what is expected.
    """
    begins, ends = _edges(text, zone)
    if begins > now:
        raise ValueError(f"found {text!r}, which is still to come, expected a moment that has been")
    return min(ends, now)


def read_span(first: str, last: str, zone: tzinfo) -> tuple[datetime, datetime]:
    """Read from when (inclusive) to when (exclusive): RFC 3339, or dates, which are whole days.

    Raises:
        ValueError: with what is expected.
    """
    start, (last_start, last_end) = _edges(first, zone)[0], _edges(last, zone)
    # A moment ends the span, a day belongs to it.
    end = last_end if last_start == last_end else last_end + MOMENT
    if end <= start:
        raise ValueError(f"found {last!r}, expected a moment after {first}")
    return start, end


def read_zone(name: str) -> ZoneInfo:
    """Read the name of a time zone.

    Raises:
        ValueError: with what is expected.
    """
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:  # each for one kind of unusable name
        hint = suggestion(name, available_timezones())
        message = f"found {name!r}, expected an IANA time zone such as UTC or Europe/Berlin{hint}"
        raise ValueError(message) from error


def moment_before(window: Window) -> datetime:
    """Return the last moment before a window: when to look at the one before, which shares nothing with it."""
    return window.start - MOMENT


def _period(text: str, zone: tzinfo) -> ChosenWindow:
    match = _PERIOD.fullmatch(text)
    assert match is not None
    year, quarter, month, day = match.groups()
    unit = "Q" if quarter else "d" if day else "M" if month else "Y"
    first = _date(int(year), 3 * int(quarter) - 2 if quarter else int(month or 1), int(day or 1))
    start = datetime.combine(first, time(), zone)
    window = TimeWindow(Duration(1, unit), start)
    return ChosenWindow(window, window.at(start.astimezone(UTC)).end - MOMENT)


def _edges(text: str, zone: tzinfo) -> tuple[datetime, datetime]:
    """Return the first and the last moment of a day, or the same moment twice."""
    try:
        return _day(text, zone) if _DATE.fullmatch(text) else _instant(text)
    except ValueError as error:
        raise ValueError(
            f"found {text!r}, expected a date or a moment with its zone, such as 2026-10-05 or"
            " 2026-10-05T12:00:00Z"
        ) from error


def _day(text: str, zone: tzinfo) -> tuple[datetime, datetime]:
    """Return the first and the last moment of a day."""
    midnight = datetime.combine(_date(*map(int, text.split("-"))), time(), zone)
    return midnight.astimezone(UTC), (midnight + timedelta(days=1)).astimezone(UTC) - MOMENT


def _instant(text: str) -> tuple[datetime, datetime]:
    if _RFC_3339.fullmatch(text) is None:
        raise ValueError(text)
    instant = datetime.fromisoformat(text.upper())
    _date(instant.year, instant.month, instant.day)
    return instant.astimezone(UTC), instant.astimezone(UTC)


def _date(year: int, month: int, day: int) -> date:
    if year not in YEARS:
        raise ValueError(year)
    return date(year, month, day)
