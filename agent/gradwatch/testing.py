"""For users' own tests: an exporter that keeps everything, and needs neither a collector nor OpenTelemetry.

>>> from gradwatch.testing import InMemoryExporter
>>> exporter = InMemoryExporter()
>>> # with gradwatch.watch(model, optimizer, exporter=exporter): train()
>>> exporter.event_names()
[]
"""

from __future__ import annotations

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

    def send_events(self, resource: Attributes, events: Sequence[Event]) -> bool:
        """See ``gradwatch.telemetry.Exporter``."""
        self.resource = resource
        self.events.extend(events)
        return True

    def send_metrics(self, resource: Attributes, metrics: Metrics) -> bool:
        """See ``gradwatch.telemetry.Exporter``."""
        self.resource = resource
        self.metrics.extend(metrics)
        return True

    def close(self) -> None:
        """Nothing to release."""

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
