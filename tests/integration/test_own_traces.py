"""The collector's spans about itself: where they are sent, and that they never go round in a circle."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import pytest
import requests
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from sqlalchemy import select

from gradwatch_collector.service.tracing import ENDPOINT
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage import schema
from tests.collector_process import Collector, collector, eventually, free_port
from tests.faulty_servers import unused_endpoint
from tests.otlp_sink import OtlpSink, otlp_sink


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")


def post(collector: Collector, body: bytes) -> int:
    headers = {"Content-Type": "application/x-protobuf"}
    return requests.post(f"{collector.url}/v1/metrics", body, headers=headers, timeout=10).status_code


def one_point() -> bytes:
    message = ExportMetricsServiceRequest()
    metric = message.resource_metrics.add().scope_metrics.add().metrics.add(name="norm")
    metric.gauge.data_points.add(time_unix_nano=1_750_000_000 * 10**9, as_double=1.5)
    encoded: bytes = message.SerializeToString()
    return encoded


def spans(sink: OtlpSink) -> list[Span]:
    with sink.arrived:
        bodies = [body for path, body in sink.requests if path == "/v1/traces"]
    return [
        span
        for body in bodies
        for owner in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in owner.scope_spans
        for span in scope.spans
    ]


def test_commits_and_evaluations_are_traced_to_the_endpoint_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with otlp_sink() as sink:
        monkeypatch.setenv(ENDPOINT, sink.endpoint)
        with collector(f"sqlite:///{tmp_path}/gradwatch.db") as running:
            assert post(running, one_point()) == 200
            eventually(lambda: {"gradwatch.evaluate"} & {span.name for span in spans(sink)}, "an evaluation")
        found = spans(sink)
    (commit,) = [span for span in found if span.name == "gradwatch.commit"]
    counts = {pair.key: pair.value.int_value for pair in commit.attributes}
    assert counts == {
        "gradwatch.batches": 1,
        "gradwatch.datapoints": 1,
        "gradwatch.events": 0,
        "gradwatch.spans": 0,
    }
    assert commit.end_time_unix_nano > commit.start_time_unix_nano


def test_nothing_is_traced_unless_an_endpoint_is_named_for_the_collector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with otlp_sink() as sink:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.endpoint)
        with collector(f"sqlite:///{tmp_path}/gradwatch.db") as running:
            assert post(running, one_point()) == 200
            eventually(lambda: "evaluated_timestamp_seconds 1" in running.get("/metrics").text, "a tick")
        assert sink.requests == []


def test_a_collector_that_traces_into_itself_does_not_trace_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv(ENDPOINT, f"http://{address}")
    url = f"sqlite:///{tmp_path}/gradwatch.db"
    with collector(url, "--listen", address) as running:
        engine = db.connect(url)

        def names() -> Counter[str]:
            with engine.connect() as connection:
                return Counter(connection.scalars(select(schema.span.c.name)))

        eventually(lambda: names()["gradwatch.evaluate"] >= 2, "two evaluations to be stored")
        assert names()["gradwatch.commit"] == 0
        assert post(running, one_point()) == 200
        eventually(lambda: names()["gradwatch.commit"], "the commit of a point to be stored")
        ticks = names()["gradwatch.evaluate"]
        eventually(lambda: names()["gradwatch.evaluate"] >= ticks + 2, "two more evaluations")
        assert names()["gradwatch.commit"] == 1
        engine.dispose()


def test_a_collector_whose_spans_nobody_takes_works_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENDPOINT, unused_endpoint())
    with collector(f"sqlite:///{tmp_path}/gradwatch.db") as running:
        assert post(running, one_point()) == 200
        eventually(lambda: "evaluated_timestamp_seconds 1" in running.get("/metrics").text, "a tick")
        running.process.terminate()
        assert running.process.wait(timeout=30) in (0, -signal.SIGTERM)
