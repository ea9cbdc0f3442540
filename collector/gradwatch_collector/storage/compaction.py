"""Background compaction: frames become layer-major blocks of 64 to 256 times of one day.

One call does a bounded amount of work in the caller's transaction, so that a crash leaves either the frames or
the block, and ingest waits for little. Frames that arrive late for times already in blocks are merged in.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, func, or_, select

from gradwatch_collector.storage import schema, segments
from gradwatch_collector.storage.database import placeholders, return_pages
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
    "(SELECT time FROM frame WHERE series_id = ? ORDER BY time LIMIT ?) "
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
_BLOCK_TIMES: Final = "SELECT time FROM block WHERE series_id = ? AND time > ? AND time < ? ORDER BY time"
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
    for series_id, width in ready:
        if values >= max_values:
            more = True
            break
        at_once = segments.rows_at_once(_FRAMES_AT_ONCE, width)
        moved = _take_frames(connection, series_id, at_once)
        written = _write_blocks(connection, series_id, moved)
        series += 1
        frames += len(moved)
        more |= len(moved) == at_once
        blocks += len(written)
        values += sum(segment.size for segment in written)
    if not ready:
        return_pages(connection)
    # Where another collector is at all of them there is nothing to do for now.
    return CompactionStats(series, frames, blocks, values, more=more and frames > 0)


def _ready(connection: Connection, quiet_since: int) -> Sequence[tuple[int, int]]:
    """Return series and the width of each."""
    frame, series, points = schema.frame.c, schema.series.c, schema.attribute_set.c
    ready = (
        select(frame.series_id)
        .group_by(frame.series_id)
        .having(or_(func.count() >= _READY_FRAMES, func.max(frame.time) < quiet_since))
        .limit(_SERIES_AT_ONCE)
        .subquery()
    )
    return [
        (row.series_id, row.width)
        for row in connection.execute(
            select(ready.c.series_id, points.width)
            .join(schema.series, series.series_id == ready.c.series_id)
            .join(schema.attribute_set, points.set_id == series.set_id)
        )
    ]


def _take_frames(connection: Connection, series_id: int, at_once: int) -> list[Segment]:
    if not segments.claim(connection, series_id):
        return []
    # Deleting returns what was read: a frame that arrives meanwhile is not among it, and stays.
    return _segments(segments.fetch(connection, _TAKE_FRAMES, (series_id, series_id, at_once)))


def _write_blocks(connection: Connection, series_id: int, frames: Sequence[Segment]) -> list[Segment]:
    return [
        written
        for stretch in _stretches(connection, series_id, frames)
        for written in _write_stretch(connection, series_id, stretch)
    ]


def _stretches(connection: Connection, series_id: int, frames: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Yield frames with no block between them: one that is weeks late must not open all blocks since.

    Frames in the order of their times, as they were taken.
    """
    if not frames:
        return
    span = (series_id, int(frames[0].times[0]), int(frames[-1].times[-1]))
    blocks = [int(row[0]) for row in segments.fetch(connection, _BLOCK_TIMES, span)]
    stretch: list[Segment] = []
    last = 0
    for frame in frames:
        first = int(frame.times[0])
        if stretch and bisect_right(blocks, last) < bisect_left(blocks, first):
            yield stretch
            stretch = []
        stretch.append(frame)
        last = max(last, int(frame.times[-1]))
    yield stretch


def _write_stretch(connection: Connection, series_id: int, frames: Sequence[Segment]) -> list[Segment]:
    first = int(frames[0].times[0])
    last = max(int(segment.times[-1]) for segment in frames)
    span = (series_id, first - first % segments.DAY, last)
    held = _segments(segments.fetch(connection, _TAKE_BLOCKS, (*span, first, *span)))
    written = [part for merged in segments.merge((*held, *frames)) for part in segments.cut(merged)]
    connection.exec_driver_sql(
        placeholders(connection, _INSERT_BLOCK),
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
