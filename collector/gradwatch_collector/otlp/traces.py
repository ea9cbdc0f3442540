"""OTLP traces into spans."""

from __future__ import annotations

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from gradwatch_collector.otlp.attributes import clean, mapping, source_of
from gradwatch_collector.otlp.decoded import Decoded
from gradwatch_collector.otlp.errors import MalformedError
from gradwatch_collector.otlp.parts import Parts
from gradwatch_collector.otlp.points import MAX_NANOS
from gradwatch_collector.records import Batch, SpanRecord


def decode_traces(body: bytes, parts: Parts | None = None) -> Decoded:
    """Decode an ``ExportTraceServiceRequest``.

    Raises:
        MalformedError: it is none, or says something impossible about who sent it.
        TooLargeError: it has more parts than may be.
    """
    try:
        (parts or Parts()).add(body, ExportTraceServiceRequest)
        request = ExportTraceServiceRequest.FromString(body)
    except DecodeError as error:
        raise MalformedError("the body is not an encoded ExportTraceServiceRequest") from error
    batches = []
    rejected = 0
    for resource_spans in request.resource_spans:
        spans = [span for scope in resource_spans.scope_spans for span in scope.spans]
        usable = [_span(span) for span in spans if _usable(span)]
        rejected += len(spans) - len(usable)
        source = source_of(resource_spans.resource)
        if spans:
            batches.append(Batch(source, spans=usable))
    return Decoded(batches, rejected, "spans without a valid id (16 and 8 bytes, not all zero) or time")


def _usable(span: Span) -> bool:
    # https://www.w3.org/TR/trace-context/#trace-id: all zeroes is invalid.
    ids_valid = len(span.trace_id) == 16 and len(span.span_id) == 8 and any(span.trace_id) and any(span.span_id)
    return ids_valid and max(span.start_time_unix_nano, span.end_time_unix_nano) <= MAX_NANOS


def _span(span: Span) -> SpanRecord:
    return SpanRecord(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_span_id=span.parent_span_id.hex() or None,
        name=clean(span.name),
        kind=span.kind,
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        status=span.status.code,
        attributes=mapping(span.attributes),
        events=[
            {
                "name": clean(event.name),
                "time": event.time_unix_nano,
                "attributes": mapping(event.attributes),
            }
            for event in span.events
        ],
    )
