"""Receivers in this process, in front of real writers and databases, for tests that hold something back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from sqlalchemy import Connection, Engine, create_engine, text
from starlette.applications import Starlette
from starlette.middleware import Middleware

from gradwatch_collector import otlp
from gradwatch_collector.api.refusals import exception_handlers
from gradwatch_collector.auth import Gate, Guard
from gradwatch_collector.otlp.grpc_server import GrpcServer
from gradwatch_collector.records import ProcessKey, Source
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.service.ingest import Ingest
from gradwatch_collector.service.server import Address


@dataclass(frozen=True)
class Addresses:
    """Where a receiver listens: ``http://HOST:PORT`` and ``HOST:PORT``."""

    url: str
    grpc: str


@contextmanager
def running(ingest: Ingest) -> Iterator[Ingest]:
    ingest.start()
    try:
        yield ingest
    finally:
        ingest.stop()


@contextmanager
def serving(ingest: Ingest, **limits: Any) -> Iterator[str]:
    """Serve OTLP/HTTP on a free port of loopback; yield the address."""
    with _serving_http(otlp.Intake(ingest, **limits), None, ingest.instruments.reject) as url:
        yield url


@contextmanager
def receiving(ingest: Ingest, *, guard: Guard | None = None, **limits: Any) -> Iterator[Addresses]:
    """Serve OTLP over HTTP and gRPC on free ports of loopback; yield the addresses."""
    intake = otlp.Intake(ingest, **limits)
    grpc = GrpcServer(Address("127.0.0.1", 0), max_body=intake.max_body)
    grpc.start(intake, guard)
    try:
        with _serving_http(intake, guard, ingest.instruments.reject) as url:
            yield Addresses(url, str(grpc.address))
    finally:
        grpc.stop(10)


@contextmanager
def _serving_http(intake: otlp.Intake, guard: Guard | None, on_refused: Callable[[str], None]) -> Iterator[str]:
    app = Starlette(
        routes=otlp.routes(intake),
        middleware=[Middleware(Gate, hosts=(), guard=guard, on_refused=on_refused)],
        exception_handlers=exception_handlers(on_refused),
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off", ws="none"))
    ready = threading.Event()
    startup = server.startup

    async def started(*arguments: Any, **keywords: Any) -> None:
        await startup(*arguments, **keywords)
        ready.set()

    server.startup = started  # type: ignore[method-assign] - uvicorn has no other way to tell a thread
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(30)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def away(database: Engine) -> Iterator[None]:
    """Nothing can be written while the block lasts."""
    database.dispose()
    if database.dialect.name == "postgresql":
        server = create_engine(database.url.set(database="postgres"), isolation_level="AUTOCOMMIT")

        def allow(connections: str) -> None:
            statement = f"ALTER DATABASE {database.url.database} ALLOW_CONNECTIONS {connections}"
            with server.connect() as connection:
                connection.execute(text(statement))

        allow("false")
        yield
        allow("true")
        server.dispose()
    else:
        file = Path(database.url.database or "")
        moved = file.rename(file.with_suffix(".moved"))
        file.mkdir()  # SQLite would make a file that is missing
        yield
        file.rmdir()
        moved.rename(file)


class Gatekeeper(Registry):
    """Lets a test hold a commit open."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.leave = threading.Event(), threading.Event()

    def resolve(self, connection: Connection, senders: Sequence[tuple[Source, int]]) -> list[ProcessKey]:
        self.entered.set()
        assert self.leave.wait(30)
        return super().resolve(connection, senders)
