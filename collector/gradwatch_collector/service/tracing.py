"""Spans about the collector's own commits and evaluations, for whoever names an endpoint for them.

Set ``GRADWATCH_COLLECTOR_OTLP_ENDPOINT`` to the base URL of an OTLP/HTTP receiver; headers, certificates and
compression are the SDK's ``OTEL_EXPORTER_OTLP_*``. ``OTEL_EXPORTER_OTLP_ENDPOINT`` is not looked at: it is
meant for training processes, and would lead back here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final

from opentelemetry.trace import INVALID_SPAN, NoOpTracer, Span, Tracer

from gradwatch import conventions as c
from gradwatch_collector.records import Batch

ENDPOINT: Final = "GRADWATCH_COLLECTOR_OTLP_ENDPOINT"
_SERVICE: Final = "gradwatch-collector"
_SCOPE: Final = "gradwatch_collector"
# All that is kept while nobody takes it: one batch, so that the end waits for one request at most.
_MOST_SPANS: Final = 512
_EXPORT_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class Tracing:
    """Where spans are made, and how to send the last of them."""

    tracer: Tracer
    close: Callable[[], None]


def tracing(environ: Mapping[str, str]) -> Tracing:
    """Return tracing to the endpoint that the environment names, or of nothing to nowhere."""
    endpoint = environ.get(ENDPOINT, "").strip()
    if not endpoint:
        return Tracing(NoOpTracer(), lambda: None)
    # Not for those who have no use for it: it takes longer to import than the collector to start.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=_EXPORT_SECONDS)
    provider = TracerProvider(
        resource=Resource.create({c.SERVICE_NAME: _SERVICE, "service.version": version("gradwatch")}),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(
        BatchSpanProcessor(exporter, max_queue_size=_MOST_SPANS, max_export_batch_size=_MOST_SPANS)
    )
    return Tracing(provider.get_tracer(_SCOPE), provider.shutdown)


def commit_span(tracer: Tracer, batches: Iterable[Batch]) -> AbstractContextManager[Span]:
    """Return a span about committing batches; none if all of them are collectors' own spans.

    A span about the commit of a span would be followed by another, for ever, if the endpoint leads back here,
    at once or by way of a load balancer or another collector.
    """
    if isinstance(tracer, NoOpTracer):
        return nullcontext(INVALID_SPAN)
    foreign = [batch for batch in batches if batch.source.resource.get(c.SERVICE_NAME) != _SERVICE]
    if not foreign:
        return nullcontext(INVALID_SPAN)
    counts = {
        "gradwatch.batches": len(foreign),
        "gradwatch.datapoints": sum(batch.datapoints for batch in foreign),
        "gradwatch.events": sum(len(batch.events) for batch in foreign),
        "gradwatch.spans": sum(len(batch.spans) for batch in foreign),
    }
    return tracer.start_as_current_span("gradwatch.commit", attributes=counts)
