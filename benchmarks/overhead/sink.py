"""An OTLP/HTTP receiver in a process of its own, so that only the sender's work is in the figures.

It keeps requests as they come, and decodes them when asked, which the benchmarks do between measurements.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from gradwatch import conventions


@dataclass(frozen=True)
class Received:
    """What arrived since the last question.

    ``overheads``: the values of ``gradwatch.agent.overhead``; ``observed``: steps whose gradients were read.
    """

    overheads: tuple[float, ...] = ()
    observed: int = 0


class Sink:
    """Handle of the receiving process."""

    def __init__(self, port: int, pid: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self.pid = pid

    def take(self) -> Received:
        """What arrived since the last call."""
        with urllib.request.urlopen(f"{self.endpoint}/received", timeout=30) as response:  # noqa: S310 - ours
            found: dict[str, Any] = json.load(response)
        return Received(tuple(found["overheads"]), found["observed"])


@contextmanager
def running_sink() -> Iterator[Sink]:
    """Start the receiver, and stop it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "overhead.sink"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert process.stdout is not None
    try:
        yield Sink(int(process.stdout.readline()), process.pid)
    finally:
        process.terminate()
        process.communicate()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    kept: list[tuple[str, bytes]] = []  # noqa: RUF012 - one server a process

    def do_POST(self) -> None:
        """Keep a request."""
        self.kept.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self._answer(b"")

    def do_GET(self) -> None:
        """Decode what was kept, and forget it."""
        requests = [self.kept.pop(0) for _ in range(len(self.kept))]
        self._answer(json.dumps(_decode(requests)).encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: Any) -> None:
        """Say nothing."""


def _decode(requests: list[tuple[str, bytes]]) -> dict[str, Any]:
    overheads: list[float] = []
    observed = 0
    for path, body in requests:
        if path != "/v1/metrics":
            continue
        message = ExportMetricsServiceRequest.FromString(
            gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
        )
        metrics = [
            m for owner in message.resource_metrics for scope in owner.scope_metrics for m in scope.metrics
        ]
        for metric in metrics:
            if metric.name == conventions.AGENT_OVERHEAD.name:
                overheads += [point.as_double for point in metric.gauge.data_points]
        observed += _observed_steps(metrics)
    return {"overheads": overheads, "observed": observed}


def _observed_steps(metrics: list[Any]) -> int:
    """Steps whose gradients were read: as counted by the agent, else the longest layer histogram's count."""
    counted = [
        point.as_int
        for metric in metrics
        if metric.name == conventions.OBSERVED_STEPS.name
        for point in metric.sum.data_points
    ]
    histograms = [
        int(point.count)
        for metric in metrics
        if metric.name == conventions.LAYER_GRADIENT_NORM.name
        for point in metric.exponential_histogram.data_points
    ]
    return sum(counted) if counted else max(histograms, default=0)


def main() -> None:
    """Serve until the parent closes our standard input."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
