"""The OpenTelemetry SDK as it comes, over HTTP and gRPC: any program that uses it is understood."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any
from uuid import uuid4

import pytest
from opentelemetry import trace
from opentelemetry._logs import SeverityNumber
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import SimpleLogRecordProcessor
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation, View
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from sqlalchemy import Engine, select

from gradwatch import conventions as c
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.service.ingest import Ingest
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage import schema
from tests.collector_process import Collector
from tests.metric_views import metrics, points, series
from tests.receivers import away, receiving, running

TRANSPORTS = ("http", "grpc")


def exporter(transport: str, signal: str, url: str, grpc_address: str, **options: Any) -> Any:
    """The SDK's exporter of a signal; ``signal``: metric, log or trace."""
    module: ModuleType = importlib.import_module(
        f"opentelemetry.exporter.otlp.proto.{transport}.{'_log' if signal == 'log' else signal}_exporter"
    )
    names = {"metric": "OTLPMetricExporter", "log": "OTLPLogExporter", "trace": "OTLPSpanExporter"}
    if transport == "grpc":
        return getattr(module, names[signal])(endpoint=grpc_address, insecure=True, **options)
    return getattr(module, names[signal])(endpoint=f"{url}/v1/{signal}s", **options)


@pytest.fixture
def resource() -> Resource:
    # Not of OTEL_RESOURCE_ATTRIBUTES, and no run: a web service, say.
    return Resource({"service.name": f"shop-{uuid4().hex}", "service.instance.id": uuid4().hex})


@pytest.fixture(params=TRANSPORTS)
def tracer(request: pytest.FixtureRequest, served: Collector, resource: Resource) -> Iterator[trace.Tracer]:
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    sent = exporter(request.param, "trace", served.url, served.grpc)
    provider.add_span_processor(SimpleSpanProcessor(sent))
    yield provider.get_tracer("shop")
    provider.shutdown()


def sender(served: Collector, resource: Resource, metric: str) -> str:
    """The run id that telemetry of no run was given."""
    job = resource.attributes["service.name"]
    ids = {
        source["run_id"]
        for listed in metrics(served, name=metric)
        for source in listed["sources"]
        if source["job"] == job
    }
    assert len(ids) == 1
    return str(ids.pop())


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("temporality", ["cumulative", "delta"])
def test_every_instrument_of_the_sdk_is_stored(
    served: Collector, resource: Resource, transport: str, temporality: str
) -> None:
    preferred = (
        {Counter: AggregationTemporality.DELTA, Histogram: AggregationTemporality.DELTA}
        if temporality == "delta"
        else {}
    )
    sent = exporter(transport, "metric", served.url, served.grpc, preferred_temporality=preferred)
    reader = PeriodicExportingMetricReader(sent, export_interval_millis=float("inf"))
    exponential = View(instrument_name="exponential", aggregation=ExponentialBucketHistogramAggregation())
    provider = MeterProvider([reader], resource, shutdown_on_exit=False, views=[exponential])
    meter = provider.get_meter("shop")
    meter.create_counter("orders", "{order}").add(3, {"country": "de", "sizes": (1, 2)})
    meter.create_up_down_counter("queue").add(-2)
    meter.create_gauge("temperature", "Cel").set(21.5)
    meter.create_observable_gauge("load", [lambda _: []])
    explicit, wide = meter.create_histogram("latency", "s"), meter.create_histogram("exponential")
    for value in (0.1, 7.0, 20_000.0):
        explicit.record(value)
        wide.record(value)
    provider.force_flush()
    provider.shutdown()
    run_id = sender(served, resource, "orders")
    (orders,) = series(served, run_id, "orders")
    assert orders["labels"] == {"country": "de", "sizes": [1, 2], "otel.scope.name": "shop"}
    assert orders["metric"] == {
        "name": "orders",
        "unit": "{order}",
        "kind": "sum",
        "temporality": temporality,
        "monotonic": True,
    }
    assert [point["value"] for point in orders["points"]] == [3]
    assert points(served, run_id, "queue")[0]["value"] == -2
    assert points(served, run_id, "temperature")[0]["value"] == 21.5
    latency, spread = points(served, run_id, "latency")[0], points(served, run_id, "exponential")[0]
    assert (latency["count"], latency["sum"], latency["min"], latency["max"]) == (3, 20_007.1, 0.1, 20_000)
    assert sum(latency["bucket_counts"]) == 3
    assert len(latency["bucket_counts"]) == len(latency["explicit_bounds"]) + 1
    assert (spread["count"], sum(spread["positive"]["bucket_counts"])) == (3, 3)
    assert metrics(served, run=run_id, name="load") == []


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_exemplars_of_the_sdk_lead_to_their_span(
    served: Collector, resource: Resource, tracer: trace.Tracer, transport: str
) -> None:
    reader = PeriodicExportingMetricReader(
        exporter(transport, "metric", served.url, served.grpc), export_interval_millis=float("inf")
    )
    provider = MeterProvider([reader], resource, shutdown_on_exit=False)
    with tracer.start_as_current_span("checkout") as span:
        provider.get_meter("shop").create_histogram("latency").record(0.25, {"path": "/"})
    provider.force_flush()
    provider.shutdown()
    (point,) = points(served, sender(served, resource, "latency"), "latency")
    (exemplar,) = point["exemplars"]
    context = span.get_span_context()
    assert exemplar["value"] == 0.25
    assert (exemplar["trace_id"], exemplar["span_id"]) == (
        f"{context.trace_id:032x}",
        f"{context.span_id:016x}",
    )


