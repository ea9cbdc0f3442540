"""From step records to the points of one interval: exact scalars of every step, histograms of layers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from gradwatch import conventions
from gradwatch.aggregate import LayerAggregate
from gradwatch.conventions import Metric
from gradwatch.telemetry import Attributes, AttributeValue, LoggedValue, MetricPoints, Point, StepRecord

# Waiting for the export thread, which empties it every few seconds: 100 s of 1 ms steps.
_WAITING: Final = 100_000


class Interval:
    """Collects what the training thread hands over, and turns it into points when asked.

    Appending to and popping from a deque needs no lock, so the training thread never waits for this one.
    """

    def __init__(self, start: int, record: Callable[[StepRecord], None] = lambda _step: None) -> None:
        self._record = record
        self.steps: deque[StepRecord] = deque(maxlen=_WAITING)
        self.logged: deque[LoggedValue] = deque(maxlen=_WAITING)
        self.nonfinite = 0
        self._nonfinite_sent = 0
        self._start = start
        self._layers: dict[tuple[int, str], LayerAggregate] = {}
        self._attributes: dict[tuple[int, int], Attributes] = {}

    def points(
        self, now: int, optimizers: int, dropped: int, pace: Callable[[], None] = lambda: None
    ) -> list[MetricPoints]:
        """Everything since the last call, up to ``now`` (Unix nanoseconds).

        ``pace`` is called between small pieces of work, so that this thread holds Python's lock only briefly.
        """
        series: dict[str, tuple[Metric, list[Point]]] = {}

        def add(metric: Metric, time: int, value: float | int, attributes: Attributes) -> None:
            series.setdefault(metric.name, (metric, []))[1].append(Point(time, value, attributes))

        spent = lasted = 0
        while self.steps:
            record = self.steps[0]
            self._record(record)  # before it leaves the queue: a black box finds it here or there
            self.steps.popleft()
            self._scalars(record, optimizers, add)
            self._aggregate(record)
            spent += record.spent
            if record.optimizer == 0:
                lasted += record.duration or 0
            pace()
        while self.logged:
            name, time, value = self.logged.popleft()
            add(conventions.LOGGED, time, value, {conventions.METRIC_NAME: name})
            pace()
        if lasted:
            add(conventions.AGENT_OVERHEAD, now, spent / lasted, {})
        found = [MetricPoints(metric, points) for metric, points in series.values()]
        found.append(self._histograms(now, optimizers, pace))
        counted = self.nonfinite
        found.append(
            MetricPoints(conventions.NONFINITE, [Point(now, counted - self._nonfinite_sent, {}, self._start)])
        )
        if dropped:
            found.append(MetricPoints(conventions.AGENT_DROPPED, [Point(now, dropped, {}, self._start)]))
        self._nonfinite_sent = counted
        self._start = now
        return [batch for batch in found if batch.points]

    def _scalars(
        self, record: StepRecord, optimizers: int, add: Callable[[Metric, int, float | int, Attributes], None]
    ) -> None:
        time = record.time
        mine = self._labels(record.optimizer, optimizers, -1, 0)
        if record.optimizer == 0:
            add(conventions.STEP_INDEX, time, record.step, {})
            if record.duration is not None:
                add(conventions.STEP_DURATION, time, record.duration / 1e9, {})
        if record.loss is not None:
            add(conventions.LOSS, time, record.loss, mine)
        if record.gradient_norm is not None:
            add(conventions.GRADIENT_NORM, time, record.gradient_norm, mine)
        groups = len(record.learning_rates)
        for group, rate in enumerate(record.learning_rates):
            if rate is not None:
                add(
                    conventions.LEARNING_RATE,
                    time,
                    rate,
                    self._labels(record.optimizer, optimizers, group, groups),
                )

    def _labels(self, optimizer: int, optimizers: int, group: int, groups: int) -> Attributes:
        key = (optimizer if optimizers > 1 else -1, group if groups > 1 else -1)
        labels = self._attributes.get(key)
        if labels is None:
            made: dict[str, AttributeValue] = {}
            if optimizers > 1:
                made[conventions.OPTIMIZER] = optimizer
            if groups > 1:
                made[conventions.PARAM_GROUP] = group
            labels = self._attributes[key] = made
        return labels

    def _aggregate(self, record: StepRecord) -> None:
        if record.indices is None or record.norms is None:
            return
        layers = self._layers
        for index, norm in zip(record.indices, record.norms, strict=True):
            key = (record.optimizer, record.layers[index])
            aggregate = layers.get(key)
            if aggregate is None:
                aggregate = layers[key] = LayerAggregate()
            aggregate.add(norm)

    def _histograms(self, now: int, optimizers: int, pace: Callable[[], None]) -> MetricPoints:
        layers, self._layers = self._layers, {}
        points = []
        for (optimizer, layer), aggregate in layers.items():
            attributes: dict[str, AttributeValue] = {conventions.LAYER_NAME: layer}
            if optimizers > 1:
                attributes[conventions.OPTIMIZER] = optimizer
            point = aggregate.point(self._start, now, attributes)
            if point is not None:
                points.append(point)
            pace()
        return MetricPoints(conventions.LAYER_GRADIENT_NORM, points)


def count_points(metrics: Sequence[MetricPoints]) -> int:
    """Number of data points."""
    return sum(len(batch.points) for batch in metrics)
