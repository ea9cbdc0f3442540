"""What a decoded OTLP request is made of: immutable values between the receiver and the database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

# Any OTLP attribute value, as JSON can hold it: str, bool, int, finite float, bytes as base64 text, NaN and
# infinities as "NaN", "Infinity", "-Infinity", lists and maps of these.
AttributeValue = Any
Attributes = Mapping[str, AttributeValue]
Vector = npt.NDArray[np.float32] | npt.NDArray[np.float64] | npt.NDArray[np.int64]
Times = npt.NDArray[np.int64]

# The rank of a supervisor, which is none: every natural key has a rank, and those of training are from 0.
NO_RANK: Final = -1


@dataclass(frozen=True, slots=True)
class Source:
    """Who sent a batch, read from the OTLP resource.

    ``run_id`` is ``training.run.id``, or a digest of the resource for telemetry that names no run. ``attempt``
    is None when the sender does not know it. ``rank`` is :data:`NO_RANK` for a supervisor. ``instance`` is
    ``service.instance.id`` (empty if absent). ``owner`` is the team of the token that it came with; None where
    that may write for every team.
    """

    run_id: str
    attempt: int | None
    rank: int
    instance: str
    resource: Attributes
    owner: str | None = None


@dataclass(frozen=True, slots=True)
class MetricIdentity:
    """What makes two points the same metric: name, unit, kind and how they aggregate."""

    name: str
    unit: str
    kind: str
    temporality: int = 0
    monotonic: bool = False


@dataclass(frozen=True, slots=True)
class AttributeSet:
    """An ordered list of point attribute sets, interned by its digest; a frame has one value for each."""

    digest: bytes
    points: Sequence[Attributes]

    @property
    def width(self) -> int:
        """Number of points a frame over this set has."""
        return len(self.points)


@dataclass(frozen=True, slots=True)
class Frame:
    """All values of one field of one metric over one attribute set, at one or more times.

    ``times``: Unix nanoseconds, shape ``[n]``, strictly increasing. ``values``: layer-major, shape
    ``[width, n]``, for numeric fields. ``packed``: for fields that are not one number a point (histogram
    buckets), one opaque byte string per time; then ``values`` is None.
    """

    metric: MetricIdentity
    field: str
    attribute_set: AttributeSet
    times: Times
    values: Vector | None
    packed: tuple[bytes, ...] | None = None


@dataclass(frozen=True, slots=True)
class EventRecord:
    """One log record. ``name`` is empty for a plain log line; ``time`` in Unix nanoseconds.

    ``sequence`` is the sender's event counter, or a digest of the record for senders that have none.
    """

    name: str
    time: int
    sequence: int
    severity: int
    body: str | None
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """One span; ids as lower-case hex, times in Unix nanoseconds."""

    trace_id: str
    span_id: str
    parent_span_id: str | None
    name: str
    kind: int
    start: int
    end: int
    status: int
    attributes: Attributes
    events: Sequence[Attributes]


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything one resource sent in one request."""

    source: Source
    frames: Sequence[Frame] = ()
    events: Sequence[EventRecord] = ()
    spans: Sequence[SpanRecord] = ()
    datapoints: int = 0


@dataclass(frozen=True, slots=True)
class ProcessKey:
    """A process of a run, its attempt resolved. The prefix of every natural key."""

    run_id: str
    attempt: int
    rank: int
    instance: str


@dataclass(frozen=True, slots=True)
class Received:
    """A batch whose process is known. ``received_at`` in Unix nanoseconds."""

    key: ProcessKey
    batch: Batch
    received_at: int
