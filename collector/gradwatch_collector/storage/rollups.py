"""Roll-ups: what is kept of numbers that are too old to be kept as they were.

Every 64 consecutive times of a series, within a day, become one: how many there were, how many of their values
were NaN or infinite, and the least, the greatest, the mean and the last. Buckets are counted in times, not in
seconds, so that a run of ten minutes keeps the shape of its loss as one of ten weeks does. Distributions
(packed fields) have no such summary: of them the number remains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection

from gradwatch_collector.records import Vector
from gradwatch_collector.storage import segments
from gradwatch_collector.storage.database import placeholders
from gradwatch_collector.storage.partitions import make_rollup_partition
from gradwatch_collector.storage.segments import DAY, PAYLOAD_COLUMNS, Segment

BUCKET: Final = 64
_SERIES_AT_ONCE: Final = 64
_BLOCKS_AT_ONCE: Final = 64

_DUE: Final = (
    "SELECT due.series_id, attribute_set.width "  # noqa: S608 - our names
    f"FROM (SELECT DISTINCT series_id FROM block WHERE time < ? LIMIT {_SERIES_AT_ONCE}) AS due "
    "JOIN series ON series.series_id = due.series_id JOIN attribute_set ON attribute_set.set_id = series.set_id"
)
_Row = tuple[Any, ...]
_Places = npt.NDArray[np.int64]
_COLUMNS: Final = ("series_id", "statistic", "time", "last_time", *PAYLOAD_COLUMNS)
_TIME: Final = _COLUMNS.index("time")
_INSERT: Final = f"INSERT INTO rollup ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608 - our names
# No row reaches beyond its day, and of every bucket the number is kept.
_ENDS: Final = (
    "SELECT time, times FROM rollup WHERE series_id = ? AND statistic = 'count' AND time >= ? AND time <= ?"
)


class Statistic(StrEnum):
    """What is kept of the values of a bucket. All but the last two leave NaN and infinities out."""

    MINIMUM = "min"
    MAXIMUM = "max"
    MEAN = "mean"
    LAST = "last"
    NONFINITE = "nonfinite"  # number of values; no row where there are none
    COUNT = "count"  # number of times: one for all points


@dataclass(frozen=True, slots=True)
class RolledUp:
    """What one call did. ``values``: numbers taken from blocks (bytes for packed fields)."""

    blocks: int
    values: int
    rows: int


def roll_up(connection: Connection, before: int, now: int, *, max_values: int = 2_000_000) -> RolledUp:
    """Replace blocks of whole days before a moment by roll-ups; stop once ``max_values`` are taken.

    In Unix nanoseconds. Another call may find more as long as one finds any. What arrives later for a day that
    is rolled up already is rolled up by itself, into buckets of its own; but for a time that ends a bucket: its
    value is known to be in it, and what was first stays.
    """
    midnight = before - before % DAY
    blocks = values = 0
    rows: list[_Row] = []
    for series_id, width in segments.fetch(connection, _DUE, (midnight,)):
        if values >= max_values:
            break
        if segments.claim(connection, series_id):
            held = segments.take_oldest(connection, "block", series_id, width, _BLOCKS_AT_ONCE, midnight - 1)
            blocks += len(held)
            values += sum(part.size for part in held)
            rows += (row for merged in segments.merge(held) for row in _rows(connection, series_id, merged))
    for day in sorted({row[_TIME] // DAY for row in rows}):
        make_rollup_partition(connection, day * DAY, now)
    if rows:
        connection.exec_driver_sql(placeholders(connection, _INSERT), rows)
    return RolledUp(blocks, values, len(rows))


def _rows(connection: Connection, series_id: int, segment: Segment) -> Iterator[_Row]:
    for day in segments.split_days(segment):
        late = _without_ends(connection, series_id, day)
        for statistic, rolled in reduce(late).items() if len(late.times) else ():
            for part in segments.cut(rolled):
                yield (
                    series_id,
                    statistic.value,
                    int(part.times[0]),
                    int(part.times[-1]),
                    *segments.to_row(part, connection, compress=True),
                )


def _without_ends(connection: Connection, series_id: int, day: Segment) -> Segment:
    """Return what is left of a day's times without those under which there are buckets already."""
    first, last = int(day.times[0]), int(day.times[-1])
    rows = segments.fetch(connection, _ENDS, (series_id, first - first % DAY, last))
    if not rows:
        return day
    ends = np.concatenate([segments.times_from(int(time), times) for time, times in rows])
    return day.take(~np.isin(day.times, ends))


def reduce(segment: Segment) -> dict[Statistic, Segment]:
    """Return the statistics of every :data:`BUCKET` times, under the last time of each."""
    starts = np.arange(0, len(segment.times), BUCKET)
    ends = np.append(starts[1:], len(segment.times)) - 1
    times = segment.times[ends]
    counts = np.diff(np.append(starts, len(segment.times)))[None, :]
    reduced: dict[Statistic, Vector] = {Statistic.COUNT: counts}
    if segment.values is not None:
        reduced |= _reduce_values(segment.values, starts, ends, counts)
    return {statistic: Segment(times, values) for statistic, values in reduced.items()}


def _reduce_values(values: Vector, starts: _Places, ends: _Places, counts: _Places) -> dict[Statistic, Vector]:
    finite = np.isfinite(values)
    known = np.add.reduceat(finite, starts, axis=1, dtype=np.int64)
    low = _extreme(np.minimum, values, finite, known, starts)
    high = _extreme(np.maximum, values, finite, known, starts)
    # Divided first, by a power of two and so exactly: no sum of 64 of them can overflow.
    shares = np.where(finite, values, 0).astype(np.float64) / BUCKET
    with np.errstate(invalid="ignore", over="ignore"):
        mean = np.add.reduceat(shares, starts, axis=1) * (BUCKET / np.where(known > 0, known, np.nan))
    # Rounding must not take a mean out of what it is the mean of.
    mean = np.clip(mean, low.astype(np.float64), high.astype(np.float64))
    reduced: dict[Statistic, Vector] = {
        Statistic.LAST: values[:, ends],
        Statistic.MINIMUM: low,
        Statistic.MAXIMUM: high,
        # As precise as what it is the mean of: a float64 would be twice the size for digits that mean nothing.
        Statistic.MEAN: mean.astype(np.float32) if values.dtype == np.float32 else mean,
    }
    if (known < counts).any():
        reduced[Statistic.NONFINITE] = counts - known
    return reduced


def _extreme(
    function: np.ufunc, values: Vector, finite: npt.NDArray[np.bool_], known: _Places, starts: _Places
) -> Vector:
    """Return the least or greatest of the finite values of each bucket; NaN where there are none."""
    if values.dtype.kind == "i":
        whole: Vector = function.reduceat(values, starts, axis=1)
        return whole
    neutral = values.dtype.type(np.inf if function is np.minimum else -np.inf)
    found = function.reduceat(np.where(finite, values, neutral), starts, axis=1)
    some: Vector = np.where(known > 0, found, values.dtype.type(np.nan))
    return some
