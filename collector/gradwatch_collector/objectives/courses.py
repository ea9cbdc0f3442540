"""What was counted, stretch by stretch: how a budget was spent, and how week followed week."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta, tzinfo
from itertools import pairwise
from typing import Final

from gradwatch_collector.objectives.changes import HOUR
from gradwatch_collector.objectives.counting import Stretch, Tallies
from gradwatch_collector.objectives.indicator import Indicator
from gradwatch_slo.counts import Counts, Group

# As many as tell apart on a phone.
_PIECES: Final = 56
_FEWEST_WEEKS: Final = 8
_MOST_WEEKS: Final = 26
_WEEK: Final = timedelta(weeks=1)


@dataclass(frozen=True, slots=True)
class Course:
    """Counts of one group: ``counts[i]`` from ``edges[i]`` up to ``edges[i + 1]``, Unix nanoseconds."""

    edges: tuple[int, ...]
    counts: tuple[Counts, ...]

    @property
    def stretches(self) -> dict[Stretch, Counts]:
        """What was counted by stretch."""
        return dict(zip(pairwise(self.edges), self.counts, strict=True))


class Courses:
    """The courses of an indicator's groups."""

    def __init__(self, tallies: Tallies, indicator: Indicator, edges: Sequence[int]) -> None:
        self._edges = tuple(edges)
        self._counts = [tallies.over(indicator, start, end) for start, end in pairwise(edges)]

    def of(self, group: Group) -> Course:
        """Return that of a group, counted or not."""
        return Course(self._edges, tuple(counts.get(group, Counts()) for counts in self._counts))


def pieces(start: int, end: int) -> list[int]:
    """Return the edges of equal stretches of a window, Unix nanoseconds.

    Of a long window they are at whole hours, of which counts are kept.
    """
    wanted = (start + (end - start) * index // _PIECES for index in range(1, _PIECES))
    inner = {at // HOUR * HOUR if end - start > _PIECES * HOUR else at for at in wanted}
    return [start, *sorted(at for at in inner if start < at < end), end]


def mondays(start: datetime, end: datetime, zone: tzinfo) -> list[datetime]:
    """Return when a window's weeks began (midnight in the zone), at least 8 and at most 26, and its end."""
    local = end.astimezone(zone)
    last = datetime.combine(local.date() - timedelta(days=local.weekday()), time(), zone)
    count = min(max(-(-(end - start) // _WEEK), _FEWEST_WEEKS), _MOST_WEEKS)
    begins = [(last - index * _WEEK).astimezone(UTC) for index in reversed(range(count))]
    return [*(at for at in begins if at < end), end]
