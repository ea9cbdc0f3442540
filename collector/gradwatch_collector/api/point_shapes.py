"""One point of a metric as JSON: a number, a histogram, a summary, with its exemplars.

Numbers that are not finite are null, and named in ``nonfinite``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    Exemplar,
    ExponentialHistogramDataPoint,
    HistogramDataPoint,
    NumberDataPoint,
    SummaryDataPoint,
)

from gradwatch_collector.api.moments import exactly
from gradwatch_collector.api.shapes import Json
from gradwatch_collector.otlp.attributes import mapping, number_or_name
from gradwatch_collector.storage.packed import EXEMPLARS
from gradwatch_collector.storage.rolled_up import Bucket

_AGGREGATE: Final = ("count", "sum", "min", "max", "buckets", EXEMPLARS)
# How points of a kind are stored: the fields, first the one that no point is without.
FIELDS: Final[Mapping[str, Sequence[str]]] = {
    "gauge": ("value", EXEMPLARS),
    "sum": ("value", EXEMPLARS),
    "histogram": _AGGREGATE,
    "exponential_histogram": _AGGREGATE,
    "summary": ("count", "sum", "quantiles"),
}
_PACKED: Final = frozenset({EXEMPLARS, "buckets", "quantiles"})
# The fields of a kind that are one number a point, in the same order.
NUMBERS: Final[Mapping[str, Sequence[str]]] = {
    kind: [name for name in names if name not in _PACKED] for kind, names in FIELDS.items()
}


def point_json(kind: str, time: int, fields: Mapping[str, Any]) -> Json:
    """Return a point of ``time`` (Unix nanoseconds); ``fields``: what is stored, None where nothing is."""
    values = {name: fields[name] for name in NUMBERS[kind]}
    shape: Json = {}
    if kind in _SHAPES:
        field, message, shaped = _SHAPES[kind]
        packed = message.FromString(fields[field] or b"")
        shape = shaped(packed)
        values = {name: None if _is_absent(packed, name, value) else value for name, value in values.items()}
    numbers, nonfinite = _numbers(values)
    point = {"time": exactly(time), **numbers, "nonfinite": nonfinite, **shape}
    exemplars = NumberDataPoint.FromString(fields.get(EXEMPLARS) or b"").exemplars
    return {**point, EXEMPLARS: [_exemplar(each) for each in exemplars]}


def rollup_json(kind: str, time: int, fields: Mapping[str, Bucket]) -> Json:
    """Return what is left of some points, the last of which was of ``time`` (Unix nanoseconds), by field."""
    return {
        "time": exactly(time),
        "count": int(next(iter(fields.values())).count),
        "fields": {name: _bucket(fields[name]) if name in fields else None for name in NUMBERS[kind]},
    }


def _bucket(bucket: Bucket) -> Json:
    return {
        "nonfinite": int(bucket.nonfinite),
        "min": _or_null(bucket.minimum),
        "max": _or_null(bucket.maximum),
        "mean": _or_null(bucket.mean),
        "last": _or_null(bucket.last),
    }


def _is_absent(packed: Any, name: str, value: float | None) -> bool:
    """Return whether a NaN stands for a number that other points had and this one did not."""
    if value is None or not math.isnan(value):
        return False
    is_told: bool = not packed.DESCRIPTOR.fields_by_name[name].has_presence or packed.HasField(name)
    return not is_told


def _numbers(values: Mapping[str, float | None]) -> tuple[Json, dict[str, str] | None]:
    """Return numbers as JSON can hold them, and what those were that it cannot; None if it can all."""
    told = {name: None if value is None else number_or_name(value) for name, value in values.items()}
    nonfinite = {name: value for name, value in told.items() if isinstance(value, str)}
    return {name: None if name in nonfinite else value for name, value in told.items()}, nonfinite or None


def _histogram(point: Any) -> Json:
    return {
        "explicit_bounds": [_or_null(each) for each in point.explicit_bounds],
        "bucket_counts": list(point.bucket_counts),
    }


def _exponential_histogram(point: Any) -> Json:
    return {
        "scale": point.scale,
        "zero_count": point.zero_count,
        "zero_threshold": _or_null(point.zero_threshold),
        "positive": _buckets(point.positive),
        "negative": _buckets(point.negative),
    }


def _buckets(buckets: Any) -> Json:
    return {"offset": buckets.offset, "bucket_counts": list(buckets.bucket_counts)}


def _summary(point: Any) -> Json:
    quantiles = []
    for each in point.quantile_values:
        numbers, nonfinite = _numbers({"quantile": each.quantile, "value": each.value})
        quantiles.append({**numbers, "nonfinite": nonfinite})
    return {"quantiles": quantiles}


def _or_null(value: float) -> float | None:
    told = number_or_name(value)
    return None if isinstance(told, str) else told


def _exemplar(exemplar: Exemplar) -> Json:
    which = exemplar.WhichOneof("value")
    numbers, nonfinite = _numbers({"value": None if which is None else getattr(exemplar, which)})
    return {
        "time": exactly(exemplar.time_unix_nano),
        **numbers,
        "nonfinite": nonfinite,
        "trace_id": exemplar.trace_id.hex() or None,
        "span_id": exemplar.span_id.hex() or None,
        "labels": mapping(exemplar.filtered_attributes),
    }


# The field that holds what is packed, what that is, and how it is shown.
_SHAPES: Final[Mapping[str, tuple[str, Any, Callable[[Any], Json]]]] = {
    "histogram": ("buckets", HistogramDataPoint, _histogram),
    "exponential_histogram": ("buckets", ExponentialHistogramDataPoint, _exponential_histogram),
    "summary": ("quantiles", SummaryDataPoint, _summary),
}
