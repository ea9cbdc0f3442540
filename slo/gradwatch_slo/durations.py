"""OpenSLO's duration shorthand: a count and one of ``m h d w M Q Y``."""

from __future__ import annotations

import re
from calendar import monthrange
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Self

_LENGTHS: Final = {
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
    "w": timedelta(weeks=1),
}
_MONTHS: Final = {"M": 1, "Q": 3, "Y": 12}
_NOMINAL: Final = {
    **_LENGTHS,
    "M": timedelta(days=30),
    "Q": timedelta(days=90),
    "Y": timedelta(days=365),
}
_SHORTHAND: Final = re.compile(r"([0-9]+)([mhdwMQY])")
_LENGTH: Final = re.compile(r"([0-9]+)([smhdw])")
# Longer ones leave the range of datetime, and of nanoseconds in 64 bits, long before they mean anything.
_LONGEST: Final = timedelta(days=36_525)
_LONGEST_MONTHS: Final = 1_200


@dataclass(frozen=True, slots=True)
class Duration:
    """``28d``, ``1Q``: weeks and shorter have a fixed length on the clock, months and longer do not."""

    count: int
    unit: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the shorthand; raise ``ValueError`` that says what is expected."""
        match = _SHORTHAND.fullmatch(text)
        # Nine digits keep the products below inside timedelta's range.
        if match is None or len(match[1]) > 9 or (count := int(match[1])) == 0:
            raise ValueError("a duration such as 28d: a positive count and one of m, h, d, w, M, Q, Y")
        unit = match[2]
        too_long = (
            count * _MONTHS[unit] > _LONGEST_MONTHS if unit in _MONTHS else count > _LONGEST // _LENGTHS[unit]
        )
        if too_long:
            raise ValueError("a duration of at most 100 years")
        return cls(count, unit)

    def __str__(self) -> str:
        return f"{self.count}{self.unit}"

    @property
    def is_exact(self) -> bool:
        """Whether it has the same length wherever and whenever: a day does not, where clocks change."""
        return self.unit in "mh"

    @property
    def months(self) -> int:
        """How many months it has: none, if it has a fixed length on the clock."""
        return self.count * _MONTHS.get(self.unit, 0)

    @property
    def nominal(self) -> timedelta:
        """Its length where one number has to do: months have 30 days, quarters 90, years 365."""
        return self.count * _NOMINAL[self.unit]

    def shift(self, moment: datetime, times: int) -> datetime:
        """Return ``moment`` moved by ``times`` durations (negative: into the past).

        Months keep the day of ``moment``, or take the month's last day where it has no such day.
        """
        if self.unit in _LENGTHS:
            return moment + times * self.count * _LENGTHS[self.unit]
        months = moment.year * 12 + moment.month - 1 + times * self.months
        year, month = divmod(months, 12)
        return moment.replace(year=year, month=month + 1, day=min(moment.day, monthrange(year, month + 1)[1]))

    def periods_between(self, anchor: datetime, moment: datetime) -> int:
        """Return k such that ``shift(anchor, k) <= moment < shift(anchor, k + 1)``."""
        if self.unit in _LENGTHS:
            return (moment - anchor) // (self.count * _LENGTHS[self.unit])
        months = (moment.year - anchor.year) * 12 + moment.month - anchor.month
        periods = months // self.months
        return periods if self.shift(anchor, periods) <= moment else periods - 1


def parse_length(text: str) -> timedelta:
    """Read a length of time such as ``60s`` or ``2h``; raise ``ValueError`` that says what is expected.

    Unlike a window's duration it may be zero, may be given in seconds, and never follows the calendar.
    """
    match = _LENGTH.fullmatch(text)
    if match is None:
        raise ValueError("a length of time such as 60s or 2h: a count and one of s, m, h, d, w")
    unit = timedelta(seconds=1) if match[2] == "s" else _LENGTHS[match[2]]
    # Ten digits are enough for a hundred years of seconds.
    if len(match[1]) > 10 or int(match[1]) > _LONGEST // unit:
        raise ValueError("a length of time of at most 100 years")
    return int(match[1]) * unit
