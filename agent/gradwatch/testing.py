"""For users' own tests: an exporter that keeps everything, and needs neither a collector nor OpenTelemetry.

>>> from gradwatch.testing import InMemoryExporter
>>> exporter = InMemoryExporter()
>>> # with gradwatch.watch(model, optimizer, exporter=exporter): train()
>>> exporter.event_names()
[]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gradwatch.conventions import RUN_HEARTBEAT, Metric
from gradwatch.telemetry import (
    Attributes,
    AttributeValue,
    Event,
    HistogramPoint,
    MetricPoints,
    Metrics,
    MetricSeries,
    Point,
)


class InMemoryExporter:
    """Keeps events and points in the order in which they arrived.

    Attributes:
        resource: Resource attributes of the last delivery.
        events: All events.
        metrics: All deliveries of points.
    """

    def __init__(self) -> None:
        self.resource: Mapping[str, AttributeValue] = {}
        self.events: list[Event] = []
        self.metrics: list[MetricPoints | MetricSeries] = []

    def send_events(self, resource: Attributes, events: Sequence[Event]) -> None:
        """See ``gradwatch.telemetry.Exporter``."""
        self.resource = resource
        self.events.extend(events)

    def send_metrics(self, resource: Attributes, metrics: Metrics) -> None:
        """See ``gradwatch.telemetry.Exporter``."""
        self.resource = resource
        self.metrics.extend(metrics)

    def deliver(self, seconds: float, *, at_once: bool = False) -> float:  # noqa: ARG002 - nothing ever waits
        """See ``gradwatch.telemetry.Exporter``."""
        return math.inf

    def send_last_words(self, seconds: float) -> None:
        """See ``gradwatch.telemetry.Exporter``."""

    def keep(self) -> None:
        """See ``gradwatch.telemetry.Exporter``."""

    def take_lost(self) -> int:
        """See ``gradwatch.telemetry.Exporter``."""
        return 0

    def close(self) -> None:
        """See ``gradwatch.telemetry.Exporter``."""

    def forget_in_child(self) -> None:
        """See ``gradwatch.telemetry.Exporter``."""

    def event_names(self) -> list[str]:
        """Names of the events, oldest first, but for signs of life, which come when they come."""
        return [event.name for event in self.events if event.name != RUN_HEARTBEAT.name]

    def find_events(self, name: str) -> list[Event]:
        """Events of this name, oldest first."""
        return [event for event in self.events if event.name == name]

    def points(self, metric: Metric, **attributes: AttributeValue) -> list[Point]:
        """Points of a gauge or sum, oldest first; only those whose attributes include these."""
        found: list[Point] = []
        for batch in self.metrics:
            if batch.metric.name == metric.name:
                found += [
                    point
                    for point in batch.points
                    if isinstance(point, Point) and attributes.items() <= point.attributes.items()
                ]
        return found

    def values(self, metric: Metric) -> list[float | int]:
        """Values of a gauge or sum, oldest first."""
        return [point.value for point in self.points(metric)]

    def histograms(self, metric: Metric) -> list[HistogramPoint]:
        """Points of an exponential histogram, oldest first."""
        return [
            point
            for batch in self.metrics
            if batch.metric.name == metric.name
            for point in batch.points
            if isinstance(point, HistogramPoint)
        ]
