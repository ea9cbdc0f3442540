"""Encoded OTLP requests over HTTP, and what a collector's answer means.

A request is sent, once more on a fresh connection if the old one was dead, and no more: when to try again is
the caller's business. Needs requests and protobuf; neither torch nor the OpenTelemetry SDK.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Final, NamedTuple

import requests
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (
    ExportLogsServiceRequest,
    ExportLogsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from requests.utils import get_auth_from_url

from gradwatch.export import bounded_answers
from gradwatch.export.spool_records import Request, Signal

REPLY_SECONDS: Final = 5.0
_CONNECT_SECONDS: Final = 1.0
# The rest of 4xx is for good (https://opentelemetry.io/docs/specs/otlp/#failures-1); 401 and 403 may be mended
# by whoever runs the collector while the run goes on, and 408 is a time-out.
_RETRYABLE: Final = frozenset({401, 403, 408, 429})
_MOST_REPLY_BYTES: Final = 1 << 16
# A header that asks for more was not meant for us.
_LONGEST_PAUSE: Final = 3600.0


class Taken(NamedTuple):
    """The collector is done with the request; it refused ``rejected`` of its items for good."""

    rejected: int = 0
    reason: str = ""


class Away(NamedTuple):
    """The request is to be sent again, not before ``after`` seconds if the collector asked for that."""

    reason: str
    after: float | None = None


Outcome = Taken | Away


class Transport:
    """Posts to ``{endpoint}/v1/logs`` and ``/v1/metrics``. May be called from several threads.

    Args:
        endpoint: Base URL.
        headers: Sent with each request.
        wall: Seconds since the epoch, for a ``Retry-After`` that is a date.
    """

    def __init__(
        self, endpoint: str, headers: Mapping[str, str], wall: Callable[[], float] = time.time
    ) -> None:
        self._wall = wall
        self._receivers: dict[Signal, _Receiver] = {
            "logs": _Receiver(endpoint, "logs", headers),
            "metrics": _Receiver(endpoint, "metrics", headers),
        }

    def send(self, request: Request, seconds: float = REPLY_SECONDS) -> Outcome:
        """Send a request; ``seconds`` bounds the waiting for a connection, and that for the whole answer."""
        outcome = self._send_whole(request, seconds)
        if isinstance(outcome, Taken) and 1 < request.items == outcome.rejected and request.signal == "logs":
            # Whichever it was that is not taken, the ending must not go with it.
            rejected, reason = 0, ""
            for single in _singles(request):
                part = self._send_whole(single, seconds)
                if isinstance(part, Away):
                    return part
                rejected, reason = rejected + part.rejected, part.reason or reason
            return Taken(rejected, reason)
        return outcome

    def close(self) -> None:
        """Close the connections."""
        for receiver in self._receivers.values():
            receiver.close()

    def _send_whole(self, request: Request, seconds: float) -> Outcome:
        try:
            response = self._receivers[request.signal].post(request, seconds)
            with response:
                reply = _read(response)
        except (requests.RequestException, OSError) as error:
            return Away(_brief(error))
        status = response.status_code
        if 200 <= status < 300:
            return _partial_success(request, response.headers.get("Content-Type", ""), reply)
        if 400 <= status < 500 and status not in _RETRYABLE:
            return Taken(request.items, f"HTTP {status}")
        return Away(f"HTTP {status}", self._pause(response.headers))

    def _pause(self, headers: Mapping[str, str]) -> float | None:
        asked = headers.get("Retry-After", "").strip()
        try:
            # A date is the collector's; so is the clock it is read against, where the answer tells it.
            seconds = float(asked) if asked[:1].isdigit() else _epoch(asked) - self._now(headers)
        except (ValueError, TypeError, OverflowError):
            return None
        return min(max(0.0, seconds), _LONGEST_PAUSE) if math.isfinite(seconds) else None

    def _now(self, headers: Mapping[str, str]) -> float:
        return _epoch(headers["Date"]) if "Date" in headers else self._wall()


class _Receiver:
    """One signal of a collector: a session of its own, with proxies and certificates looked up once.

    ``requests`` goes through the environment at each request otherwise, for longer than it sends.
    """

    def __init__(self, endpoint: str, signal: Signal, headers: Mapping[str, str]) -> None:
        url = f"{endpoint}/v1/{signal}"
        self._session = requests.Session()
        bounded_answers.mount(self._session)
        credentials = get_auth_from_url(url)
        # Without any, requests would put what ~/.netrc says in the place of the configured header.
        self._session.auth = credentials if any(credentials) else _as_configured
        self._request = self._session.prepare_request(
            requests.Request("POST", url, {**headers, "Content-Type": "application/x-protobuf"})
        )
        # As the SDK's exporters read them: https://opentelemetry.io/docs/specs/otel/protocol/exporter/
        certificate, key = (
            exporter_setting(signal, "CLIENT_CERTIFICATE"),
            exporter_setting(signal, "CLIENT_KEY"),
        )
        self._environment = self._session.merge_environment_settings(
            url,
            {},
            stream=True,
            verify=exporter_setting(signal, "CERTIFICATE"),
            cert=(certificate, key) if certificate and key else certificate,
        )

    def post(self, request: Request, seconds: float) -> requests.Response:
        """The answer, its body not yet read."""
        prepared = self._request.copy()
        prepared.prepare_body(request.body, None)
        if request.gzipped:
            prepared.headers["Content-Encoding"] = "gzip"
        timeout = (min(_CONNECT_SECONDS, seconds), seconds)
        try:
            return self._post(prepared, timeout)
        except requests.ConnectTimeout:
            raise
        except requests.ConnectionError:  # a pooled connection that the collector closed
            return self._post(prepared, timeout)

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def _post(self, prepared: requests.PreparedRequest, timeout: tuple[float, float]) -> requests.Response:
        # A redirected POST may become a GET, whose success says nothing.
        return self._session.send(prepared, timeout=timeout, allow_redirects=False, **self._environment)


def _as_configured(prepared: requests.PreparedRequest) -> requests.PreparedRequest:
    return prepared


def _read(response: requests.Response) -> bytes:
    """What fits: an answer is a few bytes, and one that has no end must not keep us."""
    reply = b""
    for part in response.iter_content(4096):
        reply += part
        if len(reply) > _MOST_REPLY_BYTES:
            break
    return reply


def _partial_success(request: Request, content_type: str, reply: bytes) -> Taken:
    if not content_type.startswith("application/x-protobuf"):
        return Taken()
    try:
        if request.signal == "logs":
            logs = ExportLogsServiceResponse.FromString(reply).partial_success
            rejected, reason = logs.rejected_log_records, logs.error_message
        else:
            metrics = ExportMetricsServiceResponse.FromString(reply).partial_success
            rejected, reason = metrics.rejected_data_points, metrics.error_message
    except DecodeError:
        return Taken()
    return Taken(max(0, rejected), reason)


def _singles(request: Request) -> Iterator[Request]:
    """The same events, each in a request of its own."""
    whole = ExportLogsServiceRequest.FromString(
        gzip.decompress(request.body) if request.gzipped else request.body
    )
    for owner in whole.resource_logs:
        for scope in owner.scope_logs:
            for record in scope.log_records:
                one = ExportLogsServiceRequest()
                one_owner = one.resource_logs.add(resource=owner.resource, schema_url=owner.schema_url)
                one_owner.scope_logs.add(scope=scope.scope, log_records=[record])
                yield Request("logs", one.SerializeToString(), 1, gzipped=False)


def _epoch(date: str) -> float:
    return parsedate_to_datetime(date).timestamp()


def _brief(error: Exception) -> str:
    cause = error.args[0] if error.args else error
    reason = getattr(cause, "reason", None) or cause
    # urllib3 puts the object in front: "HTTPConnection(host='127.0.0.1', port=4318): Failed to ..."
    return re.sub(r"^(<.*?>|\w+\(.*?\)): ", "", str(reason))[:200] or type(error).__name__


def exporter_setting(signal: Signal, name: str) -> str | None:
    """What the environment says, for this signal or for all, as the SDK's exporters read it."""
    return os.environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_{name}") or os.environ.get(
        f"OTEL_EXPORTER_OTLP_{name}"
    )
