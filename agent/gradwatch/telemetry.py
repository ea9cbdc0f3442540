"""What travels from the training thread to the export thread, and from there to an exporter.

These are gradwatch's own types: an exporter turns them into a wire format, so that neither the training
thread nor a test needs the OpenTelemetry SDK. Records made on the training thread are named tuples, because
a frozen dataclass costs about a microsecond more to make, every step.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from gradwatch.conventions import Metric

AttributeValue = str | int | float | bool | bytes
Attributes = Mapping[str, AttributeValue]


class StepRecord(NamedTuple):
    """One step of one optimizer of which more is known than its end and its loss.

    ``time`` is the step's end in Unix nanoseconds, shared by all its scalars. ``norms`` are the pre-clip L2
    norms of the gradients named by ``layers`` at ``indices``; None where the step was not observed.
    ``sharded``: the norms are this rank's shares, whose squares add up over the ranks. ``loss_scale``: what
    mixed precision multiplied the loss with. ``local_norm``: L2 norm of this rank's own gradients before data
    parallelism averaged them.
    """

    optimizer: int
    step: int
    time: int
    loss: float | None
    layers: Sequence[str]
    indices: Sequence[int] | None
    norms: Sequence[float] | None
    gradient_norm: float | None
    nonfinite: bool
    skipped: bool
    clip_ratio: float | None = None
    sharded: bool = False
    loss_scale: float | None = None
    local_norm: float | None = None


class NonfiniteStep(NamedTuple):
    """A step with a non-finite loss or gradient; what is not known is None.

    ``since``: first step in which it may have come, where nobody looked; then ``step`` is the last.
    """

    step: int
    layer: str | None = None
    born_in: str | None = None
    layers: int = 0
    elements: int | None = None
    loss: float | None = None
    since: int | None = None


class LoggedValue(NamedTuple):
    """One number given to ``watch.log``."""

    name: str
    time: int
    value: float


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. ``time`` in Unix nanoseconds."""

    name: str
    time: int
    attributes: Attributes


class Point(NamedTuple):
    """One number of a gauge or a delta sum; ``start`` is 0 for gauges. Times in Unix nanoseconds."""

    time: int
    value: float | int
    attributes: Attributes
    start: int = 0


class HistogramPoint(NamedTuple):
    """One exponential histogram (delta) of ``total`` values.

    ``buckets[i]`` counts values in (b^(offset+i), b^(offset+i+1)].
    """

    start: int
    time: int
    attributes: Attributes
    total: int
    sum: float
    minimum: float
    maximum: float
    zero_count: int
    offset: int
    buckets: Sequence[int]


@dataclass(frozen=True, slots=True)
class MetricPoints:
    """Points of one metric."""

    metric: Metric
    points: Sequence[Point] | Sequence[HistogramPoint]

    def __len__(self) -> int:
        return len(self.points)


@dataclass(frozen=True, slots=True)
class MetricSeries:
    """Points of one gauge that share their attributes, as packed columns: thousands a second stay cheap.

    ``times`` are Unix nanoseconds (typecode ``q``); ``values`` are float64 (``d``) or int64 (``q``).
    """

    metric: Metric
    attributes: Attributes
    times: array[int]
    values: array[float] | array[int]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def points(self) -> Sequence[Point]:
        """The same, one object a point."""
        return [Point(t, v, self.attributes) for t, v in zip(self.times, self.values, strict=True)]


Metrics = Sequence[MetricPoints | MetricSeries]


def count_points(metrics: Metrics) -> int:
    """Number of data points."""
    return sum(map(len, metrics))


class Exporter(Protocol):
    """Where telemetry goes: takes it over, and delivers it when told to.

    Called from one background thread; from others only when the process ends.
    """

    def send_events(self, resource: Attributes, events: Sequence[Event]) -> None:
        """Take events over, oldest first."""

    def send_metrics(self, resource: Attributes, metrics: Metrics) -> None:
        """Take points over."""

    def deliver(self, seconds: float, *, at_once: bool = False) -> float:
        """Deliver what waits, for about ``seconds``; return after how many more to call again.

        ``at_once``: now or never, but for a receiver that asked to be left alone.
        """

    def send_last_words(self, seconds: float) -> None:
        """Deliver what is urgent, though a delivery may be under way in the background thread."""

    def keep(self) -> None:
        """Put what waits where it survives this process."""

    def take_lost(self) -> int:
        """Events and points given up since the last call."""

    def close(self) -> None:
        """Keep what waits, and release what the exporter holds."""

    def forget_in_child(self) -> None:
        """After a fork: everything is the parent's."""
