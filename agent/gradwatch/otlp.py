"""Telemetry as OTLP over HTTP: events through the OpenTelemetry SDK's exporter, metrics through its encoder.

Its retries are left out, because they sleep through an exit: a request is sent, once more on a fresh
connection if the old one was dead, and keeping what failed is the export thread's business. Packed series join
the SDK's encoding of everything else as bytes (``packed_otlp``). Importing this module imports the SDK, a fifth
of a second; ``watch()`` does it, and only for this exporter.
"""

from __future__ import annotations

import gzip
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Generic, TypeVar, cast

import requests
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk._logs.export import LogRecordExportResult
from opentelemetry.sdk.metrics import export as sdk
from opentelemetry.sdk.metrics.export import AggregationTemporality
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from gradwatch import conventions
from gradwatch.packed_otlp import metrics_request
from gradwatch.telemetry import (
    Attributes,
    Event,
    HistogramPoint,
    MetricPoints,
    Metrics,
    MetricSeries,
    Point,
    RefusedError,
)

T = TypeVar("T")
S = TypeVar("S")

_CONNECT_SECONDS: Final = 1.0
_REPLY_SECONDS: Final = 5.0
# The rest of 4xx is for good (https://opentelemetry.io/docs/specs/otlp/#failures-1); 401 and 403 may be mended
# by whoever runs the collector while the run goes on, and 408 is a time-out.
_RETRYABLE: Final = frozenset({401, 403, 408, 429})
_SCOPE: Final = InstrumentationScope(conventions.SCOPE_NAME)
_EMPTY_BUCKETS: Final = sdk.Buckets(0, [])
_SDK_LOGGER: Final = "opentelemetry.exporter.otlp.proto.http._log_exporter"


class CollectorUnreachableError(Exception):
    """No connection. Not one of the errors that the SDK would retry with growing pauses."""


class _Session(requests.Session):
    """Short time-outs, and one more try for a pooled connection that the collector closed.

    ``refusal`` is the status with which the last request was refused for good, if it was.
    """

    refusal: int | None = None

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        """Send one request."""
        kwargs["timeout"] = (_CONNECT_SECONDS, _REPLY_SECONDS)
        self.refusal = None
        response = self._send(*args, **kwargs)
        if 400 <= response.status_code < 500 and response.status_code not in _RETRYABLE:
            self.refusal = response.status_code
        return response

    def _send(self, *args: Any, **kwargs: Any) -> requests.Response:
        try:
            try:
                return super().request(*args, **kwargs)
            except requests.ConnectionError as error:
                if isinstance(error, requests.ConnectTimeout):
                    raise
                return super().request(*args, **kwargs)
        except (requests.ConnectionError, requests.Timeout) as error:
            raise CollectorUnreachableError(str(error)) from None


