"""Reading series back: blocks and frames as one, ordered, each time once. See `rolled_up.py` for older ones."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, pairwise
from typing import Any, Final

import numpy as np
from sqlalchemy import ColumnElement, Connection, Row, func, select, tuple_

from gradwatch_collector.records import Attributes, MetricIdentity, Times, Vector
from gradwatch_collector.storage import packed, schema, segments
from gradwatch_collector.storage.database import batched
from gradwatch_collector.storage.segments import Segment

# One of several times may reach beyond where it begins.
_FRAMES: Final = (
    "SELECT time, {} FROM frame WHERE series_id = ? AND time <= ? AND (time >= ? OR count > 1) ORDER BY time"
)
_BLOCKS: Final = "SELECT time, {} FROM block WHERE series_id = ? AND time <= ? AND last_time >= ? ORDER BY time"
# Where the newest so-many times of a series begin, at most.
_FRAMES_BACK: Final = (
    "SELECT time FROM frame WHERE series_id = ? AND time <= ? ORDER BY time DESC LIMIT 1 OFFSET ?"
)
_BLOCKS_BACK: Final = (
    "SELECT time, count FROM block WHERE series_id = ? AND last_time <= ? ORDER BY time DESC LIMIT ?"
)
# All after a time, of many series at once. The last block that begins before that may reach beyond it.
_AFTER: Final = """
WITH wanted (series_id, since) AS (VALUES {wanted})
SELECT wanted.series_id, since, time, {columns} FROM wanted
JOIN frame ON frame.series_id = wanted.series_id AND time > since
UNION ALL
SELECT wanted.series_id, since, time, {columns} FROM wanted
JOIN block ON block.series_id = wanted.series_id AND last_time > since AND time >= coalesce(
(SELECT max(b.time) FROM block AS b WHERE b.series_id = wanted.series_id AND b.time <= since), since)
"""
_PAIR: Final = {"sqlite": "(?, ?)", "postgresql": "(CAST(? AS BIGINT), CAST(? AS BIGINT))"}
_SERIES_AT_ONCE: Final = 64
EVER: Final = (-(2**63), 2**63 - 1)


# Attempt, rank and attributes as text.
PlaceKey = tuple[int, int, str]


@dataclass(frozen=True, slots=True)
class Place:
    """Which of a metric's points: of which process, with which attributes; ``digest`` is of these alone."""

    attempt: int
    rank: int
    attributes: Attributes
    digest: bytes

    @property
    def key(self) -> PlaceKey:
        """What the place is known by."""
        return place_key(self.attempt, self.rank, self.attributes)


def place_key(attempt: int, rank: int, attributes: Attributes) -> PlaceKey:
    """Return what the place of a point is known by."""
    return attempt, rank, json.dumps(attributes, sort_keys=True)


@dataclass(frozen=True, slots=True)
class PointSeries:
    """All values of one point: one process, one field of one metric, one set of attributes.

    ``times``: Unix nanoseconds, shape ``[n]``, strictly increasing. ``values``: shape ``[n]``, or None for a
    packed field, which has one byte string for each time in ``packed``.
    """

    attempt: int
    rank: int
    attributes: Attributes
    times: Times
    values: Vector | None
    packed: tuple[bytes, ...] = ()

    @property
    def key(self) -> PlaceKey:
        """What the point's place is known by."""
        return place_key(self.attempt, self.rank, self.attributes)

    def last(self, count: int) -> PointSeries:
        """Return the newest ``count`` of the times."""
        values = None if self.values is None else self.values[-count:]
        return replace(self, times=self.times[-count:], values=values, packed=self.packed[-count:])


@dataclass(frozen=True, slots=True)
class SetSeries:
    """All values of one process over one attribute set, as stored: ``parts`` in no order, each time once."""

    attempt: int
    rank: int
    points: Sequence[Attributes]
    parts: Sequence[Segment]


def read_sets(
    connection: Connection,
    run_id: str,
    metric: str,
    field: str = "value",
    *,
    attempt: int | None = None,
    rank: int | None = None,
) -> list[SetSeries]:
    """Return a run's metric as whole matrices, by attempt, rank and first appearance."""
    return [
        SetSeries(row.attempt, row.rank, row.points, list(_pieces(connection, row.series_id, *EVER)))
        for row in series_rows(connection, run_id, metric, field, attempt, rank)
    ]


