"""OTLP metrics into frames."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import DataPointFlags, Exemplar, NumberDataPoint
from opentelemetry.proto.resource.v1.resource_pb2 import Resource

from gradwatch import conventions as c
from gradwatch_collector.otlp.attributes import clean, mapping, source_of
from gradwatch_collector.otlp.decoded import Decoded
from gradwatch_collector.otlp.errors import MalformedError
from gradwatch_collector.otlp.layout import Layouts, Numbers
from gradwatch_collector.otlp.parts import Parts
from gradwatch_collector.otlp.points import MAX_NANOS, Group, Points, Remembered, valid_times
from gradwatch_collector.otlp.wire import LazyMetricsRequest
from gradwatch_collector.records import Attributes, Batch, Frame, MetricIdentity, Source, Vector
from gradwatch_collector.storage import packed
from gradwatch_collector.storage.packed import EXEMPLARS

MAX_NAME: Final = 255  # OpenTelemetry's own limit for instruments; generous for units
_NO_VALUE: Final = DataPointFlags.DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK


@dataclass(frozen=True, slots=True)
class _Read:
    frames: Sequence[Frame] = ()
    accepted: int = 0
    rejected: int = 0


# Bytes as they come, of senders and of points' attributes each; as Python objects they take ten times that.
# Thousands of senders have room, and ones that say a megabyte about themselves do not take all memory.
_REMEMBERED: Final = 4 << 20
_PER_POINT: Final = 64

_Labels = tuple[bytes, ...]  # attributes as encoded KeyValues
_Encoded = tuple[_Labels, ...]  # those of each point

# As Prometheus names what a scope says of itself. Name and version come first: of two labels the first counts.
_OF_SCOPE: Final = "otel.scope."

# The fields of histogram and summary points that are one number each. What is left of a point when these and
# its place in the stream are taken away (buckets, quantiles) is packed.
_INTEGER_FIELDS: Final = ("count",)
_FLOAT_FIELDS: Final = ("sum", "min", "max")
_PLACE_FIELDS: Final = ("attributes", "start_time_unix_nano", "time_unix_nano", "flags", EXEMPLARS)
_PACKED_FIELD: Final = {"histogram": "buckets", "exponential_histogram": "buckets", "summary": "quantiles"}


class MetricsDecoder:
    """Decodes metrics requests, remembering resources and layouts between them. Safe to share."""

    def __init__(self) -> None:
        self._layouts = Layouts()
        self._sources: Remembered[bytes, Source] = Remembered(_REMEMBERED, len)
        self._points: Remembered[_Encoded, Points] = Remembered(_REMEMBERED, _size)

    def decode(self, body: bytes, parts: Parts | None = None) -> Decoded:
        """Decode an ``ExportMetricsServiceRequest``.

        Raises:
            MalformedError: it is none, or says something impossible about who sent it.
            TooLargeError: it has more parts than may be; what is remembered from before is not counted.
        """
        parts = parts or Parts()
        try:
            parts.add(body, LazyMetricsRequest)
            request = LazyMetricsRequest.FromString(body)
            batches = []
            rejected = 0
            for resource in request.resource_metrics:
                read = [
                    self._read(metric, parts, labels)
                    for scope in resource.scope_metrics
                    for labels in [_scope_labels(scope.scope)]
                    for metric in scope.metrics
                ]
                frames = [frame for each in read for frame in each.frames]
                accepted = sum(each.accepted for each in read)
                rejected += sum(each.rejected for each in read)
                source = self._source(resource.resource, parts)
                if read:
                    batches.append(Batch(source, frames, datapoints=accepted))
        except DecodeError as error:
            raise MalformedError("the body is not an encoded ExportMetricsServiceRequest") from error
        return Decoded(batches, rejected, "points without a usable metric name, time or value")

    def _source(self, encoded: bytes, parts: Parts) -> Source:
        source = self._sources.get(encoded)
        if source is None:
            parts.add(encoded, Resource)
            source = self._sources[encoded] = source_of(Resource.FromString(encoded))
        return source

    def _read(self, metric: Any, parts: Parts, scope: _Labels) -> _Read:
        kind = metric.WhichOneof("data")
        if kind is None:
            return _Read()
        data = getattr(metric, kind)
        is_usable = 0 < len(metric.name) <= MAX_NAME and len(metric.unit) <= MAX_NAME
        if kind in _PACKED_FIELD:
            points = list(data.data_points)
            if not is_usable or not points:
                return _Read(rejected=len(points))
            temporality = getattr(data, "aggregation_temporality", 0)
            return self._aggregates(_identity(metric, kind, temporality), points, parts, scope)
        numbers = self._layouts.read(metric.name if is_usable else "", kind, data, parts, scope)
        if not is_usable:
            return _Read(rejected=len(numbers.times))
        return _numbers(_identity(metric, kind, numbers.temporality, numbers.monotonic), numbers)

    def _aggregates(self, metric: MetricIdentity, points: Sequence[Any], parts: Parts, scope: _Labels) -> _Read:
        empty = sum(bool(point.flags & _NO_VALUE) for point in points)
        usable = [
            point
            for point in points
            if 0 < point.time_unix_nano <= MAX_NANOS
            and point.count <= MAX_NANOS
            and not point.flags & _NO_VALUE
        ]
        if usable:
            key = tuple((*point.attributes, *scope) for point in usable)
            known = self._points.get(key)
            if known is None:
                parts.add_shared(scope, len(usable))
                for each in itertools.chain.from_iterable(key):
                    parts.add(each, KeyValue)
                known = self._points[key] = Points([_attributes(each) for each in key])
            times = np.array([point.time_unix_nano for point in usable], np.int64)
            groups = list(known.group(times))
            frames = list(_aggregate_frames(metric, usable, groups))
        else:
            frames = []
        return _Read(frames, len(usable), len(points) - len(usable) - empty)


def _scope_labels(scope: Any) -> _Labels:
    """Return what points of a scope have in addition to their own attributes, so that no two scopes share any.

    Our agent's scope is the only one to send what it sends: its points need nothing.
    """
    if scope.name == c.SCOPE_NAME or not (scope.name or scope.version or scope.attributes):
        return ()
    told = (("name", scope.name), ("version", scope.version))
    labels = [
        KeyValue(key=_OF_SCOPE + name, value=AnyValue(string_value=text[:MAX_NAME])).SerializeToString()
        for name, text in told
        if text
    ]
    for each in scope.attributes:
        encoded = each.value.SerializeToString()
        value = AnyValue.FromString(encoded)
        if len(encoded) > MAX_NAME:
            # Each point has a copy. A digest tells two of them apart as well.
            value = AnyValue(string_value=blake2b(encoded, digest_size=16).hexdigest())
        labels.append(KeyValue(key=_OF_SCOPE + each.key[:MAX_NAME], value=value).SerializeToString())
    return tuple(labels)


def _size(points: _Encoded) -> int:
    return sum(_PER_POINT + sum(map(len, attributes)) for attributes in points)


def _identity(metric: Any, kind: str, temporality: int, monotonic: bool = False) -> MetricIdentity:
    return MetricIdentity(clean(metric.name), clean(metric.unit), kind, temporality, monotonic)


def _numbers(metric: MetricIdentity, numbers: Numbers) -> _Read:
    points, times = numbers.points, numbers.times
    if (
        points.whole is not None
        and numbers.are_floats
        and numbers.exemplars is None
        and numbers.are_together
        and 0 < times[0] <= MAX_NANOS
    ):
        # What nearly everybody sends: a float for each attribute set, all of one moment.
        time, values = times[:1].astype(np.int64), numbers.floats.reshape(-1, 1)
        return _Read([Frame(metric, "value", points.whole, time, values)], len(values))
    return _mixed_numbers(metric, numbers)


def _mixed_numbers(metric: MetricIdentity, numbers: Numbers) -> _Read:
    usable = valid_times(numbers.times)
    times = numbers.times.astype(np.int64)
    frames: list[Frame] = []
    accepted = 0
    values: npt.NDArray[Any]
    for of_kind, values in ((numbers.is_float, numbers.floats), (numbers.is_integer, numbers.integers)):
        kept = of_kind & usable
        count = int(np.count_nonzero(kept))
        if count:
            accepted += count
            groups = list(numbers.points.group(times, None if count == len(kept) else kept))
            frames += [
                Frame(metric, "value", group.attribute_set, group.times, values[group.index])
                for group in groups
            ]
            if numbers.exemplars is not None:
                frames += _exemplar_frames(metric, groups, numbers.exemplars)
    return _Read(frames, accepted, len(times) - accepted - int(np.count_nonzero(numbers.is_empty)))


def _attributes(encoded: Sequence[bytes]) -> Attributes:
    return mapping(KeyValue.FromString(each) for each in encoded)


def _aggregate_frames(
    metric: MetricIdentity, points: Sequence[Any], groups: Sequence[Group]
) -> Iterator[Frame]:
    has = points[0].DESCRIPTOR.fields_by_name
    no_numbers: list[tuple[str, int]] = []
    for name in (*_INTEGER_FIELDS, *_FLOAT_FIELDS):
        if name not in has:
            continue
        if has[name].has_presence:
            # An optional number that is absent from some points is a NaN there, and no frame if from all. One
            # that is there and NaN is told from these by staying in what is packed.
            present = np.array([point.HasField(name) for point in points])
        else:
            present = np.ones(len(points), bool)
        numbers = [getattr(point, name) for point in points]
        values: Vector
        values = np.array(numbers, np.int64) if name in _INTEGER_FIELDS else np.array(numbers, np.float64)
        if has[name].has_presence:
            no_numbers += [(name, position) for position in np.flatnonzero(present & np.isnan(values)).tolist()]
            values[~present] = np.nan
        for group in groups:
            if present[group.index].any():
                yield Frame(metric, name, group.attribute_set, group.times, values[group.index])
    if EXEMPLARS in has and any(point.exemplars for point in points):
        yield from _exemplar_frames(metric, groups, [_encoded_exemplars(point) for point in points])
    cleared = [name for name in (*_INTEGER_FIELDS, *_FLOAT_FIELDS, *_PLACE_FIELDS) if name in has]
    for point in points:
        for name in cleared:
            point.ClearField(name)
    for name, position in no_numbers:
        setattr(points[position], name, math.nan)
    rest = [point.SerializeToString() for point in points]
    for group in groups:
        at_times = tuple(packed.join(rest[i] for i in column) for column in group.index.T.tolist())
        yield Frame(metric, _PACKED_FIELD[metric.kind], group.attribute_set, group.times, None, at_times)


def _encoded_exemplars(point: Any) -> bytes:
    exemplars = [Exemplar.FromString(each.SerializeToString()) for each in point.exemplars]
    encoded: bytes = NumberDataPoint(exemplars=exemplars).SerializeToString()
    return encoded


def _exemplar_frames(
    metric: MetricIdentity, groups: Sequence[Group], exemplars: Sequence[bytes]
) -> Iterator[Frame]:
    # A packed field like buckets, kept and pruned with its points: for each an encoded NumberDataPoint with
    # nothing but exemplars, whatever the kind. Times at which no point of the group has any are left out.
    for group in groups:
        columns = group.index.T.tolist()
        held = [at for at, column in enumerate(columns) if any(exemplars[i] for i in column)]
        if held:
            at_times = tuple(packed.join(exemplars[i] for i in columns[at]) for at in held)
            yield Frame(metric, EXEMPLARS, group.attribute_set, group.times[held], None, at_times)
