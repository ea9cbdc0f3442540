"""Signing a browser in, by a token that it keeps in a cookie."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.endpoints import HTTPEndpoint
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gradwatch_collector.api.refusals import refuse
from gradwatch_collector.auth import Grant, Guard, Role, session
from gradwatch_collector.otlp.errors import OtlpError

PATH = "/session"
_LONGEST_BODY = 4_096


def session_route(guard: Guard | None) -> Route:
    """Return the route; without a guard nobody has to sign in."""

    class Session(HTTPEndpoint):
        """Who is signed in (GET), signing in (POST) and out (DELETE)."""

        async def get(self, request: Request) -> Response:
            """Tell who is signed in."""
            if guard is None:
                return _standing(None, needs_token=False)
            shown = session.authorization_of(request.headers, reads=True)
            try:
                grant = None if shown is None else await guard.admit_async(shown, Role.READ)
            except OtlpError:
                grant = None
            return _standing(grant, needs_token=True)

        async def post(self, request: Request) -> Response:
            """Take a token, if it is one that may read."""
            token = await _token(request)
            if guard is None:
                return _standing(None, needs_token=False)
            try:
                grant = await guard.admit_async(session.bearer(token), Role.READ)
            except OtlpError as error:
                return refuse(request.scope, error.status, str(error), error.headers, error.retry_after)
            answer = _standing(grant, needs_token=True)
            session.keep(answer, token, secure=request.url.scheme == "https")
            return answer

        async def delete(self, _: Request) -> Response:
            """Forget the token."""
            answer = _standing(None, needs_token=guard is not None)
            session.forget(answer)
            return answer

    return Route(PATH, Session)


def _standing(grant: Grant | None, *, needs_token: bool) -> Response:
    shape: Mapping[str, Any] = {
        "needs_token": needs_token,
        "name": None if grant is None else grant.name,
        "team": None if grant is None else grant.team,
    }
    return JSONResponse(shape, headers={"Cache-Control": "no-store"})


async def _token(request: Request) -> str:
    # Another site's page can send a form, but not JSON: nobody is signed in without knowing.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, 'send {"token": "gw_..."} as application/json')
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _LONGEST_BODY:
            raise HTTPException(413, "that is no token")
    try:
        token = json.loads(body)["token"]
    except (ValueError, TypeError, KeyError, RecursionError):
        token = None
    if not isinstance(token, str) or not token.strip().isascii() or not token.strip().isprintable():
        raise HTTPException(400, 'send {"token": "gw_..."}')
    return token.strip()
