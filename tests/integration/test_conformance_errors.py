"""How OTLP is refused, row by row of docs/otlp.md: what is permanent, what may be sent again, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
from google.rpc.code_pb2 import Code
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine

from gradwatch import conventions as c
from gradwatch_collector.auth import Guard, Limits, Tokens
from gradwatch_collector.otlp.memory import Memory
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.service.ingest import Ingest
from gradwatch_collector.service.instruments import Instruments
from tests.collector_process import Collector, collector, gradwatch
from tests.otlp_clients import CLIENTS, Answer, Client, GrpcClient, JsonClient, gauge, metrics_request
from tests.receivers import Gatekeeper, away, receiving, running

START = 1_750_000_000_000_000_000
MIB = 1 << 20
OK = Answer(0)
REQUESTS = (ExportMetricsServiceRequest, ExportLogsServiceRequest, ExportTraceServiceRequest)

each_transport = pytest.mark.parametrize("transport", CLIENTS)


def of(run_id: str, value: float = 1.5) -> ExportMetricsServiceRequest:
    return metrics_request({c.RUN_ID: run_id}, gauge("norm", (START, value)))


def test_a_client_does_not_send_a_request_again_that_is_none(client: Client) -> None:
    for kind in REQUESTS:
        answer = client.post(kind, b'{"resourceMetrics": 1, "resourceLogs": 1, "resourceSpans": 1}\xff')
        assert (answer.code, answer.retry) == (Code.INVALID_ARGUMENT, ())
        assert f"the body is not an {'encoded ' * (not isinstance(client, JsonClient))}" in answer.message
        assert "\n" not in answer.message


def test_an_impossible_sender_is_refused(client: Client) -> None:
    answer = client.send(metrics_request({c.RANK: "first"}, gauge("norm", (START, 1.0))))
    assert (answer.code, answer.retry) == (Code.INVALID_ARGUMENT, ())
    assert answer.message == "training.rank must be an integer from 0, not 'first'"


def test_a_broken_gzip_body_is_refused(served: Collector) -> None:
    with GrpcClient(served.url, served.grpc) as client:
        for body in (b"\x1f\x8b none", b"\x1f\x8b"):
            answer = client.post(ExportMetricsServiceRequest, body)
            assert (answer.code, answer.retry) == (Code.INVALID_ARGUMENT, ())


def size_limit(client: Client) -> int:
    # As objects of Python JSON takes ten times its size, and gRPC's messages are held before anybody can look.
    limits = {JsonClient: 16 * MIB, GrpcClient: 4 * MIB}
    return limits.get(type(client), 20 * MIB)


def test_a_body_up_to_the_limit_is_taken_and_a_larger_one_is_not(client: Client) -> None:
    limit = size_limit(client)
    assert client.post(ExportMetricsServiceRequest, client.padded(limit)) == OK
    answer = client.post(ExportMetricsServiceRequest, client.padded(limit + 1))
    # Without RetryInfo this says that sending it again is useless.
    assert (answer.code, answer.retry) == (Code.RESOURCE_EXHAUSTED, ())
    assert str(limit) in answer.message


def test_the_limit_after_decompression_is_another(client: Client) -> None:
    limit = 16 * MIB if isinstance(client, JsonClient) else 64 * MIB
    assert client.post(ExportMetricsServiceRequest, client.padded(limit), compress=True) == OK
    answer = client.post(ExportMetricsServiceRequest, client.padded(limit + 1), compress=True)
    assert (answer.code, answer.retry) == (Code.RESOURCE_EXHAUSTED, ())
    assert answer.message == f"the body has more than {limit} bytes after decompression"


@each_transport
def test_an_overload_is_a_reason_to_try_again_later(database: Engine, transport: str) -> None:
    gate = Gatekeeper()
    registry = CollectorRegistry()
    with (
        running(Ingest(database, gate, instruments=Instruments(registry))) as ingest,
        receiving(ingest, memory=Memory(1)) as addresses,
        CLIENTS[transport](addresses.url, addresses.grpc) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(client.send, of("first"))
        assert gate.entered.wait(30)  # while that is being committed, it holds all that there is
        answer = client.send(of("second"))
        held = registry.get_sample_value(c.COLLECTOR_QUEUE_BYTES.name) or 0
        assert held > (registry.get_sample_value(c.COLLECTOR_QUEUE_LIMIT.name) or 0) == 1  # as an alert does
        gate.leave.set()
        assert first.result(60) == OK
        assert client.send(of("second")) == OK
    assert answer.code == Code.UNAVAILABLE
    assert answer.message == "too much is arriving at once: more than there is memory for"
    # gRPC clients look for it in two places.
    assert answer.retry == ((1.0, 1.0) if transport == "grpc" else (1.0,))


@each_transport
def test_a_database_that_is_away_is_a_reason_to_try_again_later(database: Engine, transport: str) -> None:
    guard = Guard(Tokens(database), Limits())
    with (
        running(Ingest(database, Registry())) as ingest,
        receiving(ingest) as open_to_all,
        receiving(ingest, guard=guard) as guarded,
    ):
        for addresses, token in ((open_to_all, None), (guarded, "gw_unknown")):
            with CLIENTS[transport](addresses.url, addresses.grpc) as client:
                with away(database):
                    answer = client.send(of("run"), token=token)
                assert (answer.code, set(answer.retry)) == (Code.UNAVAILABLE, {1.0})
                assert answer.message == "the database is not available"
                expected = Code.OK if token is None else Code.UNAUTHENTICATED
                assert client.send(of("run"), token=token).code == expected


@each_transport
def test_a_collector_that_is_stopping_is_a_reason_to_try_again(database: Engine, transport: str) -> None:
    ingest = Ingest(database, Registry())
    ingest.start()
    with receiving(ingest) as addresses, CLIENTS[transport](addresses.url, addresses.grpc) as client:
        ingest.stop()
        answer = client.send(of("run"))
    assert (answer.code, answer.message) == (Code.UNAVAILABLE, "the collector is stopping")
    assert set(answer.retry) == {1.0}


def broken_clock() -> int:
    raise ZeroDivisionError


@each_transport
def test_an_internal_error_is_told_in_the_same_form(database: Engine, transport: str) -> None:
    registry = CollectorRegistry()
    with (
        running(Ingest(database, Registry(), instruments=Instruments(registry))) as ingest,
        receiving(ingest, now=broken_clock) as addresses,
        CLIENTS[transport](addresses.url, addresses.grpc) as client,
    ):
        assert client.send(of("run")) == Answer(Code.INTERNAL, "internal error")
    assert registry.get_sample_value(c.COLLECTOR_REJECTED.name, {"reason": "internal"}) == 1


@each_transport
def test_the_collector_counts_what_it_refused_and_why(database: Engine, transport: str) -> None:
    registry = CollectorRegistry()
    value: Callable[..., float | None] = registry.get_sample_value
    with (
        running(Ingest(database, Registry(), instruments=Instruments(registry))) as ingest,
        receiving(ingest) as addresses,
        CLIENTS[transport](addresses.url, addresses.grpc) as client,
    ):
        client.send(of("run"))
        client.post(ExportMetricsServiceRequest, b"\xff")
        in_part = metrics_request({c.RUN_ID: "run"}, gauge("norm", (0, 1.5), (START, 1.5)))
        assert client.send(in_part).rejected == 1
    assert value(c.COLLECTOR_RECEIVED.name, {"signal": "metrics"}) == 2
    assert value(c.COLLECTOR_REJECTED.name, {"reason": "malformed"}) == 1
    assert value(c.COLLECTOR_REJECTED_ITEMS.name, {"signal": "metrics"}) == 1
    assert value(c.COLLECTOR_REJECTED_ITEMS.name, {"signal": "logs"}) == 0


@pytest.fixture(scope="module")
def token_database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('tokens')}/gradwatch.db"


@pytest.fixture(scope="module")
def token(token_database: str) -> str:
    return create_token(token_database, "ci", "--team", "vision")


@pytest.fixture(scope="module")
def reader(token_database: str) -> str:
    return create_token(token_database, "reader", "--role", "read")


def create_token(database: str, *options: str) -> str:
    created = gradwatch("token", "create", *options, "--db", database)
    assert created.returncode == 0, created.stderr
    return created.stdout.strip()


@pytest.fixture(scope="module")
def guarded(token_database: str, token: str) -> Iterator[Collector]:
    with collector(token_database, "--require-token", "--grpc", "127.0.0.1:0") as running:
        yield running


@each_transport
def test_a_token_is_asked_for_and_its_team_counts(
    guarded: Collector, token: str, reader: str, transport: str
) -> None:
    run_id = f"run-{uuid4().hex}"
    with CLIENTS[transport](guarded.url, guarded.grpc) as client:
        for wrong in (None, "gw_wrong", ""):
            answer = client.send(of(run_id), token=wrong)
            assert (answer.code, answer.retry) == (Code.UNAUTHENTICATED, ())
            assert "a valid token is needed" in answer.message
        claimed = metrics_request({c.RUN_ID: run_id, c.TEAM: "others"}, gauge("norm", (START, 1.0)))
        assert client.send(claimed, token=token) == OK
    answer = guarded.get(
        "/api/v1/metrics", params={"run": run_id}, headers={"Authorization": f"Bearer {reader}"}
    )
    (listed,) = answer.json()["metrics"]
    assert listed["sources"][0]["resource"][c.TEAM] == "vision"