def read_series(
    connection: Connection,
    run_id: str,
    metric: str | MetricIdentity,
    field: str = "value",
    *,
    attempt: int | None = None,
    rank: int | None = None,
    attributes: Mapping[str, Any] | None = None,
    places: Collection[Place] | None = None,
    since: int | None = None,
    until: int | None = None,
    newest: int | None = None,
) -> list[PointSeries]:
    """Return every point of a run's metric, by attempt, rank and first appearance.

    ``metric`` is a name, or which of the metrics of a name. ``attributes`` selects the points that have (at
    least) these, ``places`` those that are in one. ``since`` and ``until`` are inclusive, in Unix nanoseconds;
    ``newest`` is how many times of each point come back at most, and about as many are read. Where integers
    and floats were sent for the same point, all come back as float64.
    """
    low, high = EVER[0] if since is None else since, EVER[1] if until is None else until
    pieces: dict[PlaceKey, list[Segment]] = {}
    found: dict[PlaceKey, Attributes] = {}
    keys = None if places is None else {place.key for place in places}
    for row in series_rows(connection, run_id, metric, field, attempt, rank, *may_hold(places)):
        chosen = [
            (index, point)
            for index, point in points_in(row, keys)
            if attributes is None or attributes.items() <= point.items()
        ]
        if not chosen:
            continue
        first = low if newest is None else max(low, _back(connection, row.series_id, high, newest))
        alone = chosen[0][0] if len(chosen) == 1 else None
        stretches = [
            between(part, first, high) for part in _pieces(connection, row.series_id, first, high, alone)
        ]
        for index, point in chosen if alone is None else [(0, chosen[0][1])]:
            place = place_key(row.attempt, row.rank, point)
            found.setdefault(place, point)
            pieces.setdefault(place, []).extend(part.point(index) for part in stretches if len(part.times))
    joined = (_joined(place, found[place], segments.merge(parts)) for place, parts in pieces.items() if parts)
    return [each if newest is None else each.last(newest) for each in joined]


def newest_since(connection: Connection, series_id: int, count: int) -> int:
    """Return a time after which a series has about ``count`` values; one before the first if it has fewer."""
    return max(_back(connection, series_id, EVER[1], count), EVER[0] + 1) - 1


def read_after(connection: Connection, since: Mapping[int, int]) -> Iterator[tuple[int, list[Segment]]]:
    """Yield what is stored of each series after a time (in Unix nanoseconds, by series id), if anything is.

    The segments of a series are in order, and each time is there once.
    """
    columns = segments.columns(connection)
    for some in batched(sorted(since.items()), 2, most=2 * _SERIES_AT_ONCE):
        wanted = ", ".join([_PAIR[connection.dialect.name]] * len(some))
        statement = _AFTER.format(wanted=wanted, columns=columns)
        found: dict[int, list[Segment]] = {}
        for series_id, after, time, *payload in segments.fetch(connection, statement, list(chain(*some))):
            segment = between(segments.from_row(int(time), payload), int(after) + 1, EVER[1])
            found.setdefault(int(series_id), []).append(segment)
        yield from ((series_id, _in_order(parts)) for series_id, parts in found.items())


def lowest_ranks(connection: Connection, run_id: str, metric: str, field: str = "value") -> dict[int, int]:
    """Return which is the lowest rank of each attempt, in order, that sent a metric."""
    series = schema.series.c
    lowest = connection.execute(
        select(series.attempt, func.min(series.rank))
        .join(schema.metric, schema.metric.c.metric_id == series.metric_id)
        .where(series.run_id == run_id, series.field == field, schema.metric.c.name == metric)
        .group_by(series.attempt)
        .order_by(series.attempt)
    )
    return {row.attempt: row[1] for row in lowest}


