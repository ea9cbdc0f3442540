"""What OTLP promises of data, row by row of docs/otlp.md, on a running collector, whatever carries it."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality, Exemplar, Metric
from sqlalchemy import select

from gradwatch import conventions as c
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage import schema
from tests.collector_process import Collector
from tests.metric_views import metrics, points, series
from tests.otlp_clients import Answer, Client, any_value, attributes, gauge, metrics_request

SECOND = 1_000_000_000
START = 1_750_000_000 * SECOND
MOMENT = "2025-06-15T15:06:40.000000000Z"
OK = Answer(0)
FULL = {"exemplars": [], "nonfinite": None, "time": MOMENT}


@pytest.fixture
def run_id() -> str:
    return f"run-{uuid4().hex}"


def of(run_id: str, *sent: Metric) -> ExportMetricsServiceRequest:
    return metrics_request({c.RUN_ID: run_id, c.SERVICE_NAME: "conformance"}, *sent)


def test_what_is_acknowledged_can_be_read_at_once(served: Collector, client: Client, run_id: str) -> None:
    assert client.send(of(run_id, gauge("norm", (START, 1.5)))) == OK
    assert points(served, run_id, "norm") == [{**FULL, "value": 1.5}]


def test_a_request_may_be_compressed(served: Collector, client: Client, run_id: str) -> None:
    # Long enough for gRPC to find that it pays.
    request = of(run_id, gauge("norm", *((START + i, float(i)) for i in range(500))))
    assert client.send(request, compress=True) == OK
    assert [point["value"] for point in points(served, run_id, "norm")] == list(range(499, -1, -1))


def gauge_of_floats(metric: Metric) -> None:
    metric.gauge.data_points.add(time_unix_nano=START, as_double=0.1)


def gauge_of_integers(metric: Metric) -> None:
    metric.gauge.data_points.add(time_unix_nano=START, as_int=2**63 - 1)


def delta_sum(metric: Metric) -> None:
    metric.sum.aggregation_temporality = AggregationTemporality.AGGREGATION_TEMPORALITY_DELTA
    metric.sum.data_points.add(start_time_unix_nano=START - 1, time_unix_nano=START, as_int=-3)


def cumulative_sum(metric: Metric) -> None:
    metric.sum.aggregation_temporality = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
    metric.sum.is_monotonic = True
    metric.sum.data_points.add(start_time_unix_nano=1, time_unix_nano=START, as_double=7.25)


def histogram(metric: Metric) -> None:
    metric.histogram.aggregation_temporality = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
    metric.histogram.data_points.add(
        time_unix_nano=START,
        count=6,
        sum=9.5,
        min=0.5,
        max=4.0,
        bucket_counts=[1, 2, 3],
        explicit_bounds=[1, 2],
    )


def histogram_without_options(metric: Metric) -> None:
    metric.histogram.aggregation_temporality = AggregationTemporality.AGGREGATION_TEMPORALITY_DELTA
    metric.histogram.data_points.add(time_unix_nano=START, count=2)


def exponential_histogram(metric: Metric) -> None:
    metric.exponential_histogram.aggregation_temporality = AggregationTemporality.AGGREGATION_TEMPORALITY_DELTA
    point = metric.exponential_histogram.data_points.add(
        time_unix_nano=START, count=7, sum=-2.5, min=-4, max=3, scale=-2, zero_count=1, zero_threshold=0.001
    )
    point.positive.offset, point.negative.offset = -3, 5
    point.positive.bucket_counts.extend([1, 0, 2])
    point.negative.bucket_counts.extend([3])


def summary(metric: Metric) -> None:
    point = metric.summary.data_points.add(time_unix_nano=START, count=3, sum=6)
    point.quantile_values.add(quantile=0.5, value=2)
    point.quantile_values.add(quantile=0.99, value=math.nan)


_BUCKETS = {"count": 7, "sum": -2.5, "min": -4, "max": 3, "scale": -2, "zero_count": 1, "zero_threshold": 0.001}
_HISTOGRAM = {
    "count": 6,
    "sum": 9.5,
    "min": 0.5,
    "max": 4,
    "bucket_counts": [1, 2, 3],
    "explicit_bounds": [1, 2],
}
_BARE = {"count": 2, "sum": None, "min": None, "max": None, "bucket_counts": [], "explicit_bounds": []}
_EXPONENTIAL = {
    **_BUCKETS,
    "positive": {"offset": -3, "bucket_counts": [1, 0, 2]},
    "negative": {"offset": 5, "bucket_counts": [3]},
}
_QUANTILES = [
    {"quantile": 0.5, "value": 2, "nonfinite": None},
    {"quantile": 0.99, "value": None, "nonfinite": {"value": "NaN"}},
]


@pytest.mark.parametrize(
    ("fill", "identity", "point"),
    [
        (gauge_of_floats, ("gauge", None, False), {"value": 0.1}),
        (gauge_of_integers, ("gauge", None, False), {"value": 2**63 - 1}),
        (delta_sum, ("sum", "delta", False), {"value": -3}),
        (cumulative_sum, ("sum", "cumulative", True), {"value": 7.25}),
        (histogram, ("histogram", "cumulative", False), _HISTOGRAM),
        (histogram_without_options, ("histogram", "delta", False), _BARE),
        (exponential_histogram, ("exponential_histogram", "delta", False), _EXPONENTIAL),
        (summary, ("summary", None, False), {"count": 3, "sum": 6, "quantiles": _QUANTILES}),
    ],
)
def test_every_kind_of_metric_comes_back_as_it_was_sent(
    served: Collector,
    client: Client,
    run_id: str,
    fill: Callable[[Metric], None],
    identity: tuple[str, str | None, bool],
    point: dict[str, Any],
) -> None:
    metric = Metric(name="measured", unit="By/s")
    fill(metric)
    assert client.send(of(run_id, metric)) == OK
    (found,) = series(served, run_id, "measured")
    kind, temporality, monotonic = identity
    assert found["metric"] == {
        "name": "measured",
        "unit": "By/s",
        "kind": kind,
        "temporality": temporality,
        "monotonic": monotonic,
    }
    assert found["points"] == [{**FULL, **point}]


def test_metrics_of_one_name_that_differ_otherwise_stay_apart(
    served: Collector, client: Client, run_id: str
) -> None:
    seconds, bytes_ = Metric(name="size", unit="s"), Metric(name="size", unit="By")
    seconds.gauge.data_points.add(time_unix_nano=START, as_int=1)
    bytes_.sum.data_points.add(time_unix_nano=START, as_int=2)
    assert client.send(of(run_id, seconds, bytes_)) == OK
    found = {each["metric"]["unit"]: each["points"][0]["value"] for each in series(served, run_id, "size")}
    assert found == {"s": 1, "By": 2}


def test_points_of_two_scopes_stay_apart(served: Collector, client: Client, run_id: str) -> None:
    latency = Metric(name="latency")
    histogram(latency)
    request = of(run_id)
    scopes = (("", ""), (c.SCOPE_NAME, "1"), ("net", ""), ("net", "2"), ("", "2"))
    for value, (name, version) in enumerate(scopes):
        told = request.resource_metrics[0].scope_metrics.add()
        told.scope.name, told.scope.version = name, version
        latency.histogram.data_points[0].count = value
        told.metrics.extend([gauge("requests", (START, float(value))), latency])
    assert client.send(request) == OK
    for metric, field in (("requests", "value"), ("latency", "count")):
        found = {
            (each["labels"].get("otel.scope.name"), each["labels"].get("otel.scope.version")): point[field]
            for each in series(served, run_id, metric)
            for point in each["points"]
        }
        # Our own scope and none are one: of two values the first counts.
        assert found == {(None, None): 0, ("net", None): 2, ("net", "2"): 3, (None, "2"): 4}


def test_points_of_scopes_that_differ_in_an_attribute_stay_apart(
    served: Collector, client: Client, run_id: str
) -> None:
    latency = Metric(name="latency")
    histogram(latency)
    request = of(run_id)
    long = "x" * 300
    for value, told in enumerate(
        ({}, {"shard": 1}, {"shard": 2}, {"shard": long + "a"}, {"shard": long + "b"})
    ):
        scope = request.resource_metrics[0].scope_metrics.add()
        scope.scope.name = "net"
        scope.scope.attributes.extend(attributes({"name": "another", **told}))
        latency.histogram.data_points[0].count = value
        scope.metrics.extend([gauge("requests", (START, float(value))), latency])
    assert client.send(request) == OK
    for metric, field in (("requests", "value"), ("latency", "count")):
        found = {
            point[field]: each["labels"] for each in series(served, run_id, metric) for point in each["points"]
        }
        assert {labels["otel.scope.name"] for labels in found.values()} == {"net"}
        shards = [found[value].get("otel.scope.shard") for value in range(5)]
        assert shards[:3] == [None, 1, 2]
        # Of what is long there is a digest.
        assert {len(shard) for shard in shards[3:]} == {32}
        assert shards[3] != shards[4]


def test_nan_and_infinities_are_kept_apart_from_numbers(served: Collector, client: Client, run_id: str) -> None:
    values = (math.nan, math.inf, -math.inf, 0.0, -0.0)
    assert client.send(of(run_id, gauge("norm", *((START + i, v) for i, v in enumerate(values))))) == OK
    found = points(served, run_id, "norm")[::-1]
    assert [point["value"] for point in found] == [None, None, None, 0.0, -0.0]
    flags = [point["nonfinite"] for point in found]
    assert flags == [{"value": "NaN"}, {"value": "Infinity"}, {"value": "-Infinity"}, None, None]


def test_the_sum_of_a_histogram_may_be_no_number(served: Collector, client: Client, run_id: str) -> None:
    metric = Metric(name="norms")
    metric.histogram.data_points.add(time_unix_nano=START, count=1, sum=math.nan, min=-math.inf, max=math.inf)
    assert client.send(of(run_id, metric)) == OK
    (point,) = points(served, run_id, "norms")
    assert (point["sum"], point["min"], point["max"]) == (None, None, None)
    assert point["nonfinite"] == {"sum": "NaN", "min": "-Infinity", "max": "Infinity"}


@pytest.mark.parametrize("kind", ["histogram", "exponential_histogram"])
def test_what_a_histogram_does_not_say_is_not_what_it_says_is_no_number(
    served: Collector, client: Client, run_id: str, kind: str
) -> None:
    metric = Metric(name="norms")
    held = getattr(metric, kind).data_points
    for label, told in (
        ("all", {"sum": 1.0, "min": 0.0, "max": 1.0}),
        ("nan", {"sum": math.nan, "max": math.nan}),
        ("none", {}),
    ):
        held.add(time_unix_nano=START, count=1, attributes=attributes({"label": label}), **told)
    assert client.send(of(run_id, metric)) == OK
    found = {each["labels"]["label"]: each["points"][0] for each in series(served, run_id, "norms")}
    shown = {
        label: ([point["sum"], point["min"], point["max"]], point["nonfinite"])
        for label, point in found.items()
    }
    assert shown == {
        "all": ([1.0, 0.0, 1.0], None),
        "nan": ([None, None, None], {"sum": "NaN", "max": "NaN"}),
        "none": ([None, None, None], None),
    }


VALUES: dict[str, Any] = {
    "string": "ünï",
    "empty": "",
    "bool": True,
    "int": -(2**63),
    "double": 0.1,
    "bytes": b"\xff\x00",
    "array": [1, "x", None, [2.5]],
    "map": {"inner": {"bytes": b"\x01", "flag": False}},
    "nothing": None,
}
AS_JSON: dict[str, Any] = {
    **VALUES,
    "bytes": "/wA=",
    "map": {"inner": {"bytes": "AQ==", "flag": False}},
}


def test_every_kind_of_attribute_value_comes_back(served: Collector, client: Client, run_id: str) -> None:
    request = metrics_request({c.RUN_ID: run_id, **VALUES}, gauge("norm", (START, 1.0), **VALUES))
    assert client.send(request) == OK
    (found,) = series(served, run_id, "norm")
    assert found["labels"] == AS_JSON
    (listed,) = metrics(served, run=run_id)
    assert listed["sources"][0]["resource"] == {c.RUN_ID: run_id, **AS_JSON}


def test_points_are_told_apart_by_any_attribute(served: Collector, client: Client, run_id: str) -> None:
    sent = [gauge("norm", (START, float(i)), label=value) for i, value in enumerate(VALUES.values())]
    assert client.send(of(run_id, *sent)) == OK
    assert len(series(served, run_id, "norm")) == len(sent)


@pytest.mark.parametrize("kind", ["gauge", "sum", "histogram", "exponential_histogram"])
def test_exemplars_are_kept_with_their_points(
    served: Collector, client: Client, run_id: str, kind: str
) -> None:
    metric = Metric(name="latency")
    held = getattr(metric, kind).data_points
    number = {"as_double": 1.0} if kind in ("gauge", "sum") else {"count": 1}
    for label in ("with", "without"):
        held.add(time_unix_nano=START, attributes=attributes({"label": label}), **number)
    held[0].exemplars.extend(
        [
            Exemplar(
                time_unix_nano=START - SECOND,
                as_double=math.inf,
                trace_id=bytes(range(16)),
                span_id=bytes(range(8)),
                filtered_attributes=attributes({"user": "x"}),
            ),
            Exemplar(time_unix_nano=START, as_int=4),
        ]
    )
    assert client.send(of(run_id, metric)) == OK
    found = {
        each["labels"]["label"]: each["points"][0]["exemplars"] for each in series(served, run_id, "latency")
    }
    assert found == {
        "without": [],
        "with": [
            {
                "time": "2025-06-15T15:06:39.000000000Z",
                "value": None,
                "nonfinite": {"value": "Infinity"},
                "trace_id": "000102030405060708090a0b0c0d0e0f",
                "span_id": "0001020304050607",
                "labels": {"user": "x"},
            },
            {"time": MOMENT, "value": 4, "nonfinite": None, "trace_id": None, "span_id": None, "labels": {}},
        ],
    }


def test_timestamps_in_the_far_past_and_future_are_kept(served: Collector, client: Client, run_id: str) -> None:
    times = (1, 86_400 * SECOND, START, 4_000_000_000 * SECOND, 2**63 - 1)
    for time in times:
        assert client.send(of(run_id, gauge("norm", (time, 1.0)))) == OK
    assert [point["time"] for point in points(served, run_id, "norm")] == [
        "2262-04-11T23:47:16.854775807Z",
        "2096-10-02T07:06:40.000000000Z",
        MOMENT,
        "1970-01-02T00:00:00.000000000Z",
        "1970-01-01T00:00:00.000000001Z",
    ]


def test_points_that_cannot_be_stored_are_told_and_the_others_kept(
    served: Collector, client: Client, run_id: str
) -> None:
    without_value = Metric(name="norm")
    without_value.gauge.data_points.add(time_unix_nano=START)
    never, too_late = gauge("norm", (0, 1.0)), gauge("norm", (2**63, 1.0))
    unnamed = gauge("", (START, 1.0), (START + 1, 1.0))
    answer = client.send(of(run_id, never, gauge("norm", (START, 1.5)), too_late, without_value, unnamed))
    assert (answer.code, answer.rejected) == (0, 5)
    assert answer.message == "not stored: points without a usable metric name, time or value"
    assert [point["value"] for point in points(served, run_id, "norm")] == [1.5]


def test_a_point_that_says_there_is_no_value_is_no_mistake(
    served: Collector, client: Client, run_id: str
) -> None:
    stale = Metric(name="norm")
    stale.gauge.data_points.add(time_unix_nano=START + 1, flags=1)
    assert client.send(of(run_id, gauge("norm", (START, 1.5)), stale)) == OK
    assert [point["time"] for point in points(served, run_id, "norm")] == [MOMENT]


def test_log_records_that_cannot_be_stored_are_told_and_the_others_kept(client: Client, run_id: str) -> None:
    request = ExportLogsServiceRequest()
    owner = request.resource_logs.add()
    owner.resource.attributes.extend(attributes({c.RUN_ID: run_id}))
    records = owner.scope_logs.add().log_records
    records.add(time_unix_nano=START, body=any_value("kept"))
    records.add(time_unix_nano=2**63, body=any_value("too late"))
    records.add(time_unix_nano=START, event_name="x" * 256)
    answer = client.send(request)
    assert (answer.code, answer.rejected) == (0, 2)
    assert "time after 2262" in answer.message


def test_equal_log_records_are_stored_one_by_one_and_a_request_sent_again_only_once(
    served: Collector, client: Client, run_id: str
) -> None:
    request = ExportLogsServiceRequest()
    owner = request.resource_logs.add()
    owner.resource.attributes.extend(attributes({c.RUN_ID: run_id}))
    records = owner.scope_logs.add().log_records
    for number in (1, 1, 2):
        records.add(time_unix_nano=START, body=any_value("retrying"), span_id=bytes([number] * 8))
    assert client.send(request) == client.send(request) == OK
    engine = db.connect(served.database)
    with engine.connect() as connection:
        stored = connection.scalars(select(schema.event.c.body).where(schema.event.c.run_id == run_id)).all()
    engine.dispose()
    assert stored == ["retrying"] * 3


def test_spans_that_cannot_be_stored_are_told_and_the_others_kept(client: Client, run_id: str) -> None:
    request = ExportTraceServiceRequest()
    owner = request.resource_spans.add()
    owner.resource.attributes.extend(attributes({c.RUN_ID: run_id}))
    spans = owner.scope_spans.add().spans
    spans.add(trace_id=uuid4().bytes, span_id=b"\1" * 8, name="kept")
    spans.add(trace_id=bytes(16), span_id=b"\1" * 8, name="no id")
    spans.add(trace_id=uuid4().bytes, span_id=b"\1", name="short id")
    answer = client.send(request)
    assert (answer.code, answer.rejected) == (0, 2)
    assert "spans without a valid id" in answer.message


def test_events_and_spans_are_stored(served: Collector, client: Client, run_id: str) -> None:
    resource = attributes({c.RUN_ID: run_id, c.SERVICE_NAME: "conformance"})
    logs = ExportLogsServiceRequest()
    owner = logs.resource_logs.add()
    owner.resource.attributes.extend(resource)
    owner.scope_logs.add().log_records.add(
        event_name=c.RUN_STARTED.name,
        time_unix_nano=START,
        severity_number=9,
        body=any_value({"nested": [1, b"\x00"]}),
        attributes=attributes(VALUES),
    )
    traces = ExportTraceServiceRequest()
    of_spans = traces.resource_spans.add()
    of_spans.resource.attributes.extend(resource)
    trace_id = uuid4().bytes
    span = of_spans.scope_spans.add().spans.add(
        trace_id=trace_id,
        span_id=b"\xab" * 8,
        parent_span_id=b"\xcd" * 8,
        name="epoch",
        kind=2,
        start_time_unix_nano=START,
        end_time_unix_nano=START + SECOND,
        attributes=attributes(VALUES),
    )
    span.status.code = 2
    span.events.add(name="oom", time_unix_nano=START, attributes=attributes({"n": 1}))
    assert client.send(logs) == client.send(traces) == OK
    (event,) = served.show(run_id)["events"]
    assert (event["name"], event["attributes"]) == (c.RUN_STARTED.name, AS_JSON)
    assert event["body"] == '{"nested": [1, "AA=="]}'
    engine = db.connect(served.database)
    with engine.connect() as connection:
        (stored,) = connection.execute(
            select(schema.span).where(schema.span.c.trace_id == trace_id.hex())
        ).mappings()
    engine.dispose()
    assert (stored["span_id"], stored["parent_span_id"]) == ("ab" * 8, "cd" * 8)
    assert (stored["name"], stored["kind"], stored["status"]) == ("epoch", 2, 2)
    assert stored["attributes"] == AS_JSON
    assert stored["events"] == [{"name": "oom", "time": START, "attributes": {"n": 1}}]


def test_what_is_sent_again_is_stored_once_and_the_first_value_counts(
    served: Collector, client: Client, run_id: str
) -> None:
    for value in (1.0, 1.0, 2.0):
        assert client.send(of(run_id, gauge("norm", (START, value)))) == OK
    assert client.send(of(run_id, gauge("norm", (START, 3.0), (START + SECOND, 4.0), (START, 5.0)))) == OK
    assert [point["value"] for point in points(served, run_id, "norm")] == [4.0, 1.0]


def test_what_arrives_out_of_order_is_read_in_order(served: Collector, client: Client, run_id: str) -> None:
    for second in (3, 1, 4, 0, 2):
        assert client.send(of(run_id, gauge("norm", (START + second * SECOND, float(second))))) == OK
    assert [point["value"] for point in points(served, run_id, "norm")] == [4.0, 3.0, 2.0, 1.0, 0.0]


def test_fields_of_later_versions_are_ignored(served: Collector, client: Client, run_id: str) -> None:
    metric = Metric(name="latency")
    histogram(metric)
    metric.histogram.data_points[0].exemplars.add(time_unix_nano=START, as_int=1, trace_id=b"\1" * 16)
    request = of(run_id, gauge("norm", (START, 1.5), nested={"list": [1]}), metric)
    assert client.post(type(request), client.with_unknown_fields(request)) == OK
    assert points(served, run_id, "norm") == [{**FULL, "value": 1.5}]
    (point,) = points(served, run_id, "latency")
    assert point["bucket_counts"] == [1, 2, 3]
    assert point["exemplars"][0]["trace_id"] == "01" * 16


@pytest.mark.parametrize(
    "request_type", [ExportMetricsServiceRequest, ExportLogsServiceRequest, ExportTraceServiceRequest]
)
def test_an_empty_request_is_a_success(client: Client, request_type: type) -> None:
    assert client.send(request_type()) == OK


def test_a_request_of_empty_messages_is_a_success(client: Client) -> None:
    request = ExportMetricsServiceRequest()
    request.resource_metrics.add().scope_metrics.add().metrics.add(name="nothing").gauge.SetInParent()
    request.resource_metrics[0].scope_metrics[0].metrics.add(name="less")
    assert client.send(request) == OK


def test_many_clients_at_once_lose_nothing(served: Collector, client: Client, run_id: str) -> None:
    def send(worker: int) -> list[Answer]:
        return [
            client.send(of(run_id, gauge("norm", (START + i, float(worker)), worker=worker))) for i in range(10)
        ]

    with ThreadPoolExecutor(16) as pool:
        answers = [answer for told in pool.map(send, range(16)) for answer in told]
    assert answers == [OK] * 160
    found = {each["labels"]["worker"]: len(each["points"]) for each in series(served, run_id, "norm")}
    assert found == dict.fromkeys(range(16), 10)


def test_telemetry_that_is_no_run_is_found_and_is_no_run(served: Collector, client: Client) -> None:
    name, service = f"http.requests.{uuid4().hex}", f"checkout-{uuid4().hex}"
    metric = Metric(name=name, unit="{request}")
    cumulative_sum(metric)
    assert client.send(metrics_request({c.SERVICE_NAME: service, "host.name": "web-1"}, metric)) == OK
    (listed,) = metrics(served, name=name)
    assert (listed["unit"], listed["kind"], listed["monotonic"]) == ("{request}", "sum", True)
    (source,) = listed["sources"]
    assert (source["is_run"], source["job"]) == (False, service)
    assert source["resource"] == {c.SERVICE_NAME: service, "host.name": "web-1"}
    assert points(served, source["run_id"], name) == [{**FULL, "value": 7.25}]
    assert source["run_id"] not in served.runs()
