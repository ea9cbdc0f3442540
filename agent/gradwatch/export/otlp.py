"""Telemetry as OTLP requests.

Importing this module imports the OpenTelemetry SDK and protobuf, a fifth of a second; ``watch()`` does it, and
only to deliver to a collector.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from gradwatch.export.otlp_encoding import encoded_resource, logs_request, metrics_request
from gradwatch.export.spool_records import SIGNALS, Request, Signal, gzipped
from gradwatch.export.transport import exporter_setting
from gradwatch.telemetry import Attributes, Event, Metrics, count_points


class OtlpEncoder:
    """Makes requests; ``pace`` is called now and then meanwhile, and those of ``compressed`` are gzipped."""

    def __init__(self, pace: Callable[[], None], compressed: Collection[Signal] = SIGNALS) -> None:
        self._pace = pace
        self._compressed = compressed
        self._resource: tuple[Attributes, bytes] | None = None

    def events(self, resource: Attributes, events: Sequence[Event], *, urgent: bool) -> Request:
        """See ``gradwatch.export.delivery.Encoder``."""
        return self._request("logs", logs_request(self._encoded(resource), events), len(events), urgent=urgent)

    def metrics(self, resource: Attributes, metrics: Metrics) -> Request:
        """See ``gradwatch.export.delivery.Encoder``."""
        body = metrics_request(self._encoded(resource), metrics, self._pace)
        return self._request("metrics", body, count_points(metrics))

    def _request(self, signal: Signal, body: bytes, items: int, *, urgent: bool = False) -> Request:
        is_compressed = signal in self._compressed
        body = gzipped(body, self._pace) if is_compressed else body
        self._pace()
        return Request(signal, body, items, gzipped=is_compressed, urgent=urgent)

    def _encoded(self, resource: Attributes) -> bytes:
        # Kept together: an ending may be on its way from a thread of its own.
        known = self._resource
        if known is None or known[0] is not resource:
            known = self._resource = (resource, encoded_resource(resource))
        return known[1]


def compressed_signals(endpoint: str) -> list[Signal]:
    """As the environment says; otherwise none if the collector is on this machine, where it only costs time."""
    return [signal for signal in SIGNALS if _is_compressed(signal, endpoint)]


def _is_compressed(signal: Signal, url: str) -> bool:
    asked = exporter_setting(signal, "COMPRESSION")
    if asked:
        return asked == "gzip"
    host = urlsplit(url).hostname or ""
    try:
        return not ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"
