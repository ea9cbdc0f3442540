"""The collector put together: receiver, writer, evaluator, API and the socket they listen on."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import uvicorn
from prometheus_client import CollectorRegistry, disable_created_metrics
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from sqlalchemy import Engine, QueuePool
from starlette.applications import Starlette
from starlette.middleware import Middleware

from gradwatch_collector import otlp
from gradwatch_collector.api import Api
from gradwatch_collector.auth import UNLIMITED, Gate, Guard, Limits, Rates, Tokens, has_tokens
from gradwatch_collector.evaluator import Evaluator
from gradwatch_collector.exposition import RunMetrics
from gradwatch_collector.ingest import Ingest
from gradwatch_collector.instruments import Instruments
from gradwatch_collector.live import LiveRuns
from gradwatch_collector.registry import Registry
from gradwatch_collector.tls import TlsFiles
from gradwatch_collector.tracing import tracing
from gradwatch_slo.objectives import default_objectives

logger = logging.getLogger(__name__)

_BACKLOG: Final = 2048
_HEADERS: Final = (
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    # Pages load what is ours and nothing else, and nobody shows ours within theirs.
    (
        "Content-Security-Policy",
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    ),
)
_HEADERS_OVER_TLS: Final = (("Strict-Transport-Security", "max-age=31536000"),)


class ListenError(Exception):
    """The collector may not, or cannot, listen on the address it was given; the message says why."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What `serve` was told."""

    host: str
    port: int
    lost_after: float
    allowed_hosts: Sequence[str] = ()
    require_token: bool = False
    allow_anonymous: bool = False
    rates: Rates = UNLIMITED
    tls: TlsFiles | None = None

    @property
    def guarded(self) -> bool:
        """Whether every request needs a token."""
        return self.require_token or not (self.is_loopback or self.allow_anonymous)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


def listen(settings: ServerSettings, engine: Engine) -> socket.socket:
    """Bind the address, or say in one line why not.

    Raises:
        ListenError: the port is in use, the address is not ours, or it is not loopback, there is no token, and
            that was not said to be meant.
    """
    address = f"{settings.host}:{settings.port}"
    if settings.guarded and not settings.is_loopback:
        with engine.connect() as connection:
            if not has_tokens(connection, time.time_ns()):
                raise ListenError(
                    f"refusing to listen on {address} without a token: others could reach it. "
                    "Create one with `gradwatch token create NAME`, listen on 127.0.0.1, or let everybody in "
                    "with --allow-anonymous"
                )
    host = settings.host.strip("[]")
    try:
        info = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(info[0], info[1])
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(info[4])
        # Connections are accepted from here on, so that whoever reads the printed address can connect at once.
        bound.listen(_BACKLOG)
    except OSError as error:
        raise ListenError(
            f"cannot listen on {address}: {error.strerror or error}; choose another with --listen HOST:PORT"
        ) from error
    return bound


def application(
    engine: Engine, settings: ServerSettings, *, connections: Callable[[], int] = lambda: 0
) -> Starlette:
    """Return the ASGI application; its lifespan starts and stops the writer and the evaluator.

    ``connections`` tells how many are open, for `/metrics`.
    """
    disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus-client's; a series more for each counter
    metrics = CollectorRegistry()
    ProcessCollector(registry=metrics)
    GCCollector(registry=metrics)
    live = LiveRuns()
    instruments = Instruments(metrics)
    instruments.connections.set_function(connections)
    assert isinstance(engine.pool, QueuePool)
    instruments.database_connections.set_function(engine.pool.checkedout)
    traces = tracing(os.environ)
    ingest = Ingest(
        engine,
        Registry(settings.lost_after),
        instruments=instruments,
        on_committed=live.update,
        tracer=traces.tracer,
    )
    objectives = default_objectives().objectives
    evaluator = Evaluator(engine, live, objectives, lost_after=settings.lost_after, tracer=traces.tracer)
    metrics.register(RunMetrics(evaluator, live))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        ingest.start()
        evaluator.start()
        try:
            yield
        finally:
            evaluator.stop()
            ingest.stop()
            traces.close()

    gate = Middleware(
        Gate,
        hosts=(settings.host, *settings.allowed_hosts),
        guard=Guard(Tokens(engine), Limits(settings.rates)) if settings.guarded else None,
        on_refused=instruments.reject,
    )
    return Starlette(
        routes=[*otlp.routes(ingest), *Api(engine, evaluator, objectives, metrics).routes()],
        middleware=[gate],
        lifespan=lifespan,
    )


def serve(engine: Engine, settings: ServerSettings, bound: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are answered first."""
    tls = settings.tls
    if tls is None and not settings.is_loopback:
        logger.warning("%s is served without TLS: tokens and telemetry can be read on the way", settings.host)
    config = uvicorn.Config(
        application(engine, settings, connections=lambda: len(server.server_state.connections)),
        http="httptools",
        ws="none",
        # Ours, not uvicorn's own.
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=10,
        # The Gate, not a proxy's headers, decides who is asking.
        proxy_headers=False,
        # On every answer, whoever gives it.
        headers=[*_HEADERS, *(_HEADERS_OVER_TLS if tls is not None else ())],
        server_header=False,
        ssl_certfile=None if tls is None else tls.certificate,
        ssl_keyfile=None if tls is None else tls.key,
        ssl_ca_certs=None if tls is None else tls.client_ca,
        ssl_cert_reqs=ssl.CERT_NONE if tls is None or tls.client_ca is None else ssl.CERT_REQUIRED,
    )
    server = uvicorn.Server(config)
    server.run(sockets=[bound])
