"""Encoded requests, and how they lie in a spool's segments.

A record is a header with a check of its own, and the body as it is sent. Wherever a segment is damaged, reading
goes on at the next header that is whole: nothing is lost but the records that were hit.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple, cast, get_args

Signal = Literal["logs", "metrics"]

SIGNALS: Final = get_args(Signal)
# Compressed at once, in a third of a millisecond.
_PIECE: Final = 1 << 15
_GZIP: Final = 31  # zlib's window bits for a gzip header
_MAGIC: Final = b"gwr1"
# Marker, index of the signal, whether the body is gzipped, items, bytes of the body, CRC-32 of the body; then
# the CRC-32 of all that.
_HEAD: Final = struct.Struct("<4sB?III")
_CHECK: Final = struct.Struct("<I")
_HEADER_BYTES: Final = _HEAD.size + _CHECK.size


class Request(NamedTuple):
    """An encoded OTLP request of ``items`` events or points."""

    signal: Signal
    body: bytes
    items: int
    gzipped: bool
    urgent: bool = False


def pack(request: Request) -> bytes:
    """The request as a record. That it is urgent is said by the segment it goes to."""
    head = _HEAD.pack(
        _MAGIC,
        SIGNALS.index(request.signal),
        request.gzipped,
        request.items,
        len(request.body),
        zlib.crc32(request.body),
    )
    return head + _CHECK.pack(zlib.crc32(head)) + request.body


def unpack(segment: bytes) -> tuple[Sequence[Request], int]:
    """All requests that are whole, in order, and the number of items in the others.

    What was hit so badly that nobody can say how much it was counts as one.
    """
    found: list[Request] = []
    lost, at, damaged = 0, 0, False
    while 0 <= at < len(segment):
        header = _header(segment, at)
        if header is not None:
            signal, gzipped, items, size, check = header
            body = segment[at + _HEADER_BYTES : at + _HEADER_BYTES + size]
            if zlib.crc32(body) == check and len(body) == size:
                found.append(Request(signal, body, items, gzipped))
                at += _HEADER_BYTES + size
                damaged = False
                continue
        # Its length may be what is wrong, so the next record is looked for, not jumped to.
        if header is not None or not damaged:
            lost += 1 if header is None else header[2]
        damaged = True
        at = segment.find(_MAGIC, at + 1)
    return found, lost


def _header(segment: bytes, at: int) -> tuple[Signal, bool, int, int, int] | None:
    head, check = segment[at : at + _HEAD.size], segment[at + _HEAD.size : at + _HEADER_BYTES]
    if len(check) < _CHECK.size or zlib.crc32(head) != _CHECK.unpack(check)[0]:
        return None
    magic, signal, gzipped, items, size, body_check = _HEAD.unpack(head)
    if magic != _MAGIC or signal >= len(SIGNALS):
        return None
    return cast("Signal", SIGNALS[signal]), gzipped, items, size, body_check


def gzipped(body: bytes, pace: Callable[[], None] = lambda: None) -> bytes:
    """The body compressed; ``pace`` is called between small pieces of work."""
    packer = zlib.compressobj(1, wbits=_GZIP)
    packed = []
    for start in range(0, len(body), _PIECE):
        packed.append(packer.compress(memoryview(body)[start : start + _PIECE]))
        pace()
    return b"".join((*packed, packer.flush()))
