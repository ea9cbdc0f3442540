"""Writing what was decoded: frames, events and spans of a whole group of batches, each stored once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
from sqlalchemy import Connection, Table

from gradwatch import conventions as c
from gradwatch_collector.records import EventRecord, Frame, ProcessKey, Received, SpanRecord
from gradwatch_collector.runs import checkpoints
from gradwatch_collector.storage import schema, segments
from gradwatch_collector.storage.database import batched, placeholders
from gradwatch_collector.storage.segments import PAYLOAD_COLUMNS, Segment
from gradwatch_collector.storage.series import SeriesIds
from gradwatch_collector.storage.upsert import insert

_Row = tuple[int, Segment]  # by series id
_COLUMNS: Final = ("series_id", "time", *PAYLOAD_COLUMNS)
_ROW: Final = f"({', '.join('?' * len(_COLUMNS))})"
_MAX_ROWS: Final = 64
# On its way into the database a frame of one point takes several kilobytes.
_FRAMES_AT_ONCE: Final = 2048
_HELD_TIMES: Final = "SELECT times FROM frame WHERE series_id = ? AND time = ?"


def store(connection: Connection, series: SeriesIds, group: Sequence[Received]) -> None:
    """Store a group of batches inside the caller's transaction. What is there already stays as it is."""
    frames = [(received.key, frame) for received in group for frame in received.batch.frames]
    for some in batched(frames, most=_FRAMES_AT_ONCE):
        store_frames(connection, _stretches(connection, series, some))
    events = [
        _event(received, event)
        for received in group
        for event in received.batch.events
        if event.name != c.RUN_HEARTBEAT.name  # updates the run, and would be most of the table
    ]
    _insert(connection, schema.event, events)
    _insert(
        connection,
        schema.checkpoint,
        [row for r in group for row in checkpoints.rows(r.key, r.batch.events, r.received_at)],
    )
    _insert(connection, schema.span, [_span(r.key, span) for r in group for span in r.batch.spans])


def store_frames(connection: Connection, stretches: Iterable[tuple[int, Segment]]) -> None:
    """Append stretches of series, by series id, to the frame table."""
    # In the order of the key, so that two writers cannot wait for each other.
    rows = sorted(stretches, key=lambda row: (row[0], int(row[1].times[0])))
    if rows and _insert_frames(connection, rows) < len(rows):
        for series_id, segment in rows:
            if len(segment.times) > 1:
                _store_missing(connection, series_id, segment)


def _stretches(
    connection: Connection, series: SeriesIds, frames: Sequence[tuple[ProcessKey, Frame]]
) -> Iterable[tuple[int, Segment]]:
    for (_, frame), ids in zip(frames, series.of(connection, frames), strict=True):
        segment = segments.of_frame(frame)
        if len(ids) == frame.attribute_set.width > 1:
            yield from ((series_id, segment.point(index)) for index, series_id in enumerate(ids))
        else:
            yield ids[0], segment


def _insert_frames(connection: Connection, rows: Sequence[_Row]) -> int:
    """Insert what is not there yet; return how many rows that were."""
    inserted = 0
    for some in _in_powers_of_two(rows):
        # Many rows a statement: for each statement SQLite lets other threads run, and waits for its turn again.
        statement = (
            f"INSERT INTO frame ({', '.join(_COLUMNS)}) VALUES {', '.join([_ROW] * len(some))} "  # noqa: S608 - our names
            "ON CONFLICT DO NOTHING"
        )
        parameters = [
            value
            for series_id, segment in some
            # Not compressed: compaction does that once, for many times together, off the path of the request.
            for value in (
                series_id,
                int(segment.times[0]),
                *segments.to_row(segment, connection, compress=False),
            )
        ]
        inserted += connection.exec_driver_sql(placeholders(connection, statement), tuple(parameters)).rowcount
    return inserted


def _in_powers_of_two(rows: Sequence[_Row]) -> Iterator[Sequence[_Row]]:
    """Cut, so that there are few different statements: each is prepared once."""
    start = 0
    while start < len(rows):
        size = min(_MAX_ROWS, 1 << (len(rows) - start).bit_length() - 1)
        yield rows[start : start + size]
        start += size


def _store_missing(connection: Connection, series_id: int, segment: Segment) -> None:
    # A frame of several times met another with the same first time. Mostly they are one, sent twice; but a
    # sender may also have cut its times differently, and then the others must not be lost.
    while len(segment.times):
        start = int(segment.times[0])
        held = segments.fetch(connection, _HELD_TIMES, (series_id, start))
        if held:
            times = segments.times_from(start, held[0][0])
            segment = segment.take(~np.isin(segment.times, times))
        if not len(segment.times) or _insert_frames(connection, [(series_id, segment)]):
            return


def _event(received: Received, event: EventRecord) -> dict[str, Any]:
    key = received.key
    return {
        "run_id": key.run_id,
        "attempt": key.attempt,
        "rank": key.rank,
        "instance": key.instance,
        "sequence": event.sequence,
        "name": event.name,
        "time": event.time,
        "received_at": received.received_at,
        "severity": event.severity,
        "body": event.body,
        "attributes": dict(event.attributes),
    }


def _span(key: ProcessKey, span: SpanRecord) -> dict[str, Any]:
    return {
        "trace_id": span.trace_id,
        "span_id": span.span_id,
        "parent_span_id": span.parent_span_id,
        "run_id": key.run_id,
        "attempt": key.attempt,
        "rank": key.rank,
        "name": span.name,
        "kind": span.kind,
        "start": span.start,
        "end": span.end,
        "status": span.status,
        "attributes": dict(span.attributes),
        "events": [dict(each) for each in span.events],
    }


def _insert(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    if rows:
        connection.execute(insert(connection, table).on_conflict_do_nothing(), rows)
