"""OTLP/HTTP: POST /v1/metrics, /v1/logs and /v1/traces, protobuf, answered after the commit."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from gradwatch import conventions as c
from gradwatch_collector.otlp.decoded import Decoded
from gradwatch_collector.otlp.errors import (
    CONTENT_TYPE,
    MalformedError,
    OtlpError,
    TooLargeError,
    UnavailableError,
    UnsupportedError,
    error_response,
)
from gradwatch_collector.otlp.logs import decode_logs
from gradwatch_collector.otlp.metrics import MetricsDecoder
from gradwatch_collector.otlp.traces import decode_traces
from gradwatch_collector.records import Batch

if TYPE_CHECKING:
    from gradwatch_collector.ingest import Ingest  # which raises this package's errors

# The OpenTelemetry Collector's own limit for a request body is 20 MiB.
MAX_BODY: Final = 20 << 20
MAX_DECOMPRESSED: Final = 64 << 20
# Larger bodies take milliseconds to decode: not on the thread that answers health checks.
_DECODE_INLINE: Final = 512 << 10


@dataclass(frozen=True, slots=True)
class _Signal:
    path: str
    decode: Callable[[bytes, int], Decoded]
    response: Any  # the class of the encoded response
    rejected_field: str


def routes(
    ingest: Ingest,
    *,
    max_body: int = MAX_BODY,
    max_decompressed: int = MAX_DECOMPRESSED,
    now: Callable[[], int] = time.time_ns,
) -> list[Route]:
    """Return the three OTLP/HTTP routes. Limits in bytes; ``now`` in Unix nanoseconds."""
    metrics = MetricsDecoder()
    signals = (
        _Signal(
            "/v1/metrics",
            lambda body, _: metrics.decode(body),
            ExportMetricsServiceResponse,
            "rejected_data_points",
        ),
        _Signal("/v1/logs", decode_logs, ExportLogsServiceResponse, "rejected_log_records"),
        _Signal(
            "/v1/traces", lambda body, _: decode_traces(body), ExportTraceServiceResponse, "rejected_spans"
        ),
    )

    def route(signal: _Signal) -> Route:
        async def receive(request: Request) -> Response:
            try:
                body = await _body(request, max_body, max_decompressed)
                received_at = now()
                if len(body) <= _DECODE_INLINE:
                    decoded = signal.decode(body, received_at)
                else:
                    decoded = await asyncio.to_thread(signal.decode, body, received_at)
                await ingest.submit(_granted(request, decoded.batches), len(body), received_at)
            except OtlpError as error:
                ingest.instruments.reject(error.reason)
                return error_response(error.status, str(error))
            except asyncio.CancelledError:
                # Only the end of the process cancels a request. It is not committed: the sender still has it.
                return error_response(UnavailableError.status, "the collector is stopping")
            except ClientDisconnect:
                return Response(status_code=499)  # nobody is there to read it
            return Response(_success(signal, decoded), media_type=CONTENT_TYPE)

        return Route(signal.path, receive, methods=["POST"])

    return [route(signal) for signal in signals]


async def _body(request: Request, max_body: int, max_decompressed: int) -> bytes:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != CONTENT_TYPE:
        raise UnsupportedError(f"Content-Type {content_type or 'missing'!r}: only {CONTENT_TYPE} is read here")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", ""):
        raise UnsupportedError(f"Content-Encoding {encoding!r}: only gzip and identity are read here")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_body:
        raise TooLargeError(f"the body has {length} bytes; the limit is {max_body}")
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_body:
            raise TooLargeError(f"the body has more than {max_body} bytes")
        chunks.append(chunk)
    body = b"".join(chunks)
    if encoding != "gzip":
        return body
    if len(body) <= _DECODE_INLINE:
        return _gunzip(body, max_decompressed)
    return await asyncio.to_thread(_gunzip, body, max_decompressed)


def _gunzip(body: bytes, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while body:  # gzip members may follow each other
        stream = zlib.decompressobj(wbits=31)
        try:
            part = stream.decompress(body, limit - size + 1)
        except zlib.error as error:
            raise MalformedError("the body is not gzip, as Content-Encoding says") from error
        size += len(part)
        if size > limit:
            raise TooLargeError(f"the body has more than {limit} bytes after decompression")
        if not stream.eof:
            raise MalformedError("the gzip body ends too early")
        parts.append(part)
        body = stream.unused_data
    return b"".join(parts)


def _granted(request: Request, batches: Sequence[Batch]) -> Sequence[Batch]:
    # A token's team wins over what the telemetry claims.
    grant = request.scope.get("gradwatch.grant")
    if grant is None or grant.team is None:
        return batches
    return [
        replace(batch, source=replace(batch.source, resource={**batch.source.resource, c.TEAM: grant.team}))
        for batch in batches
    ]


def _success(signal: _Signal, decoded: Decoded) -> bytes:
    # https://opentelemetry.io/docs/specs/otlp/#full-success: partial_success stays unset.
    response = signal.response()
    if decoded.rejected:
        setattr(response.partial_success, signal.rejected_field, decoded.rejected)
        response.partial_success.error_message = f"not stored: {decoded.why}"
    encoded: bytes = response.SerializeToString()
    return encoded
