"""OTLP/gRPC: the three Export services, answered after the commit as over HTTP.

Imported only where gRPC is served: grpcio starts threads and takes time to load.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

# grpcio would write a line on stderr for whatever a client does wrong. It reads this when it is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

from gradwatch_collector.auth import Grant, Guard, Role
from gradwatch_collector.otlp.errors import (
    MalformedError,
    OtlpError,
    SlowError,
    UnavailableError,
    retry_info,
    status_message,
)
from gradwatch_collector.otlp.intake import Intake
from gradwatch_collector.otlp.signals import Signal
from gradwatch_collector.service.tls import TlsFiles

if TYPE_CHECKING:
    from gradwatch_collector.service.server import Address

logger = logging.getLogger(__name__)

_STATUS_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
_COMPRESSIONS: Final = 1 << grpc.Compression.NoCompression | 1 << grpc.Compression.Gzip
_GZIP: Final = b"\x1f\x8b"
# The OpenTelemetry Collector's own limit for a message. Its size is not known before it is read, and then it is
# in memory: so less than over HTTP, and only so many at a time.
MAX_MESSAGE: Final = 4 << 20
_STREAMS: Final = 100  # under way over one connection, as HTTP/2 recommends at least
_START_SECONDS: Final = 30
# In which those that are given up at the end are told so.
_LAST_WORDS_SECONDS: Final = 1.0

_Export = Callable[[Any, Any], Awaitable[bytes]]


class _Calls:
    """The requests that are under way; grpcio would give them up at the end without an answer."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[bytes]] = set()
        self._is_ending = False

    async def answer(self, work: Coroutine[Any, Any, bytes]) -> bytes:
        """Do what a request asks for, to its end: what a client has given up is on its way all the same."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[bytes]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # of which nobody may be there to hear

    @contextlib.contextmanager
    def put_off_at_the_end(self) -> Iterator[None]:
        """Answer those that are given up at the end: the sender still has the request."""
        try:
            yield
        except asyncio.CancelledError as error:
            if not self._is_ending:
                raise
            raise UnavailableError("the collector is stopping") from error

    def end(self) -> None:
        """Give up whatever is under way."""
        self._is_ending = True
        for task in tuple(self._tasks):
            task.cancel()


class GrpcServer:
    """Holds its ``address`` from construction on, and answers between `start` and `stop`.

    ``max_body``: bytes that a message may have as it comes. It runs on an event loop and a thread of its own:
    its port must be known before the HTTP server has a loop.

    Raises:
        OSError: the address cannot be had.
    """

    def __init__(self, address: Address, *, max_body: int = MAX_MESSAGE, tls: TlsFiles | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gradwatch-grpc", daemon=True)
        self._thread.start()
        self._calls = _Calls()
        self._max_body = max_body
        try:
            self._server, bound = self._run(_bind(str(address), max_body, tls))
        except OSError:
            self._end()
            raise
        self.address = replace(address, port=bound)

    def start(self, intake: Intake, guard: Guard | None = None) -> None:
        """Begin to answer; with a guard only those whom that admits."""
        readers = asyncio.Semaphore(intake.most_messages(self._max_body))
        services = (_service(intake, signal, guard, self._calls, readers) for signal in intake.signals)
        self._server.add_generic_rpc_handlers(tuple(services))
        self._run(self._server.start())

    def stop(self, grace: float) -> None:
        """Refuse new requests, let those under way end within ``grace`` seconds, put off the rest, and end."""
        self._run(self._stop(grace), grace)
        self._end()

    async def _stop(self, grace: float) -> None:
        stopped = asyncio.ensure_future(self._server.stop(grace + _LAST_WORDS_SECONDS))
        await asyncio.wait([stopped], timeout=grace)
        self._calls.end()
        await stopped

    def _run(self, work: Coroutine[Any, Any, Any], grace: float = 0.0) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_START_SECONDS + grace)

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _bind(address: str, max_body: int, tls: TlsFiles | None) -> tuple[Any, int]:
    server = grpc.aio.server(
        options=(
            # Two collectors would share the port, and each would get half of what is sent.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", max_body),
            ("grpc.max_concurrent_streams", _STREAMS),
            # Clients that vanished, and those that have nothing to say for long.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.max_connection_idle_ms", 600_000),
            # Compressed messages are left to us, because the limit above is for what comes in: a gzip bomb
            # would be unpacked before anybody could look. Of compressions only gzip is offered.
            ("grpc.per_message_decompression", 0),
            ("grpc.compression_enabled_algorithms_bitset", _COMPRESSIONS),
        )
    )
    try:
        bound: int = (
            server.add_insecure_port(address)
            if tls is None
            else server.add_secure_port(address, _credentials(tls))
        )
    except RuntimeError as error:
        raise OSError("the port is in use or the address is not ours") from error
    return server, bound


def _credentials(tls: TlsFiles) -> Any:
    certificate, key = Path(tls.certificate).read_bytes(), Path(tls.key).read_bytes()
    authority = None if tls.client_ca is None else Path(tls.client_ca).read_bytes()
    return grpc.ssl_server_credentials(
        [(key, certificate)], root_certificates=authority, require_client_auth=authority is not None
    )


def _service(
    intake: Intake, signal: Signal, guard: Guard | None, calls: _Calls, readers: asyncio.Semaphore
) -> Any:
    # No (de)serialisers: decoders take bytes, and the answer to nearly every request is no bytes at all.
    # To clients a stream of one message is that message. Here it is one that is read when we say so: after the
    # token, and when there is room.
    method = grpc.stream_unary_rpc_method_handler(_export(intake, signal, guard, calls, readers))
    return grpc.method_handlers_generic_handler(signal.service, {"Export": method})


def _export(
    intake: Intake, signal: Signal, guard: Guard | None, calls: _Calls, readers: asyncio.Semaphore
) -> _Export:
    async def export(_: Any, context: Any) -> bytes:
        return await calls.answer(answer(context))

    async def answer(context: Any) -> bytes:
        try:
            grant = None if guard is None else await _grant(guard, context)
            with calls.put_off_at_the_end(), intake.hold() as holding:
                async with readers:
                    body = await _message(context, intake.body_seconds)
                    holding.grow(len(body))
                if guard is not None and grant is not None:
                    guard.charge(grant, len(body))
                # No encoded message begins like gzip does: there is no wire type 7.
                if body[:2] == _GZIP:
                    body = await intake.decompressed(body, intake.max_decompressed, holding)
                response = await intake.accept(signal, body, grant, holding)
        except OtlpError as error:
            failure = error
        except Exception:
            logger.exception("a request failed")
            failure = OtlpError("internal error")
        else:
            encoded: bytes = response.SerializeToString()
            return encoded
        intake.refused(failure)
        return await _abort(context, failure)

    return export


async def _message(context: Any, seconds: float) -> bytes:
    try:
        async with asyncio.timeout(seconds):
            message: Any = await context.read()
    except TimeoutError:
        raise SlowError(f"the message did not arrive within {seconds:g} s") from None
    if message is grpc.aio.EOF:
        if context.cancelled() or context.done():
            # By the client, or by grpcio: the message is too large, or compressed as nobody offered.
            raise asyncio.CancelledError
        raise MalformedError("no message came")
    encoded: bytes = message
    return encoded


async def _grant(guard: Guard, context: Any) -> Grant:
    metadata = dict(context.invocation_metadata() or ())
    return await guard.admit_async(metadata.get("authorization"), Role.INGEST)


async def _abort(context: Any, error: OtlpError) -> NoReturn:
    """End the call with the status of an error and, if the request may be sent again, when.

    opentelemetry-python looks for RetryInfo in a trailer of its own, all others in the standard one.
    """
    status = status_message(error.status, str(error), error.retry_after)
    trailers = [("grpc-status-details-bin", status.SerializeToString())]
    if error.retry_after is not None:
        trailers.append(("google.rpc.retryinfo-bin", retry_info(error.retry_after).SerializeToString()))
    await context.abort(_STATUS_CODES[status.code], status.message, tuple(trailers))
    raise AssertionError("unreachable")
