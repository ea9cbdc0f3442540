"""One point of a metric as JSON: a number, a histogram, a summary, with its exemplars.

Numbers that are not finite are null, and named in ``nonfinite``.
"""

from __future__ import annotations

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
from gradwatch_collector.api.views import Json
from gradwatch_collector.otlp.attributes import mapping, number_or_name
from gradwatch_collector.storage.packed import EXEMPLARS

_AGGREGATE: Final = ("count", "sum", "min", "max", "buckets", EXEMPLARS)
# How points of a kind are stored: the fields, first the one that no point is without.
FIELDS: Final[Mapping[str, Sequence[str]]] = {
    "gauge": ("value", EXEMPLARS),
    "sum": ("value", EXEMPLARS),
    "histogram": _AGGREGATE,
    "exponential_histogram": _AGGREGATE,
    "summary": ("count", "sum", "quantiles"),
}


def point_json(kind: str, time: int, fields: Mapping[str, Any]) -> Json:
    """Return a point of ``time`` (Unix nanoseconds); ``fields``: what is stored, None where nothing is."""
    numbers, nonfinite = _numbers({name: fields[name] for name in FIELDS[kind] if name not in _PACKED})
    point = {"time": exactly(time), **numbers, "nonfinite": nonfinite}
    if kind in _SHAPES:
        field, shape = _SHAPES[kind]
        point |= shape(fields[field] or b"")
    exemplars = NumberDataPoint.FromString(fields.get(EXEMPLARS) or b"").exemplars
    return {**point, EXEMPLARS: [_exemplar(each) for each in exemplars]}


def _numbers(values: Mapping[str, float | None]) -> tuple[Json, dict[str, str] | None]:
    """Return numbers as JSON can hold them, and what those were that it cannot; None if it can all."""
    told = {name: None if value is None else number_or_name(value) for name, value in values.items()}
    nonfinite = {name: value for name, value in told.items() if isinstance(value, str)}
    return {name: None if name in nonfinite else value for name, value in told.items()}, nonfinite or None


def _histogram(encoded: bytes) -> Json:
    point = HistogramDataPoint.FromString(encoded)
    return {
        "explicit_bounds": [_or_null(each) for each in point.explicit_bounds],
        "bucket_counts": list(point.bucket_counts),
    }


def _exponential_histogram(encoded: bytes) -> Json:
    point = ExponentialHistogramDataPoint.FromString(encoded)
    return {
        "scale": point.scale,
        "zero_count": point.zero_count,
        "zero_threshold": _or_null(point.zero_threshold),
        "positive": _buckets(point.positive),
        "negative": _buckets(point.negative),
    }


def _buckets(buckets: Any) -> Json:
    return {"offset": buckets.offset, "bucket_counts": list(buckets.bucket_counts)}


def _summary(encoded: bytes) -> Json:
    quantiles = []
    for each in SummaryDataPoint.FromString(encoded).quantile_values:
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


_SHAPES: Final[Mapping[str, tuple[str, Callable[[bytes], Json]]]] = {
    "histogram": ("buckets", _histogram),
    "exponential_histogram": ("buckets", _exponential_histogram),
    "summary": ("quantiles", _summary),
}
_PACKED: Final = frozenset({EXEMPLARS, "buckets", "quantiles"})