def series_rows(
    connection: Connection,
    run_id: str,
    metric: str | MetricIdentity,
    field: str,
    attempt: int | None,
    rank: int | None,
    *conditions: ColumnElement[bool],
) -> Sequence[Row[int, int, int, Any]]:
    """Return ``series_id, attempt, rank, points`` of every series, ``points`` being its attribute set.

    ``conditions`` are on `series` and `attribute_set`.
    """
    series, sets = schema.series.c, schema.attribute_set.c
    query = (
        select(series.series_id, series.attempt, series.rank, sets.points)
        .join(schema.metric, schema.metric.c.metric_id == series.metric_id)
        .join(schema.attribute_set, sets.set_id == series.set_id)
        .where(series.run_id == run_id, series.field == field, *_is(metric), *conditions)
        .order_by(series.attempt, series.rank, series.series_id)
    )
    if attempt is not None:
        query = query.where(series.attempt == attempt)
    if rank is not None:
        query = query.where(series.rank == rank)
    return connection.execute(query).all()


def may_hold(places: Collection[Place] | None) -> list[ColumnElement[bool]]:
    """Return what a series must meet to hold one of the places (None: nothing), its labels not being read."""
    if places is None:
        return []
    series, sets = schema.series.c, schema.attribute_set.c
    processes = sorted({(place.attempt, place.rank) for place in places})
    return [
        tuple_(series.attempt, series.rank).in_(processes),
        (sets.width > 1) | sets.digest.in_({place.digest for place in places}),
    ]


def points_in(row: Row[int, int, int, Any], keys: Collection[PlaceKey] | None) -> list[tuple[int, Attributes]]:
    """Return the points of one of `series_rows` that have one of the keys (None: all), with their positions."""
    return [
        (index, point)
        for index, point in enumerate(row.points)
        if keys is None or place_key(row.attempt, row.rank, point) in keys
    ]


def _is(metric: str | MetricIdentity) -> list[ColumnElement[bool]]:
    if isinstance(metric, str):
        return [schema.metric.c.name == metric]
    return [schema.metric.c[name] == value for name, value in asdict(metric).items()]


def _back(connection: Connection, series_id: int, high: int, count: int) -> int:
    """Return a time with at least ``count`` times of the series from it up to ``high``, or the first of all."""
    frames = segments.fetch(connection, _FRAMES_BACK, (series_id, high, count - 1))
    starts = [int(frames[0][0])] if frames else [EVER[0]]
    seen = 0
    for start, held in segments.fetch(connection, _BLOCKS_BACK, (series_id, high, count)):
        seen += held
        if seen >= count:
            starts.append(int(start))
            break
    return max(starts)


def _pieces(
    connection: Connection, series_id: int, low: int, high: int, point: int | None = None
) -> Iterable[Segment]:
    """Yield blocks and frames of a series, each time once."""
    columns = segments.columns(connection, point)
    # Frames first: compaction only ever moves times from frames to blocks, so that none can slip past.
    frames = segments.fetch(connection, _FRAMES.format(columns), (series_id, high, low))
    blocks = segments.fetch(connection, _BLOCKS.format(columns), (series_id, high, low))
    return _in_order([segments.from_row(row[0], row[1:], point) for row in (*blocks, *frames)])


def _in_order(parts: Sequence[Segment]) -> list[Segment]:
    in_order = sorted(parts, key=lambda part: int(part.times[0]))
    apart = all(int(left.times[-1]) < int(right.times[0]) for left, right in pairwise(in_order))
    return in_order if apart else segments.merge(parts)


def between(segment: Segment, low: int, high: int) -> Segment:
    """Return the times from ``low`` up to ``high``, inclusive."""
    start, end = np.searchsorted(segment.times, low), np.searchsorted(segment.times, high, side="right")
    return segment.take(slice(int(start), int(end)))


def _joined(place: PlaceKey, attributes: Attributes, parts: Sequence[Segment]) -> PointSeries:
    attempt, rank, _ = place
    times = np.concatenate([part.times for part in parts])
    order = np.argsort(times)
    if any(part.values is None for part in parts):
        joined = [packed.split(each)[0] for part in parts for each in part.packed]
        return PointSeries(
            attempt, rank, attributes, times[order], None, tuple(joined[i] for i in order.tolist())
        )
    values: Vector = np.concatenate([part.values[0] for part in parts if part.values is not None])
    return PointSeries(attempt, rank, attributes, times[order], values[order])
