"""What the collector counts about itself, as Prometheus instruments on a registry that is passed in."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from gradwatch import conventions as c
from gradwatch_collector.records import Batch

_SIGNALS = ("metrics", "logs", "traces")
_REASONS = (
    "malformed",
    "too_large",
    "too_slow",
    "unsupported",
    "foreign_host",
    "unauthenticated",
    "forbidden",
    "rate_limited",
    "rejected",
    "unavailable",
    "internal",
)
# From one fsync of an SSD to a database in trouble.
_COMMIT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Instruments:
    """The ``gradwatch_collector_*`` families that the receiver and the writer feed."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._received = _counter(c.COLLECTOR_RECEIVED, registry)
        self._committed = _counter(c.COLLECTOR_COMMITTED, registry)
        self._rejected = _counter(c.COLLECTOR_REJECTED, registry)
        self._rejected_items = _counter(c.COLLECTOR_REJECTED_ITEMS, registry)
        self.queue_depth = _gauge(c.COLLECTOR_QUEUE_DEPTH, registry)
        self.queue_bytes = _gauge(c.COLLECTOR_QUEUE_BYTES, registry)
        self.queue_limit = _gauge(c.COLLECTOR_QUEUE_LIMIT, registry)
        self.connections = _gauge(c.COLLECTOR_CONNECTIONS, registry)
        self.database_connections = _gauge(c.COLLECTOR_DATABASE_CONNECTIONS, registry)
        self.commit_duration = Histogram(
            c.COLLECTOR_COMMIT_DURATION.name,
            c.COLLECTOR_COMMIT_DURATION.description,
            buckets=_COMMIT_SECONDS,
            registry=registry,
        )
        # Counters exist at 0 from the start, or `increase()` would miss the first of a kind.
        for signal in _SIGNALS:
            self._received.labels(signal)
            self._committed.labels(signal)
            self._rejected_items.labels(signal)
        for reason in _REASONS:
            self._rejected.labels(reason)

    def receive(self, batches: Iterable[Batch]) -> None:
        """Count the items of a request that was understood."""
        _count(self._received, batches)

    def commit(self, batches: Iterable[Batch]) -> None:
        """Count the items of requests that are committed."""
        _count(self._committed, batches)

    def reject(self, reason: str) -> None:
        """Count a request that was refused."""
        self._rejected.labels(reason).inc()

    def reject_items(self, signal: str, count: int) -> None:
        """Count the items of a request that were refused while the others were taken."""
        self._rejected_items.labels(signal).inc(count)


def _gauge(family: c.Family, registry: CollectorRegistry) -> Gauge:
    return Gauge(family.name, family.description, registry=registry)


def _counter(family: c.Family, registry: CollectorRegistry) -> Counter:
    return Counter(family.name, family.description, family.labels, registry=registry)


def _count(counter: Counter, batches: Iterable[Batch]) -> None:
    metrics = logs = traces = 0
    for batch in batches:
        metrics += batch.datapoints
        logs += len(batch.events)
        traces += len(batch.spans)
    for signal, count in zip(_SIGNALS, (metrics, logs, traces), strict=True):
        if count:
            counter.labels(signal).inc(count)
