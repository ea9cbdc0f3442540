"""Values that are not one number a point, such as histogram buckets: one byte string for all points of a time.

The points follow each other as protobuf writes a repeated field number 1. A packed value of an exponential
histogram is therefore an encoded ``opentelemetry.proto.metrics.v1.ExponentialHistogram`` whose data points
carry their buckets and nothing else (likewise ``Histogram`` and ``Summary``) but those of ``sum``, ``min`` and
``max`` that were sent as NaN. Exemplars, whatever the kind of their metric, are an encoded ``Gauge`` whose data
points carry them and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

# The field that holds exemplars; it has values only at times at which there are any.
EXEMPLARS: Final = "exemplars"
_TAG: Final = b"\x0a"  # field 1, length-delimited


def join(points: Iterable[bytes]) -> bytes:
    """Join one byte string for each point."""
    return b"".join(_TAG + _varint(len(point)) + point for point in points)


def split(packed: bytes) -> list[bytes]:
    """Return what was joined."""
    points = []
    position = 0
    while position < len(packed):
        position += len(_TAG)
        length = shift = 0
        more = True
        while more:
            byte = packed[position]
            length |= (byte & 0x7F) << shift
            shift += 7
            position += 1
            more = byte >= 0x80
        points.append(packed[position : position + length])
        position += length
    return points


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