class _Quiet(logging.Filter):
    """Holds back what the SDK says in our thread at each attempt; the user's own exporters still speak."""

    def __init__(self) -> None:
        super().__init__()
        self.thread: int | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record may pass."""
        return record.thread != self.thread


class _Paced(Sequence[T], Generic[S, T]):
    """Makes SDK points as the encoder asks for them, so that building and encoding share one pace."""

    def __init__(self, points: Sequence[S], convert: Callable[[S], T], pace: Callable[[], None]) -> None:
        self._points = points
        self._convert = convert
        self._pace = pace

    def __len__(self) -> int:
        return len(self._points)

    def __getitem__(self, index: Any) -> Any:
        chosen = self._points[index]
        return list(map(self._convert, chosen)) if isinstance(index, slice) else self._convert(chosen)

    def __iter__(self) -> Iterator[T]:
        for point in self._points:
            yield self._convert(point)
            self._pace()


class OtlpExporter:
    """Sends to ``{endpoint}/v1/logs`` and ``/v1/metrics`` with gzip."""

    def __init__(self, endpoint: str, headers: Mapping[str, str], pace: Callable[[], None]) -> None:
        self._pace = pace
        self._quiet = _Quiet()
        logging.getLogger(_SDK_LOGGER).addFilter(self._quiet)
        self._log_session, self._metric_session = _Session(), _metric_session(headers)
        self._logs = OTLPLogExporter(
            f"{endpoint}/v1/logs",
            session=self._log_session,
            headers=dict(headers),
            timeout=_REPLY_SECONDS,
            compression=Compression.Gzip,
        )
        self._metrics_url = f"{endpoint}/v1/metrics"
        self._resource: tuple[Attributes, Resource] | None = None

    def send_events(self, resource: Attributes, events: Sequence[Event]) -> bool:
        """See ``gradwatch.telemetry.Exporter``."""
        self._quiet.thread = threading.get_ident()
        owner = self._sdk_resource(resource)
        records = [
            ReadableLogRecord(
                LogRecord(
                    timestamp=event.time,
                    observed_timestamp=event.time,
                    severity_number=SeverityNumber.INFO,
                    attributes=cast("dict[str, Any]", event.attributes),
                    event_name=event.name,
                ),
                owner,
                _SCOPE,
            )
            for event in events
        ]
        return _delivered(self._logs.export(records) is LogRecordExportResult.SUCCESS, self._log_session)

    def send_metrics(self, resource: Attributes, metrics: Metrics) -> bool:
        """See ``gradwatch.telemetry.Exporter``."""
        single = [self._metric(batch) for batch in metrics if isinstance(batch, MetricPoints)]
        scope = sdk.ScopeMetrics(_SCOPE, single, "")
        request = encode_metrics(
            sdk.MetricsData([sdk.ResourceMetrics(self._sdk_resource(resource), [scope], "")])
        )
        owner = request.resource_metrics[0]
        body = request.SerializeToString() + metrics_request(
            owner.resource.SerializeToString(),
            owner.scope_metrics[0].scope.SerializeToString(),
            [batch for batch in metrics if isinstance(batch, MetricSeries)],
        )
        try:
            response = self._metric_session.post(self._metrics_url, data=gzip.compress(body, 1))
        except CollectorUnreachableError:
            return False
        return _delivered(response.ok, self._metric_session)

    def close(self) -> None:
        """Close the connections; the SDK's logger is as before."""
        self._logs.shutdown()  # type: ignore[no-untyped-call] # SDK
        self._metric_session.close()
        logging.getLogger(_SDK_LOGGER).removeFilter(self._quiet)

    def _sdk_resource(self, attributes: Attributes) -> Resource:
        if self._resource is None or self._resource[0] is not attributes:
            self._resource = (attributes, Resource(attributes))
        return self._resource[1]

    def _metric(self, batch: MetricPoints) -> sdk.Metric:
        metric = batch.metric
        data: sdk.Gauge | sdk.Sum | sdk.ExponentialHistogram
        if metric.kind == "exponential_histogram":
            histograms = cast("Sequence[HistogramPoint]", batch.points)
            data = sdk.ExponentialHistogram(
                _Paced(histograms, _histogram_point, self._pace), AggregationTemporality.DELTA
            )
        else:
            numbers = _Paced(cast("Sequence[Point]", batch.points), _number_point, self._pace)
            if metric.kind == "sum":
                data = sdk.Sum(numbers, AggregationTemporality.DELTA, is_monotonic=True)
            else:
                data = sdk.Gauge(numbers)
        return sdk.Metric(metric.name, metric.description, metric.unit, data)


def _metric_session(headers: Mapping[str, str]) -> _Session:
    session = _Session()
    session.headers.update({**headers, "Content-Type": "application/x-protobuf", "Content-Encoding": "gzip"})
    # As the SDK's exporters read them: https://opentelemetry.io/docs/specs/otel/protocol/exporter/
    session.verify = _of_metrics("CERTIFICATE") or True
    certificate, key = _of_metrics("CLIENT_CERTIFICATE"), _of_metrics("CLIENT_KEY")
    if certificate:
        session.cert = (certificate, key) if key else certificate
    return session


def _of_metrics(setting: str) -> str | None:
    return os.environ.get(f"OTEL_EXPORTER_OTLP_METRICS_{setting}") or os.environ.get(
        f"OTEL_EXPORTER_OTLP_{setting}"
    )


def _delivered(success: bool, session: _Session) -> bool:
    if session.refusal is not None:
        raise RefusedError(f"HTTP {session.refusal}")
    return success


def _number_point(point: Point) -> sdk.NumberDataPoint:
    return sdk.NumberDataPoint(point.attributes, point.start, point.time, point.value)


def _histogram_point(point: HistogramPoint) -> sdk.ExponentialHistogramDataPoint:
    return sdk.ExponentialHistogramDataPoint(
        attributes=point.attributes,
        start_time_unix_nano=point.start,
        time_unix_nano=point.time,
        count=point.total,
        sum=point.sum,
        scale=conventions.EXPONENTIAL_HISTOGRAM_SCALE,
        zero_count=point.zero_count,
        positive=sdk.Buckets(point.offset, point.buckets),
        negative=_EMPTY_BUCKETS,
        flags=0,
        min=point.minimum,
        max=point.maximum,
    )
