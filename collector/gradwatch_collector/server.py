"""The collector put together: receiver, writer, evaluator, API and the socket they listen on."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import uvicorn
from prometheus_client import CollectorRegistry, disable_created_metrics
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from sqlalchemy import Engine
from starlette.applications import Starlette
from starlette.middleware import Middleware

from gradwatch_collector import otlp
from gradwatch_collector.api import Api
from gradwatch_collector.auth import Gate, Tokens, has_tokens
from gradwatch_collector.evaluator import Evaluator
from gradwatch_collector.exposition import RunMetrics
from gradwatch_collector.ingest import Ingest
from gradwatch_collector.instruments import Instruments
from gradwatch_collector.live import LiveRuns
from gradwatch_collector.otlp.intake import MAX_BODY
from gradwatch_collector.refusals import EXCEPTION_HANDLERS
from gradwatch_collector.registry import Registry
from gradwatch_slo.objectives import default_objectives

if TYPE_CHECKING:
    from gradwatch_collector.otlp.grpc_server import GrpcServer

_BACKLOG: Final = 2048
_GRACE_SECONDS: Final = 10


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
    """What `serve` was told. ``grpc`` is None where no gRPC is served."""

    http: Address
    grpc: Address | None
    lost_after: float
    allowed_hosts: Sequence[str] = ()
    require_token: bool = False

    def tokens(self, address: Address, engine: Engine) -> Tokens | None:
        """Return what checks tokens on an address, or None where none are needed."""
        return Tokens(engine) if self.require_token or not address.is_loopback else None


def listen(settings: ServerSettings, engine: Engine) -> socket.socket:
    """Bind the address for HTTP, or say in one line why not.

    Raises:
        ListenError: the port is in use, the address is not ours, or it is not loopback and there is no token.
    """
    address = settings.http
    _require_guard(address, engine)
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

    _require_guard(address, engine)
    try:
        _bind(address).close()  # grpcio does not say why it cannot
        return GrpcServer(address, max_body=MAX_BODY, tokens=settings.tokens(address, engine))
    except OSError as error:
        raise ListenError(
            f"cannot listen on {address}: {error.strerror or error}; choose another with --grpc HOST:PORT, "
            "or serve no gRPC with --grpc off"
        ) from error


def _require_guard(address: Address, engine: Engine) -> None:
    if address.is_loopback:
        return
    with engine.connect() as connection:
        if not has_tokens(connection):
            raise ListenError(
                f"refusing to listen on {address} without a token: others could reach it. "
                "Create one with `gradwatch token create NAME`, or listen on 127.0.0.1"
            )


def _bind(address: Address) -> socket.socket:
    info = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(info[0], info[1])
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(info[4])
    except OSError:
        bound.close()
        raise
    return bound


def application(engine: Engine, settings: ServerSettings, grpc: GrpcServer | None = None) -> Starlette:
    """Return the ASGI application; its lifespan starts and stops the writer, the evaluator and gRPC."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus-client's; a series more for each counter
    metrics = CollectorRegistry()
    ProcessCollector(registry=metrics)
    GCCollector(registry=metrics)
    live = LiveRuns()
    instruments = Instruments(metrics)
    ingest = Ingest(engine, Registry(settings.lost_after), instruments=instruments, on_committed=live.update)
    evaluator = Evaluator(engine, live, default_objectives().objectives, lost_after=settings.lost_after)
    metrics.register(RunMetrics(evaluator, live))
    intake = otlp.Intake(ingest)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        ingest.start()
        evaluator.start()
        if grpc is not None:
            grpc.start(intake)
        try:
            yield
        finally:
            if grpc is not None:
                grpc.stop(_GRACE_SECONDS)
            evaluator.stop()
            ingest.stop()

    gate = Middleware(
        Gate,
        hosts=(settings.http.host, *settings.allowed_hosts),
        tokens=settings.tokens(settings.http, engine),
    )
    return Starlette(
        routes=[*otlp.routes(intake), *Api(engine, evaluator, metrics).routes()],
        middleware=[gate],
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )


def serve(
    engine: Engine, settings: ServerSettings, bound: socket.socket, grpc: GrpcServer | None = None
) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are answered first."""
    config = uvicorn.Config(
        application(engine, settings, grpc),
        http="httptools",
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        # The Gate, not a proxy's headers, decides who is asking.
        proxy_headers=False,
    )
    uvicorn.Server(config).run(sockets=[bound])
