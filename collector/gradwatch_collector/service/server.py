"""The collector put together: receiver, writer, evaluator, API and the socket they listen on."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import uvicorn
from prometheus_client import CollectorRegistry, disable_created_metrics
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from sqlalchemy import Engine, QueuePool
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware

from gradwatch_collector import otlp
from gradwatch_collector.api.refusals import exception_handlers
from gradwatch_collector.api.routes import Api
from gradwatch_collector.auth import UNLIMITED, Gate, Guard, Limits, Rates, Tokens, has_tokens
from gradwatch_collector.findings.overrides import Override
from gradwatch_collector.otlp.memory import DEFAULT_MEMORY, Memory
from gradwatch_collector.page.routes import page_routes
from gradwatch_collector.runs.live import LiveRuns
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.service.connections import HttpConnection
from gradwatch_collector.service.evaluator import Evaluator
from gradwatch_collector.service.exposition import RunMetrics
from gradwatch_collector.service.ingest import Ingest
from gradwatch_collector.service.instruments import Instruments
from gradwatch_collector.service.lease import Lease
from gradwatch_collector.service.summariser import Summariser
from gradwatch_collector.service.tls import TlsFiles
from gradwatch_collector.service.tracing import tracing
from gradwatch_collector.service.upkeep import Upkeep
from gradwatch_collector.storage.database_clock import DatabaseClock
from gradwatch_collector.storage.retention import EMBEDDED, Policy
from gradwatch_slo.cost import PriceTable
from gradwatch_slo.objective import Objective
from gradwatch_slo.objectives import default_objectives

if TYPE_CHECKING:
    from gradwatch_collector.otlp.grpc_server import GrpcServer

logger = logging.getLogger(__name__)

_BACKLOG: Final = 2048
# Requests under way at the end are answered within this; with what ends after them it takes 20 s at most, and
# Kubernetes waits for 30 s before it kills.
_GRACE_SECONDS: Final = 10
# Those over gRPC have had the same time by then; what still waits, waits for the writer, which gives up soon.
_GRPC_GRACE_SECONDS: Final = 4
_HEADERS: Final = (
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    # Pages load what is ours and nothing else, and nobody shows ours within theirs.
    (
        "Content-Security-Policy",
        # Plotly writes styles into the page, and draws heat maps as images of its own.
        (
            "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
            "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
        ),
    ),
)
_HEADERS_OVER_TLS: Final = (("Strict-Transport-Security", "max-age=31536000"),)


class ListenError(Exception):
    """The collector may not, or cannot, listen on the address it was given; the message says why."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen. ``host`` without brackets; port 0 takes a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What `serve` was told. ``grpc`` is None where no gRPC is served; ``memory`` in bytes."""

    http: Address
    grpc: Address | None
    lost_after: float
    memory: int = DEFAULT_MEMORY
    allowed_hosts: Sequence[str] = ()
    require_token: bool = False
    allow_anonymous: bool = False
    rates: Rates = UNLIMITED
    tls: TlsFiles | None = None
    policy: Policy = EMBEDDED
    prices: PriceTable | None = None
    overrides: Sequence[Override] = ()
    objectives: Sequence[Objective] = field(default_factory=lambda: default_objectives().objectives)

    def guarded(self, address: Address) -> bool:
        """Whether every request to this address needs a token."""
        return self.require_token or not (address.is_loopback or self.allow_anonymous)


def listen(settings: ServerSettings, engine: Engine) -> socket.socket:
    """Bind the address for HTTP, or say in one line why not.

    Raises:
        ListenError: the port is in use, the address is not ours, or it is not loopback, there is no token, and
            that was not said to be meant.
    """
    address = settings.http
    _require_guard(settings, address, engine)
    try:
        bound = _bind(address)
        # Connections are accepted from here on, so that whoever reads the printed address can connect at once.
        bound.listen(_BACKLOG)
    except OSError as error:
        raise ListenError(
            f"cannot listen on {address}: {error.strerror or error}; choose another with --listen HOST:PORT"
        ) from error
    return bound


def listen_grpc(settings: ServerSettings, engine: Engine) -> GrpcServer | None:
    """Bind the address for gRPC, or say in one line why not. None if none was asked for.

    Raises:
        ListenError: as for `listen`.
    """
    if (address := settings.grpc) is None:
        return None
    from gradwatch_collector.otlp.grpc_server import GrpcServer

    _require_guard(settings, address, engine)
    try:
        _bind(address).close()  # grpcio does not say why it cannot
        return GrpcServer(address, tls=settings.tls)
    except OSError as error:
        raise ListenError(
            f"cannot listen on {address}: {error.strerror or error}; choose another with --grpc HOST:PORT, "
            "or serve no gRPC with --grpc off"
        ) from error


