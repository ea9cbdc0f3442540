"""Connections that end before their answer: nobody is disturbed, and the log says no more than that."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.collector_process import Collector, collector
from tests.otlp_clients import gauge, metrics_request

START = 1_750_000_000_000_000_000
CLIENTS = 50


@pytest.fixture
def log() -> Iterator[IO[str]]:
    with tempfile.TemporaryFile("w+") as file:
        yield file


@pytest.fixture
def running(tmp_path: Path, log: IO[str]) -> Iterator[Collector]:
    with collector(f"sqlite:///{tmp_path}/gradwatch.db", log=log) as started:
        yield started


def sending(running: Collector, behind: bytes = b"") -> socket.socket:
    """A connection over which requests were sent without waiting for answers, and something behind them."""
    host, _, port = running.url.removeprefix("http://").rpartition(":")
    body = metrics_request({"training.run.id": "run"}, gauge("norm", (START, 1.5))).SerializeToString()
    head = "POST /v1/metrics HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-protobuf\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    client = socket.create_connection((host, int(port)), timeout=30)
    client.sendall(request * 3 + behind)
    return client


def address(running: Collector) -> tuple[str, int]:
    host, _, port = running.url.removeprefix("http://").rpartition(":")
    return host, int(port)


HEADS = (
    b"GET /" + b"a" * 100,
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: ",
    b"GET / HTTP/1.1\r\n",
    b"POST /v1/logs HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Long: ",
)


@pytest.mark.parametrize("start", HEADS)
def test_heads_that_do_not_end_are_not_read_to_their_end(running: Collector, start: bytes) -> None:
    before = running.peak_mib()
    with socket.create_connection(address(running), timeout=30) as client:
        client.sendall(start)
        sent = 0
        with pytest.raises(ConnectionError):
            while sent < 64 << 20:
                sent += client.send(b"a" * (1 << 20))
            raise AssertionError("all of it was read")
    assert running.get("/healthz").status_code == 200
    assert running.peak_mib() - before < 16


@pytest.mark.parametrize("size", [100, 30_000])
def test_a_head_of_a_few_kilobytes_in_pieces_is_read(running: Collector, size: int) -> None:
    body = metrics_request({"training.run.id": "run"}, gauge("norm", (START, 1.5))).SerializeToString()
    head = f"POST /v1/metrics HTTP/1.1\r\nHost: localhost\r\nX-Long: {'a' * size}\r\n"
    head += f"Content-Type: application/x-protobuf\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(address(running), timeout=30) as client:
        for piece in (head[:20], head[20:-50], head[-50:]):
            client.sendall(piece.encode())
        client.sendall(body)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_what_is_no_http_behind_requests_is_no_failure_of_the_collector(
    running: Collector, log: IO[str]
) -> None:
    for _ in range(CLIENTS):
        with sending(running, b"\0\0\r\n\r\n") as client:
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 ")
    assert_quiet(running, log)


def test_a_client_that_hangs_up_before_its_answers_is_no_failure_of_the_collector(
    running: Collector, log: IO[str]
) -> None:
    for _ in range(CLIENTS):
        sending(running).close()
    assert_quiet(running, log)


def assert_quiet(running: Collector, log: IO[str]) -> None:
    assert running.get("/healthz").status_code == 200
    log.seek(0)
    lines = [line for line in log.read().splitlines() if not line.endswith("Invalid HTTP request received.")]
    assert lines == []
