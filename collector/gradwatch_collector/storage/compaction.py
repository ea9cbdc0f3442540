"""Background compaction: frames become layer-major blocks of 64 to 256 times of one day.

One call does a bounded amount of work in the caller's transaction, so that a crash leaves either the frames or
the block, and ingest waits for little. Frames that arrive late for times already in blocks are merged in.

Calls go round the series that have frames, a stretch of the frame table each, so that what one costs does not
grow with how many wait.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, select

from gradwatch_collector.storage import schema, segments
from gradwatch_collector.storage.database import batched, placeholders, return_pages
from gradwatch_collector.storage.segments import PAYLOAD_COLUMNS, Segment

MIN_TIMES: Final = 64
# A series is compacted once it has this many frames, or none came for ten minutes.
_READY_FRAMES: Final = 128
_QUIET_NANOS: Final = 600 * 1_000_000_000
_FRAMES_AT_ONCE: Final = 512
# How many keys of frames one call looks at: some 20 ms of reading.
_LOOKED_AT: Final = 16_384

_PAYLOAD: Final = ", ".join(PAYLOAD_COLUMNS)
# The limit comes first: a stretch of the key's index is read, and all else is of that.
_WAITING: Final = (
    "SELECT series_id, count(*), max(time) FROM "
    "(SELECT series_id, time FROM frame WHERE series_id > ? ORDER BY series_id, time LIMIT ?) AS stretch "
    "GROUP BY series_id ORDER BY series_id"
)
_OLDER: Final = "SELECT DISTINCT series_id FROM frame WHERE time < ? LIMIT ?"
_SERIES_AT_ONCE: Final = 64
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
    """What one call did. ``values``: numbers written to blocks (bytes for packed fields).

    ``more`` says that another call may find work, from the series after ``after`` on.
    """

    series: int = 0
    frames: int = 0
    blocks: int = 0
    values: int = 0
    after: int = 0
    more: bool = False


def compact(
    connection: Connection, now: int, *, after: int = 0, quiet: int = _QUIET_NANOS, max_values: int = 500_000
) -> CompactionStats:
    """Move frames that are ready into blocks; stop once ``max_values`` are written.

    ``now`` and ``quiet`` in nanoseconds: a series whose newest frame is older than ``quiet`` is compacted
    however few it has. ``after``: where the last call stopped (`CompactionStats.after`); 0 begins a round.
    """
    waiting, reached = _look(connection, after, now - quiet)
    ready = _widths(connection, list(waiting))
    series = frames = blocks = values = 0
    unfinished = False
    for series_id, width in ready:
        moved = _take_frames(connection, series_id, width)
        written = _write_blocks(connection, series_id, moved)
        series += 1
        frames += len(moved)
        unfinished |= 0 < len(moved) < waiting[series_id]
        blocks += len(written)
        values += sum(segment.size for segment in written)
        if values >= max_values and series < len(ready):
            reached = series_id
            break
    if not ready:
        return_pages(connection)
    return CompactionStats(series, frames, blocks, values, reached, more=reached > 0 or unfinished)


def compact_older(connection: Connection, before: int) -> None:
    """Move frames of some series that have any from before a moment into blocks, however few they are.

    A series that is never quiet, because a clock was ahead once, or of which nobody took care since, has some.
    """
    older = segments.fetch(connection, _OLDER, (before, _SERIES_AT_ONCE))
    for series_id, width in _widths(connection, [int(row[0]) for row in older]):
        _write_blocks(connection, series_id, _take_frames(connection, series_id, width))


def _look(connection: Connection, after: int, quiet_since: int) -> tuple[Mapping[int, int], int]:
    """Return how many frames the series have that are ready, and after which to look next; 0 at the end."""
    found = segments.fetch(connection, _WAITING, (after, _LOOKED_AT))
    reached = 0
    if sum(frames for _, frames, _ in found) == _LOOKED_AT:
        # The last may have more than was looked at. Unless it is ready even so, it is the next call's first.
        found = found if len(found) == 1 else found[:-1]
        reached = int(found[-1][0])
    ready = {
        int(one): int(frames) for one, frames, last in found if frames >= _READY_FRAMES or last < quiet_since
    }
    return ready, reached


def _widths(connection: Connection, ids: Sequence[int]) -> list[tuple[int, int]]:
    series, sets = schema.series.c, schema.attribute_set.c
    query = select(series.series_id, sets.width).join(schema.attribute_set, sets.set_id == series.set_id)
    return [
        (row.series_id, row.width)
        for some in batched(ids)
        for row in connection.execute(query.where(series.series_id.in_(some)).order_by(series.series_id))
    ]


def _take_frames(connection: Connection, series_id: int, width: int) -> list[Segment]:
    if not segments.claim(connection, series_id):
        return []
    return segments.take_oldest(connection, "frame", series_id, width, _FRAMES_AT_ONCE)


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
    held = segments.from_rows(segments.fetch(connection, _TAKE_BLOCKS, (*span, first, *span)))
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