def _require_guard(settings: ServerSettings, address: Address, engine: Engine) -> None:
    if address.is_loopback or not settings.guarded(address):
        return
    with engine.connect() as connection:
        if not has_tokens(connection, time.time_ns()):
            raise ListenError(
                f"refusing to listen on {address} without a token: others could reach it. "
                "Create one with `gradwatch token create NAME`, listen on 127.0.0.1, or let everybody in "
                "with --allow-anonymous"
            )


def _bind(address: Address) -> socket.socket:
    info = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(info[0], info[1])
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Whatever is accepted has it, too: a host that vanished is noticed at some time.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    try:
        bound.bind(info[4])
    except OSError:
        bound.close()
        raise
    return bound


def application(
    engine: Engine,
    settings: ServerSettings,
    grpc: GrpcServer | None = None,
    *,
    connections: Callable[[], int] = lambda: 0,
    is_ending: Callable[[], bool] = lambda: False,
) -> Starlette:
    """Return the ASGI application; its lifespan starts and stops writer, evaluator, upkeep and gRPC.

    ``connections`` tells how many are open over HTTP, for `/metrics`; ``is_ending`` whether answers that go on
    for ever should end now.
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
    clock, lease = DatabaseClock(), Lease(engine)
    with engine.connect() as connection:
        clock.set(connection)
    evaluator = Evaluator(
        engine,
        live,
        settings.objectives,
        lease=lease,
        lost_after=settings.lost_after,
        overrides=settings.overrides,
        now=clock.now,
        tracer=traces.tracer,
    )
    upkeep = Upkeep(engine, lease, clock, settings.policy)
    summariser = Summariser(engine, lease, clock, settings.prices)
    # One for all protocols: a token's limits are limits of what it sends altogether.
    guard = Guard(Tokens(engine), Limits(settings.rates))
    metrics.register(RunMetrics(evaluator, live, upkeep))
    intake = otlp.Intake(ingest, Memory.of_process(settings.memory), now=clock.now)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        upkeep.start()
        ingest.start()
        evaluator.start()
        summariser.start()
        if grpc is not None:
            assert settings.grpc is not None
            grpc.start(intake, guard if settings.guarded(settings.grpc) else None)
        try:
            yield
        finally:
            # Off this thread, which still has answers to send. The evaluator gives the lease back at its end.
            stops = [upkeep.stop, ingest.stop, summariser.stop]
            if grpc is not None:
                stops.append(functools.partial(grpc.stop, _GRPC_GRACE_SECONDS))
            await asyncio.gather(*map(asyncio.to_thread, stops))
            await asyncio.to_thread(evaluator.stop)
            traces.close()

    guarding = guard if settings.guarded(settings.http) else None
    gate = Middleware(
        Gate,
        hosts=(settings.http.host, *settings.allowed_hosts),
        guard=guarding,
        on_refused=instruments.reject,
    )
    app = Starlette(
        routes=[
            *otlp.routes(intake),
            *Api(engine, evaluator, settings.objectives, metrics, settings.prices).routes(),
            *page_routes(evaluator, guarding, is_ending),
        ],
        # Between the gate and the routes: what is streamed, and what is compressed already, is left as it is.
        middleware=[gate, Middleware(GZipMiddleware, minimum_size=1_000, compresslevel=5)],
        exception_handlers=exception_handlers(instruments.reject),
        lifespan=lifespan,
    )
    # OTLP knows no redirects, and a client that follows none would be told nothing.
    app.router.redirect_slashes = False
    return app


def serve(
    engine: Engine, settings: ServerSettings, bound: socket.socket, grpc: GrpcServer | None = None
) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are answered first, then the process ends well."""
    tls = settings.tls
    for address in (settings.http, settings.grpc):
        if tls is None and address is not None and not address.is_loopback:
            logger.warning("%s is served without TLS: tokens and telemetry can be read on the way", address)
    config = uvicorn.Config(
        application(
            engine,
            settings,
            grpc,
            connections=lambda: len(server.server_state.connections),
            is_ending=lambda: server.should_exit,
        ),
        http=HttpConnection,
        ws="none",
        # Ours, not uvicorn's own.
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
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

    def end(*_: object) -> None:
        server.should_exit = True

    # uvicorn has handlers of its own while it serves, and at the end raises the signal again for those of
    # before: the default ones would make an orderly end look like a killing.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    server.run(sockets=[bound])
