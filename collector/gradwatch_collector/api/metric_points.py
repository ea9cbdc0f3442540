"""The points of one metric of one run, or of telemetry that is no run, as JSON.

The shape is ``schemas/series-list.schema.json``. Numbers that are not finite are null, and named beside.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any, Final

from sqlalchemy import Connection, select

from gradwatch_collector.api.metric_catalog import metric_json
from gradwatch_collector.api.moments import exactly
from gradwatch_collector.api.point_shapes import FIELDS, point_json
from gradwatch_collector.api.views import MAX_LIMIT, BadCursorError, Json
from gradwatch_collector.records import Attributes, MetricIdentity
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.reading import PointSeries, read_series, series_rows

# In one answer, shared by its series; and what is read for it, wide sets being read whole.
MAX_POINTS: Final = 100_000
_MAX_VALUES: Final = 10_000_000

_Key = tuple[int, int, str]  # attempt, rank, labels


@dataclass(frozen=True, slots=True)
class SeriesQuery:
    """What is asked for. ``labels``: what points must have, by name, as text or as JSON writes it.

    ``since`` and ``until`` in Unix nanoseconds, inclusive; ``points``: the newest so many of each series.
    """

    run_id: str
    metric: str
    attempt: int | None = None
    rank: int | None = None
    labels: Sequence[tuple[str, str]] = ()
    since: int | None = None
    until: int | None = None
    points: int = MAX_LIMIT
    limit: int = MAX_LIMIT
    cursor: str | None = None

    def selects(self, labels: Attributes) -> bool:
        """Return whether a point with these labels is asked for."""
        return all(name in labels and value in _spellings(labels[name]) for name, value in self.labels)


def parse_labels(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Return labels given as ``NAME=VALUE``.

    Raises:
        ValueError: one is not.
    """
    labels = []
    for text in texts:
        name, separator, value = text.partition("=")
        if not name or not separator:
            raise ValueError(f"{text!r:.80} is no label such as training.layer.name=fc.weight")
        labels.append((name, value))
    return labels


@dataclass(frozen=True, slots=True)
class _Place:
    """One series of an answer, before it is read."""

    metric: MetricIdentity
    key: _Key
    labels: Attributes

    @property
    def cursor(self) -> str:
        canonical = json.dumps([asdict(self.metric), self.key])
        return blake2b(canonical.encode(), digest_size=12).hexdigest()


def list_series(connection: Connection, query: SeriesQuery) -> Json | None:
    """Return ``{"series": [...], "next_cursor": ...}``, the newest attempt first and in it by rank.

    Each has its newest points, newest first; ``next_until`` asks for those before. None if the run (or what
    sent no run) has no such metric.

    Raises:
        BadCursorError: the cursor is not one of ours.
    """
    metrics = _metrics(connection, query)
    if not metrics:
        return None
    places, width = _places(connection, query, metrics)
    start = 0 if query.cursor is None else _after(query.cursor, places)
    page = places[start : start + query.limit]
    points = max(1, min(query.points, MAX_POINTS // max(1, len(page)), _MAX_VALUES // max(1, width)))
    read = {
        metric: _read(connection, query, metric, points, [place for place in page if place.metric == metric])
        for metric in {place.metric for place in page}
    }
    return {
        "series": [_series_json(query.run_id, place, read[place.metric], points) for place in page],
        "next_cursor": page[-1].cursor if len(places) > start + query.limit else None,
    }


def _metrics(connection: Connection, query: SeriesQuery) -> list[MetricIdentity]:
    metric, series = schema.metric.c, schema.series.c
    rows = connection.execute(
        select(metric.name, metric.unit, metric.kind, metric.temporality, metric.monotonic)
        .where(
            metric.name == query.metric,
            metric.metric_id.in_(select(series.metric_id).where(series.run_id == query.run_id)),
        )
        .order_by(metric.metric_id)
    )
    return [MetricIdentity(*row) for row in rows]


def _places(
    connection: Connection, query: SeriesQuery, metrics: Iterable[MetricIdentity]
) -> tuple[list[_Place], int]:
    """Return the series that are asked for, in order, and how wide all sets are that hold them."""
    found: dict[tuple[MetricIdentity, _Key], _Place] = {}
    width = 0
    for metric in metrics:
        field = FIELDS[metric.kind][0]
        for row in series_rows(connection, query.run_id, metric, field, query.attempt, query.rank):
            chosen = [labels for labels in row.points if query.selects(labels)]
            width += len(row.points) if chosen else 0
            for labels in chosen:
                place = _Place(metric, _key(row.attempt, row.rank, labels), labels)
                found.setdefault((metric, place.key), place)
    return sorted(found.values(), key=lambda place: (-place.key[0], place.key[1])), width


def _after(cursor: str, places: Sequence[_Place]) -> int:
    for index, place in enumerate(places):
        if place.cursor == cursor:
            return index + 1
    raise BadCursorError(f"cursor {cursor!r:.80} is not one this server gave out")


_Columns = Mapping[str, Mapping[_Key, PointSeries]]


def _read(
    connection: Connection, query: SeriesQuery, metric: MetricIdentity, points: int, places: Sequence[_Place]
) -> _Columns:
    shown = {_label_key(place.labels) for place in places}
    return {
        field: {
            _key(series.attempt, series.rank, series.attributes): series
            for series in read_series(
                connection,
                query.run_id,
                metric,
                field,
                attempt=query.attempt,
                rank=query.rank,
                where=lambda labels: _label_key(labels) in shown,
                since=query.since,
                until=query.until,
                newest=points + 1,  # one more tells whether there are more
            )
        }
        for field in FIELDS[metric.kind]
    }


def _series_json(run_id: str, place: _Place, columns: _Columns, points: int) -> Json:
    main = columns[FIELDS[place.metric.kind][0]].get(place.key)
    times = [] if main is None else main.times.tolist()
    shown = times[-points:]
    attempt, rank, _ = place.key
    return {
        "run_id": run_id,
        "attempt": attempt,
        "rank": None if rank < 0 else rank,
        "metric": metric_json(asdict(place.metric)),
        "labels": place.labels,
        "points": list(_points(place, columns, shown))[::-1],
        "next_until": exactly(shown[0] - 1) if len(times) > len(shown) else None,
    }


def _points(place: _Place, columns: _Columns, times: Sequence[int]) -> Iterator[Json]:
    held = {field: _by_time(column.get(place.key)) for field, column in columns.items()}
    for time in times:
        yield point_json(place.metric.kind, time, {field: values.get(time) for field, values in held.items()})


def _by_time(series: PointSeries | None) -> Mapping[int, Any]:
    if series is None:
        return {}
    values: Sequence[Any] = series.packed if series.values is None else series.values.tolist()
    return dict(zip(series.times.tolist(), values, strict=True))


def _key(attempt: int, rank: int, labels: Attributes) -> _Key:
    return attempt, rank, _label_key(labels)


def _label_key(labels: Attributes) -> str:
    return json.dumps(labels, sort_keys=True)


def _spellings(value: Any) -> tuple[str, ...]:
    written = json.dumps(value)
    return (value, written) if isinstance(value, str) else (written,)
