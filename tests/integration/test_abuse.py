"""Whoever sends what is made to take memory or time gets none, and good requests are answered meanwhile."""

from __future__ import annotations

import contextlib
import gzip
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import grpc
import pytest
import requests
from google.rpc.code_pb2 import Code
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from sqlalchemy import Engine

from gradwatch import conventions as c
from gradwatch_collector.otlp.memory import Memory
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.service.ingest import Ingest
from tests.collector_process import Collector, collector, eventually, gradwatch
from tests.otlp_clients import SERVICES, Answer, GrpcClient, attributes, gauge, metrics_request
from tests.receivers import Gatekeeper, receiving, running

START: Final = 1_750_000_000_000_000_000
MIB: Final = 1 << 20
CAP_MIB: Final = 512
# Two bytes each; what they are within is put around them.
NOTHINGS: Final = 31 * MIB
GOOD: Final = metrics_request({c.RUN_ID: "good"}, gauge("norm", (START, 1.5))).SerializeToString()


@pytest.fixture(scope="module")
def abused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collector]:
    database = f"sqlite:///{tmp_path_factory.mktemp('abuse')}/gradwatch.db"
    with collector(database, "--memory", str(CAP_MIB)) as serving:
        yield serving


def post(serving: Collector, body: bytes, path: str = "metrics", **headers: str) -> int:
    sent = {"Content-Type": "application/x-protobuf"} | {k.replace("_", "-"): v for k, v in headers.items()}
    return requests.post(f"{serving.url}/v1/{path}", body, headers=sent, timeout=60).status_code


@contextlib.contextmanager
def served_meanwhile(serving: Collector) -> Iterator[None]:
    """Send good requests for as long as the block takes: each is taken, and memory stays under the cap."""
    over, answers = threading.Event(), []

    def send() -> None:
        while not over.wait(0.05):
            answers.append(requests.get(f"{serving.url}/healthz", timeout=10).status_code)
            answers.append(post(serving, GOOD))

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send)
        try:
            yield
            eventually(lambda: sending.done() or len(answers) > 2, "a good request to be answered")
        finally:
            over.set()
        sending.result()
    assert set(answers) == {200}
    assert serving.peak_mib() <= CAP_MIB


def within(inner: bytes, *tags: int) -> bytes:
    """The message as the field with the last tag of one with the tag before, and so on."""
    for tag in reversed(tags):
        size, length = len(inner), bytearray()
        while size > 0x7F:
            length.append(size & 0x7F | 0x80)
            size >>= 7
        inner = bytes([tag, *length, size]) + inner
    return inner


