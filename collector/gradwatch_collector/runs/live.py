"""The newest number of every metric of every run that is sending now, in memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from typing import Final

from gradwatch import conventions as c
from gradwatch_collector.records import Batch, Frame, ProcessKey, Received
from gradwatch_collector.runs import telling
from gradwatch_collector.runs.facts import JobLabels, job_labels_of

_KEPT: Final = {metric.name: metric for metric in (*c.RUN_GAUGES, c.LOGGED)}
_MAX_RUNS: Final = 10_000
# Newest numbers, of all runs and of one: points may be told apart by whatever a sender thinks of.
_MAX_PLACES: Final = 300_000
_MAX_PLACES_OF_RUN: Final = 30_000
# A logged metric is a Prometheus series for each job: names made up by a loop must not become a flood.
_MAX_JOBS: Final = 1_000
_MAX_NAMES: Final = 50
_Place = tuple[str, str, int, int]  # metric, name given to watch.log, rank, index of the point


class LiveRuns:
    """Latest values by run, fed after each commit and read by ``/metrics``.

    Gauges keep the newest value of each (rank, point); sums add up what was committed since the collector
    started. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # When each run was last heard here, in Unix nanoseconds.
        self._heard: dict[str, int] = {}
        # Time and value by place, for each run.
        self._runs: dict[str, dict[_Place, tuple[int, float]]] = {}
        self._places = 0
        # job -> newest value of each logged metric over its runs; outlives the runs.
        self._jobs: dict[JobLabels, dict[str, float]] = {}

    def update(self, committed: Iterable[Received]) -> None:
        """Take in batches that have just been committed."""
        with self._lock:
            for each in committed:
                self._heard[each.key.run_id] = each.received_at
                for frame in each.batch.frames:
                    if frame.metric.name in _KEPT and frame.values is not None:
                        self._take(each.key, each.batch, frame)

    def _take(self, key: ProcessKey, batch: Batch, frame: Frame) -> None:
        values = self._runs.pop(key.run_id, None)
        if values is None:
            values = {}
        self._places -= len(values)
        while self._runs and (len(self._runs) >= _MAX_RUNS or self._places > _MAX_PLACES):
            self._places -= len(self._runs.pop(next(iter(self._runs))))  # quiet the longest
        self._runs[key.run_id] = values
        assert frame.values is not None
        metric, at = frame.metric.name, int(frame.times[-1])
        for index, point in enumerate(frame.attribute_set.points):
            name = telling.text(point.get(c.METRIC_NAME)) or ""
            place = (metric, name, key.rank, 0 if name else index)
            if place not in values and len(values) >= _MAX_PLACES_OF_RUN:
                continue
            held_at, held = values.get(place, (0, 0.0))
            if _KEPT[metric].kind == "sum":
                # A process sends one request after the other: what comes twice comes right after itself.
                if at != held_at:
                    values[place] = (at, held + float(frame.values[index].sum()))
            elif at >= held_at:  # what was kept while the collector was away arrives after what is newer
                values[place] = (at, float(frame.values[index, -1]))
                if name:
                    self._keep_for_job(batch, name, values[place][1])
        self._places += len(values)

    def _keep_for_job(self, batch: Batch, name: str, value: float) -> None:
        job = job_labels_of(batch.source.resource)
        named = self._jobs.pop(job, {})
        if name in named or len(named) < _MAX_NAMES:
            named[name] = value
        self._jobs[job] = named
        if len(self._jobs) > _MAX_JOBS:
            self._jobs.pop(next(iter(self._jobs)))

    def job_metrics(self) -> dict[tuple[str, ...], float]:
        """Return the newest value of each logged metric by (job labels..., name)."""
        with self._lock:
            return {(*job, name): v for job, named in self._jobs.items() for name, v in named.items()}

    def forget(self, keep: Mapping[str, int]) -> None:
        """Drop every run but those in ``keep`` that were heard here since the moment given for each.

        What sends to another collector by now has newer values there.
        """
        with self._lock:
            heard = self._heard.items()
            self._heard = {run_id: at for run_id, at in heard if run_id in keep and at >= keep[run_id]}
            for run_id in self._runs.keys() - self._heard.keys():
                self._places -= len(self._runs.pop(run_id))

    def gauge(self, run_id: str, metric: c.Metric) -> float | None:
        """Return the newest value, the highest over ranks and devices; None if it was never sent."""
        with self._lock:
            values = [v for place, (_, v) in self._runs.get(run_id, {}).items() if place[0] == metric.name]
        return _highest(values)


def _highest(values: list[float]) -> float | None:
    if not values:
        return None
    # A NaN on any rank is what somebody must see.
    return math.nan if any(math.isnan(v) for v in values) else max(values)
