"""Reads what is new of each run since it was last looked at, and keeps what rules need of it in memory.

Little is lost with it: whoever judges next reads the newest million values of each number once more, and goes
on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from sqlalchemy import Connection, Integer, Text, bindparam, case, func, select

from gradwatch import conventions as c
from gradwatch_collector.findings.precedents import load_precedents
from gradwatch_collector.findings.predecessors import Predecessor, load_errors, load_predecessors
from gradwatch_collector.findings.run_view import (
    CheckpointSeen,
    Doubles,
    EventSeen,
    Layers,
    Levels,
    Number,
    RunView,
)
from gradwatch_collector.findings.track import Track
from gradwatch_collector.records import Attributes, Times
from gradwatch_collector.runs.facts import RunRow
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import batched
from gradwatch_collector.storage.reading import newest_since, read_after
from gradwatch_collector.storage.segments import Segment
from gradwatch_slo.runs import Status

# What rules look at. Of each, the fields that are numbers.
_NUMBERS: Final = (
    c.STEP_INDEX,
    c.LOSS,
    c.LEARNING_RATE,
    c.GRADIENT_NORM,
    c.CLIP_RATIO,
    c.LOSS_SCALE,
    c.SKIPPED_STEPS,
    c.STEP_DURATION,
    c.DATA_WAIT,
    c.LOGGED,
    c.INPUT_MEAN,
    c.INPUT_STDDEV,
    c.DEVICE_MEMORY_ALLOCATED,
    c.DEVICE_MEMORY_RESERVED,
    c.DEVICE_MEMORY_PEAK,
    c.DEVICE_MEMORY_LIMIT,
    c.DEVICE_MEMORY_HEADROOM,
    c.DEVICE_MEMORY_FRAGMENTATION,
    c.HW_GPU_UTILIZATION,
    c.PROCESS_MEMORY,
    c.HOST_MEMORY_LIMIT,
    c.LOCAL_GRADIENT_NORM,
    c.COLLECTIVE_DURATION,
    c.PHASE_DURATION,
)
_LAYERS: Final = (c.LAYER_GRADIENT_NORM, c.UPDATE_RATIO, c.WEIGHT_NORM)
_BY_LAYER: Final = {metric.name for metric in _LAYERS}
_METRICS: Final = {metric.name for metric in (*_NUMBERS, *_LAYERS)}
_FIELDS: Final = ("value", "count", "sum", "max")
_EVENTS: Final = (
    c.RUN_ENDED,
    c.STALLED,
    c.NONFINITE_STEP,
    c.INSTRUMENTATION_MISSING,
    c.OUT_OF_MEMORY,
)
_MOST_EVENTS: Final = 200
_FIRST_VALUES: Final = 1 << 20
# Every rank of a run is heard at a time of its own; what cannot wait for so long is found by `SceneRule`s.
_LOOK_EVERY: Final = 2_000_000_000
# Of one run: steps of all ranks, then all that the lowest ranks tell, about a hundred and fifty of them; and
# whoever makes names up in a loop gets no rule about the rest of them.
_MOST_SERIES: Final = 4_000
_INTERVALS: Final = 32
# When predecessors that are not summarised yet are looked at again.
_SUMMARISED: Final = 60_000_000_000

# Built once, and each for every run that is looked at: composing one costs more than what it does.
_OF: Final = bindparam("of_run", type_=Text), bindparam("of_attempt", type_=Integer)
_series_of, _event, _checkpoint = schema.series.c, schema.event.c, schema.checkpoint.c
_SERIES_OF: Final = (
    select(_series_of.series_id)
    .join(schema.metric, schema.metric.c.metric_id == _series_of.metric_id)
    .where(_series_of.run_id == _OF[0], _series_of.attempt == _OF[1])
    .where(schema.metric.c.name.in_(sorted(_METRICS)), _series_of.field.in_(_FIELDS))
    .order_by(
        case({c.STEP_INDEX.name: 0, c.LOGGED.name: 2}, value=schema.metric.c.name, else_=1),
        _series_of.rank,
        _series_of.series_id,
    )
    .limit(_MOST_SERIES)
)
_EVENTS_OF: Final = (
    select(_event.name, _event.rank, _event.time, _event.attributes)
    .where(_event.run_id == _OF[0], _event.attempt == _OF[1])
    .where(_event.name.in_([each.name for each in _EVENTS]))
    .order_by(_event.time.desc())
    .limit(_MOST_EVENTS)
)
_CHECKPOINTS_OF: Final = (
    select(*(_checkpoint[name] for name in CheckpointSeen.__slots__))
    .where(_checkpoint.run_id == _OF[0], _checkpoint.attempt == _OF[1])
    .order_by(_checkpoint.time.desc(), _checkpoint.sequence.desc())
    .limit(_MOST_EVENTS)
)


@dataclass(slots=True)
class _LayerTrack:
    names: Sequence[str]
    times: Times
    values: Doubles

    def add(self, times: Times, values: Doubles) -> None:
        self.times = np.concatenate([self.times, times])[-_INTERVALS:]
        self.values = np.concatenate([self.values, values], axis=1)[:, -_INTERVALS:]


@dataclass(slots=True)
class _Series:
    metric: str
    field: str
    rank: int
    points: Sequence[Attributes]
    since: int
    tracks: Sequence[Track] = ()
    layers: _LayerTrack | None = None

    def add(self, segment: Segment) -> None:
        values = segment.values
        if values is None:
            return
        numbers = values.astype(np.float64)
        if self.layers is not None:
            self.layers.add(segment.times, numbers)
        else:
            for track, each in zip(self.tracks, numbers, strict=True):
                track.add(segment.times, each)
        self.since = int(segment.times[-1])


@dataclass(slots=True)
class _Known:
    attempt: int
    stands: tuple[object, ...]
    heard: int | None
    looked_at: int
    resource: Attributes
    predecessors: Sequence[Predecessor] = ()
    precedents: Sequence[Levels] = ()
    # When they were read, and when the newest run of the job had ended by then.
    compared_at: int | None = None
    newest_end: int | None = None
    series: dict[int, _Series] = field(default_factory=dict)


class RunReader:
    """Keeps what was read of the runs that are live or have just ended. Not thread-safe."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._ends: Mapping[str, int] = {}

    def read(
        self, connection: Connection, runs: Sequence[RunRow], now: int, more: Callable[[], bool]
    ) -> Iterator[RunView]:
        """Yield every run of which there is news, while ``more`` says that there is time; the others next time.

        ``runs``: all that are live or have just ended; what is kept of others is dropped. ``now`` in Unix
        nanoseconds. Best on a connection whose statements tell of one moment.
        """
        listed = {run.run_id for run in runs}
        self._known = {run_id: known for run_id, known in self._known.items() if run_id in listed}
        heard = _heard(connection, [run.run_id for run in runs])
        self._ends = _newest_ends(runs)
        waiting = [run for run in runs if self._has_news(run, heard.get(run.run_id), now)]
        looked = {run_id: place for place, run_id in enumerate(self._known)}  # the longest ago first
        for run in sorted(waiting, key=lambda run: looked.get(run.run_id, -1)):
            if not more():
                return
            yield self._look(connection, run, heard.get(run.run_id), now)

    def _has_news(self, run: RunRow, heard: int | None, now: int) -> bool:
        known = self._known.get(run.run_id)
        if known is None or known.stands != _stands(run):
            return True
        return known.heard != heard and now - known.looked_at >= _LOOK_EVERY

    def _look(self, connection: Connection, run: RunRow, heard: int | None, now: int) -> RunView:
        known = self._known.pop(run.run_id, None)
        if known is None or known.attempt != run.attempt:
            known = _Known(
                attempt=run.attempt,
                stands=(),
                heard=None,
                looked_at=now,
                resource=_resource(connection, run),
            )
        self._known[run.run_id] = known
        self._compare(connection, run, known, now)
        new = self._find_series(connection, run, known)
        seen = {series_id: each.since for series_id, each in known.series.items() if series_id not in new}
        # Of a new one there may be a million values: one at a time.
        for some in (seen, *({series_id: known.series[series_id].since} for series_id in new)):
            for series_id, segments in read_after(connection, some):
                for segment in segments:
                    known.series[series_id].add(segment)
        known.stands, known.heard, known.looked_at = _stands(run), heard, now
        return RunView(
            run=run,
            now=now,
            resource=known.resource,
            numbers=_numbers(known.series.values()),
            layers=_layers(known.series.values()),
            events=_events(connection, run),
            checkpoints=_checkpoints(connection, run),
            errors=_errors(connection, run),
            predecessors=known.predecessors,
            precedents=known.precedents,
        )

    def _compare(self, connection: Connection, run: RunRow, known: _Known, now: int) -> None:
        """Read what is known of earlier runs, if there may be more to know than there was."""
        newest_end = self._ends.get(run.job)
        known_by_now = known.compared_at is not None and known.newest_end == newest_end
        is_whole = all(each.summary for each in known.predecessors)
        if known_by_now and (is_whole or now - (known.compared_at or 0) < _SUMMARISED):
            return
        known.compared_at, known.newest_end = now, newest_end
        known.predecessors = load_predecessors(connection, run)
        known.precedents = load_precedents(connection, run)

    def _find_series(self, connection: Connection, run: RunRow, known: _Known) -> Collection[int]:
        """Find those that are new; return their ids."""
        series, sets = schema.series.c, schema.attribute_set.c
        ids = connection.scalars(_SERIES_OF, _place(run))
        # Not those above the highest: a transaction that took a lower id may commit later.
        unknown = [series_id for series_id in ids if series_id not in known.series]
        for new in batched(unknown):
            rows = connection.execute(
                select(series.series_id, series.rank, series.field, schema.metric.c.name, sets.points)
                .join(schema.metric, schema.metric.c.metric_id == series.metric_id)
                .join(schema.attribute_set, sets.set_id == series.set_id)
                .where(series.series_id.in_(new))
                .order_by(series.series_id)
            )
            for row in rows.all():
                newest = _INTERVALS if row.name in _BY_LAYER else _FIRST_VALUES
                since = newest_since(connection, row.series_id, newest)
                known.series[row.series_id] = _series(row.name, row.field, row.rank, row.points, since)
        return unknown


