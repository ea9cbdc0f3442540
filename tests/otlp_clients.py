"""OTLP clients that know nothing of the collector's code: protobuf and JSON over HTTP, and gRPC.

They speak alike, so that one test says the same to the collector in three ways.
"""

from __future__ import annotations

import base64
import gzip
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
import requests
from google.protobuf import json_format
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (
    ExportLogsServiceRequest,
    ExportLogsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

PATIENCE_SECONDS: Final = 60
# A field that no version of OTLP has: number 999, one varint.
_UNKNOWN: Final = b"\xb8\x3e\x01"
RESPONSES: Final = {
    ExportMetricsServiceRequest: ("metrics", ExportMetricsServiceResponse, "rejected_data_points"),
    ExportLogsServiceRequest: ("logs", ExportLogsServiceResponse, "rejected_log_records"),
    ExportTraceServiceRequest: ("traces", ExportTraceServiceResponse, "rejected_spans"),
}
SERVICES: Final = {
    "metrics": "opentelemetry.proto.collector.metrics.v1.MetricsService",
    "logs": "opentelemetry.proto.collector.logs.v1.LogsService",
    "traces": "opentelemetry.proto.collector.trace.v1.TraceService",
}


@dataclass(frozen=True)
class Answer:
    """What the collector said. ``code``: of ``google.rpc``, 0 if it took the request.

    ``rejected`` and ``message``: from the partial success, or the message of the error. ``retry``: seconds to
    wait, as told in each of the places where clients look.
    """

    code: int
    message: str = ""
    rejected: int = 0
    retry: Sequence[float] = ()


class Client(ABC):
    """Sends requests to one collector; a context manager."""

    def __init__(self, url: str, grpc_address: str) -> None:
        self._url = url
        self._grpc_address = grpc_address

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        return

    @abstractmethod
    def encode(self, request: Any) -> bytes:
        """The request as it goes over the wire."""

    @abstractmethod
    def with_unknown_fields(self, request: Any) -> bytes:
        """The request with a field that nobody knows in every message of it."""

    @abstractmethod
    def padded(self, size: int) -> bytes:
        """A request of that size that says nothing."""

    @abstractmethod
    def post(self, kind: type, body: bytes, *, compress: bool = False, token: str | None = None) -> Answer:
        """Send a body as a request of a kind."""

    def send(self, request: Any, **options: Any) -> Answer:
        """Send a request."""
        return self.post(type(request), self.encode(request), **options)


class _Http(Client):
    content_type: str

    def post(self, kind: type, body: bytes, *, compress: bool = False, token: str | None = None) -> Answer:
        path, response, rejected = RESPONSES[kind]
        headers = {"Content-Type": self.content_type}
        if compress:
            headers["Content-Encoding"] = "gzip"
        if token:
            headers["Authorization"] = f"Bearer {token}"
        answer = requests.post(
            f"{self._url}/v1/{path}",
            gzip.compress(body, 1) if compress else body,
            headers=headers,
            timeout=PATIENCE_SECONDS,
        )
        assert answer.headers["Content-Type"] == self.content_type
        if answer.status_code == 200:
            told = self._decode(response, answer.content).partial_success
            return Answer(0, told.error_message, getattr(told, rejected))
        status = self._decode(Status, answer.content)
        retry = answer.headers.get("Retry-After")
        assert (answer.status_code in (429, 502, 503, 504)) == (retry is not None)
        return Answer(status.code, status.message, retry=() if retry is None else (float(retry),))

    @staticmethod
    @abstractmethod
    def _decode(message: Any, body: bytes) -> Any: ...


class _Binary(Client):
    """Speaks protobuf's binary form, over whatever."""

    def encode(self, request: Any) -> bytes:
        encoded: bytes = request.SerializeToString()
        return encoded

    def with_unknown_fields(self, request: Any) -> bytes:
        return _with_unknown_fields(request)

    def padded(self, size: int) -> bytes:
        return _padded(size)


class ProtobufClient(_Binary, _Http):
    """OTLP/HTTP, binary."""

    content_type = "application/x-protobuf"

    @staticmethod
    def _decode(message: Any, body: bytes) -> Any:
        return message.FromString(body)


class JsonClient(_Http):
    """OTLP/HTTP, JSON."""

    content_type = "application/json"

    def encode(self, request: Any) -> bytes:
        return json.dumps(otlp_json(request)).encode()

    def with_unknown_fields(self, request: Any) -> bytes:
        def extended(told: Any) -> Any:
            if isinstance(told, list):
                return [extended(each) for each in told]
            if isinstance(told, dict):
                known = {key: extended(value) for key, value in told.items()}
                return {**known, "notOfThisVersion": {"traceId": "none", "deep": [1, None]}}
            return told

        return json.dumps(extended(otlp_json(request))).encode()

    def padded(self, size: int) -> bytes:
        return b'{"padding":"%s"}' % (b"x" * (size - 14))

    @staticmethod
    def _decode(message: Any, body: bytes) -> Any:
        return json_format.Parse(body, message())


class GrpcClient(_Binary):
    """OTLP/gRPC."""

    def __enter__(self) -> Client:
        self._channel = grpc.insecure_channel(self._grpc_address, options=(("grpc.enable_http_proxy", 0),))
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def post(self, kind: type, body: bytes, *, compress: bool = False, token: str | None = None) -> Answer:
        path, response, rejected = RESPONSES[kind]
        export = self._channel.unary_unary(f"/{SERVICES[path]}/Export")
        try:
            answer = export(
                body,
                timeout=PATIENCE_SECONDS,
                metadata=(("authorization", f"Bearer {token}"),) if token else (),
                compression=grpc.Compression.Gzip if compress else grpc.Compression.NoCompression,
            )
        except grpc.RpcError as error:
            return Answer(error.code().value[0], error.details(), retry=_retry(error.trailing_metadata()))
        told = response.FromString(answer).partial_success
        return Answer(0, told.error_message, getattr(told, rejected))


CLIENTS: Final[Mapping[str, type[Client]]] = {
    "protobuf": ProtobufClient,
    "json": JsonClient,
    "grpc": GrpcClient,
}


def _retry(trailers: Iterable[tuple[str, bytes]]) -> Sequence[float]:
    told = dict(trailers)
    own = told.get("google.rpc.retryinfo-bin")
    found = [] if own is None else [RetryInfo.FromString(own)]
    for detail in Status.FromString(told.get("grpc-status-details-bin", b"")).details:
        retry = RetryInfo()
        if detail.Unpack(retry):
            found.append(retry)
    return tuple(each.retry_delay.ToTimedelta().total_seconds() for each in found)


def otlp_json(message: Any) -> Any:
    """A message as OTLP writes it in JSON: enums as integers, ids as hexadecimal."""

    def with_hex_ids(told: Any) -> Any:
        if isinstance(told, list):
            return [with_hex_ids(each) for each in told]
        if isinstance(told, dict):
            return {
                key: base64.b64decode(value).hex()
                if key in ("traceId", "spanId", "parentSpanId")
                else with_hex_ids(value)
                for key, value in told.items()
            }
        return told

    return with_hex_ids(json_format.MessageToDict(message, use_integers_for_enums=True))


def _with_unknown_fields(request: Any) -> bytes:
    def extend(message: Any) -> None:
        for field, value in message.ListFields():
            if field.message_type is not None:
                for each in value if field.is_repeated else [value]:
                    extend(each)
        message.MergeFromString(_UNKNOWN)

    copy = type(request)()
    copy.CopyFrom(request)
    extend(copy)
    encoded: bytes = copy.SerializeToString()
    assert len(encoded) > len(request.SerializeToString())
    return encoded


def _padded(size: int) -> bytes:
    # Field 999 again, as bytes; its length takes four bytes from 2 MiB to 256 MiB.
    length = size - 6
    assert 2 << 20 <= length < 256 << 20
    varint = bytes((length >> shift & 0x7F) | (0x80 if shift < 21 else 0) for shift in (0, 7, 14, 21))
    return b"\xba\x3e" + varint + b"x" * length


def any_value(value: Any) -> AnyValue:
    """A Python value as OTLP's."""
    match value:
        case None:
            return AnyValue()
        case bool():
            return AnyValue(bool_value=value)
        case int():
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
        case str():
            return AnyValue(string_value=value)
        case bytes():
            return AnyValue(bytes_value=value)
    found = AnyValue()
    if isinstance(value, Mapping):
        found.kvlist_value.SetInParent()
        found.kvlist_value.values.extend(attributes(value))
    else:
        found.array_value.SetInParent()
        found.array_value.values.extend(any_value(each) for each in value)
    return found


def attributes(values: Mapping[str, Any]) -> list[KeyValue]:
    """Attributes by name as OTLP's."""
    return [KeyValue(key=name, value=any_value(value)) for name, value in values.items()]


def metrics_request(resource: Mapping[str, Any], *metrics: Metric) -> ExportMetricsServiceRequest:
    """A request of one resource."""
    request = ExportMetricsServiceRequest()
    owner = request.resource_metrics.add()
    owner.resource.attributes.extend(attributes(resource))
    owner.scope_metrics.add().metrics.extend(metrics)
    return request


def gauge(name: str, *points: tuple[int, float], **labels: Any) -> Metric:
    """A gauge: time in Unix nanoseconds and value of each point, integers as integers."""
    metric = Metric(name=name)
    for time, value in points:
        point = metric.gauge.data_points.add(time_unix_nano=time, attributes=attributes(labels))
        if isinstance(value, int):
            point.as_int = value
        else:
            point.as_double = value
    return metric
