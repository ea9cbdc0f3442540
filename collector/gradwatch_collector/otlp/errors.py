"""What goes wrong with an OTLP request, and how OTLP/HTTP says so; the only place that knows the codes.

The specification (https://opentelemetry.io/docs/specs/otlp/#otlphttp-response): every 4xx and 5xx response
carries an encoded ``google.rpc.Status``; a client retries after 429, 502, 503 and 504 and after nothing else,
and heeds ``Retry-After``.
"""

from __future__ import annotations

from typing import ClassVar, Final

from google.rpc.code_pb2 import Code
from google.rpc.status_pb2 import Status
from starlette.responses import Response

CONTENT_TYPE: Final = "application/x-protobuf"
RETRY_AFTER_SECONDS: Final = 1
_PATHS: Final = frozenset({"/v1/metrics", "/v1/logs", "/v1/traces"})

_CODES: Final = {
    400: Code.INVALID_ARGUMENT,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    413: Code.RESOURCE_EXHAUSTED,
    415: Code.INVALID_ARGUMENT,
    421: Code.INVALID_ARGUMENT,
    500: Code.INTERNAL,
    503: Code.UNAVAILABLE,
}


class OtlpError(Exception):
    """A request that cannot be accepted. The message is one line for the sender's log."""

    status: ClassVar[int] = 500
    reason: ClassVar[str] = "internal"


class MalformedError(OtlpError):
    """The body is not what it says it is, or says something that cannot be: sending it again is useless."""

    status = 400
    reason = "malformed"


class TooLargeError(OtlpError):
    """The body is larger than the limit, before or after decompression."""

    status = 413
    reason = "too_large"


class UnsupportedError(OtlpError):
    """The content type or encoding is not one we read."""

    status = 415
    reason = "unsupported"


class RejectedError(OtlpError):
    """The database does not take the data, and never will."""

    status = 400
    reason = "rejected"


class UnavailableError(OtlpError):
    """The database is away or the queue is full: the same request may succeed later."""

    status = 503
    reason = "unavailable"


def is_otlp_path(path: str) -> bool:
    """Return whether a request to this path expects OTLP's form of errors."""
    return path in _PATHS


def error_response(status: int, message: str) -> Response:
    """Return a response with an encoded ``google.rpc.Status``."""
    body = Status(code=_CODES.get(status, Code.UNKNOWN), message=message).SerializeToString()
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == UnavailableError.status else None
    return Response(body, status, headers, media_type=CONTENT_TYPE)
