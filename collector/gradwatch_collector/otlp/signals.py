"""Metrics, logs and traces: how each is decoded and answered, whatever carried it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opentelemetry.proto.collector.logs.v1 import logs_service_pb2
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from gradwatch_collector.otlp.decoded import Decoded
from gradwatch_collector.otlp.logs import decode_logs
from gradwatch_collector.otlp.metrics import MetricsDecoder
from gradwatch_collector.otlp.parts import Parts
from gradwatch_collector.otlp.traces import decode_traces


@dataclass(frozen=True, slots=True)
class Signal:
    """One of the three.

    ``service``: full name of the gRPC service, whose only method is ``Export``. ``request``, ``response``: the
    protobuf classes (Any: no stubs know them). ``decode`` takes an encoded request, when it was received, and
    what counts its parts.
    """

    name: str
    service: str
    request: Any
    response: Any
    rejected_field: str
    decode: Callable[[bytes, int, Parts], Decoded]

    @property
    def path(self) -> str:
        """Where it is posted."""
        return f"/v1/{self.name}"

    def answer(self, decoded: Decoded) -> Any:
        """Return the response to what was stored."""
        # https://opentelemetry.io/docs/specs/otlp/#full-success: partial_success stays unset.
        response = self.response()
        if decoded.rejected:
            setattr(response.partial_success, self.rejected_field, decoded.rejected)
            response.partial_success.error_message = f"not stored: {decoded.why}"
        return response


def signals() -> Sequence[Signal]:
    """Return the three signals, with decoders that remember layouts between requests. Safe to share."""
    metrics = MetricsDecoder()
    return (
        Signal(
            "metrics",
            metrics_service_pb2.DESCRIPTOR.services_by_name["MetricsService"].full_name,
            metrics_service_pb2.ExportMetricsServiceRequest,
            metrics_service_pb2.ExportMetricsServiceResponse,
            "rejected_data_points",
            lambda body, _, parts: metrics.decode(body, parts),
        ),
        Signal(
            "logs",
            logs_service_pb2.DESCRIPTOR.services_by_name["LogsService"].full_name,
            logs_service_pb2.ExportLogsServiceRequest,
            logs_service_pb2.ExportLogsServiceResponse,
            "rejected_log_records",
            decode_logs,
        ),
        Signal(
            "traces",
            trace_service_pb2.DESCRIPTOR.services_by_name["TraceService"].full_name,
            trace_service_pb2.ExportTraceServiceRequest,
            trace_service_pb2.ExportTraceServiceResponse,
            "rejected_spans",
            lambda body, _, parts: decode_traces(body, parts),
        ),
    )