AMPLIFIED: Final[dict[str, Callable[[], tuple[str, bytes]]]] = {
    "resources of metrics": lambda: ("metrics", b"\x0a\0" * NOTHINGS),
    "resources of logs": lambda: ("logs", b"\x0a\0" * NOTHINGS),
    "metrics": lambda: ("metrics", within(b"\x12\0" * NOTHINGS, 0x0A, 0x12)),
    "points of a gauge": lambda: ("metrics", within(b"\x0a\0" * NOTHINGS, 0x0A, 0x12, 0x12, 0x2A)),
    "points with long tags": lambda: (
        "metrics",
        within(b"\x8a\x80\0\0" * (NOTHINGS // 2), 0x0A, 0x12, 0x12, 0x2A),
    ),
    "attributes of a histogram's point": lambda: (
        "metrics",
        within(b"\x4a\0" * NOTHINGS, 0x0A, 0x12, 0x12, 0x4A, 0x0A),
    ),
    "points of a scope of many attributes": lambda: (
        "metrics",
        within(
            within(b"".join(within(b"%03d" % n, 0x1A, 0x0A) for n in range(100)), 0x0A)
            + within(b"\x0a\0" * 20_000, 0x12, 0x2A),
            0x0A,
            0x12,
        ),
    ),
    "log records": lambda: ("logs", within(b"\x12\0" * NOTHINGS, 0x0A, 0x12)),
    "attributes of a log record": lambda: ("logs", within(b"\x32\0" * NOTHINGS, 0x0A, 0x12, 0x12)),
    "values of a resource's attribute": lambda: (
        "logs",
        within(b"\x0a\0" * NOTHINGS, 0x0A, 0x0A, 0x0A, 0x12, 0x2A),
    ),
    "spans": lambda: ("traces", within(b"\x12\0" * NOTHINGS, 0x0A, 0x12)),
    "counts of an exponential histogram": lambda: (
        "metrics",
        within(b"\1" * 2 * NOTHINGS, 0x0A, 0x12, 0x12, 0x52, 0x0A, 0x42, 0x12),
    ),
    "characters of a text with an emoji": lambda: (
        "logs",
        within("😀".encode() + b"a" * 2 * NOTHINGS, 0x0A, 0x12, 0x12, 0x2A, 0x0A),
    ),
}


@pytest.mark.parametrize("what", AMPLIFIED)
def test_a_small_body_of_many_parts_is_refused_before_they_are_built(abused: Collector, what: str) -> None:
    path, body = AMPLIFIED[what]()
    zipped = gzip.compress(body, 9)
    assert len(zipped) < 256 << 10
    with served_meanwhile(abused):
        assert post(abused, zipped, path, Content_Encoding="gzip") == 413


def listed(each: str, beside: str = "") -> bytes:
    """A request in JSON with a list that no version of OTLP has."""
    one = each.encode() + b","
    head = b'{"beside":"%s","listed":[' % beside.encode()
    return head + one * ((15 * MIB - len(beside)) // len(one)) + b"0]}"


JSON_OF_MANY_PARTS: Final[dict[str, Callable[[], bytes]]] = {
    "objects": lambda: listed("{}"),
    "lists": lambda: listed("[]"),
    "lists in objects": lambda: listed('{"a":[]}'),
    "resources": lambda: b'{"resourceLogs":[' + b"{}," * (5 * MIB) + b"{}]}",
    "numbers in wide text": lambda: listed("-9", beside="😀"),
    "numbers beside what is escaped": lambda: listed("-9", beside=r"\ud83d\ude00"),
    "texts": lambda: listed('"ab"'),
    "texts with an emoji each": lambda: listed('"é😀"'),
}


@pytest.mark.parametrize("what", JSON_OF_MANY_PARTS)
def test_json_of_many_parts_is_refused_before_they_are_built(abused: Collector, what: str) -> None:
    body = JSON_OF_MANY_PARTS[what]()
    with served_meanwhile(abused):
        assert post(abused, body, "logs", Content_Type="application/json") == 413


JSON_OF_SOME_PARTS: Final[dict[str, Callable[[], bytes]]] = {
    "numbers": lambda: listed("1.5"),
    "numbers in wide text": lambda: listed("-9", beside="😀")[: 9 * MIB] + b"0]}",
    "keys": lambda: b"{%s}" % b",".join(b'"%x":-9' % i for i in range(1_300_000)),
    "a text with an emoji": lambda: listed("1", beside="😀" + "a" * 14 * MIB),
    "counts of a histogram": lambda: histogram_in_json(512 << 10),
}


@pytest.mark.parametrize("what", JSON_OF_SOME_PARTS)
def test_json_is_taken_in_the_memory_that_there_is(abused: Collector, what: str) -> None:
    body = JSON_OF_SOME_PARTS[what]()
    with served_meanwhile(abused), ThreadPoolExecutor(8) as pool:
        answers = set(pool.map(lambda _: post(abused, body, Content_Type="application/json"), range(8)))
    assert {200} <= answers <= {200, 503}


def histogram_in_json(buckets: int) -> bytes:
    point = b'{"timeUnixNano":"%d","count":1,"bucketCounts":[%s0]}' % (START, b"1," * buckets)
    metric = b'{"name":"spread","histogram":{"dataPoints":[%s]}}' % point
    return b'{"resourceMetrics":[{"scopeMetrics":[{"metrics":[%s]}]}]}' % metric


def test_json_of_eighty_thousand_points_is_taken(abused: Collector) -> None:
    labels = '[{"key":"layer","value":{"stringValue":"layer.0"}}]'
    points = ",".join(
        f'{{"timeUnixNano":"{START + i}","asDouble":1.5,"attributes":{labels}}}' for i in range(80_000)
    )
    metric = f'{{"name":"norm","gauge":{{"dataPoints":[{points}]}}}}'
    body = f'{{"resourceMetrics":[{{"scopeMetrics":[{{"metrics":[{metric}]}}]}}]}}'.encode()
    with served_meanwhile(abused):
        assert post(abused, body, Content_Type="application/json") == 200


def numbers() -> bytes:
    request = metrics_request({c.RUN_ID: "wide"})
    metric = request.resource_metrics[0].scope_metrics[0].metrics.add(name="norm")
    for i in range(50_000):
        point = metric.gauge.data_points.add(time_unix_nano=START + i, as_double=1.5)
        point.attributes.extend(attributes({"layer": f"{i}"}))
    return request.SerializeToString()


def histograms() -> bytes:
    request = metrics_request({c.RUN_ID: "wide"})
    metric = request.resource_metrics[0].scope_metrics[0].metrics.add(name="spread")
    for i in range(50_000):
        point = metric.histogram.data_points.add(time_unix_nano=START + i, count=1, bucket_counts=[1])
        point.attributes.extend(attributes({"layer": f"{i}"}))
    return request.SerializeToString()


HEAVY: Final[dict[str, tuple[str, Callable[[], bytes]]]] = {
    "records": ("logs", lambda: within(b"\x12\0" * 50_000, 0x0A, 0x12)),
    "numbers": ("metrics", numbers),
    "histograms": ("metrics", histograms),
}


def test_a_body_and_its_parts_are_too_much_together_though_neither_is_alone(abused: Collector) -> None:
    (point,) = gauge("norm", (START, 1.5), layer="x" * 400).gauge.data_points
    body = within(within(point.SerializeToString(), 0x0A) * 110_000, 0x0A, 0x12, 0x12, 0x2A)
    with served_meanwhile(abused):
        assert post(abused, gzip.compress(body, 1), Content_Encoding="gzip") == 413


@pytest.mark.parametrize("what", HEAVY)
def test_requests_as_heavy_as_may_be_are_taken_in_the_memory_that_there_is(
    abused: Collector, what: str
) -> None:
    path, made = HEAVY[what]
    body = made()
    with served_meanwhile(abused), ThreadPoolExecutor(8) as pool:
        answers = set(pool.map(lambda _: post(abused, body, path), range(8)))
    assert {200} <= answers <= {200, 503}


def test_a_gzip_body_of_a_million_members_is_refused_at_once(abused: Collector) -> None:
    body = gzip.compress(b"") * (20 * MIB // 20 - 1)
    with served_meanwhile(abused):
        assert post(abused, body, Content_Encoding="gzip") == 413


def stalled(url: str, size: int) -> socket.socket:
    """A connection over which most of a body came, and then nothing more."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    client = socket.create_connection((host, int(port)), timeout=30)
    head = "POST /v1/metrics HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-protobuf\r\n"
    client.sendall(f"{head}Content-Length: {size}\r\n\r\n".encode())
    with contextlib.suppress(ConnectionError):  # where there is no room, it is refused
        client.sendall(b"\0" * (size - MIB // 2))
    return client


def test_large_uploads_that_stall_keep_no_small_request_out(abused: Collector) -> None:
    with contextlib.ExitStack() as stack, served_meanwhile(abused):
        for _ in range(8):
            stack.enter_context(stalled(abused.url, 19 * MIB))


def test_what_a_body_holds_that_does_not_arrive_is_given_back(database: Engine) -> None:
    memory = Memory(8 * MIB)
    with (
        running(Ingest(database, Registry())) as ingest,
        receiving(ingest, memory=memory, body_seconds=1.0) as addresses,
        stalled(addresses.url, 2 * MIB) as client,
    ):
        answer = client.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"the body did not arrive within 1 s" in answer
        assert b"retry-after: 1" in answer.lower()
        eventually(lambda: memory.held == 0, "what it held to be given back")


def test_what_a_client_gives_up_is_held_until_it_is_stored(database: Engine) -> None:
    memory, gate = Memory(8 * MIB), Gatekeeper()
    options = (("grpc.enable_http_proxy", 0),)
    with (
        running(Ingest(database, gate)) as ingest,
        receiving(ingest, memory=memory) as addresses,
        grpc.insecure_channel(addresses.grpc, options=options) as channel,
    ):
        export = channel.unary_unary(f"/{SERVICES['metrics']}/Export")
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as given_up:
                export(GOOD, timeout=0.5)
            assert given_up.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert memory.held >= 3 * len(GOOD)
        gate.leave.set()
        eventually(lambda: memory.held == 0, "what was held to be given back")


def test_a_message_is_read_over_grpc_only_after_the_token(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/gradwatch.db"
    assert gradwatch("db", "upgrade", "--db", database).returncode == 0
    token = gradwatch("token", "create", "ci", "--db", database).stdout.strip()
    body = bytes(4 * MIB - 1024)
    with collector(database, "--memory", "256", "--grpc", "127.0.0.1:0", "--require-token") as serving:
        before = serving.peak_mib()

        def post_over(_: int) -> int:
            options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
            with (
                grpc.insecure_channel(serving.grpc, options=options) as channel,
                pytest.raises(grpc.RpcError) as refused,
            ):
                channel.unary_unary(f"/{SERVICES['metrics']}/Export")(body, timeout=60)
            code: int = refused.value.code().value[0]
            return code

        with ThreadPoolExecutor(50) as pool:
            assert set(pool.map(post_over, range(100))) == {Code.UNAUTHENTICATED}
        with GrpcClient(serving.url, serving.grpc) as client:
            good = ExportMetricsServiceRequest.FromString(GOOD)
            assert client.send(good, token=token) == Answer(0)
        # 100 messages would be 400 MiB.
        assert serving.peak_mib() - before < 100
