"""Good requests, as senders make them: every metric, attribute and event of ours, and all that OTLP has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from gradwatch import conventions as c
from tests.otlp_clients import any_value, attributes, gauge, metrics_request

_SECOND: Final = 1_000_000_000
# Small requests are spoiled where it matters, and quickly taken in.
_METRICS_AT_ONCE: Final = 2
# A value for each attribute that somebody reads as more than a value; any other is a text.
_VALUES: Final[dict[str, Any]] = {
    c.RANK: 0,
    c.WORLD_SIZE: 2,
    c.SEED: 7,
    c.DEADLINE: 3600.0,
    c.PROCESS_PID: 4711,
    c.PARENT_PID: 4710,
    c.TIER: c.TIER_PRODUCTION,
    c.TARGET: "val_loss <= 0.1",
    c.STEP: 41,
    c.STATUS: "failed",
    c.REASON: "exception",
    c.EXIT_CODE: 1,
    c.WILL_RETRY: False,
    c.BORN_IN: "forward",
    c.NONFINITE_EARLIEST: 40,
    c.NONFINITE_LATEST: 41,
    c.NONFINITE_STEPS: 3,
    c.NONFINITE_ELEMENTS: 12,
    c.NONFINITE_LAYERS: 1,
    c.LOSS_VALUE: 0.5,
    c.TARGET_VALUE: 0.1,
    c.FLIGHT_DATA: b"\x01\x02",
    c.CHECKPOINT_SIZE: 1 << 30,
    c.CHECKPOINT_DURATION: 1.5,
    c.OOM_REQUESTED: 1 << 33,
}
# What is there in some processes only, or would say that none of them is a rank.
_LEFT_OUT: Final = frozenset({c.RUN_ID, c.SUPERVISOR, c.RUN_ATTEMPT})
ODD_VALUES: Final[dict[str, Any]] = {
    "text": "Grüße",
    "yes": True,
    "whole": -(2**63),
    "real": 0.1,
    "bytes": b"\x00\xff",
    "list": [1, "two", None, [3.0]],
    "map": {"a": {"b": [True, b"c"]}},
    "nothing": None,
}


def resource_of(run_id: str) -> dict[str, Any]:
    """Every attribute of a training process; the run is the first."""
    told = {name: _VALUES.get(name, name) for name in c.RESOURCE_ATTRIBUTES if name not in _LEFT_OUT}
    return {c.RUN_ID: run_id, **told}


def samples(run_id: str, time: int) -> list[Any]:
    """Requests of all three signals, of a run, around a time in Unix nanoseconds."""
    resource = resource_of(run_id)
    ours = [_ours(metric, time) for metric in c.METRICS]
    groups = [ours[i : i + _METRICS_AT_ONCE] for i in range(0, len(ours), _METRICS_AT_ONCE)]
    small = {c.RUN_ID: run_id, c.RANK: 1, **ODD_VALUES}
    return [
        *(metrics_request(resource, *group) for group in groups),
        *(metrics_request(small, metric) for metric in _kinds(time)),
        metrics_request({"service.name": "of no run"}, *_kinds(time)),
        metrics_request({c.RUN_ID: run_id, c.SUPERVISOR: True}, gauge("queue", (time, 1))),
        *(events_request(resource, [event], time) for event in c.EVENTS),
        events_request({c.RUN_ID: run_id, c.SUPERVISOR: True}, [c.RUN_STARTED, c.RUN_ENDED], time),
        _plain_lines(small, time),
        _spans(small, time),
    ]


def _ours(metric: c.Metric, time: int) -> Metric:
    labels = {name: _VALUES.get(name, name) for name in metric.attributes}
    if metric.kind in ("gauge", "sum"):
        made = gauge(metric.name, (time, 0.25), **labels)
        if metric.kind == "sum":
            points = made.gauge.data_points[:]
            made.sum.SetInParent()
            made.sum.data_points.extend(points)
            made.sum.aggregation_temporality = 1
    else:
        made = _exponential(metric.name, time)
    made.unit = metric.unit
    return made


def _kinds(time: int) -> list[Metric]:
    layers = Metric(name="norm", unit="1")
    for layer in ("a", "b", "c"):
        for step in range(2):
            layers.gauge.data_points.add(
                time_unix_nano=time + step, as_double=step / 3, attributes=attributes({"layer": layer})
            )
    odd = gauge("odd", (time, 7), (time + 1, float("nan")), **ODD_VALUES)
    counter = Metric(name="requests", unit="{request}")
    counter.sum.aggregation_temporality = 2
    counter.sum.is_monotonic = True
    point = counter.sum.data_points.add(
        start_time_unix_nano=time - _SECOND, time_unix_nano=time, as_int=2**53 + 1
    )
    point.exemplars.add(time_unix_nano=time, as_double=1.0, span_id=b"12345678", trace_id=b"1234567890123456")
    histogram = Metric(name="latency", unit="s")
    histogram.histogram.aggregation_temporality = 1
    held = histogram.histogram.data_points.add(
        time_unix_nano=time,
        count=6,
        sum=3.5,
        min=0.1,
        max=2.0,
        bucket_counts=[1, 2, 3],
        explicit_bounds=[0.5, 1],
    )
    held.exemplars.add(time_unix_nano=time, as_int=1, filtered_attributes=attributes({"k": "v"}))
    summary = Metric(name="quantiles", unit="s")
    quantiles = summary.summary.data_points.add(time_unix_nano=time, count=3, sum=1.5)
    quantiles.quantile_values.add(quantile=0.5, value=0.4)
    quantiles.quantile_values.add(quantile=1.0, value=1.0)
    return [layers, odd, counter, histogram, _exponential("sizes", time), summary]


def _exponential(name: str, time: int) -> Metric:
    made = Metric(name=name)
    made.exponential_histogram.aggregation_temporality = 1
    point = made.exponential_histogram.data_points.add(
        time_unix_nano=time, count=4, sum=9.5, scale=3, zero_count=1
    )
    point.positive.offset = -2
    point.positive.bucket_counts.extend([1, 2])
    point.negative.offset = 5
    point.negative.bucket_counts.append(1)
    return made


def events_request(resource: dict[str, Any], events: Sequence[c.Event], time: int) -> ExportLogsServiceRequest:
    """Events of a resource, one after the other."""
    request = ExportLogsServiceRequest()
    owner = request.resource_logs.add()
    owner.resource.attributes.extend(attributes(resource))
    scope = owner.scope_logs.add()
    for sequence, event in enumerate(events):
        told = {name: _VALUES.get(name, name) for name in event.attributes} | {c.EVENT_SEQUENCE: sequence}
        scope.log_records.add(
            time_unix_nano=time + sequence,
            event_name=event.name,
            severity_number=9,
            attributes=attributes(told),
        )
    return request


def _plain_lines(resource: dict[str, Any], time: int) -> ExportLogsServiceRequest:
    request = events_request(resource, [], time)
    scope = request.resource_logs[0].scope_logs[0]
    for body in ("a line", ODD_VALUES, 7):
        scope.log_records.add(
            observed_time_unix_nano=time,
            body=any_value(body),
            severity_text="INFO",
            trace_id=b"1234567890123456",
            span_id=b"12345678",
        )
    return request


def _spans(resource: dict[str, Any], time: int) -> ExportTraceServiceRequest:
    request = ExportTraceServiceRequest()
    owner = request.resource_spans.add()
    owner.resource.attributes.extend(attributes(resource))
    span = owner.scope_spans.add().spans.add(
        trace_id=b"1234567890123456",
        span_id=b"12345678",
        parent_span_id=b"87654321",
        name="step",
        kind=1,
        start_time_unix_nano=time,
        end_time_unix_nano=time + _SECOND,
        attributes=attributes(ODD_VALUES),
    )
    span.events.add(name="halfway", time_unix_nano=time, attributes=attributes(ODD_VALUES))
    span.links.add(trace_id=b"1234567890123456", span_id=b"12345678")
    span.status.code = 2
    return request
