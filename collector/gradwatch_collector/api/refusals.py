"""How the router and the API refuse requests: each path in the form of errors that its clients read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ExceptionHandler, Scope

from gradwatch_collector.otlp.encodings import media_type
from gradwatch_collector.otlp.errors import (
    MalformedError,
    OtlpError,
    UnavailableError,
    UnsupportedError,
    error_response,
    is_otlp_path,
)

# What is counted as, by status: no such path and no such method are what nobody serves here.
_REASONS: Final = {
    MalformedError.status: MalformedError.reason,
    404: UnsupportedError.reason,
    405: UnsupportedError.reason,
    UnavailableError.status: UnavailableError.reason,
}


def refuse(
    scope: Scope,
    status: int,
    message: str,
    headers: Mapping[str, str] | None = None,
    retry_after: float | None = None,
) -> Response:
    """Return an encoded ``google.rpc.Status`` for an OTLP path and ``{"error": message}`` for any other."""
    if is_otlp_path(scope["path"]):
        kind = media_type(Headers(scope=scope).get("content-type", ""))
        return error_response(status, message, kind, headers, retry_after)
    return JSONResponse({"error": message}, status, headers)


def exception_handlers(on_refused: Callable[[str], None]) -> Mapping[type[Exception], ExceptionHandler]:
    """Return how an application answers what its router and its handlers raise.

    ``on_refused`` is told the reason of every `HTTPException`; other exceptions are counted by the `Gate`.
    """

    def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        on_refused(_REASONS.get(error.status_code, OtlpError.reason))
        return refuse(request.scope, error.status_code, error.detail, error.headers)

    return {HTTPException: refused, Exception: _failed}


def _failed(request: Request, _: Exception) -> Response:
    # The server writes the exception to the log.
    return refuse(request.scope, 500, "internal error")
