"""The OTLP receiver over a real socket, in front of a real writer and database."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import requests
from google.rpc.code_pb2 import Code
from google.rpc.status_pb2 import Status
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.metrics.export import (
    Gauge,
    Metric,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine, func, select

from gradwatch import conventions as c
from gradwatch_collector.otlp.errors import RejectedError, UnavailableError
from gradwatch_collector.records import Batch, EventRecord, Received, Source
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.service.ingest import Ingest
from gradwatch_collector.service.instruments import Instruments
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.reading import read_series
from tests.receivers import Gatekeeper, away, running, serving

PROTOBUF = {"Content-Type": "application/x-protobuf"}
START = 1_750_000_000_000_000_000


@pytest.fixture
def address(database: Engine) -> Iterator[str]:
    with (
        running(Ingest(database, Registry())) as ingest,
        serving(ingest, max_body=20_000, max_decompressed=50_000) as url,
    ):
        yield url


def metrics_request(value: float = 1.5, *, run_id: str = "run", time: int = START) -> bytes:
    message = ExportMetricsServiceRequest()
    owner = message.resource_metrics.add()
    owner.resource.attributes.add(key=c.RUN_ID).value.string_value = run_id
    metric = owner.scope_metrics.add().metrics.add(name="norm")
    metric.gauge.data_points.add(time_unix_nano=time, as_double=value)
    encoded: bytes = message.SerializeToString()
    return encoded


def stored(database: Engine) -> list[float]:
    with database.connect() as connection:
        return [
            value
            for point in read_series(connection, "run", "norm")
            for value in np.asarray(point.values).tolist()
        ]


def post(url: str, body: bytes, **headers: str) -> requests.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.post(url, body, headers=PROTOBUF | named, timeout=30)


def test_an_accepted_request_is_committed_when_the_response_arrives(address: str, database: Engine) -> None:
    response = post(f"{address}/v1/metrics", metrics_request())
    assert stored(database) == [1.5]
    assert (response.status_code, response.headers["content-type"]) == (200, "application/x-protobuf")
    # Unset partial_success is how OTLP says that all of it was accepted: the response is empty.
    assert response.content == b""


def test_the_three_signals_are_stored(address: str, database: Engine) -> None:
    logs, traces = ExportLogsServiceRequest(), ExportTraceServiceRequest()
    logs.resource_logs.add().scope_logs.add().log_records.add(
        event_name="training.epoch.ended", time_unix_nano=5
    )
    traces.resource_spans.add().scope_spans.add().spans.add(trace_id=b"\1" * 16, span_id=b"\2" * 8, name="run")
    for path, message in (("logs", logs), ("traces", traces)):
        for _ in range(2):
            assert post(f"{address}/v1/{path}", message.SerializeToString()).status_code == 200
    with database.connect() as connection:
        assert list(connection.scalars(select(schema.event.c.name))) == ["training.epoch.ended"]
        assert list(connection.scalars(select(schema.span.c.name))) == ["run"]


def test_the_opentelemetry_sdk_is_understood(address: str, database: Engine) -> None:
    point = NumberDataPoint({c.LAYER_NAME: "a"}, None, START, float("nan"))
    metric = Metric("norm", "", "", Gauge([point]))
    scope = ScopeMetrics(InstrumentationScope("test"), [metric], "")
    data = MetricsData([ResourceMetrics(Resource({c.RUN_ID: "run"}), [scope], "")])
    exporter = OTLPMetricExporter(f"{address}/v1/metrics")
    assert exporter.export(data) is MetricExportResult.SUCCESS
    exporter.shutdown()
    assert np.isnan(stored(database)).tolist() == [True]


def test_gzip_is_read_in_one_or_several_members(address: str, database: Engine) -> None:
    body = metrics_request()
    members = gzip.compress(body[:10]) + gzip.compress(body[10:])
    assert post(f"{address}/v1/metrics", gzip.compress(body), Content_Encoding="gzip").status_code == 200
    assert post(f"{address}/v1/metrics", members, Content_Encoding="gzip").status_code == 200
    assert stored(database) == [1.5]


def test_a_content_type_may_have_parameters(address: str) -> None:
    parameters = "Application/X-Protobuf; charset=utf-8"
    assert post(f"{address}/v1/metrics", metrics_request(), Content_Type=parameters).status_code == 200


def test_points_that_cannot_be_stored_are_reported_and_the_others_kept(address: str, database: Engine) -> None:
    good, bad = metrics_request(), metrics_request(time=2**63)
    response = post(f"{address}/v1/metrics", good + bad)
    partial = ExportMetricsServiceResponse.FromString(response.content).partial_success
    assert (response.status_code, partial.rejected_data_points) == (200, 1)
    assert "not stored: points without" in partial.error_message
    assert stored(database) == [1.5]


def with_rank(rank: str) -> bytes:
    message = ExportMetricsServiceRequest()
    message.resource_metrics.add().resource.attributes.add(key=c.RANK).value.string_value = rank
    encoded: bytes = message.SerializeToString()
    return encoded


@pytest.mark.parametrize(
    ("body", "headers", "status", "code", "message"),
    [
        (b"\xff", {}, 400, Code.INVALID_ARGUMENT, "the body is not an encoded ExportMetricsServiceRequest"),
        (with_rank("x"), {}, 400, Code.INVALID_ARGUMENT, "training.rank must be an integer from 0, not 'x'"),
        (b"plain", {"Content-Encoding": "gzip"}, 400, Code.INVALID_ARGUMENT, "the body is not gzip"),
        (
            gzip.compress(b"abc", mtime=0)[:-4],
            {"Content-Encoding": "gzip"},
            400,
            Code.INVALID_ARGUMENT,
            "ends too early",
        ),
        (bytes(20_001), {}, 413, Code.RESOURCE_EXHAUSTED, "20001 bytes; the limit is 20000"),
        (
            gzip.compress(bytes(50_001), mtime=0),
            {"Content-Encoding": "gzip"},
            413,
            Code.RESOURCE_EXHAUSTED,
            "50000 bytes",
        ),
        (b"{}", {"Content-Type": "text/json"}, 415, Code.INVALID_ARGUMENT, "'text/json'"),
        (b"", {"Content-Encoding": "zstd"}, 415, Code.INVALID_ARGUMENT, "'zstd'"),
    ],
)
def test_a_bad_request_gets_one_line_in_an_encoded_status(
    address: str, database: Engine, body: bytes, headers: dict[str, str], status: int, code: int, message: str
) -> None:
    response = requests.post(f"{address}/v1/metrics", body, headers=PROTOBUF | headers, timeout=30)
    told = Status.FromString(response.content)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/x-protobuf")
    assert told.code == code
    assert message in told.message
    assert "\n" not in told.message
    assert "Retry-After" not in response.headers
    with database.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(schema.process)) == 0


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(address: str) -> None:
    response = requests.post(f"{address}/v1/metrics", iter([bytes(15_000)] * 2), headers=PROTOBUF, timeout=30)
    assert response.status_code == 413


def test_a_database_that_is_away_is_a_reason_to_try_again(database: Engine) -> None:
    with running(Ingest(database, Registry())) as ingest, serving(ingest) as url:
        with away(database):
            response = post(f"{url}/v1/metrics", metrics_request())
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
        assert Status.FromString(response.content).code == Code.UNAVAILABLE
        assert post(f"{url}/v1/metrics", metrics_request()).status_code == 200
    assert stored(database) == [1.5]


def batch(run_id: str, *events: EventRecord) -> Batch:
    return Batch(Source(run_id, 1, 0, "one", {}), events=events)


def note(attributes: dict[str, Any]) -> EventRecord:
    return EventRecord("note", START, 0, 9, None, attributes)


def test_requests_that_wait_together_are_committed_together(database: Engine) -> None:
    gate = Gatekeeper()
    groups: list[list[Received]] = []
    with running(Ingest(database, gate, on_committed=groups.append)) as ingest:
        waiting = [ingest.put([batch("first")], 1, START)]
        assert gate.entered.wait(30)
        waiting += [ingest.put([batch(name)], 1, START) for name in "abc"]
        gate.leave.set()
        for each in waiting:
            each.result(30)
    assert [[each.key.run_id for each in group] for group in groups] == [["first"], ["a", "b", "c"]]


def test_data_the_database_refuses_does_not_take_its_neighbours_down(database: Engine) -> None:
    gate = Gatekeeper()
    with running(Ingest(database, gate)) as ingest:
        first = ingest.put([batch("first")], 1, START)
        assert gate.entered.wait(30)
        good = ingest.put([batch("good", note({"x": 1}))], 1, START)
        bad = ingest.put([batch("half"), batch("bad", note({"x": object()}))], 1, START)
        after = ingest.put([batch("after", note({"x": 2}))], 1, START)
        gate.leave.set()
        for each in (first, good, after):
            each.result(30)
        with pytest.raises(RejectedError, match=r"\A[^\n]+\Z"):
            bad.result(30)
    with database.connect() as connection:
        runs = set(connection.scalars(select(schema.process.c.run_id)))
    assert runs == {"first", "good", "after"}


def test_what_was_queued_is_committed_before_the_writer_stops(database: Engine) -> None:
    gate = Gatekeeper()
    ingest = Ingest(database, gate)
    ingest.start()
    waiting = [ingest.put([batch(name)], 1, START) for name in "ab"]
    gate.leave.set()
    ingest.stop()
    assert all(each.done() and each.exception() is None for each in waiting)
    with pytest.raises(UnavailableError, match="stopping"):
        ingest.put([batch("c")], 1, START)


def test_a_listener_that_fails_does_not_fail_the_sender(
    database: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    def listen(_: list[Received]) -> None:
        raise ZeroDivisionError

    with running(Ingest(database, Registry(), on_committed=listen)) as ingest:
        ingest.put([batch("a")], 1, START).result(30)
        ingest.put([batch("b")], 1, START).result(30)
    assert "a listener failed" in caplog.text


def test_the_collector_counts_what_it_received_committed_and_refused(database: Engine) -> None:
    metrics = CollectorRegistry()
    value: Callable[..., float | None] = metrics.get_sample_value
    ingest = Ingest(database, Registry(), instruments=Instruments(metrics))
    assert value("gradwatch_collector_rejected_total", {"reason": "malformed"}) == 0
    with running(ingest), serving(ingest) as url:
        post(f"{url}/v1/metrics", metrics_request())
        post(f"{url}/v1/metrics", b"\xff")
    for family in (c.COLLECTOR_RECEIVED, c.COLLECTOR_COMMITTED):
        assert value(family.name, {"signal": "metrics"}) == 1
    assert value("gradwatch_collector_rejected_total", {"reason": "malformed"}) == 1
    assert value(f"{c.COLLECTOR_COMMIT_DURATION.name}_count") == 1
    assert value(c.COLLECTOR_QUEUE_DEPTH.name) == 0


def test_a_request_is_awaited_from_an_event_loop(database: Engine) -> None:
    async def send(ingest: Ingest) -> None:
        await asyncio.gather(*(ingest.submit([batch(name)], 1, START) for name in "abc"))

    with running(Ingest(database, Registry())) as ingest:
        asyncio.run(send(ingest))
    with database.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(schema.process)) == 3
