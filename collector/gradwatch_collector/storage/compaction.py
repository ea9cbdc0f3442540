"""Background compaction: frames become layer-major blocks of 64 to 256 times of one day.

One call does a bounded amount of work in the caller's transaction, so that a crash leaves either the frames or
the block, and ingest waits for little. Frames that arrive late for times already in blocks are merged in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, func, or_, select

from gradwatch_collector.storage import schema, segments
from gradwatch_collector.storage.database import return_pages
from gradwatch_collector.storage.segments import PAYLOAD_COLUMNS, Segment

MIN_TIMES: Final = 64
# A series is compacted once it has this many frames, or none came for ten minutes.
_READY_FRAMES: Final = 128
_QUIET_NANOS: Final = 600 * 1_000_000_000
_FRAMES_AT_ONCE: Final = 512
_SERIES_AT_ONCE: Final = 256

_PAYLOAD: Final = ", ".join(PAYLOAD_COLUMNS)
_TAKE_FRAMES: Final = (
    "DELETE FROM frame WHERE series_id = ? AND time IN "  # noqa: S608 - our names
    f"(SELECT time FROM frame WHERE series_id = ? ORDER BY time LIMIT {_FRAMES_AT_ONCE}) "
    f"RETURNING time, {_PAYLOAD}"
)
# The day's newest block is opened again while it is short, so that slow series do not end in many small ones.
# No block reaches beyond its day: with the time limited at both ends PostgreSQL looks at those partitions only.
_TAKE_BLOCKS: Final = (
    "DELETE FROM block WHERE series_id = ? AND time >= ? AND time <= ? "  # noqa: S608 - our names
    f"AND (last_time >= ? OR count < {MIN_TIMES} AND time = "
    "(SELECT max(time) FROM block WHERE series_id = ? AND time >= ? AND time <= ?)) "
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
    more = len(ready) == _SERIES_AT_ONCE
    for series_id in ready:
        if values >= max_values:
            more = True
            break
        moved = _take_frames(connection, series_id)
        written = _write_blocks(connection, series_id, moved)
        series += 1
        frames += len(moved)
        more |= len(moved) == _FRAMES_AT_ONCE
        blocks += len(written)
        values += sum(segment.size for segment in written)
    if not ready:
        return_pages(connection)
    # Where another collector is at all of them there is nothing to do for now.
    return CompactionStats(series, frames, blocks, values, more=more and frames > 0)


def _ready(connection: Connection, quiet_since: int) -> Sequence[int]:
    frame = schema.frame.c
    return connection.scalars(
        select(frame.series_id)
        .group_by(frame.series_id)
        .having(or_(func.count() >= _READY_FRAMES, func.max(frame.time) < quiet_since))
        .limit(_SERIES_AT_ONCE)
    ).all()


def _take_frames(connection: Connection, series_id: int) -> list[Segment]:
    if not segments.claim(connection, series_id):
        return []
    # Deleting returns what was read: a frame that arrives meanwhile is not among it, and stays.
    return _segments(segments.fetch(connection, _TAKE_FRAMES, (series_id, series_id)))


def _write_blocks(connection: Connection, series_id: int, frames: Sequence[Segment]) -> list[Segment]:
    if not frames:
        return []
    first = min(int(segment.times[0]) for segment in frames)
    last = max(int(segment.times[-1]) for segment in frames)
    span = (series_id, first - first % segments.DAY, last)
    held = _segments(segments.fetch(connection, _TAKE_BLOCKS, (*span, first, *span)))
    written = [part for merged in segments.merge((*held, *frames)) for part in segments.cut(merged)]
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
