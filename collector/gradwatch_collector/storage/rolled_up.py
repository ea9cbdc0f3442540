"""Reading back what is left of numbers that were pruned (`rollups.py`).

Whoever shows both reads what is still there as it was sent first, then this: rolling up only ever moves numbers
from there to here, so that none can slip past.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, exists

from gradwatch_collector.records import Attributes, MetricIdentity, Times
from gradwatch_collector.storage import schema, segments
from gradwatch_collector.storage.reading import (
    EVER,
    Place,
    PlaceKey,
    SetSeries,
    between,
    may_hold,
    place_key,
    points_in,
    series_rows,
)
from gradwatch_collector.storage.rollups import Statistic
from gradwatch_collector.storage.segments import Segment

Doubles = npt.NDArray[np.float64]

_ROLLUPS: Final = "SELECT statistic, time, {} FROM rollup WHERE series_id = ? AND time <= ? AND last_time >= ?"
_OF_STATISTIC: Final = "SELECT time, {} FROM rollup WHERE series_id = ? AND statistic = ? ORDER BY time"
# Where the newest so-many buckets of a series begin, at most.
_BACK: Final = (
    f"SELECT time, count FROM rollup WHERE series_id = ? AND statistic = '{Statistic.COUNT}' "  # noqa: S608 - our names
    "AND last_time <= ? ORDER BY time DESC LIMIT ?"
)
# One statement tells of all series that there is nothing to read.
_IS_ROLLED_UP: Final = exists().where(schema.rollup.c.series_id == schema.series.c.series_id)


@dataclass(frozen=True, slots=True)
class Bucket:
    """One bucket of a `PointRollup`, whose fields say what these are."""

    count: float
    nonfinite: float
    minimum: float
    maximum: float
    mean: float
    last: float


@dataclass(frozen=True, slots=True)
class PointRollup:
    """What is left of the values of one point that were pruned: buckets of up to 64 times (`rollups.py`).

    ``times``: the last of each bucket, in Unix nanoseconds, strictly increasing. The others are float64, all of
    shape ``[n]``. ``count``: times in a bucket; ``nonfinite``: how many of their values were NaN or infinite.
    ``minimum``, ``maximum`` and ``mean`` are over the others, NaN where there are none. ``last`` is what it
    was. Of a packed field only the count is known.
    """

    attempt: int
    rank: int
    attributes: Attributes
    times: Times
    count: Doubles
    nonfinite: Doubles
    minimum: Doubles
    maximum: Doubles
    mean: Doubles
    last: Doubles

    @property
    def key(self) -> PlaceKey:
        """What the point's place is known by."""
        return place_key(self.attempt, self.rank, self.attributes)

    def buckets(self) -> Iterator[tuple[int, Bucket]]:
        """Yield each bucket under its time."""
        columns = (self.count, self.nonfinite, self.minimum, self.maximum, self.mean, self.last)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for time, row in zip(self.times.tolist(), rows, strict=True):
            yield time, Bucket(*row)

    @property
    def total(self) -> float:
        """Sum of the finite values of all buckets, as exact as their means are."""
        return float(np.nansum(self.mean * (self.count - self.nonfinite)))


def read_rollups(
    connection: Connection,
    run_id: str,
    metric: str | MetricIdentity,
    field: str = "value",
    *,
    attempt: int | None = None,
    rank: int | None = None,
    places: Collection[Place] | None = None,
    since: int | None = None,
    until: int | None = None,
    newest: int | None = None,
) -> list[PointRollup]:
    """Return what was rolled up of every point of a run's metric, by attempt, rank and first appearance.

    Arguments as for `read_series`, which returns what is still there as it was sent; a bucket is at the last of
    its times, and about ``newest`` of each point come back. A point that was sent in several attribute sets is
    returned once for each.
    """
    low, high = EVER[0] if since is None else since, EVER[1] if until is None else until
    keys = None if places is None else {place.key for place in places}
    found = []
    conditions = (_IS_ROLLED_UP, *may_hold(places))
    for row in series_rows(connection, run_id, metric, field, attempt, rank, *conditions):
        chosen = points_in(row, keys)
        if chosen:
            first = low if newest is None else max(low, _back(connection, row.series_id, high, newest))
            buckets = _buckets(connection, row.series_id, first, high, [index for index, _ in chosen])
            if buckets:
                found += [
                    _point(row.attempt, row.rank, point, index, buckets)
                    for index, (_, point) in enumerate(chosen)
                ]
    return found


def read_rolled_up_sets(
    connection: Connection,
    run_id: str,
    metric: str,
    statistic: Statistic,
    field: str = "value",
    *,
    attempt: int | None = None,
    rank: int | None = None,
) -> list[SetSeries]:
    """Return a statistic of what was rolled up of a run's metric as whole matrices, as `read_sets` does."""
    statement = _OF_STATISTIC.format(segments.columns(connection))
    return [
        SetSeries(
            row.attempt,
            row.rank,
            row.points,
            [
                segments.from_row(time, payload)
                for time, *payload in segments.fetch(connection, statement, (row.series_id, statistic.value))
            ],
        )
        for row in series_rows(connection, run_id, metric, field, attempt, rank, _IS_ROLLED_UP)
    ]


def _back(connection: Connection, series_id: int, high: int, count: int) -> int:
    """Return a time with at least ``count`` buckets of the series from it up to ``high``, or before all."""
    seen = 0
    for start, held in segments.fetch(connection, _BACK, (series_id, high, count)):
        seen += held
        if seen >= count:
            return int(start)
    return EVER[0]


def _buckets(
    connection: Connection, series_id: int, low: int, high: int, points: Sequence[int]
) -> dict[str, list[Segment]]:
    """Return the stored segments of each statistic of a series, for some of its points."""
    found: dict[str, list[Segment]] = {}
    statement = _ROLLUPS.format(segments.columns(connection))
    for statistic, time, *payload in segments.fetch(connection, statement, (series_id, high, low)):
        part = between(segments.from_row(time, payload), low, high)
        assert part.values is not None
        if len(part.times):
            # How many there were is told once for all points.
            rows = [0] * len(points) if statistic == Statistic.COUNT else points
            found.setdefault(statistic, []).append(replace(part, values=part.values[rows]))
    return found


def _point(
    attempt: int, rank: int, attributes: Attributes, index: int, buckets: Mapping[str, Sequence[Segment]]
) -> PointRollup:
    times = np.unique(np.concatenate([part.times for part in buckets[Statistic.COUNT]]))

    def told(statistic: Statistic, unknown: float = np.nan) -> Doubles:
        values = np.full(len(times), unknown)
        for part in buckets.get(statistic, ()):
            assert part.values is not None
            at, theirs = np.intersect1d(times, part.times, assume_unique=True, return_indices=True)[1:]
            values[at] = part.values[index][theirs]
        return values

    return PointRollup(
        attempt,
        rank,
        attributes,
        times,
        count=told(Statistic.COUNT),
        nonfinite=told(Statistic.NONFINITE, 0.0),
        minimum=told(Statistic.MINIMUM),
        maximum=told(Statistic.MAXIMUM),
        mean=told(Statistic.MEAN),
        last=told(Statistic.LAST),
    )
