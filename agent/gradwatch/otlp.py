"""Telemetry as OTLP over HTTP.

Retries are left out, because they sleep through an exit: a request is sent, once more on a fresh connection if
the old one was dead, and keeping what failed is the export thread's business. Importing this module imports
requests and protobuf, a tenth of a second; ``watch()`` does it, and only for this exporter.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

import requests

from gradwatch.otlp_encoding import encoded_resource, logs_request, metrics_request
from gradwatch.telemetry import Attributes, Event, Metrics, RefusedError

_CONNECT_SECONDS: Final = 1.0
_REPLY_SECONDS: Final = 5.0
# The rest of 4xx is for good (https://opentelemetry.io/docs/specs/otlp/#failures-1); 401 and 403 may be mended
# by whoever runs the collector while the run goes on, and 408 is a time-out.
_RETRYABLE: Final = frozenset({401, 403, 408, 429})
# Compressed at once, in a third of a millisecond.
_PIECE: Final = 1 << 15
_GZIP: Final = 31  # zlib's window bits for a gzip header


class OtlpExporter:
    """Sends to ``{endpoint}/v1/logs`` and ``/v1/metrics``."""

    def __init__(self, endpoint: str, headers: Mapping[str, str], pace: Callable[[], None]) -> None:
        self._pace = pace
        self._logs = _Receiver(endpoint, "logs", headers, pace)
        self._metrics = _Receiver(endpoint, "metrics", headers, pace)
        self._resource: tuple[Attributes, bytes] | None = None

    def send_events(self, resource: Attributes, events: Sequence[Event]) -> bool:
        """See ``gradwatch.telemetry.Exporter``."""
        return self._logs.post(logs_request(self._encoded(resource), events))

    def send_metrics(self, resource: Attributes, metrics: Metrics) -> bool:
        """See ``gradwatch.telemetry.Exporter``."""
        return self._metrics.post(metrics_request(self._encoded(resource), metrics, self._pace))

    def close(self) -> None:
        """Close the connections."""
        self._logs.close()
        self._metrics.close()

    def _encoded(self, resource: Attributes) -> bytes:
        # Kept together: an ending may be on its way from a thread of its own.
        known = self._resource
        if known is None or known[0] is not resource:
            known = self._resource = (resource, encoded_resource(resource))
        return known[1]


class _Receiver:
    """One signal of a collector: a session of its own, with proxies and certificates looked up once.

    ``requests`` goes through the environment at each request otherwise, for longer than it sends.
    """

    def __init__(
        self, endpoint: str, signal: str, headers: Mapping[str, str], pace: Callable[[], None]
    ) -> None:
        url = f"{endpoint}/v1/{signal}"
        self._pace = pace
        self._compressed = _is_compressed(signal, url)
        encoding = {"Content-Encoding": "gzip"} if self._compressed else {}
        self._session = requests.Session()
        self._request = self._session.prepare_request(
            requests.Request("POST", url, {**headers, **encoding, "Content-Type": "application/x-protobuf"})
        )
        # As the SDK's exporters read them: https://opentelemetry.io/docs/specs/otel/protocol/exporter/
        certificate, key = _setting(signal, "CLIENT_CERTIFICATE"), _setting(signal, "CLIENT_KEY")
        self._environment = self._session.merge_environment_settings(
            url,
            {},
            stream=False,
            verify=_setting(signal, "CERTIFICATE"),
            cert=(certificate, key) if certificate and key else certificate,
        )

    def post(self, body: bytes) -> bool:
        """Whether it was taken.

        Raises:
            RefusedError: The answer is a refusal for good.
        """
        request = self._request.copy()
        request.prepare_body(_gzipped(body, self._pace) if self._compressed else body, None)
        self._pace()
        try:
            response = self._send(request)
        except (requests.ConnectionError, requests.Timeout):
            return False
        finally:
            self._pace()
        if 400 <= response.status_code < 500 and response.status_code not in _RETRYABLE:
            raise RefusedError(f"HTTP {response.status_code}")
        return response.ok

    def close(self) -> None:
        self._session.close()

    def _send(self, request: requests.PreparedRequest) -> requests.Response:
        timeout = (_CONNECT_SECONDS, _REPLY_SECONDS)
        try:
            return self._session.send(request, timeout=timeout, **self._environment)
        except requests.ConnectTimeout:
            raise
        except requests.ConnectionError:  # a pooled connection that the collector closed
            return self._session.send(request, timeout=timeout, **self._environment)


def _gzipped(body: bytes, pace: Callable[[], None]) -> bytes:
    packer = zlib.compressobj(1, wbits=_GZIP)
    packed = []
    for start in range(0, len(body), _PIECE):
        packed.append(packer.compress(memoryview(body)[start : start + _PIECE]))
        pace()
    return b"".join((*packed, packer.flush()))


def _is_compressed(signal: str, url: str) -> bool:
    """As the environment says; otherwise unless the collector is on this machine, where it only costs time."""
    asked = _setting(signal, "COMPRESSION")
    if asked:
        return asked == "gzip"
    host = urlsplit(url).hostname or ""
    try:
        return not ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def _setting(signal: str, name: str) -> str | None:
    return os.environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_{name}") or os.environ.get(
        f"OTEL_EXPORTER_OTLP_{name}"
    )
