"""Background compaction: frames become layer-major blocks of 64 to 256 times.

One call does a bounded amount of work in the caller's transaction, so that a crash leaves either the frames or
the block, and ingest waits for little. Frames that arrive late for times already in blocks are merged in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from sqlalchemy import Connection, func, or_, select

from gradwatch_collector import schema, segments, vectors
from gradwatch_collector.segments import PAYLOAD_COLUMNS, Segment

MAX_TIMES: Final = 256
MIN_TIMES: Final = 64
# A series is compacted once it has this many frames, or none came for ten minutes.
_READY_FRAMES: Final = 128
_QUIET_NANOS: Final = 600 * 1_000_000_000
_FRAMES_AT_ONCE: Final = 512
_SERIES_AT_ONCE: Final = 256
_PAGES_AT_ONCE: Final = 1_000

_PAYLOAD: Final = ", ".join(PAYLOAD_COLUMNS)
_TAKE_FRAMES: Final = (
    "DELETE FROM frame WHERE series_id = ? AND time IN "  # noqa: S608 - our names
    f"(SELECT time FROM frame WHERE series_id = ? ORDER BY time LIMIT {_FRAMES_AT_ONCE}) "
    f"RETURNING time, {_PAYLOAD}"
)
# The newest block is opened again while it is short, so that slow series do not end in many small ones.
_TAKE_BLOCKS: Final = (
    "DELETE FROM block WHERE series_id = ? AND (time <= ? AND last_time >= ? "  # noqa: S608 - our names
    f"OR count < {MIN_TIMES} AND last_time < ? AND time = (SELECT max(time) FROM block WHERE series_id = ?)) "
    f"RETURNING time, {_PAYLOAD}"
)
_COLUMNS: Final = ("series_id", "time", "last_time", *PAYLOAD_COLUMNS)
_INSERT_BLOCK: Final = f"INSERT INTO block ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608 - our names


@dataclass(frozen=True, slots=True)
class CompactionStats:
    """What one call did. ``values``: numbers written to blocks (bytes for packed fields)."""

    series: int = 0
    frames: int = 0
    blocks: int = 0
    values: int = 0
    more: bool = False


def compact(
    connection: Connection, now: int, *, quiet: int = _QUIET_NANOS, max_values: int = 500_000
) -> CompactionStats:
    """Move frames that are ready into blocks; stop once ``max_values`` are written.

    ``now`` and ``quiet`` in nanoseconds: a series whose newest frame is older than ``quiet`` is compacted
    however few it has. ``more`` says that another call will find work.
    """
    ready = _ready(connection, now - quiet)
    series = frames = blocks = values = 0
    for series_id in ready:
        if values >= max_values:
            break
        moved = _take_frames(connection, series_id)
        written = _write_blocks(connection, series_id, moved)
        series += 1
        frames += len(moved)
        blocks += len(written)
        values += sum(segment.size for segment in written)
    if not ready:
        _return_pages(connection)
    return CompactionStats(
        series, frames, blocks, values, more=series == _SERIES_AT_ONCE or series < len(ready)
    )


def _ready(connection: Connection, quiet_since: int) -> Sequence[int]:
    frame = schema.frame.c
    return connection.scalars(
        select(frame.series_id)
        .group_by(frame.series_id)
        .having(or_(func.count() >= _READY_FRAMES, func.max(frame.time) < quiet_since))
        .limit(_SERIES_AT_ONCE)
    ).all()


def _take_frames(connection: Connection, series_id: int) -> list[Segment]:
    if connection.dialect.name == "postgresql":
        # Another collector may be at it; whoever comes second leaves the series alone.
        series = schema.series.c
        mine = select(series.series_id).where(series.series_id == series_id).with_for_update(skip_locked=True)
        if connection.scalar(mine) is None:
            return []
    # Deleting returns what was read: a frame that arrives meanwhile is not among it, and stays.
    return _segments(segments.fetch(connection, _TAKE_FRAMES, (series_id, series_id)))


def _write_blocks(connection: Connection, series_id: int, frames: Sequence[Segment]) -> list[Segment]:
    if not frames:
        return []
    first = min(int(segment.times[0]) for segment in frames)
    last = max(int(segment.times[-1]) for segment in frames)
    held = _segments(segments.fetch(connection, _TAKE_BLOCKS, (series_id, last, first, first, series_id)))
    written = [part for merged in segments.merge((*held, *frames)) for part in _parts(merged)]
    connection.exec_driver_sql(
        segments.placeholders(connection, _INSERT_BLOCK),
        [
            (
                series_id,
                int(segment.times[0]),
                int(segment.times[-1]),
                *segments.to_row(segment, connection, compress=True),
            )
            for segment in written
        ],
    )
    return written


def _segments(rows: Sequence[Sequence[Any]]) -> list[Segment]:
    return [segments.from_row(row[0], row[1:]) for row in sorted(rows, key=lambda row: int(row[0]))]


def _parts(segment: Segment) -> Iterator[Segment]:
    # Even parts of at most 256 times: none is shorter than 128 if there is more than one.
    count = len(segment.times)
    for part in np.array_split(np.arange(count), -(-count // MAX_TIMES)):
        cut = segment.take(slice(int(part[0]), int(part[-1]) + 1))
        # One float64 among frames of float32 widens its block and no other.
        yield cut if cut.values is None else replace(cut, values=vectors.narrow(cut.values))


def _return_pages(connection: Connection) -> None:
    # Idle time: SQLite hands the pages of deleted frames back to the file system, some at a time.
    if connection.dialect.name == "sqlite":
        free = connection.exec_driver_sql("PRAGMA freelist_count").scalar_one()
        for _ in range(min(free, _PAGES_AT_ONCE)):
            # One by one: whatever the number asked for, Python's sqlite3 stops after the first.
            connection.exec_driver_sql("PRAGMA incremental_vacuum(1)")
