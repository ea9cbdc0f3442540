"""How requests that reach no handler are answered: each path in the form of errors that its clients read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ExceptionHandler, Scope

from gradwatch_collector.otlp.encodings import media_type
from gradwatch_collector.otlp.errors import error_response, is_otlp_path


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


def _refused_by_router(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refuse(request.scope, error.status_code, error.detail, error.headers)


def _failed(request: Request, _: Exception) -> Response:
    # The server writes the exception to the log.
    return refuse(request.scope, 500, "internal error")


EXCEPTION_HANDLERS: Final[Mapping[type[Exception], ExceptionHandler]] = {
    HTTPException: _refused_by_router,
    Exception: _failed,
}
