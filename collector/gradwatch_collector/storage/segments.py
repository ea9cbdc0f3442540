"""A stretch of one series in memory, and as the payload columns that `frame` and `block` share.

SQLite holds vectors as encoded bytes, PostgreSQL as arrays; here is the only place that knows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import psycopg
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from gradwatch_collector.records import Frame, Times, Vector
from gradwatch_collector.storage import packed, vectors
from gradwatch_collector.storage.database import placeholders

# In the order of `to_row` and `from_row`.
PAYLOAD_COLUMNS: Final = ("count", "times", "f32", "f64", "i64", "packed")
_VECTORS: Final = ("f32", "f64", "i64")
_CLAIM: Final = text("SELECT pg_try_advisory_xact_lock(hashtextextended(:series, 0))")
MAX_TIMES: Final = 256
# Packed values before they are compressed, of a row: one point may have a megabyte.
_MAX_BYTES: Final = 4 << 20
_BYTES_AT_ONCE: Final = 32 << 20
DAY: Final = 86_400 * 1_000_000_000
_TYPES: Final = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int64))
# How many bytes the packed values of a row are in memory: blocks are compressed, frames are not.
_PACKED_SIZE: Final = {"frame": "length(packed)", "block": f"{_MAX_BYTES}"}
# Rows until those before have so many bytes: one at least.
_TAKE: Final = (
    "DELETE FROM {table} WHERE series_id = ? AND time IN (SELECT time FROM ("  # noqa: S608 - our names
    "SELECT time, coalesce(sum(size) OVER (ORDER BY time ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) "
    "AS ahead FROM (SELECT time, CASE WHEN packed IS NULL THEN CAST(count AS BIGINT) * ? ELSE {packed_size} "
    "END AS size FROM {table} WHERE series_id = ? AND time <= ? ORDER BY time LIMIT ?) AS oldest"
    ") AS sized WHERE ahead < ?) "
    "RETURNING time, " + ", ".join(PAYLOAD_COLUMNS)
)


@dataclass(frozen=True, slots=True)
class Segment:
    """Some times of one series.

    ``times``: Unix nanoseconds, shape ``[n]``, strictly increasing. ``values``: shape ``[width, n]``; or, for
    fields that are not one number a point, ``packed`` has one byte string for each time.
    """

    times: Times
    values: Vector | None
    packed: tuple[bytes, ...] = ()

    @property
    def size(self) -> int:
        """Number of values; bytes for packed ones."""
        return self.values.size if self.values is not None else sum(map(len, self.packed))

    def take(self, index: npt.NDArray[Any] | slice) -> Segment:
        """Return some of the times, by increasing positions, a mask or a slice."""
        if self.values is not None:
            return Segment(self.times[index], self.values[:, index])
        kept = np.arange(len(self.times))[index].tolist()
        return Segment(self.times[index], None, tuple(self.packed[i] for i in kept))

    def point(self, index: int) -> Segment:
        """Return the series of one point of the set, as a set of its own."""
        if self.values is not None:
            return Segment(self.times, self.values[index : index + 1])
        return Segment(
            self.times, None, tuple(packed.join([packed.split(each)[index]]) for each in self.packed)
        )


def of_frame(frame: Frame) -> Segment:
    """Return a frame's numbers, in the narrowest type that keeps them."""
    if frame.values is None:
        return Segment(frame.times, None, frame.packed or ())
    return Segment(frame.times, vectors.narrow(frame.values))


def merge(segments: Iterable[Segment]) -> list[Segment]:
    """Merge segments of one series by time; where two have the same time, the earlier segment wins.

    Returns at most one segment each of floats, integers and packed values: no float holds every integer, so
    the kinds stay apart.
    """
    parts = list(segments)
    if not parts:
        return []
    times = np.concatenate([part.times for part in parts])
    _, first = np.unique(times, return_index=True)
    kept = np.zeros(len(times), bool)
    kept[first] = True
    kinds: dict[str, list[Segment]] = {}
    start = 0
    for part in parts:
        mask = kept[start : start + len(part.times)]
        start += len(part.times)
        if mask.any():
            kinds.setdefault(_kind(part), []).append(part.take(mask))
    return [_concatenate(same) for same in kinds.values()]


def _kind(segment: Segment) -> str:
    return "packed" if segment.values is None else segment.values.dtype.kind


def _concatenate(parts: Sequence[Segment]) -> Segment:
    times = np.concatenate([part.times for part in parts])
    order = np.argsort(times)
    if parts[0].values is None:
        joined = [each for part in parts for each in part.packed]
        return Segment(times[order], None, tuple(joined[i] for i in order.tolist()))
    values: Vector = np.concatenate([part.values for part in parts if part.values is not None], axis=1)
    return Segment(times[order], values[:, order])


def split_days(segment: Segment) -> Iterator[Segment]:
    """Split a segment at midnight (UTC)."""
    days = segment.times // DAY
    starts = [0, *(np.flatnonzero(np.diff(days)) + 1).tolist(), len(days)]
    for start, end in itertools.pairwise(starts):
        yield segment.take(slice(start, end))


