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
