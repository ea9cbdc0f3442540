"""What every transport does with a request once its bytes are there: unpack, decode, commit, answer."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from gradwatch_collector.otlp.errors import MalformedError, OtlpError, TooLargeError
from gradwatch_collector.otlp.memory import Holding, Memory
from gradwatch_collector.otlp.signals import Signal, signals

if TYPE_CHECKING:
    from gradwatch_collector.auth import Grant  # which uses this package's errors
    from gradwatch_collector.service.ingest import Ingest  # which raises them

# The OpenTelemetry Collector's own limit for a request body is 20 MiB.
MAX_BODY: Final = 20 << 20
MAX_DECOMPRESSED: Final = 64 << 20
# Larger bodies take milliseconds to decode: not on the thread that answers health checks.
DECODE_INLINE: Final = 512 << 10
_UNPACK_AT_ONCE: Final = 1 << 20


class Intake:
    """The way into the database for decoded requests, with the limits that hold on it.

    Limits in bytes, before and after decompression; ``now`` in Unix nanoseconds. It may be used from several
    event loops.
    """

    def __init__(
        self,
        ingest: Ingest,
        memory: Memory | None = None,
        *,
        max_body: int = MAX_BODY,
        max_decompressed: int = MAX_DECOMPRESSED,
        now: Callable[[], int] = time.time_ns,
    ) -> None:
        self.max_body = max_body
        self.max_decompressed = max_decompressed
        self.signals: Sequence[Signal] = signals()
        self._ingest = ingest
        self._memory = memory or Memory.of_process()
        ingest.instruments.queue_limit.set(self._memory.limit)
        self._now = now

    def hold(self) -> Holding:
        """Return what counts the bytes of one request, from the first to its answer."""
        return Holding(self._memory)

    async def accept(self, signal: Signal, body: bytes, grant: Grant | None) -> Any:
        """Store an encoded request and return the response message once it is committed.

        Raises:
            OtlpError: it cannot be stored, now or ever.
        """
        received_at = self._now()
        if len(body) <= DECODE_INLINE:
            decoded = signal.decode(body, received_at)
        else:
            decoded = await asyncio.to_thread(signal.decode, body, received_at)
        batches = decoded.batches if grant is None else grant.stamp(decoded.batches)
        await self._ingest.submit(batches, len(body), received_at)
        return signal.answer(decoded)

    def refused(self, error: OtlpError) -> None:
        """Count a request that was refused."""
        self._ingest.instruments.reject(error.reason)


async def decompressed(body: bytes, limit: int, holding: Holding) -> bytes:
    """Return what is in a gzip body of one or several members.

    Raises:
        MalformedError: it is not gzip, or ends too early.
        TooLargeError: more than ``limit`` bytes are in it.
        UnavailableError: there is no room for it now.
    """
    if len(body) <= DECODE_INLINE:
        return _gunzip(body, limit, holding)
    return await asyncio.to_thread(_gunzip, body, limit, holding)


def _gunzip(body: bytes, limit: int, holding: Holding) -> bytes:
    parts: list[bytes] = []
    size = 0
    while body:  # gzip members may follow each other
        stream = zlib.decompressobj(wbits=31)
        while not stream.eof:
            try:
                part = stream.decompress(body, _UNPACK_AT_ONCE)
            except zlib.error as error:
                raise MalformedError("the body is not gzip, which it claims to be") from error
            if not part and not stream.eof:
                raise MalformedError("the gzip body ends too early")
            size += len(part)
            if size > limit:
                raise TooLargeError(f"the body has more than {limit} bytes after decompression")
            holding.grow(len(part))
            parts.append(part)
            body = stream.unconsumed_tail
        body = stream.unused_data
    return b"".join(parts)