def cut(segment: Segment) -> Iterator[Segment]:
    """Cut a segment into what a row of `block` or `rollup` holds: at most 256 times, all of one day (UTC).

    Even parts: none has fewer than 128 times if its day has more than 256; but packed values are cut where they
    have 4 MiB, too.
    """
    for day in split_days(segment):
        count = len(day.times)
        for part in np.array_split(np.arange(count), -(-count // MAX_TIMES)):
            row = day.take(slice(int(part[0]), int(part[-1]) + 1))
            if row.values is None:
                yield from _cut_bytes(row)
            else:
                # One float64 among frames of float32 widens its row and no other.
                yield replace(row, values=vectors.narrow(row.values))


def _cut_bytes(segment: Segment) -> Iterator[Segment]:
    sizes = np.array([len(each) for each in segment.packed])
    starts = np.cumsum(sizes) - sizes
    bounds = [0, *(np.flatnonzero(np.diff(starts // _MAX_BYTES)) + 1).tolist(), len(sizes)]
    for start, end in itertools.pairwise(bounds):
        yield segment.take(slice(start, end))


def to_row(segment: Segment, connection: Connection, *, compress: bool) -> tuple[Any, ...]:
    """Return the payload columns. ``compress`` trades time for space (SQLite only)."""
    count = len(segment.times)
    blobs = connection.dialect.name == "sqlite"
    columns: list[Any] = [count, None, None, None, None, None]
    if count > 1:
        columns[1] = vectors.encode_times(segment.times) if blobs else segment.times
    if segment.values is None:
        columns[5] = vectors.encode_packed(segment.packed, compress=compress)
    else:
        values = segment.values
        columns[2 + _TYPES.index(values.dtype)] = (
            vectors.encode(values, compress=compress) if blobs else np.ascontiguousarray(values).reshape(-1)
        )
    return tuple(columns)


def columns(connection: Connection, point: int | None = None) -> str:
    """Return what to select for `from_row`; for one point of the set PostgreSQL sends no other's values."""
    if point is None or connection.dialect.name == "sqlite":
        return ", ".join(PAYLOAD_COLUMNS)
    row = f"[{point} * count + 1:{point + 1} * count]"
    return ", ".join(f"{name}{row}" if name in _VECTORS else name for name in PAYLOAD_COLUMNS)


def from_row(time: int, row: Sequence[Any], point: int | None = None) -> Segment:
    """Return the segment that starts at ``time`` from its payload columns, as `fetch` returns them.

    ``point``: only this one of the set, as a set of its own.
    """
    count, held_times, *by_type, packed_values = row
    times = times_from(time, held_times)
    if packed_values is not None:
        whole = Segment(times, None, vectors.decode_packed(packed_values, count))
        return whole if point is None else whole.point(point)
    index = next((index for index, held in enumerate(by_type) if held is not None), None)
    if index is None:
        raise ValueError(f"the row at {time} has no payload")
    held = by_type[index]
    if not isinstance(held, bytes):
        values = held
    elif point is None:
        values = vectors.decode(held, _TYPES[index])
    else:
        values = vectors.decode_row(held, _TYPES[index], point, count)
    return Segment(times, values.reshape(-1, count))


def times_from(time: int, column: Any) -> Times:
    """Return the times of a row from its key's time and its column ``times``."""
    if column is None:
        return np.array([time], np.int64)
    times: Times = vectors.decode_times(column) if isinstance(column, bytes) else column
    return times


def fetch(connection: Connection, statement: str, parameters: Sequence[Any]) -> Sequence[Sequence[Any]]:
    """Run a driver-level statement (``?`` placeholders) inside the transaction; return rows with vectors.

    SQLAlchemy's array type would make a Python object of each value.

    Raises:
        DBAPIError: as from SQLAlchemy itself.
    """
    if connection.dialect.name == "sqlite":
        return connection.exec_driver_sql(statement, tuple(parameters)).all()
    driver = connection.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)
    try:
        with driver.cursor(binary=True) as cursor:
            cursor.execute(placeholders(connection, statement), parameters)
            return cursor.fetchall()
    except psycopg.Error as error:
        raise DBAPIError(statement, tuple(parameters), error) from error


def take_oldest(
    connection: Connection, table: str, series_id: int, width: int, most: int, until: int = 2**63 - 1
) -> list[Segment]:
    """Delete a series' oldest rows of `frame` or `block` and return them: ``most``, or fewer large ones.

    ``width``: of its attribute set; ``until``: the last time with which a row may begin, in Unix nanoseconds.
    """
    statement = _TAKE.format(table=table, packed_size=_PACKED_SIZE[table])
    # Deleting returns what was read: a frame that arrives meanwhile is not among it, and stays.
    return from_rows(
        fetch(connection, statement, (series_id, 8 * width, series_id, until, most, _BYTES_AT_ONCE))
    )


def from_rows(rows: Sequence[Sequence[Any]]) -> list[Segment]:
    """Return the segments of rows of time and payload, by time."""
    return [from_row(row[0], row[1:]) for row in sorted(rows, key=lambda row: int(row[0]))]


def claim(connection: Connection, series_id: int) -> bool:
    """Return whether the series' stored rows are this transaction's to rearrange.

    They are not while another collector is at them. An advisory lock, because Citus would have to look for the
    row of `series` on every node.
    """
    return connection.dialect.name != "postgresql" or bool(
        connection.scalar(_CLAIM, {"series": f"series {series_id}"})
    )
