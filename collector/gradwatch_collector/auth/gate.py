"""Every HTTP request passes here: the Host header that browsers cannot forge, then the guard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradwatch_collector.api.refusals import refuse
from gradwatch_collector.auth.guard import Guard
from gradwatch_collector.auth.session import authorization_of
from gradwatch_collector.auth.tokens import Grant, Role
from gradwatch_collector.otlp.errors import ForbiddenError, OtlpError, is_otlp_path

_GRANT: Final = "gradwatch.grant"
_LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")
# Whoever asks for these has no credentials, or none yet, and is told nothing.
_OPEN: Final = ("/healthz", "/readyz", "/", "/compare", "/slos", "/session")
_OPEN_FOLDERS: Final = ("/static/", "/runs/")
_READING: Final = ("GET", "HEAD")
# What knows how to leave other teams' runs out, or tells of none. Everything else is refused to a team,
# `/metrics` above all.
_FOR_TEAMS: Final = (
    "/api/v1/runs",
    "/api/v1/run-counts",
    "/api/v1/curves",
    "/api/v1/layer-map",
    "/api/v1/last-steps",
    "/api/v1/comparison",
    "/api/v1/findings",
    "/api/v1/metrics",
    "/api/v1/series",
    "/api/v1/slos",
    "/api/v1/slo-courses",
    "/api/v1/openapi.json",
    "/events",
)


class ForeignHostError(OtlpError):
    """The Host header is not one of ours."""

    status = 421
    reason = "foreign_host"


def grant_of(scope: Mapping[str, Any]) -> Grant | None:
    """Return what let a request in; None where no tokens are asked for."""
    grant: Grant | None = scope.get(_GRANT)
    return grant


class Gate:
    """ASGI middleware: refuses foreign Host headers and, where there is a guard, whom that refuses.

    A page in a browser can make requests to loopback, but not with a Host header of its own choosing: checking
    it stops DNS rebinding. ``on_refused`` is told the reason of every refusal.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Sequence[str],
        guard: Guard | None,
        on_refused: Callable[[str], None],
    ) -> None:
        self._app = app
        self._hosts = {host.lower() for host in (*hosts, *_LOOPBACK)}
        self._guard = guard
        self._on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        try:
            self._check_host(headers.get("host", ""))
            if self._guard is not None and not _is_open(path):
                role = _role(scope["method"], path)
                shown = authorization_of(headers, reads=role is Role.READ)
                grant = await self._guard.admit_async(shown, role)
                _check_team(grant, path)
                scope[_GRANT] = grant
                receive = _metered(self._guard, grant, receive)
        except OtlpError as refusal:
            self._on_refused(refusal.reason)
            answer = refuse(scope, refusal.status, str(refusal), refusal.headers, refusal.retry_after)
            await answer(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except Exception:
            self._on_refused(OtlpError.reason)
            raise

    def _check_host(self, host: str) -> None:
        if _without_port(host).lower() not in self._hosts:
            raise ForeignHostError(f"Host {host!r} is not served here; start the collector with --allowed-host")


def _is_open(path: str) -> bool:
    return path in _OPEN or path.startswith(_OPEN_FOLDERS)


def _role(method: str, path: str) -> Role:
    if is_otlp_path(path):
        return Role.INGEST
    return Role.READ if method in _READING else Role.ADMIN


def _check_team(grant: Grant, path: str) -> None:
    known = any(path == each or path.startswith(f"{each}/") for each in _FOR_TEAMS)
    if grant.team is not None and not known and not is_otlp_path(path):
        raise ForbiddenError(f"{path} tells of every team's runs; token {grant.name!r} is for {grant.team!r}")


def _metered(guard: Guard, grant: Grant, receive: Receive) -> Receive:
    async def metered() -> Message:
        message = await receive()
        guard.charge(grant, len(message.get("body", b"")))
        return message

    return metered


def _without_port(host: str) -> str:
    head, separator, port = host.rpartition(":")
    return head if separator and port.isdigit() and (":" not in head or head.endswith("]")) else host
