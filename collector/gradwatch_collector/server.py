"""The collector put together: receiver, writer, evaluator, API and the socket they listen on."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final

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
from gradwatch_collector.database_clock import DatabaseClock
from gradwatch_collector.evaluator import Evaluator
from gradwatch_collector.exposition import RunMetrics
from gradwatch_collector.ingest import Ingest
from gradwatch_collector.instruments import Instruments
from gradwatch_collector.lease import Lease
from gradwatch_collector.live import LiveRuns
from gradwatch_collector.registry import Registry
from gradwatch_collector.retention import EMBEDDED, Policy
from gradwatch_collector.upkeep import Upkeep
from gradwatch_slo.objectives import default_objectives

_BACKLOG: Final = 2048
# Requests under way at the end are answered within this; with what ends after them it takes 20 s at most, and
# Kubernetes waits for 30 s before it kills.
_GRACE_SECONDS: Final = 10


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
    policy: Policy = EMBEDDED

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
        ListenError: the port is in use, the address is not ours, or it is not loopback and there is no token.
    """
    address = f"{settings.host}:{settings.port}"
    if not settings.is_loopback:
        with engine.connect() as connection:
            if not has_tokens(connection):
                raise ListenError(
                    f"refusing to listen on {address} without a token: others could reach it. "
                    "Create one with `gradwatch token create NAME`, or listen on 127.0.0.1"
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


def application(engine: Engine, settings: ServerSettings) -> Starlette:
    """Return the ASGI application; its lifespan starts and stops the writer, the evaluator and the upkeep."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus-client's; a series more for each counter
    metrics = CollectorRegistry()
    ProcessCollector(registry=metrics)
    GCCollector(registry=metrics)
    live = LiveRuns()
    instruments = Instruments(metrics)
    ingest = Ingest(engine, Registry(settings.lost_after), instruments=instruments, on_committed=live.update)
    clock, lease = DatabaseClock(), Lease(engine)
    with engine.connect() as connection:
        clock.set(connection)
    evaluator = Evaluator(
        engine,
        live,
        default_objectives().objectives,
        lease=lease,
        lost_after=settings.lost_after,
        now=clock.now,
    )
    upkeep = Upkeep(engine, lease, clock, settings.policy)
    metrics.register(RunMetrics(evaluator, live))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        upkeep.start()
        ingest.start()
        evaluator.start()
        try:
            yield
        finally:
            # Off this thread, which still has answers to send. The evaluator gives the lease back at its end.
            await asyncio.gather(*(asyncio.to_thread(each.stop) for each in (upkeep, ingest)))
            await asyncio.to_thread(evaluator.stop)

    guarded = settings.require_token or not settings.is_loopback
    gate = Middleware(
        Gate, hosts=(settings.host, *settings.allowed_hosts), tokens=Tokens(engine) if guarded else None
    )
    return Starlette(
        routes=[*otlp.routes(ingest, now=clock.now), *Api(engine, evaluator, metrics).routes()],
        middleware=[gate],
        lifespan=lifespan,
    )


def serve(engine: Engine, settings: ServerSettings, bound: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are answered first, then the process ends well."""
    config = uvicorn.Config(
        application(engine, settings),
        http="httptools",
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        # The Gate, not a proxy's headers, decides who is asking.
        proxy_headers=False,
    )
    server = uvicorn.Server(config)

    def end(*_: object) -> None:
        server.should_exit = True

    # uvicorn has handlers of its own while it serves, and at the end raises the signal again for those of
    # before: the default ones would make an orderly end look like a killing.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    server.run(sockets=[bound])
