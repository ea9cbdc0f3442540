"""OTLP/JSON says what protobuf says, and whatever else comes is refused in one line."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from gradwatch_collector.otlp.errors import MalformedError
from gradwatch_collector.otlp.json_bodies import JsonRequest
from tests.otlp_clients import any_value, attributes, otlp_json

REQUESTS = (ExportMetricsServiceRequest, ExportLogsServiceRequest, ExportTraceServiceRequest)
READERS = {kind: JsonRequest(kind) for kind in REQUESTS}

TEXT = st.text('aé\0\U0001f600"\\', max_size=5)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | TEXT
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
ATTRIBUTES = st.dictionaries(st.sampled_from(["traceId", "a", "span_id", ""]), VALUES, max_size=3)
TRACE_IDS, SPAN_IDS = st.binary(min_size=16, max_size=16), st.binary(min_size=8, max_size=8)
TIMES = st.integers(0, 2**64 - 1)


@given(TRACE_IDS, SPAN_IDS, TIMES, ATTRIBUTES)
def test_traces_say_the_same_in_json(trace_id: bytes, span_id: bytes, time: int, values: Any) -> None:
    request = ExportTraceServiceRequest()
    owner = request.resource_spans.add()
    owner.resource.attributes.extend(attributes(values))
    span = owner.scope_spans.add().spans.add(
        trace_id=trace_id, span_id=span_id, parent_span_id=span_id, start_time_unix_nano=time, kind=3
    )
    span.attributes.extend(attributes(values))
    span.links.add(trace_id=trace_id, span_id=span_id).attributes.extend(attributes(values))
    assert ExportTraceServiceRequest.FromString(read(request)) == request


@given(TRACE_IDS, SPAN_IDS, TIMES, VALUES)
def test_logs_say_the_same_in_json(trace_id: bytes, span_id: bytes, time: int, body: Any) -> None:
    request = ExportLogsServiceRequest()
    request.resource_logs.add().scope_logs.add().log_records.add(
        time_unix_nano=time,
        trace_id=trace_id,
        span_id=span_id,
        severity_number=9,
        flags=1,
        body=any_value(body),
    )
    assert ExportLogsServiceRequest.FromString(read(request)) == request


@given(TRACE_IDS, SPAN_IDS, TIMES, st.integers(-(2**63), 2**63 - 1), ATTRIBUTES)
def test_metrics_say_the_same_in_json(
    trace_id: bytes, span_id: bytes, time: int, value: int, values: Any
) -> None:
    request = ExportMetricsServiceRequest()
    metrics = request.resource_metrics.add().scope_metrics.add().metrics
    for kind in ("gauge", "sum", "histogram", "exponential_histogram"):
        point = getattr(metrics.add(name=kind), kind).data_points.add(time_unix_nano=time)
        point.attributes.extend(attributes(values))
        point.exemplars.add(as_int=value, trace_id=trace_id, span_id=span_id)
    metrics[2].histogram.data_points[0].bucket_counts.extend([1, 2**63])
    metrics[2].histogram.data_points[0].explicit_bounds.extend([0.1, float("inf")])
    assert ExportMetricsServiceRequest.FromString(read(request)) == request


def read(request: Any) -> bytes:
    return READERS[type(request)].to_protobuf(json.dumps(otlp_json(request)).encode())


# What is where it should be, but for one thing.
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def names(descriptor: Any, found: set[str]) -> set[str]:
    """Every name that a field of a message or of one within it has."""
    for field in descriptor.fields:
        if field.json_name not in found:
            found |= {field.json_name, field.name}
            if field.message_type is not None:
                names(field.message_type, found)
    return found


KEYS = st.sampled_from(sorted({"[x]", "@type"}.union(*(names(kind.DESCRIPTOR, set()) for kind in REQUESTS))))
NESTED = st.recursive(
    ANYTHING,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=25,
)


@pytest.mark.parametrize("kind", REQUESTS)
@given(body=st.binary(max_size=50) | NESTED.map(lambda told: json.dumps(told).encode()))
def test_no_body_makes_the_reader_fail_in_any_other_way(kind: type, body: bytes) -> None:
    with contextlib.suppress(MalformedError):
        READERS[kind].to_protobuf(body)


def test_a_whole_surrogate_pair_is_a_letter() -> None:
    body = b'{"resourceSpans": [{"schemaUrl": "\\ud83d\\uDD25", "\\ud83d\\udd25": 1}]}'
    read = ExportTraceServiceRequest.FromString(READERS[ExportTraceServiceRequest].to_protobuf(body))
    assert read.resource_spans[0].schema_url == "\U0001f525"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "Expecting value"),
        (b"[]", "it is a JSON list and no object"),
        (b"\xff", "can't decode byte 0xff"),
        (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"resourceSpans":' * 5_000, "it is nested too deeply"),
        (b'{"resourceSpans": [null]}', "null is not allowed"),
        (b'{"resourceSpans": {}}', "repeated field resourceSpans must be in []"),
        (b'{"resourceSpans": [{"schemaUrl": 1}]}', "Failed to parse"),
        (b'{"resourceSpans": [{"schemaUrl": "\\ud800"}]}', "half of a surrogate pair"),
        (b'{"resourceSpans": "\\uDFFF\\ud800"}', "half of a surrogate pair"),
        (b'{"resourceSpans": [{"\\udbff": 1}]}', "half of a surrogate pair"),
        (b'{"x": ' + b"9" * 5_000 + b"}", "Exceeds the limit"),
    ],
)
def test_a_body_that_is_none_is_refused_in_one_line(body: bytes, told: str) -> None:
    with pytest.raises(MalformedError) as refused:
        READERS[ExportTraceServiceRequest].to_protobuf(body)
    assert str(refused.value).startswith("the body is not an ExportTraceServiceRequest in JSON: ")
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400