def test_spans_of_the_sdk_are_stored(served: Collector, tracer: trace.Tracer) -> None:
    with tracer.start_as_current_span("outer") as outer, tracer.start_as_current_span("inner") as inner:
        inner.add_event("found", {"n": 1})
        inner.record_exception(ValueError("x"))
    trace_id = f"{outer.get_span_context().trace_id:032x}"
    engine = db.connect(served.database)
    with engine.connect() as connection:
        rows = connection.execute(
            select(schema.span).where(schema.span.c.trace_id == trace_id).order_by(schema.span.c.start)
        ).mappings()
        stored = [(row["name"], [event["name"] for event in row["events"]]) for row in rows]
    engine.dispose()
    assert stored == [("outer", []), ("inner", ["found", "exception"])]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_events_of_the_sdk_make_a_run(served: Collector, transport: str) -> None:
    run_id = f"run-{uuid4().hex}"
    provider = LoggerProvider(Resource({c.RUN_ID: run_id, c.SERVICE_NAME: "sdk"}), shutdown_on_exit=False)
    sent = exporter(transport, "log", served.url, served.grpc)
    provider.add_log_record_processor(SimpleLogRecordProcessor(sent))
    provider.get_logger("test").emit(
        event_name=c.RUN_STARTED.name,
        severity_number=SeverityNumber.INFO,
        body={"nested": [1, None]},
        attributes={"bytes": b"\x00", "list": ("a", "b")},
    )
    provider.shutdown()
    (event,) = served.show(run_id)["events"]
    assert event["attributes"] == {"bytes": "AA==", "list": ["a", "b"]}
    assert served.runs()[run_id]["status"] == "running"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_sdk_delivers_by_itself_once_the_database_is_back(database: Engine, transport: str) -> None:
    spans: list[Any] = []

    class Kept(SimpleSpanProcessor):
        def on_end(self, span: Any) -> None:
            spans.append(span)

    with running(Ingest(database, Registry())) as ingest, receiving(ingest) as addresses:
        sent = exporter(transport, "trace", addresses.url, addresses.grpc)
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(Kept(sent))
        provider.get_tracer("test").start_span("kept").end()
        refused = threading.Event()
        reject = ingest.instruments.reject

        def told(reason: str) -> None:
            reject(reason)
            refused.set()

        ingest.instruments.reject = told  # type: ignore[method-assign] - to know when to let the database in
        with ThreadPoolExecutor(1) as pool:
            with away(database):
                result = pool.submit(sent.export, spans)
                assert refused.wait(30)
            assert result.result(60) is SpanExportResult.SUCCESS
        provider.shutdown()
        sent.shutdown()
    with database.connect() as connection:
        assert list(connection.scalars(select(schema.span.c.name))) == ["kept"]
