"""The points of one metric of one run, or of telemetry that is no run, as JSON.

The shape is ``schemas/series-list.schema.json``. Numbers that are not finite are null, and named beside.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Row, Select, Text, case, cast, exists, func, select, tuple_

from gradwatch_collector.api.metric_catalog import metric_json
from gradwatch_collector.api.moments import exactly
from gradwatch_collector.api.point_shapes import FIELDS, NUMBERS, point_json, rollup_json
from gradwatch_collector.api.shapes import MAX_LIMIT, BadCursorError, Json
from gradwatch_collector.records import Attributes, MetricIdentity
from gradwatch_collector.runs import telling
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.reading import Place, PlaceKey, PointSeries, may_hold, read_series
from gradwatch_collector.storage.rolled_up import Bucket, read_rollups
from gradwatch_collector.storage.series import attribute_set

# In one answer, shared by its series; and what is read for it, wide sets being read whole.
MAX_POINTS: Final = 100_000
# Of distributions, each of which may have a thousand numbers.
MAX_DISTRIBUTIONS: Final = 5_000
_MAX_VALUES: Final = 10_000_000
# Of buckets, quantiles and exemplars as they are stored: as Python objects and JSON they take 60 times that.
_MAX_BYTES: Final = 2 << 20
# Of labels as JSON.
_MAX_CHARACTERS: Final = 4 << 20
_ROWS_AT_ONCE: Final = 200

_series, _sets, _metric = schema.series.c, schema.attribute_set.c, schema.metric.c
# Newest attempt, rank, metric, sets of several points first; set; place in the set.
_Order = tuple[int, ...]
_IDENTITY: Final = tuple(_metric[each.name] for each in fields(MetricIdentity))
_IS_ALONE: Final = case((_sets.width == 1, 1), else_=0)
_ORDER: Final = (-_series.attempt, _series.rank, _series.metric_id, _IS_ALONE, _series.series_id)
_OF_PROCESS: Final = 3
# Every point of a metric is in this field of it.
_IS_MAIN: Final = tuple_(_metric.kind, _series.field).in_([(kind, names[0]) for kind, names in FIELDS.items()])


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
class _Listed:
    """One series of an answer, before it is read."""

    order: _Order
    metric: MetricIdentity
    place: Place


_Sent = Mapping[str, Mapping[PlaceKey, PointSeries]]


@dataclass(frozen=True, slots=True)
class _Held:
    """What is stored of the series of one metric: what is there as it was sent, by field, and what is left."""

    sent: _Sent
    rolled_up: Mapping[PlaceKey, Mapping[int, Mapping[str, Bucket]]]


def list_series(connection: Connection, query: SeriesQuery) -> Json | None:
    """Return ``{"series": [...], "next_cursor": ...}``, the newest attempt first and in it by rank.

    Each has its newest points and roll-ups, newest first; ``next_until`` asks for those before. None if the run
    (or what sent no run) has no such metric.

    Raises:
        BadCursorError: the cursor is not one of ours.
    """
    after = None if query.cursor is None else _open_cursor(query.cursor)
    page, more = _page(_listed(connection, query, after), query.limit)
    if not page and not _is_known(connection, query):
        return None
    by_metric: dict[MetricIdentity, list[Place]] = {}
    for each in page:
        by_metric.setdefault(each.metric, []).append(each.place)
    width = sum(_width(connection, query, metric, places) for metric, places in by_metric.items())
    most = MAX_POINTS if all(len(NUMBERS[metric.kind]) == 1 for metric in by_metric) else MAX_DISTRIBUTIONS
    points = max(1, min(query.points, most // max(1, len(page)), _MAX_VALUES // max(1, width)))
    held = {metric: _read(connection, query, metric, points, places) for metric, places in by_metric.items()}
    shown: list[Json] = []
    room = _MAX_BYTES
    for each in page:
        if room <= 0:
            break
        series, size = _series_json(query.run_id, each, held[each.metric], points, room)
        shown.append(series)
        room -= size
    return {
        "series": shown,
        "next_cursor": _cursor(page[len(shown) - 1].order) if more or len(shown) < len(page) else None,
    }


def _page(listed: Iterator[_Listed], limit: int) -> tuple[list[_Listed], bool]:
    """Return the first of them, fewer where their labels are long, and whether there are more."""
    page: list[_Listed] = []
    room = _MAX_CHARACTERS
    for each in listed:
        if len(page) == limit or room <= 0:
            return page, True
        page.append(each)
        room -= len(each.place.key[-1])
    return page, False


def _is_known(connection: Connection, query: SeriesQuery) -> bool:
    sent = exists().where(_series.metric_id == _metric.metric_id, _series.run_id == query.run_id)
    return bool(connection.scalar(select(exists().where(_metric.name == query.metric, sent))))


def _listed(connection: Connection, query: SeriesQuery, after: _Order | None) -> Iterator[_Listed]:
    """Yield the series that are asked for, in order. Labels are read as they are needed.

    A point that was sent in several sets is one series, in the first of them.
    """
    process: _Order = ()
    in_sets: set[bytes] = set()
    for row, points in _with_points(connection, _rows(query, after)):
        here, is_alone = tuple(row[: len(_ORDER)]), row.width == 1
        if here[:_OF_PROCESS] != process:
            process, in_sets = here[:_OF_PROCESS], set()
        for index, labels in enumerate(points):
            digest = row.digest if is_alone else attribute_set([labels]).digest
            if digest in in_sets:
                continue
            if not is_alone:
                in_sets.add(digest)
            order = (*here, index)
            if query.selects(labels) and (after is None or order > after):
                place = Place(-here[0], here[1], labels, digest)
                yield _Listed(order, MetricIdentity(*row[-len(_IDENTITY) :]), place)


def _with_points(connection: Connection, statement: Select[Any]) -> Iterator[tuple[Row[Any], list[Attributes]]]:
    """Yield the rows with their sets, which are read a few at a time: what is sorted is small."""
    with connection.execute(statement) as rows:
        for some in rows.partitions(_ROWS_AT_ONCE):
            for few in _apart(connection, some):
                of_few = select(_sets.set_id, _sets.points).where(_sets.set_id.in_({row.set_id for row in few}))
                points = dict(iter(connection.execute(of_few)))
                yield from ((row, points[row.set_id]) for row in few)


def _apart(connection: Connection, rows: Sequence[Row[Any]]) -> Iterator[list[Row[Any]]]:
    """Yield the rows by so many as may have their sets read at once."""
    size = select(_sets.set_id, func.length(cast(_sets.points, Text)))
    sizes = dict(iter(connection.execute(size.where(_sets.set_id.in_({row.set_id for row in rows})))))
    few: list[Row[Any]] = []
    room = _MAX_CHARACTERS
    for row in rows:
        if few and room < sizes[row.set_id]:
            yield few
            few, room = [], _MAX_CHARACTERS
        few.append(row)
        room -= sizes[row.set_id]
    yield few


def _rows(query: SeriesQuery, after: _Order | None) -> Select[Any]:
    statement = (
        select(*_ORDER, _sets.set_id, _sets.width, _sets.digest, *_IDENTITY)
        .join_from(schema.series, schema.metric)
        .join(schema.attribute_set)
        .where(_series.run_id == query.run_id, _metric.name == query.metric, _IS_MAIN, *_of_process(query))
        .order_by(*_ORDER)
        .execution_options(yield_per=_ROWS_AT_ONCE)
    )
    if after is None:
        return statement
    *here, _ = after
    # Of the process where the page before ended its sets are read again: what is in them was listed.
    return statement.where(
        tuple_(*_ORDER[:_OF_PROCESS]) >= tuple_(*here[:_OF_PROCESS]),
        (_sets.width > 1) | (tuple_(*_ORDER) > tuple_(*here)),
    )


def _of_process(query: SeriesQuery) -> list[ColumnElement[bool]]:
    asked = ((_series.attempt, query.attempt), (_series.rank, query.rank))
    return [column == told for column, told in asked if told is not None]


def _cursor(order: _Order) -> str:
    return base64.urlsafe_b64encode(json.dumps(order).encode()).decode()


def _open_cursor(cursor: str) -> _Order:
    try:
        told = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        order = tuple(telling.integer(each) for each in told)
    except (ValueError, TypeError, RecursionError):
        order = ()
    known = tuple(each for each in order if each is not None)
    if len(known) != len(_ORDER) + 1:
        raise BadCursorError(cursor)
    return known


def _width(connection: Connection, query: SeriesQuery, metric: MetricIdentity, places: Sequence[Place]) -> int:
    """Return how wide all sets are that may hold the points."""
    widths = (
        select(func.sum(_sets.width))
        .join_from(schema.series, schema.metric)
        .join(schema.attribute_set)
        .where(
            _series.run_id == query.run_id, *(_metric[name] == told for name, told in asdict(metric).items())
        )
        .where(_IS_MAIN, *may_hold(places))
    )
    return int(connection.scalar(widths) or 0)


def _read(
    connection: Connection, query: SeriesQuery, metric: MetricIdentity, points: int, places: Sequence[Place]
) -> _Held:
    asked: dict[str, Any] = {
        "places": places,
        "since": query.since,
        "until": query.until,
        "newest": points + 1,  # one more tells whether there are more
    }
    sent = {
        field: {each.key: each for each in read_series(connection, query.run_id, metric, field, **asked)}
        for field in FIELDS[metric.kind]
    }
    rolled_up: dict[PlaceKey, dict[int, dict[str, Bucket]]] = {}
    for field in NUMBERS[metric.kind]:
        for each in read_rollups(connection, query.run_id, metric, field, **asked):
            buckets = rolled_up.setdefault(each.key, {})
            for time, bucket in each.buckets():
                buckets.setdefault(time, {})[field] = bucket
        if not rolled_up:
            break  # no point is without the first field
    return _Held(sent, rolled_up)


def _series_json(run_id: str, listed: _Listed, held: _Held, points: int, room: int) -> tuple[Json, int]:
    """Return one series, and how many bytes of what is packed it shows: ``room`` at most, or one point."""
    place, kind = listed.place, listed.metric.kind
    main = held.sent[FIELDS[kind][0]].get(place.key)
    times = [] if main is None else main.times.tolist()
    rolled_up = held.rolled_up.get(place.key, {})
    every = sorted({*times, *rolled_up})
    newest, size = _fitting(every[-points:], _sizes(place.key, held.sent), room)
    first = newest[0] if newest else 0
    shown = [time for time in times if time >= first]
    series = {
        "run_id": run_id,
        "attempt": place.attempt,
        "rank": None if place.rank < 0 else place.rank,
        "metric": metric_json(asdict(listed.metric)),
        "labels": place.attributes,
        "points": list(_points(kind, place.key, held.sent, shown))[::-1],
        "rollups": [
            rollup_json(kind, time, rolled_up[time])
            for time in sorted(rolled_up, reverse=True)
            if time >= first
        ],
        "next_until": exactly(first - 1) if len(every) > len(newest) else None,
    }
    return series, size


def _sizes(key: PlaceKey, sent: _Sent) -> Counter[int]:
    """Return how many bytes of what is packed there are at each time."""
    sizes: Counter[int] = Counter()
    for series in sent.values():
        if key in series and series[key].values is None:
            for time, packed in zip(series[key].times.tolist(), series[key].packed, strict=True):
                sizes[time] += len(packed)
    return sizes


def _fitting(times: Sequence[int], sizes: Mapping[int, int], room: int) -> tuple[Sequence[int], int]:
    """Return the newest of the times for which there is room, at least one, and what they take of it."""
    size = 0
    for count, time in enumerate(reversed(times)):
        if count and size + sizes[time] > room:
            return times[-count:], size
        size += sizes[time]
    return times, size


def _points(kind: str, key: PlaceKey, sent: _Sent, times: Sequence[int]) -> Iterator[Json]:
    held = {field: _by_time(series.get(key)) for field, series in sent.items()}
    for time in times:
        yield point_json(kind, time, {field: values.get(time) for field, values in held.items()})


def _by_time(series: PointSeries | None) -> Mapping[int, Any]:
    if series is None:
        return {}
    values: Sequence[Any] = series.packed if series.values is None else series.values.tolist()
    return dict(zip(series.times.tolist(), values, strict=True))


def _spellings(value: Any) -> tuple[str, ...]:
    written = json.dumps(value)
    return (value, written) if isinstance(value, str) else (written,)
