"""Number data points without building a message for each.

In an encoded ``NumberDataPoint`` the times and the value have fixed width; everything else is its attributes.
The bytes of one request's points therefore equal the next one's except at known places. A layout knows these
places; if all other bytes are equal, it reads times and values of all points at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError
from opentelemetry.proto.metrics.v1.metrics_pb2 import DataPointFlags, NumberDataPoint

from gradwatch_collector.otlp.attributes import mapping
from gradwatch_collector.otlp.points import Points

_START: Final = NumberDataPoint.DESCRIPTOR.fields_by_name["start_time_unix_nano"].number
_TIME: Final = NumberDataPoint.DESCRIPTOR.fields_by_name["time_unix_nano"].number
_DOUBLE: Final = NumberDataPoint.DESCRIPTOR.fields_by_name["as_double"].number
_INT: Final = NumberDataPoint.DESCRIPTOR.fields_by_name["as_int"].number
_NO_VALUE: Final = DataPointFlags.DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK
_ALTERNATIVES: Final = 8
_EIGHT: Final = np.arange(8)
# What a point without a time or a value reads; it is left out afterwards.
_PADDING: Final = bytes(8)


@dataclass(frozen=True, slots=True)
class Numbers:
    """Points read: ``times`` as sent, and for each point its float, its integer, or neither.

    ``is_empty``: the sender says that there is no value, which is not the same as forgetting it. ``exemplars``:
    for each point an encoded ``NumberDataPoint`` that has them and nothing else; None if no point has any.
    """

    points: Points
    times: npt.NDArray[np.uint64]
    floats: npt.NDArray[np.float64]
    integers: npt.NDArray[np.int64]
    is_float: npt.NDArray[np.bool_]
    is_integer: npt.NDArray[np.bool_]
    is_empty: npt.NDArray[np.bool_]
    exemplars: Sequence[bytes] | None = None


@dataclass(frozen=True, slots=True)
class _Layout:
    points: Points
    mask: npt.NDArray[np.uint8]  # 0xff where bytes repeat, shape [bytes]
    template: npt.NDArray[np.uint8]  # the bytes that repeat, 0 elsewhere
    time_at: npt.NDArray[np.int64]  # where each point's time begins
    value_at: npt.NDArray[np.int64]
    is_float: npt.NDArray[np.bool_]
    is_integer: npt.NDArray[np.bool_]
    is_empty: npt.NDArray[np.bool_]

    @property
    def nbytes(self) -> int:
        """Memory held, roughly."""
        return 2 * self.mask.nbytes + 512 * (1 + len(self.time_at))

    def read(self, body: npt.NDArray[np.uint8]) -> Numbers:
        raw = body[self.value_at[:, None] + _EIGHT]
        return Numbers(
            self.points,
            body[self.time_at[:, None] + _EIGHT].view("<u8").reshape(-1),
            raw.view("<f8").reshape(-1),
            raw.view("<i8").reshape(-1),
            self.is_float,
            self.is_integer,
            self.is_empty,
        )


class Layouts:
    """The layouts met so far, in at most ``max_bytes`` of memory. Safe to share between threads."""

    def __init__(self, max_bytes: int = 64 << 20) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        # Points of equal lengths under one metric differ only between runs: a few alternatives are kept.
        self._layouts: dict[tuple[str, tuple[int, ...]], list[_Layout]] = {}

    def read(self, metric: str, points: Sequence[bytes]) -> Numbers:
        """Read the encoded points of one metric (at least one).

        Raises:
            DecodeError: a point is not an encoded ``NumberDataPoint``.
        """
        body = np.frombuffer(b"".join((*points, _PADDING)), np.uint8)
        place = (metric, tuple(map(len, points)))
        known = self._layouts.get(place, [])
        for layout in known:
            if np.array_equal(body & layout.mask, layout.template):
                return layout.read(body)
        messages = [NumberDataPoint.FromString(each) for each in points]
        if any(message.exemplars for message in messages):
            return self._read_apart(metric, messages)
        learned = _learn(points, messages, body)
        self._bytes += learned.nbytes
        if self._bytes > self._max_bytes:
            self._layouts.clear()
            self._bytes = learned.nbytes
        self._layouts[place] = [learned, *known[: _ALTERNATIVES - 1]]
        return learned.read(body)

    def _read_apart(self, metric: str, messages: Sequence[Any]) -> Numbers:
        # Exemplars never repeat: with them inside no layout would ever be met again.
        exemplars = [NumberDataPoint(exemplars=each.exemplars).SerializeToString() for each in messages]
        for message in messages:
            message.ClearField("exemplars")
        numbers = self.read(metric, [message.SerializeToString() for message in messages])
        return replace(numbers, exemplars=exemplars)


def _learn(points: Sequence[bytes], messages: Sequence[Any], body: npt.NDArray[np.uint8]) -> _Layout:
    mask = np.full(len(body), 0xFF, np.uint8)
    padding = len(body) - len(_PADDING)
    time_at = np.full(len(points), padding, np.int64)
    value_at = np.full(len(points), padding, np.int64)
    kinds: list[str | None] = []
    attributes = []
    start = 0
    for index, (encoded, message) in enumerate(zip(points, messages, strict=True)):
        attributes.append(mapping(message.attributes))
        kinds.append("empty" if message.flags & _NO_VALUE else message.WhichOneof("value"))
        for number, place in _fixed64_fields(encoded):
            at = start + place
            if number in (_START, _TIME, _DOUBLE, _INT):
                mask[at : at + 8] = 0
            if number == _TIME:
                time_at[index] = at
            elif number in (_DOUBLE, _INT):
                value_at[index] = at
        start += len(encoded)
    return _Layout(
        Points(attributes),
        mask,
        body & mask,
        time_at,
        value_at,
        np.array([kind == "as_double" for kind in kinds]),
        np.array([kind == "as_int" for kind in kinds]),
        np.array([kind == "empty" for kind in kinds]),
    )


def _fixed64_fields(encoded: bytes) -> Iterator[tuple[int, int]]:
    # The message was parsed before: nothing here can run over its end.
    at = 0
    while at < len(encoded):
        tag, at = _varint(encoded, at)
        match tag & 7:
            case 0:  # varint
                _, at = _varint(encoded, at)
            case 1:  # fixed64
                yield tag >> 3, at
                at += 8
            case 2:  # length-delimited
                length, at = _varint(encoded, at)
                at += length
            case 5:  # fixed32
                at += 4
            case wire_type:
                raise DecodeError(f"a data point uses wire type {wire_type}, which OTLP does not")


def _varint(encoded: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = encoded[at]
        at += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return number, at
