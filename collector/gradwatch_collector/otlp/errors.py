"""What goes wrong with an OTLP request, and how OTLP/HTTP says so; the only place that knows the codes.

The specification (https://opentelemetry.io/docs/specs/otlp/#otlphttp-response): every 4xx and 5xx response
carries a ``google.rpc.Status``, encoded as the request was; a client retries after 429, 502, 503 and 504 and
after nothing else, and heeds ``Retry-After``. OTLP/gRPC has the same codes as its status.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Final

from google.protobuf.duration_pb2 import Duration
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status
from starlette.responses import Response

from gradwatch_collector.otlp.encodings import JSON, PROTOBUF, encode

RETRY_AFTER_SECONDS: Final = 1.0
_PATHS: Final = "/v1/"

_CODES: Final = {
    400: Code.INVALID_ARGUMENT,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.NOT_FOUND,
    405: Code.UNIMPLEMENTED,
    413: Code.RESOURCE_EXHAUSTED,
    415: Code.INVALID_ARGUMENT,
    421: Code.INVALID_ARGUMENT,
    429: Code.RESOURCE_EXHAUSTED,
    500: Code.INTERNAL,
    503: Code.UNAVAILABLE,
}


class OtlpError(Exception):
    """A request that cannot be accepted. The message is one line for the sender's log."""

    status: ClassVar[int] = 500
    reason: ClassVar[str] = "internal"
    retry_after: float | None = None  # seconds, where the same request may succeed later

    @property
    def headers(self) -> dict[str, str]:
        """Return what an HTTP response says beside its body, whatever the form of that."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(math.ceil(self.retry_after))
        return headers


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


class UnauthenticatedError(OtlpError):
    """Nobody is known by the token that came with the request, if one came."""

    status = 401
    reason = "unauthenticated"


class ForbiddenError(OtlpError):
    """Whoever sent the request is known, and may not do this."""

    status = 403
    reason = "forbidden"


class LimitedError(OtlpError):
    """More came with a token than it may send: the same request may succeed ``retry_after`` seconds later."""

    status = 429
    reason = "rate_limited"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RejectedError(OtlpError):
    """The database does not take the data, and never will."""

    status = 400
    reason = "rejected"


class UnavailableError(OtlpError):
    """The database is away or the queue is full: the same request may succeed later."""

    status = 503
    reason = "unavailable"
    retry_after = RETRY_AFTER_SECONDS


class SlowError(UnavailableError):
    """The body took too long to arrive. What is left of it will not be read."""

    reason = "too_slow"

    @property
    def headers(self) -> dict[str, str]:
        """Return what an HTTP response says beside its body."""
        return {**super().headers, "Connection": "close"}


def is_otlp_path(path: str) -> bool:
    """Return whether a request to this path expects OTLP's form of errors."""
    return path.startswith(_PATHS)


def retry_info(seconds: float) -> RetryInfo:
    """Return when the same request may be sent again."""
    return RetryInfo(retry_delay=Duration(seconds=math.ceil(seconds)))


def status_message(status: int, message: str, retry_after: float | None = None) -> Status:
    """Return the ``google.rpc.Status`` that says what an HTTP status does, with the detail OTLP asks for."""
    told = Status(code=_CODES.get(status, Code.UNKNOWN), message=message)
    if status == MalformedError.status:
        violation = BadRequest.FieldViolation(description=message)
        told.details.add().Pack(BadRequest(field_violations=[violation]))
    if retry_after is not None:
        told.details.add().Pack(retry_info(retry_after))
    return told


def error_response(
    status: int,
    message: str,
    media_type: str = PROTOBUF,
    headers: Mapping[str, str] | None = None,
    retry_after: float | None = None,
) -> Response:
    """Return a response with an encoded ``google.rpc.Status``, in JSON where that was asked."""
    answered = JSON if media_type == JSON else PROTOBUF
    body = encode(status_message(status, message, retry_after), answered)
    return Response(body, status, headers, media_type=answered)