def _series(metric: str, field: str, rank: int, points: Sequence[Attributes], since: int) -> _Series:
    if metric in _BY_LAYER:
        names = [str(point.get(c.LAYER_NAME)) for point in points]
        layers = _LayerTrack(names, np.empty(0, np.int64), np.empty((len(points), 0)))
        return _Series(metric, field, rank, points, since, layers=layers)
    return _Series(metric, field, rank, points, since, tracks=[Track() for _ in points])


def _newest_ends(runs: Iterable[RunRow]) -> Mapping[str, int]:
    """Return when the newest run of each job ended, of those that live or have just ended."""
    ends: dict[str, int] = {}
    for run in runs:
        if run.ended_at is not None:
            ends[run.job] = max(run.ended_at, ends.get(run.job, run.ended_at))
    return ends


def _stands(run: RunRow) -> tuple[object, ...]:
    return run.status, run.attempt, run.will_retry


def _heard(connection: Connection, runs: Sequence[str]) -> dict[str, int]:
    """Return when each run's newest batch was received."""
    process, found = schema.process.c, dict[str, int]()
    for some in batched(runs):
        rows = connection.execute(
            select(process.run_id, func.max(process.heard_at))
            .where(process.run_id.in_(some))
            .group_by(process.run_id)
        )
        found |= {run_id: int(at) for run_id, at in rows}
    return found


