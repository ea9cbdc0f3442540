"""Who may talk to the collector: tokens, and the Host header that browsers cannot forge.

Tokens are 256 random bits, shown once and stored as their SHA-256: there is nothing to brute-force, so a slow
password hash would only slow ingest down.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Engine, insert, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gradwatch_collector import schema
from gradwatch_collector.refusals import refuse

TOKEN_PREFIX = "gw_"  # noqa: S105 - a prefix that secret scanners can look for, not a secret
_CACHED_FOR_SECONDS = 10.0
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class TokenExistsError(ValueError):
    """A token of that name is there already."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a valid token allows. Its team wins over what telemetry claims."""

    name: str
    team: str | None


def create_token(connection: Connection, name: str, team: str | None, now: int) -> str:
    """Store a new token and return it; it cannot be shown again.

    Raises:
        TokenExistsError: the name is taken.
    """
    token = TOKEN_PREFIX + secrets.token_urlsafe(32)
    try:
        connection.execute(
            insert(schema.token).values(name=name, team=team, digest=_digest(token), created_at=now)
        )
    except IntegrityError as error:
        raise TokenExistsError(f"a token named {name!r} exists already; choose another name") from error
    return token


def has_tokens(connection: Connection) -> bool:
    """Return whether any token is valid."""
    return connection.scalar(select(schema.token.c.token_id).where(_valid()).limit(1)) is not None


class Tokens:
    """Looks tokens up, remembering answers for ten seconds: a revoked token stops working soon enough."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._known: dict[bytes, tuple[float, Grant | None]] = {}

    def bearer(self, authorization: str) -> Grant | None:
        """Return what the bearer of an Authorization header may do, or None if it shows no valid token."""
        scheme, _, token = authorization.partition(" ")
        return self.grant(token.strip()) if scheme.lower() == "bearer" else None

    def grant(self, token: str) -> Grant | None:
        """Return what the token allows, or None if it is not valid."""
        digest, now = _digest(token), time.monotonic()
        with self._lock:
            held = self._known.get(digest)
        if held is not None and now - held[0] < _CACHED_FOR_SECONDS:
            return held[1]
        with self._engine.connect() as connection:
            row = connection.execute(
                select(schema.token.c.name, schema.token.c.team).where(
                    schema.token.c.digest == digest, _valid()
                )
            ).one_or_none()
        grant = None if row is None else Grant(row.name, row.team)
        with self._lock:
            if len(self._known) > 10_000:
                self._known.clear()
            self._known[digest] = (now, grant)
        return grant


class Gate:
    """ASGI middleware: refuses foreign Host headers and, where required, requests without a valid token.

    A page in a browser can make requests to loopback, but not with a Host header of its own choosing: checking
    it stops DNS rebinding. The grant, if any, is left in ``scope["gradwatch.grant"]``.
    """

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str], tokens: Tokens | None) -> None:
        self._app = app
        self._hosts = {host.lower() for host in (*hosts, *_LOOPBACK)}
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        path: str = scope["path"]
        host = headers.get("host", "")
        if _without_port(host).lower() not in self._hosts:
            return refuse(
                scope, 421, f"Host {host!r} is not served here; start the collector with --allowed-host"
            )
        # Probes carry no credentials and tell nothing.
        if self._tokens is None or path in ("/healthz", "/readyz"):
            return None
        try:
            grant = self._tokens.bearer(headers.get("authorization", ""))
        except SQLAlchemyError:
            return refuse(scope, 503, "the database is not available")
        if grant is None:
            return refuse(
                scope, 401, "a valid token is needed: Authorization: Bearer TOKEN (gradwatch token create)"
            )
        scope["gradwatch.grant"] = grant
        return None


def _without_port(host: str) -> str:
    head, separator, port = host.rpartition(":")
    return head if separator and port.isdigit() and (":" not in head or head.endswith("]")) else host


def _valid() -> ColumnElement[bool]:
    return schema.token.c.revoked_at.is_(None)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
