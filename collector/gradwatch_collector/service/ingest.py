"""The writer: one thread that commits whatever is waiting in one transaction, then answers for all of it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final, Protocol

from opentelemetry.trace import NoOpTracer, StatusCode, Tracer
from prometheus_client import CollectorRegistry
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from gradwatch_collector.auth.teams import Owners
from gradwatch_collector.otlp.errors import OtlpError, RejectedError, UnavailableError
from gradwatch_collector.records import Batch, ProcessKey, Received, Source
from gradwatch_collector.runs.turns import take_turns
from gradwatch_collector.service.instruments import Instruments
from gradwatch_collector.service.tracing import commit_span
from gradwatch_collector.storage.database import is_deadlock, is_transient, transaction
from gradwatch_collector.storage.series import SeriesIds
from gradwatch_collector.storage.writing import store

logger = logging.getLogger(__name__)

# A larger transaction would keep the evaluator waiting for its turn.
_MAX_GROUP_BYTES: Final = 16 << 20
_ATTEMPTS: Final = 3
_STOP_SECONDS: Final = 5.0


class ProcessRegistry(Protocol):
    """What the writer asks of the run registry."""

    def resolve(self, connection: Connection, senders: Sequence[tuple[Source, int]]) -> list[ProcessKey]:
        """Return which process of which attempt sent each batch, and was heard when it was received."""

    def apply(self, connection: Connection, group: Sequence[Received]) -> None:
        """Let batches change how their runs stand."""


@dataclass(frozen=True, slots=True)
class _Request:
    batches: Sequence[Batch]
    size: int
    received_at: int
    done: Future[None] = field(default_factory=Future)


class Ingest:
    """Group commit: requests that arrive during one commit share the next.

    A request is one unit: all of it is stored or none. Data that the database refuses fails its own request
    only. Thread-safe.
    """

    def __init__(
        self,
        engine: Engine,
        registry: ProcessRegistry,
        *,
        instruments: Instruments | None = None,
        on_committed: Callable[[list[Received]], None] | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.instruments = instruments or Instruments(CollectorRegistry())
        self._tracer = tracer or NoOpTracer()
        self._owners = Owners()
        self._engine = engine
        self._registry = registry
        self._on_committed = on_committed
        self._series = SeriesIds()
        self._waiting: list[_Request] = []
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="gradwatch-ingest", daemon=True)

    def start(self) -> None:
        """Start the writer."""
        self._thread.start()

    def stop(self) -> None:
        """Refuse new requests, commit those that are waiting, and end; leave a database that hangs alone.

        What is not committed by then was not acknowledged either.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(_STOP_SECONDS)
        if self._thread.is_alive():
            logger.warning("the database does not answer: what is not committed is left to its senders")

    def submit(self, batches: Sequence[Batch], size: int, received_at: int) -> asyncio.Future[None]:
        """Queue a decoded request that holds ``size`` bytes; the result arrives once it is committed.

        Raises (here or from the future):
            UnavailableError: the database is away or the collector stopping; the sender should try again.
            RejectedError: the database does not take the data.
            ForbiddenError: it came with one team's token, and is about another's run.
        """
        return asyncio.wrap_future(self.put(batches, size, received_at))

    def put(self, batches: Sequence[Batch], size: int, received_at: int) -> Future[None]:
        """Do as `submit`, outside an event loop."""
        request = _Request(batches, size, received_at)
        with self._changed:
            if self._stopping:
                raise UnavailableError("the collector is stopping")
            self._waiting.append(request)
            self.instruments.queue_depth.set(len(self._waiting))
            self._changed.notify()
        self.instruments.receive(batches)
        return request.done

    def _run(self) -> None:
        while group := self._next_group():
            started = time.perf_counter()
            self._commit_or_split(group)
            self.instruments.commit_duration.observe(time.perf_counter() - started)

    def _next_group(self) -> list[_Request]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            size = taken = 0
            while taken < len(self._waiting) and (not taken or size < _MAX_GROUP_BYTES):
                size += self._waiting[taken].size
                taken += 1
            group, self._waiting = self._waiting[:taken], self._waiting[taken:]
            self.instruments.queue_depth.set(len(self._waiting))
        # A client that went away has cancelled its request. What it sent is stored all the same: it was
        # received, and storing it is idempotent.
        for request in group:
            request.done.set_running_or_notify_cancel()
        return group

    def _commit_or_split(self, group: Sequence[_Request]) -> None:
        error = self._commit(group)
        if error is None:
            for request in group:
                _answer(request, None)
        elif isinstance(error, UnavailableError) or len(group) == 1:
            for request in group:
                _answer(request, error)
        else:
            # One of them is bad, and nobody knows which: each for itself.
            for request in group:
                _answer(request, self._commit([request]))

    def _commit(self, group: Sequence[_Request]) -> OtlpError | None:
        with commit_span(self._tracer, (batch for request in group for batch in request.batches)) as span:
            error = self._try(group)
            if error is not None:
                span.set_status(StatusCode.ERROR, str(error))
            return error

    def _try(self, group: Sequence[_Request]) -> OtlpError | None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with transaction(self._engine) as connection:
                    committed = self._write(connection, group)
            except SQLAlchemyError as error:
                self._series.forget()
                if is_deadlock(error) and attempt < _ATTEMPTS:
                    continue
                return _refusal(error)
            except OtlpError as error:
                self._series.forget()
                return error
            except Exception as error:
                # A value that no layer foresaw must cost its request, never the writer.
                self._series.forget()
                logger.exception("a request could not be stored")
                return RejectedError(f"the data cannot be stored: {type(error).__name__}")
            self._series.keep()
            self.instruments.commit(each.batch for each in committed)
            self._tell(committed)
            return None
        raise AssertionError("unreachable")

    def _write(self, connection: Connection, group: Sequence[_Request]) -> list[Received]:
        arrived = [(batch, request.received_at) for request in group for batch in request.batches]
        take_turns(connection, {batch.source.run_id for batch, _ in arrived})
        self._owners.require(connection, [batch.source for batch, _ in arrived])
        keys = self._registry.resolve(connection, [(batch.source, at) for batch, at in arrived])
        received = [Received(key, batch, at) for key, (batch, at) in zip(keys, arrived, strict=True)]
        store(connection, self._series, received)
        self._registry.apply(connection, received)
        return received

    def _tell(self, committed: list[Received]) -> None:
        if self._on_committed is None:
            return
        try:
            self._on_committed(committed)
        except Exception:
            # The data is safe already; a listener's trouble is not the sender's.
            logger.exception("a listener failed on committed data")


def _answer(request: _Request, error: OtlpError | None) -> None:
    if request.done.cancelled():
        return
    if error is None:
        request.done.set_result(None)
    else:
        request.done.set_exception(error)


def _refusal(error: SQLAlchemyError) -> OtlpError:
    if is_transient(error):
        logger.warning("the database is not available: %s", str(error).splitlines()[0])
        return UnavailableError("the database is not available")
    logger.warning("the database refused data: %s", str(error).splitlines()[0])
    return RejectedError(f"the database refused the data: {type(error).__name__}")
