"""What is OTLP/gRPC's own: the port, status codes and trailers, compression, a clean end."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from sqlalchemy import Engine

from gradwatch import conventions as c
from gradwatch_collector.otlp.grpc_server import GrpcServer
from gradwatch_collector.otlp.intake import Intake
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.service.ingest import Ingest
from gradwatch_collector.service.server import Address
from tests.collector_process import Collector, collector, gradwatch
from tests.metric_views import points
from tests.otlp_clients import Answer, GrpcClient, gauge, metrics_request
from tests.receivers import Gatekeeper, receiving, running

START = 1_750_000_000_000_000_000
OK = Answer(0)


def of(run_id: str, *values: float) -> ExportMetricsServiceRequest:
    return metrics_request({c.RUN_ID: run_id}, gauge("norm", *((START + i, v) for i, v in enumerate(values))))


@contextlib.contextmanager
def serving(tmp_path: Path, *options: str) -> Iterator[Collector]:
    with collector(f"sqlite:///{tmp_path}/gradwatch.db", "--grpc", "127.0.0.1:0", *options) as running:
        yield running


def serve(tmp_path: Path, *options: str) -> Any:
    return gradwatch(
        "collector", "serve", "--db", f"sqlite:///{tmp_path}/db", "--listen", "127.0.0.1:0", *options
    )


def test_a_port_in_use_is_one_clear_line(collectors: Callable[[str], Collector], tmp_path: Path) -> None:
    address = collectors("sqlite").grpc
    done = serve(tmp_path, "--grpc", address)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line == (
        f"Error: cannot listen on {address}: Address already in use; "
        "choose another with --grpc HOST:PORT, or serve no gRPC with --grpc off"
    )


def test_an_address_that_is_none_is_a_mistake_in_usage(tmp_path: Path) -> None:
    done = serve(tmp_path, "--grpc", "4317")
    assert done.returncode == 2
    assert "--grpc: '4317' is not HOST:PORT" in done.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--listen", "127.0.0.1:²"),
        ("--lost-after", "nan"),
        ("--lost-after", "inf"),
        ("--requests-per-second", "nan"),
    ],
)
def test_what_is_no_address_and_no_number_is_one_clear_line(tmp_path: Path, option: str, value: str) -> None:
    done = serve(tmp_path, option, value)
    assert (done.returncode, done.stdout) == (2, "")
    assert option in done.stderr.splitlines()[-1]


def test_another_address_is_refused_without_a_token(tmp_path: Path) -> None:
    done = serve(tmp_path, "--grpc", "0.0.0.0:0")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "gradwatch token create" in line


def test_grpc_can_be_switched_off(tmp_path: Path) -> None:
    with collector(f"sqlite:///{tmp_path}/gradwatch.db", "--grpc", "off") as running:
        assert running.grpc == ""
        assert running.get("/readyz").status_code == 200


def test_the_generated_client_of_the_specification_is_understood(
    collectors: Callable[[str], Collector],
) -> None:
    served = collectors("sqlite")
    with grpc.insecure_channel(served.grpc) as channel:
        stub = metrics_service_pb2_grpc.MetricsServiceStub(channel)
        answer = stub.Export(of("stub", 1.5), timeout=30)
    assert not answer.HasField("partial_success")
    assert [point["value"] for point in points(served, "stub", "norm")] == [1.5]


def refusal(address: str, method: str, body: bytes = b"", **options: Any) -> grpc.RpcError:
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary(method)(body, timeout=30, **options)
    return raised.value


EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"


def test_what_is_not_served_is_unimplemented(collectors: Callable[[str], Collector]) -> None:
    address = collectors("sqlite").grpc
    profiles = "/opentelemetry.proto.collector.profiles.v1development.ProfilesService/Export"
    assert refusal(address, profiles).code() is grpc.StatusCode.UNIMPLEMENTED
    assert refusal(address, EXPORT + "All").code() is grpc.StatusCode.UNIMPLEMENTED
    deflated = refusal(address, EXPORT, bytes(1000), compression=grpc.Compression.Deflate)
    assert deflated.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "deflate" in deflated.details()


def test_an_overload_says_in_both_trailers_when_to_come_again(database: Engine) -> None:
    ingest = Ingest(database, Registry())
    ingest.start()
    with receiving(ingest) as addresses:
        ingest.stop()
        error = refusal(addresses.grpc, EXPORT)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    trailers = dict(error.trailing_metadata())
    expected = RetryInfo()
    expected.retry_delay.seconds = 1
    assert RetryInfo.FromString(trailers["google.rpc.retryinfo-bin"]) == expected
    detail = AnyMessage()
    detail.Pack(expected)
    status = Status.FromString(trailers["grpc-status-details-bin"])
    assert (status.code, status.message, list(status.details)) == (Code.UNAVAILABLE, error.details(), [detail])


@pytest.mark.parametrize("body", [b"\xff", b"\x1f\x8bnone"])
def test_a_permanent_error_says_nothing_of_coming_again(
    collectors: Callable[[str], Collector], body: bytes
) -> None:
    error = refusal(collectors("sqlite").grpc, EXPORT, body)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    trailers = dict(error.trailing_metadata())
    assert trailers.keys() == {"grpc-status-details-bin"}
    (detail,) = Status.FromString(trailers["grpc-status-details-bin"]).details
    bad_request = BadRequest()
    assert detail.Unpack(bad_request)
    assert [violation.description for violation in bad_request.field_violations] == [error.details()]


def test_what_is_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    with serving(tmp_path) as killed, GrpcClient(killed.url, killed.grpc) as client:
        answers = [client.send(of("run", float(i), *map(float, range(i)))) for i in range(1, 6)]
        killed.process.send_signal(signal.SIGKILL)
        killed.process.wait(30)
    assert answers == [OK] * 5
    with serving(tmp_path) as again:
        assert len(points(again, "run", "norm")) == 6


def test_requests_under_way_are_answered_before_the_end(tmp_path: Path) -> None:
    with serving(tmp_path) as stopped:

        def send(worker: int) -> list[int]:
            told = []
            with GrpcClient(stopped.url, stopped.grpc) as client:
                for i in range(1_000):
                    request = metrics_request({c.RUN_ID: "run"}, gauge("norm", (START + i, 1.0), worker=worker))
                    told.append(client.send(request).code)
                    if told[-1]:
                        break
                    if worker == 0 and i == 20:
                        stopped.process.terminate()
            return told

        with ThreadPoolExecutor(8) as pool:
            told = list(pool.map(send, range(8)))
        assert stopped.process.wait(30) in (0, -signal.SIGTERM)
    # Whoever was not served was told what OTLP clients take as a reason to come again.
    assert {codes[-1] for codes in told} <= {Code.UNAVAILABLE, Code.CANCELLED}
    with serving(tmp_path) as again:
        answer = again.get("/api/v1/series", params={"run": "run", "metric": "norm"}).json()
    stored = {each["labels"]["worker"]: len(each["points"]) for each in answer["series"]}
    for worker, codes in enumerate(told):
        assert stored[worker] >= codes.count(0)


def test_a_request_that_cannot_be_committed_by_the_end_is_put_off(database: Engine) -> None:
    gatekeeper = Gatekeeper()
    with running(Ingest(database, gatekeeper)) as ingest:
        intake = Intake(ingest)
        server = GrpcServer(Address("127.0.0.1", 0), max_body=intake.max_body)
        server.start(intake)
        with GrpcClient("", str(server.address)) as client, ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.send, of("late", 1.0))
            assert gatekeeper.entered.wait(30)
            server.stop(0.1)
            gatekeeper.leave.set()
            assert answer.result() == Answer(Code.UNAVAILABLE, "the collector is stopping", retry=(1.0, 1.0))


def test_clients_that_say_nothing_keep_nobody_waiting(collectors: Callable[[str], Collector]) -> None:
    served = collectors("sqlite")
    host, _, port = served.grpc.rpartition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            silent = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            silent.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
        with GrpcClient(served.url, served.grpc) as client:
            assert client.send(of("slow", 1.0)) == OK


def test_a_call_that_is_given_up_is_no_trouble(database: Engine) -> None:
    with running(Ingest(database, Registry())) as ingest, receiving(ingest) as addresses:
        with grpc.insecure_channel(addresses.grpc) as channel:
            export = channel.unary_unary(EXPORT)
            for _ in range(20):
                export.future(of("gone", 1.0).SerializeToString(), timeout=30).cancel()
        with GrpcClient(addresses.url, addresses.grpc) as client:
            assert client.send(of("gone", 1.0, 2.0)) == OK
