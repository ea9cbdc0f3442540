"""A small OTLP/HTTP receiver for tests: real HTTP, real protobuf, everything kept in memory."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue


@dataclass(frozen=True)
class ReceivedEvent:
    name: str
    time: int
    attributes: dict[str, Any]
    resource: dict[str, Any]


@dataclass
class OtlpSink:
    """What arrived. ``status``, ``headers`` and ``reply`` are what the next requests are answered with.

    What ``refuses`` says of a body is refused for good.
    """

    endpoint: str
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    reply: bytes = b""
    refuses: Callable[[bytes], bool] = lambda _body: False
    requests: list[tuple[str, bytes]] = field(default_factory=list)
    events: list[ReceivedEvent] = field(default_factory=list)
    metrics: list[Any] = field(default_factory=list)
    encodings: set[str] = field(default_factory=set)
    authorizations: set[str | None] = field(default_factory=set)
    arrived: threading.Condition = field(default_factory=threading.Condition)

    def wait_for_event(self, name: str, timeout: float = 20.0) -> ReceivedEvent:
        """The first event of this name, once it is there."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: self.find(name), timeout), f"no {name}: {self.names()}"
            return self.find(name)[0]

    def names(self) -> list[str]:
        return [event.name for event in self.events]

    def find(self, name: str) -> list[ReceivedEvent]:
        return [event for event in self.events if event.name == name]

    def values(self, name: str) -> list[float]:
        """Values of a gauge or sum in order of arrival."""
        return [
            point.as_double if point.WhichOneof("value") == "as_double" else point.as_int
            for metric in self.metrics
            if metric.name == name
            for point in (metric.gauge.data_points or metric.sum.data_points)
        ]


def _attributes(pairs: Iterator[KeyValue] | Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


@contextmanager
def otlp_sink() -> Iterator[OtlpSink]:
    """Run a receiver on a free loopback port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            encoding = self.headers.get("Content-Encoding", "")
            body = gzip.decompress(raw) if encoding == "gzip" else raw
            with sink.arrived:
                status = 400 if sink.refuses(body) else sink.status
                sink.encodings.add(encoding)
                sink.authorizations.add(self.headers["Authorization"])
                sink.requests.append((self.path, raw))
                if status == 200:
                    self._keep(body)
                sink.arrived.notify_all()
            self.send_response_only(status)
            for name, value in {"Content-Length": str(len(sink.reply)), **sink.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(sink.reply)

        def _keep(self, body: bytes) -> None:
            if self.path == "/v1/logs":
                for owner in ExportLogsServiceRequest.FromString(body).resource_logs:
                    resource = _attributes(owner.resource.attributes)
                    for scope in owner.scope_logs:
                        sink.events += [
                            ReceivedEvent(
                                record.event_name,
                                record.time_unix_nano,
                                _attributes(record.attributes),
                                resource,
                            )
                            for record in scope.log_records
                        ]
            elif self.path == "/v1/metrics":
                for owner in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                    for scope in owner.scope_metrics:
                        sink.metrics += scope.metrics

        def log_message(self, *_arguments: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    sink = OtlpSink(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield sink
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
