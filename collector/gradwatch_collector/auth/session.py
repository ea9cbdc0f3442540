"""A browser's token: it is kept in a cookie that no script can read, and opens what is only read.

A cookie comes with every request that the browser makes, whoever's page brought it about. So it counts for
reading only, and is sent with requests of our own pages only.
"""

from __future__ import annotations

from http.cookies import CookieError, SimpleCookie
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.responses import Response

COOKIE: Final = "gradwatch_token"
_ATTRIBUTES: Final[dict[str, Any]] = {"path": "/", "httponly": True, "samesite": "strict"}


def authorization_of(headers: Headers, *, reads: bool) -> str | None:
    """Return what a request shows: its ``Authorization`` header, or else its cookie if it only reads."""
    told = headers.get("authorization")
    if told is not None or not reads:
        return told
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return None if cookie is None else bearer(cookie.value)


def bearer(token: str) -> str:
    """Return the value of the header that shows a token."""
    return f"Bearer {token}"


def keep(answer: Response, token: str, *, secure: bool) -> None:
    """Have the browser keep a token until it is closed; ``secure``: and never send it without TLS."""
    answer.set_cookie(COOKIE, token, secure=secure, **_ATTRIBUTES)


def forget(answer: Response) -> None:
    """Have the browser forget it."""
    answer.delete_cookie(COOKIE, **_ATTRIBUTES)
