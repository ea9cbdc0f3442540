"""The newest number of every metric of every run that is sending now, in memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from typing import Final

from gradwatch import conventions as c
from gradwatch_collector.records import Batch, Frame, ProcessKey
from gradwatch_collector.runs import job_labels_of

_KEPT: Final = {metric.name: metric for metric in (*c.RUN_GAUGES, c.LOGGED)}
_MAX_RUNS: Final = 10_000
_Place = tuple[str, str, int, int]  # metric, name given to watch.log, rank, index of the point


class LiveRuns:
    """Latest values by run, fed after each commit and read by detectors and ``/metrics``.

    Gauges keep the newest value of each (rank, point); sums add up what was committed since the collector
    started. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[str, dict[_Place, float]] = {}
        # (job labels..., metric) -> newest value over the job's runs; outlives the runs.
        self.job_metrics: dict[tuple[str, ...], float] = {}

    def update(self, committed: Iterable[tuple[ProcessKey, Batch, int]]) -> None:
        """Take in batches that have just been committed."""
        with self._lock:
            for key, batch, _ in committed:
                for frame in batch.frames:
                    if frame.metric.name in _KEPT and frame.values is not None:
                        self._take(key, batch, frame)

    def _take(self, key: ProcessKey, batch: Batch, frame: Frame) -> None:
        values = self._runs.pop(key.run_id, None)
        if values is None:
            values = {}
            if len(self._runs) >= _MAX_RUNS:
                self._runs.pop(next(iter(self._runs)))  # the one that has been quiet the longest
        self._runs[key.run_id] = values
        job = job_labels_of(batch.source.resource)
        assert frame.values is not None
        metric = frame.metric.name
        for index, point in enumerate(frame.attribute_set.points):
            name = str(point.get(c.METRIC_NAME, ""))
            place = (metric, name, key.rank, index if not name else 0)
            if _KEPT[metric].kind == "sum":
                values[place] = values.get(place, 0.0) + float(frame.values[index].sum())
            else:
                values[place] = float(frame.values[index, -1])
            if name:
                self.job_metrics[(*job, name)] = values[place]

    def forget(self, keep: set[str]) -> None:
        """Drop every run that is not in ``keep``."""
        with self._lock:
            for run_id in self._runs.keys() - keep:
                del self._runs[run_id]

    def gauge(self, run_id: str, metric: c.Metric) -> float | None:
        """Return the newest value, the highest over ranks and devices; None if it was never sent."""
        with self._lock:
            values = [v for place, v in self._runs.get(run_id, {}).items() if place[0] == metric.name]
        return _highest(values)

    def memory_headroom(self, run_id: str) -> float | None:
        """Return (limit - peak) / limit of the tightest device; of the host for a run without devices."""
        with self._lock:
            values = self._runs.get(run_id, {})
            devices = _ratios(values, c.DEVICE_MEMORY_PEAK, c.DEVICE_MEMORY_LIMIT)
            hosts = _ratios(values, c.PROCESS_MEMORY, c.HOST_MEMORY_LIMIT)
        used = max(devices or hosts, default=None)
        return None if used is None else 1 - used


def _ratios(values: dict[_Place, float], used: c.Metric, limit: c.Metric) -> list[float]:
    return [
        value / values[limit.name, *place[1:]]
        for place, value in values.items()
        if place[0] == used.name and values.get((limit.name, *place[1:]))
    ]


def _highest(values: list[float]) -> float | None:
    if not values:
        return None
    # A NaN on any rank is what somebody must see.
    return math.nan if any(math.isnan(v) for v in values) else max(values)