def _resource(connection: Connection, run: RunRow) -> Attributes:
    process = schema.process.c
    resource: Attributes | None = connection.scalar(
        select(process.resource)
        .where(process.run_id == run.run_id, process.attempt == run.attempt, process.rank >= 0)
        .order_by(process.rank, process.started_at)
        .limit(1)
    )
    return resource or {}


def _numbers(series: Iterable[_Series]) -> Mapping[str, Sequence[Number]]:
    found: dict[str, list[Number]] = {}
    for each in sorted(series, key=lambda one: one.rank):
        for point, track in zip(each.points, each.tracks, strict=False):
            found.setdefault(_name(each), []).append(Number(each.rank, point, track.recent(), track.course()))
    return found


def _layers(series: Iterable[_Series]) -> Mapping[str, Sequence[Layers]]:
    found: dict[str, list[Layers]] = {}
    for each in sorted(series, key=lambda one: one.rank):
        if (track := each.layers) is not None:
            attributes = {k: v for k, v in each.points[0].items() if k != c.LAYER_NAME}
            found.setdefault(_name(each), []).append(
                Layers(each.rank, attributes, track.names, track.times, track.values)
            )
    name = c.LAYER_GRADIENT_NORM.name
    for total, count in zip(found.get(f"{name} sum", ()), found.get(f"{name} count", ()), strict=False):
        if total.names == count.names and np.array_equal(total.times, count.times):
            with np.errstate(invalid="ignore", divide="ignore"):
                mean = replace(total, values=total.values / count.values)
            found.setdefault(f"{name} mean", []).append(mean)
    return found


def _name(series: _Series) -> str:
    return series.metric if series.field == "value" else f"{series.metric} {series.field}"


def _events(connection: Connection, run: RunRow) -> Mapping[str, Sequence[EventSeen]]:
    found: dict[str, list[EventSeen]] = {}
    for row in reversed(connection.execute(_EVENTS_OF, _place(run)).all()):
        found.setdefault(row.name, []).append(EventSeen(row.rank, row.time, row.attributes))
    return found


def _errors(connection: Connection, run: RunRow) -> Sequence[str]:
    if run.status is Status.RUNNING and run.attempt == 1:  # nothing has ended yet
        return ()
    return load_errors(connection, [run.run_id]).get(run.run_id, ())


def _checkpoints(connection: Connection, run: RunRow) -> Sequence[CheckpointSeen]:
    rows = connection.execute(_CHECKPOINTS_OF, _place(run)).all()
    return [CheckpointSeen(*row) for row in reversed(rows)]


def _place(run: RunRow) -> dict[str, object]:
    return {"of_run": run.run_id, "of_attempt": run.attempt}
