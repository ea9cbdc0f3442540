"""What every transport does with a request once its bytes are there: unpack, decode, commit, answer."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, TypeVar

from gradwatch_collector.otlp.decoded import Decoded
from gradwatch_collector.otlp.errors import MalformedError, OtlpError, TooLargeError
from gradwatch_collector.otlp.memory import SMALL, Holding, Memory
from gradwatch_collector.otlp.parts import Parts
from gradwatch_collector.otlp.signals import Signal, signals

if TYPE_CHECKING:
    from gradwatch_collector.auth import Grant  # which uses this package's errors
    from gradwatch_collector.service.ingest import Ingest  # which raises them

_Result = TypeVar("_Result")
# The OpenTelemetry Collector's own limit for a request body is 20 MiB.
MAX_BODY: Final = 20 << 20
MAX_DECOMPRESSED: Final = 64 << 20
# OpenTelemetry's exporters give up after 10 s. A body that takes longer than this comes from nobody who waits.
BODY_SECONDS: Final = 30.0
# What has or weighs more takes many milliseconds to decode: not on the thread that answers health checks.
_INLINE: Final = SMALL
_UNPACK_AT_ONCE: Final = 256 << 10
# Compressors that work in parallel make many members, but none of a few bytes.
_MOST_MEMBERS: Final = 4_096
# Two: one is busy with a large body while another comes. More would only share the interpreter.
_DECODERS: Final = 2


class Intake:
    """The way into the database for decoded requests, with the limits that hold on it.

    Limits in bytes, before and after decompression; ``body_seconds`` in which a body must arrive; ``now`` in
    Unix nanoseconds. It may be used from several event loops.
    """

    def __init__(
        self,
        ingest: Ingest,
        memory: Memory | None = None,
        *,
        max_body: int = MAX_BODY,
        max_decompressed: int = MAX_DECOMPRESSED,
        body_seconds: float = BODY_SECONDS,
        now: Callable[[], int] = time.time_ns,
    ) -> None:
        self.max_body = max_body
        self.body_seconds = body_seconds
        self.signals: Sequence[Signal] = signals()
        self._ingest = ingest
        self._memory = memory or Memory.of_process()
        self._most = max(SMALL, self._memory.limit)
        self.max_decompressed = min(max_decompressed, self._most)
        ingest.instruments.queue_limit.set(self._memory.limit)
        ingest.instruments.queue_bytes.set_function(lambda: float(self._memory.held))
        self._now = now
        self._decoders = ThreadPoolExecutor(_DECODERS, "gradwatch-decode")

    def hold(self) -> Holding:
        """Return what counts the bytes of one request, from the first to its answer."""
        return Holding(self._memory)

    def most_weight(self, holding: Holding) -> int:
        """Return what the parts of a request may weigh: with its body as much as all may hold together."""
        return max(0, self._most - holding.size)

    def most_messages(self, size: int) -> int:
        """How many messages of up to ``size`` bytes may be on their way that nobody has counted yet."""
        return max(4, self._memory.limit // size)

    async def aside(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """Do what takes longer than a moment on a thread that has nothing else to do."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work, *arguments)

    async def accept(self, signal: Signal, body: bytes, grant: Grant | None, holding: Holding) -> Any:
        """Store an encoded request and return the response message once it is committed.

        Raises:
            OtlpError: it cannot be stored, now or ever.
        """
        received_at = self._now()
        decoded = await self._decoded(signal, body, received_at, holding)
        batches = decoded.batches if grant is None else grant.stamp(decoded.batches)
        await self._ingest.submit(batches, holding.size, received_at)
        if decoded.rejected:
            self._ingest.instruments.reject_items(signal.name, decoded.rejected)
        return signal.answer(decoded)

    async def _decoded(self, signal: Signal, body: bytes, received_at: int, holding: Holding) -> Decoded:
        def decode(most: int) -> Decoded:
            return signal.decode(body, received_at, Parts(most, holding.grow))

        if len(body) <= _INLINE:
            # Nothing of it is built before its parts are weighed: little is done twice.
            with contextlib.suppress(TooLargeError):
                return decode(_INLINE)
        return await self.aside(decode, self.most_weight(holding))

    async def decompressed(self, body: bytes, limit: int, holding: Holding) -> bytes:
        """Return what is in a gzip body of one or several members.

        Raises:
            MalformedError: it is not gzip, or ends too early.
            TooLargeError: more than ``limit`` bytes are in it, or too many members.
            UnavailableError: there is no room for it now.
        """
        unpacked = _unpacked(body, limit, holding)
        # However short it is: 64 KiB become 64 MiB.
        first = list(itertools.islice(unpacked, _INLINE // _UNPACK_AT_ONCE))
        return b"".join(itertools.chain(first, await self.aside(list, unpacked) if len(first) > 1 else ()))

    def refused(self, error: OtlpError) -> None:
        """Count a request that was refused."""
        self._ingest.instruments.reject(error.reason)


def _unpacked(body: bytes, limit: int, holding: Holding) -> Iterator[bytes]:
    """Yield what is in it, in pieces of which some may be empty."""
    view, at, size, members = memoryview(body), 0, 0, 0
    while at < len(view):  # gzip members may follow each other
        members += 1
        if members > _MOST_MEMBERS:
            raise TooLargeError(f"the gzip body has more than {_MOST_MEMBERS} members")
        stream = zlib.decompressobj(wbits=31)
        while not stream.eof:
            # Fed in pieces: what is left of one is copied for every piece that comes out, and for every member.
            piece: bytes | memoryview = stream.unconsumed_tail
            if not piece:
                piece = view[at : at + _UNPACK_AT_ONCE]
                at += len(piece)
            try:
                part = stream.decompress(piece, _UNPACK_AT_ONCE)
            except zlib.error as error:
                raise MalformedError("the body is not gzip, which it claims to be") from error
            if not piece and not part and not stream.eof:
                raise MalformedError("the gzip body ends too early")
            size += len(part)
            if size > limit:
                raise TooLargeError(f"the body has more than {limit} bytes after decompression")
            holding.grow(len(part))
            yield part
        at -= len(stream.unused_data)
