"""OTLP requests become frames, events and spans that say the same."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import ExponentialHistogram, Gauge, Metric
from opentelemetry.proto.resource.v1.resource_pb2 import Resource

from gradwatch import conventions as c
from gradwatch_collector.otlp.attributes import source_of
from gradwatch_collector.otlp.errors import MalformedError
from gradwatch_collector.otlp.logs import decode_logs
from gradwatch_collector.otlp.metrics import MetricsDecoder
from gradwatch_collector.otlp.traces import decode_traces
from gradwatch_collector.records import Frame
from gradwatch_collector.storage import packed

Sample = tuple[str, str, int, Any]  # field, layer, time, value


def string(name: str, value: str) -> KeyValue:
    return KeyValue(key=name, value=AnyValue(string_value=value))


def request(*metrics: Metric, resource: Iterable[KeyValue] = ()) -> bytes:
    message = ExportMetricsServiceRequest()
    owner = message.resource_metrics.add()
    owner.resource.attributes.extend(resource)
    owner.scope_metrics.add().metrics.extend(metrics)
    encoded: bytes = message.SerializeToString()
    return encoded


def gauge(points: Sequence[tuple[str, int, float | int]], name: str = "norm") -> Metric:
    metric = Metric(name=name, unit="1")
    for layer, time, value in points:
        point = metric.gauge.data_points.add(time_unix_nano=time, attributes=[string(c.LAYER_NAME, layer)])
        if isinstance(value, int):
            point.as_int = value
        else:
            point.as_double = value
    return metric


def samples(frames: Iterable[Frame]) -> list[Sample]:
    return sorted(
        (frame.field, point[c.LAYER_NAME], int(time), frame.values[row, column].item())
        for frame in frames
        if frame.values is not None
        for row, point in enumerate(frame.attribute_set.points)
        for column, time in enumerate(frame.times)
    )


def decode(*metrics: Metric) -> Sequence[Frame]:
    return MetricsDecoder().decode(request(*metrics)).batches[0].frames


def test_layers_of_one_time_become_one_frame_over_their_set() -> None:
    (frame,) = decode(gauge([("a", 5, 1.5), ("b", 5, 2.5)]))
    assert [point[c.LAYER_NAME] for point in frame.attribute_set.points] == ["a", "b"]
    assert frame.times.tolist() == [5]
    assert frame.values is not None
    assert frame.values.tolist() == [[1.5], [2.5]]
    assert (frame.metric.name, frame.metric.unit, frame.metric.kind, frame.field) == (
        "norm",
        "1",
        "gauge",
        "value",
    )


def test_many_times_of_one_point_become_one_frame() -> None:
    (frame,) = decode(gauge([("a", 7, 3.0), ("a", 5, 1.0), ("a", 6, 2.0)]))
    assert (frame.attribute_set.width, frame.times.tolist()) == (1, [5, 6, 7])
    assert frame.values is not None
    assert frame.values.tolist() == [[1.0, 2.0, 3.0]]


def test_layers_over_several_times_become_one_frame_when_all_are_there() -> None:
    (frame,) = decode(gauge([(layer, time, time * 10.0) for time in (1, 2) for layer in "ab"]))
    assert frame.values is not None
    assert frame.values.tolist() == [[10.0, 20.0], [10.0, 20.0]]


POINTS = st.lists(
    st.tuples(
        st.sampled_from("abc"), st.integers(1, 5), st.one_of(st.floats(allow_nan=False), st.integers(-9, 9))
    ),
    min_size=1,
    max_size=30,
)


@given(st.lists(POINTS, min_size=1, max_size=4))
def test_any_points_come_out_as_they_went_in_the_first_of_equals_counting(requests: list[Any]) -> None:
    decoder = MetricsDecoder()
    for points in requests + requests:  # the second round meets remembered layouts
        decoded = decoder.decode(request(gauge(points)))
        assert (decoded.rejected, decoded.batches[0].datapoints) == (0, len(points))
        # Integers and floats are kept apart, so each kind counts its own first.
        first: dict[Any, Any] = {}
        for layer, time, value in points:
            first.setdefault((layer, time, type(value)), value)
        expected = sorted(("value", layer, time, value) for (layer, time, _), value in first.items())
        assert samples(decoded.batches[0].frames) == expected


def test_requests_that_differ_only_in_attributes_of_equal_length_are_told_apart() -> None:
    decoder = MetricsDecoder()
    for layer in ("aa", "bb", "aa", "cc"):
        frames = decoder.decode(request(gauge([(layer, 1, 1.0)]))).batches[0].frames
        assert samples(frames) == [("value", layer, 1, 1.0)]


def test_points_cut_differently_from_the_same_bytes_are_told_apart() -> None:
    decoder = MetricsDecoder()
    for points in ([("a", 1, 1.0), ("bbb", 1, 2.0)], [("aaa", 1, 1.0), ("b", 1, 2.0)]):
        frames = decoder.decode(request(gauge(points))).batches[0].frames
        assert samples(frames) == [("value", *point) for point in points]


def test_nan_and_infinities_are_kept() -> None:
    (frame,) = decode(gauge([("a", 1, math.nan), ("b", 1, math.inf), ("c", 1, -math.inf)]))
    np.testing.assert_array_equal(frame.values, [[math.nan], [math.inf], [-math.inf]])


def test_sums_carry_their_temporality() -> None:
    metric = Metric(name="steps")
    metric.sum.aggregation_temporality, metric.sum.is_monotonic = 1, True
    metric.sum.data_points.add(time_unix_nano=3, as_int=4)
    (frame,) = decode(metric)
    assert (frame.metric.kind, frame.metric.temporality, frame.metric.monotonic) == ("sum", 1, True)
    assert frame.values is not None
    assert frame.values.dtype == np.int64


def histogram(minimum: float | None = 0.5) -> Metric:
    metric = Metric(name="layer.norm")
    metric.exponential_histogram.aggregation_temporality = 1
    for layer in "ab":
        point = metric.exponential_histogram.data_points.add(
            time_unix_nano=9, count=3, sum=4.5, scale=3, attributes=[string(c.LAYER_NAME, layer)]
        )
        point.positive.offset = ord(layer)
        point.positive.bucket_counts.extend([1, 0, 2])
        if minimum is not None:
            point.min = minimum
    return metric


def test_an_exponential_histogram_is_its_fields_and_packed_buckets() -> None:
    frames = {frame.field: frame for frame in decode(histogram())}
    assert set(frames) == {"count", "sum", "min", "buckets"}
    assert samples([frames["count"], frames["sum"]]) == [
        ("count", "a", 9, 3),
        ("count", "b", 9, 3),
        ("sum", "a", 9, 4.5),
        ("sum", "b", 9, 4.5),
    ]
    assert frames["buckets"].packed is not None
    buckets = ExponentialHistogram.FromString(frames["buckets"].packed[0])
    assert [(point.scale, point.positive.offset) for point in buckets.data_points] == [(3, 97), (3, 98)]
    assert [list(point.positive.bucket_counts) for point in buckets.data_points] == [[1, 0, 2]] * 2
    assert not any(point.attributes or point.time_unix_nano or point.count for point in buckets.data_points)


def test_explicit_histograms_and_summaries_are_understood() -> None:
    explicit = Metric(name="explicit")
    explicit.histogram.data_points.add(
        time_unix_nano=1, count=2, sum=3, bucket_counts=[1, 1], explicit_bounds=[5]
    )
    summary = Metric(name="summary")
    summary.summary.data_points.add(time_unix_nano=1, count=2, sum=3).quantile_values.add(quantile=0.5, value=7)
    assert [(frame.metric.kind, frame.field) for frame in decode(explicit, summary)] == [
        ("histogram", "count"),
        ("histogram", "sum"),
        ("histogram", "buckets"),
        ("summary", "count"),
        ("summary", "sum"),
        ("summary", "quantiles"),
    ]


def with_exemplars(metric: Metric) -> Metric:
    data = getattr(metric, metric.WhichOneof("data"))
    data.data_points[-1].exemplars.add(time_unix_nano=8, as_int=3, trace_id=b"\x01" * 16)
    return metric


@pytest.mark.parametrize("metric", [gauge([("a", 9, 1.0), ("b", 9, 2.0)]), histogram()])
def test_exemplars_are_a_packed_field_of_their_own(metric: Metric) -> None:
    plain, told = decode(metric), decode(with_exemplars(metric))
    (frame,) = [frame for frame in told if frame.field == packed.EXEMPLARS]
    assert [each.field for each in plain] == [each.field for each in told if each is not frame]
    assert samples(plain) == samples(told)
    assert frame.times.tolist() == [9]
    assert frame.packed is not None
    first, second = Gauge.FromString(frame.packed[0]).data_points
    assert not first.exemplars
    (exemplar,) = second.exemplars
    assert (exemplar.time_unix_nano, exemplar.as_int, exemplar.trace_id) == (8, 3, b"\x01" * 16)
    assert not second.attributes


def test_times_without_exemplars_have_no_place_among_them() -> None:
    metric = gauge([("a", 5, 1.0), ("a", 6, 2.0), ("a", 7, 3.0)])
    metric.gauge.data_points[1].exemplars.add(as_double=1.0)
    (frame,) = [frame for frame in decode(metric) if frame.field == packed.EXEMPLARS]
    assert frame.times.tolist() == [6]


def test_points_with_exemplars_are_read_by_a_remembered_layout() -> None:
    decoder = MetricsDecoder()
    for time in range(1, 6):
        decoder.decode(request(with_exemplars(gauge([("a", time, 1.0), ("b", time, 2.0)]))))
    (layouts,) = decoder._layouts._layouts.values()
    assert len(layouts) == 1


def test_points_that_cannot_be_stored_are_counted_and_the_others_kept() -> None:
    metric = gauge([("a", 1, 1.0), ("late", 2**63, 1.0), ("never", 0, 1.0)])
    metric.gauge.data_points.add(time_unix_nano=1)
    unnamed = gauge([("a", 1, 1.0)], name="")
    nothing_recorded = Metric(name="stale")
    nothing_recorded.gauge.data_points.add(time_unix_nano=1, flags=1)
    decoded = MetricsDecoder().decode(request(metric, unnamed, nothing_recorded))
    assert (decoded.rejected, decoded.batches[0].datapoints) == (4, 1)
    assert samples(decoded.batches[0].frames) == [("value", "a", 1, 1.0)]


def test_every_kind_of_attribute_value_is_kept() -> None:
    resource = Resource()
    values: dict[str, Any] = {
        "string": AnyValue(string_value="nul\0"),
        "bool": AnyValue(bool_value=True),
        "int": AnyValue(int_value=-(2**63)),
        "double": AnyValue(double_value=0.5),
        "nan": AnyValue(double_value=math.nan),
        "bytes": AnyValue(bytes_value=b"\xff\x00"),
        "nothing": AnyValue(),
    }
    values["array"] = AnyValue()
    values["array"].array_value.values.extend([AnyValue(int_value=1), AnyValue(string_value="x")])
    values["map"] = AnyValue()
    values["map"].kvlist_value.values.add(key="inner", value=AnyValue(double_value=-math.inf))
    for name, value in values.items():
        resource.attributes.add(key=name, value=value)
    assert source_of(resource).resource == {
        "string": "nul\N{REPLACEMENT CHARACTER}",
        "bool": True,
        "int": -(2**63),
        "double": 0.5,
        "nan": "NaN",
        "bytes": "/wA=",
        "nothing": None,
        "array": [1, "x"],
        "map": {"inner": "-Infinity"},
    }


def test_identity_accepts_numeric_strings() -> None:
    source = source_of(
        Resource(
            attributes=[
                string(c.RUN_ID, "r"),
                string(c.RUN_ATTEMPT, "2"),
                string(c.RANK, "7"),
                string(c.SERVICE_INSTANCE_ID, "i"),
            ]
        )
    )
    assert (source.run_id, source.attempt, source.rank, source.instance) == ("r", 2, 7, "i")


def test_telemetry_without_a_run_gets_a_digest_of_its_resource() -> None:
    one, same, other = (
        source_of(Resource(attributes=[string("service.name", name)])).run_id for name in ("x", "x", "y")
    )
    assert one == same != other
    assert one.startswith("resource-")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (c.RANK, "first", "training.rank must be an integer from 0, not 'first'"),
        (c.RANK, "-1", "training.rank must be an integer from 0"),
        (c.RUN_ATTEMPT, "0", "training.run.attempt must be an integer from 1"),
        (c.RUN_ATTEMPT, "9" * 5000, "training.run.attempt must be an integer from 1"),
        (c.RUN_ID, "x" * 257, "training.run.id is longer than 256 characters"),
    ],
)
def test_an_impossible_identity_is_refused(name: str, value: str, message: str) -> None:
    with pytest.raises(MalformedError, match=message):
        source_of(Resource(attributes=[string(name, value)]))


def log_request(**fields: Any) -> bytes:
    message = ExportLogsServiceRequest()
    message.resource_logs.add().scope_logs.add().log_records.add(**fields)
    encoded: bytes = message.SerializeToString()
    return encoded


def test_a_log_record_becomes_an_event_with_its_number() -> None:
    counted = KeyValue(key=c.EVENT_SEQUENCE, value=AnyValue(int_value=4))
    encoded = log_request(
        event_name="training.nonfinite", time_unix_nano=5, severity_number=17, attributes=[counted]
    )
    (event,) = decode_logs(encoded, 99).batches[0].events
    assert (event.name, event.time, event.sequence, event.severity) == ("training.nonfinite", 5, 4, 17)


def sequences(encoded: bytes, received_at: int = 1) -> list[int]:
    return [event.sequence for event in decode_logs(encoded, received_at).batches[0].events]


@pytest.mark.parametrize("told", [AnyValue(double_value=1e22), AnyValue(double_value=-1e300)])
def test_a_number_that_no_database_can_hold_counts_nothing(told: AnyValue) -> None:
    counted = KeyValue(key=c.EVENT_SEQUENCE, value=told)
    (sequence,) = sequences(log_request(time_unix_nano=5, attributes=[counted]))
    assert abs(sequence) < 2**63


def test_a_record_nobody_counted_is_keyed_by_its_contents() -> None:
    def number(text: str, received_at: int) -> int:
        (found,) = sequences(log_request(body=AnyValue(string_value=text), time_unix_nano=5), received_at)
        return found

    assert number("x", 1) == number("x", 2) != number("y", 1)
    assert number("x", 1) < 0


@pytest.mark.parametrize(
    "told",
    [
        {"trace_id": b"\x01" * 16},
        {"span_id": b"\x01" * 8},
        {"severity_text": "warn"},
        {"observed_time_unix_nano": 6},
        {"body": AnyValue(bytes_value=b"abc")},
    ],
)
def test_records_are_told_apart_by_whatever_they_say(told: dict[str, Any]) -> None:
    plain: dict[str, Any] = {"time_unix_nano": 5, "body": AnyValue(string_value="YWJj")}
    assert sequences(log_request(**plain)) != sequences(log_request(**{**plain, **told}))


def test_records_are_told_apart_by_their_scope() -> None:
    message = ExportLogsServiceRequest()
    owner = message.resource_logs.add()
    for name in ("one", "other"):
        scope = owner.scope_logs.add()
        scope.scope.name = name
        scope.log_records.add(time_unix_nano=5)
    assert len(set(sequences(message.SerializeToString()))) == 2


def test_equal_records_of_a_request_are_as_many_and_the_same_when_it_comes_again() -> None:
    message = ExportLogsServiceRequest()
    for _ in range(2):  # as something in between does that joins requests
        records = message.resource_logs.add().scope_logs.add().log_records
        for _ in range(2):
            records.add(time_unix_nano=5, body=AnyValue(string_value="x"))

    def numbers(received_at: int) -> list[int]:
        decoded = decode_logs(message.SerializeToString(), received_at)
        return [event.sequence for batch in decoded.batches for event in batch.events]

    assert len(set(numbers(1))) == 4
    assert numbers(1) == numbers(2)


def test_a_record_without_a_time_is_a_new_one_whenever_it_comes() -> None:
    encoded = log_request(body=AnyValue(string_value="x"))
    (event,) = decode_logs(encoded, 99).batches[0].events
    assert (event.time, event.body) == (99, "x")
    assert sequences(encoded, 1) != sequences(encoded, 2)


def test_a_span_keeps_its_ids_and_a_bad_one_is_counted() -> None:
    message = ExportTraceServiceRequest()
    spans = message.resource_spans.add().scope_spans.add().spans
    good = spans.add(trace_id=b"\x01" * 16, span_id=b"\x02" * 8, name="step", kind=1, start_time_unix_nano=3)
    good.events.add(name="oom", time_unix_nano=4)
    spans.add(trace_id=b"\x01" * 16, span_id=b"short")
    spans.add(trace_id=bytes(16), span_id=b"\x02" * 8)
    decoded = decode_traces(message.SerializeToString())
    (span,) = decoded.batches[0].spans
    assert (span.trace_id, span.span_id, span.parent_span_id) == ("01" * 16, "02" * 8, None)
    assert span.events == [{"name": "oom", "time": 4, "attributes": {}}]
    assert decoded.rejected == 2


def decode_metrics(body: bytes) -> Any:
    return MetricsDecoder().decode(body)


@pytest.mark.parametrize("decoder", [decode_metrics, lambda body: decode_logs(body, 1), decode_traces])
@pytest.mark.parametrize("body", [b"\xff", b"\x0a\x05\x0a\xff\xff\xff\xff", b"not protobuf at all"])
def test_a_malformed_body_is_one_clear_line(decoder: Callable[[bytes], Any], body: bytes) -> None:
    with pytest.raises(MalformedError, match="the body is not an encoded Export"):
        decoder(body)


@given(st.binary(max_size=200))
def test_no_body_makes_a_decoder_fail_in_any_other_way(body: bytes) -> None:
    for decoder in (decode_metrics, lambda b: decode_logs(b, 1), decode_traces):
        with contextlib.suppress(MalformedError):
            decoder(body)


@given(st.integers(0, 400), st.integers(0, 255))
def test_no_damage_to_a_request_makes_the_decoder_fail_in_any_other_way(place: int, byte: int) -> None:
    damaged = bytearray(
        request(gauge([("a", 5, 1.5), ("b", 5, 2)]), histogram(), resource=[string(c.RUN_ID, "r")])
    )
    damaged[place % len(damaged)] = byte
    with contextlib.suppress(MalformedError):
        decode_metrics(bytes(damaged))
