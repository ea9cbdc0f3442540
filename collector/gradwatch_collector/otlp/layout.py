"""Gauges and sums without building a message for each of their points.

In an encoded ``NumberDataPoint`` the times and the value have fixed width; everything else is its attributes.
The bytes of a metric in one request therefore equal those in the next except at known places. A layout knows
these places; if all other bytes are equal, it reads times and values of all points at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import DataPointFlags, Gauge, NumberDataPoint, Sum

from gradwatch_collector.otlp.attributes import mapping
from gradwatch_collector.otlp.parts import Parts
from gradwatch_collector.otlp.points import Points

_MESSAGES: Final[dict[str, Any]] = {"gauge": Gauge, "sum": Sum}
_POINTS: Final = Gauge.DESCRIPTOR.fields_by_name["data_points"].number
assert Sum.DESCRIPTOR.fields_by_name["data_points"].number == _POINTS
_START: Final = NumberDataPoint.DESCRIPTOR.fields_by_name["start_time_unix_nano"].number
_TIME: Final = NumberDataPoint.DESCRIPTOR.fields_by_name["time_unix_nano"].number
_DOUBLE: Final = NumberDataPoint.DESCRIPTOR.fields_by_name["as_double"].number
_INT: Final = NumberDataPoint.DESCRIPTOR.fields_by_name["as_int"].number
_NO_VALUE: Final = DataPointFlags.DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK
_FIXED64, _DELIMITED = 1, 2
_ALTERNATIVES: Final = 8
# What a point without a time or a value reads; it is left out afterwards.
_PADDING: Final = bytes(8)


@dataclass(frozen=True, slots=True)
class Numbers:
    """Points read: ``times`` as sent, and for each point its float, its integer, or neither.

    ``is_empty``: the sender says that there is no value, which is not the same as forgetting it.
    ``are_floats``: there are points, and each has a float. ``are_together``: all have one time. ``exemplars``:
    for each point an encoded ``NumberDataPoint`` that has them and nothing else; None if no point has any.
    """

    points: Points
    temporality: int
    monotonic: bool
    times: npt.NDArray[np.uint64]
    floats: npt.NDArray[np.float64]
    integers: npt.NDArray[np.int64]
    is_float: npt.NDArray[np.bool_]
    is_integer: npt.NDArray[np.bool_]
    is_empty: npt.NDArray[np.bool_]
    are_floats: bool
    are_together: bool
    exemplars: Sequence[bytes] | None = None


@dataclass(frozen=True, slots=True)
class _Layout:
    points: Points
    temporality: int
    monotonic: bool
    mask: npt.NDArray[np.uint8]  # 0xff where bytes repeat, shape [bytes]
    template: bytes  # those that repeat, 0 elsewhere
    time_at: npt.NDArray[np.int64]  # where each point's time begins
    value_at: npt.NDArray[np.int64]
    is_float: npt.NDArray[np.bool_]
    is_integer: npt.NDArray[np.bool_]
    is_empty: npt.NDArray[np.bool_]
    are_floats: bool

    @property
    def nbytes(self) -> int:
        """Memory held, roughly: mask, template and attributes; eight arrays and dictionaries; points."""
        return 3 * self.mask.nbytes + 4096 + 512 * len(self.time_at)

    def read(self, body: bytes) -> Numbers:
        # Every eight bytes of the body as a number, whatever they are: the points are picked from these.
        anywhere = np.ndarray((len(body) - 7,), "<u8", body, strides=(1,))
        raw, times = anywhere[self.value_at], anywhere[self.time_at]
        return Numbers(
            self.points,
            self.temporality,
            self.monotonic,
            times,
            raw.view("<f8"),
            raw.view("<i8"),
            self.is_float,
            self.is_integer,
            self.is_empty,
            self.are_floats,
            bool((times == times[:1]).all()),
        )


class Layouts:
    """The layouts met so far, in at most ``max_bytes`` of memory. Safe to share between threads."""

    def __init__(self, max_bytes: int = 64 << 20) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        # Metrics of one name and length differ only between runs: a few alternatives are kept.
        self._layouts: dict[tuple[str, str, tuple[bytes, ...], int], list[_Layout]] = {}

    def read(
        self, metric: str, kind: str, encoded: bytes, parts: Parts, labels: tuple[bytes, ...] = ()
    ) -> Numbers:
        """Read an encoded ``Gauge`` or ``Sum``, as ``kind`` says.

        ``labels``: attributes of all points beside their own, as encoded ``KeyValue``.

        Raises:
            DecodeError: it is none.
            TooLargeError: it has too many parts, and no layout like it is known.
        """
        body = encoded + _PADDING
        octets = np.frombuffer(body, np.uint8)
        place = (metric, kind, labels, len(body))
        known = self._layouts.get(place, [])
        for layout in known:
            if (octets & layout.mask).tobytes() == layout.template:
                numbers = layout.read(body)
                if not numbers.are_together:
                    # Its points weigh nothing this time, but each moment becomes a frame.
                    parts.add_items(len(np.unique(numbers.times)))
                return numbers
        parts.add(encoded, _MESSAGES[kind])
        message = _MESSAGES[kind].FromString(encoded)
        parts.add_shared(labels, len(message.data_points))
        if any(point.exemplars for point in message.data_points):
            return self._read_apart(metric, kind, message, parts, labels)
        learned = _learn(message, encoded, octets, labels)
        if learned.nbytes > self._max_bytes:
            return learned.read(body)
        self._bytes += learned.nbytes
        if self._bytes > self._max_bytes:
            self._layouts.clear()
            self._bytes = learned.nbytes
        self._layouts[place] = [learned, *known[: _ALTERNATIVES - 1]]
        return learned.read(body)

    def _read_apart(
        self, metric: str, kind: str, message: Any, parts: Parts, labels: tuple[bytes, ...]
    ) -> Numbers:
        # Exemplars never repeat: with them inside no layout would ever be met again.
        points = message.data_points
        exemplars = [NumberDataPoint(exemplars=each.exemplars).SerializeToString() for each in points]
        for point in points:
            point.ClearField("exemplars")
        numbers = self.read(metric, kind, message.SerializeToString(), parts, labels)
        return replace(numbers, exemplars=exemplars)


def _learn(message: Any, encoded: bytes, body: npt.NDArray[np.uint8], labels: Sequence[bytes]) -> _Layout:
    points = message.data_points
    shared = [KeyValue.FromString(each) for each in labels]
    mask = np.full(len(body), 0xFF, np.uint8)
    time_at = np.full(len(points), len(encoded), np.int64)  # in the padding
    value_at = time_at.copy()
    for index, (start, end) in enumerate(_delimited(encoded, _POINTS)):
        for number, wire_type, at, _ in _fields(encoded, start, end):
            if wire_type != _FIXED64 or number not in (_START, _TIME, _DOUBLE, _INT):
                continue
            mask[at : at + 8] = 0
            if number == _TIME:
                time_at[index] = at
            elif number != _START:
                value_at[index] = at
    kinds = ["empty" if point.flags & _NO_VALUE else point.WhichOneof("value") for point in points]
    return _Layout(
        Points([mapping((*point.attributes, *shared)) for point in points]),
        getattr(message, "aggregation_temporality", 0),
        getattr(message, "is_monotonic", False),
        mask,
        (body & mask).tobytes(),
        time_at,
        value_at,
        np.array([kind == "as_double" for kind in kinds], bool),
        np.array([kind == "as_int" for kind in kinds], bool),
        np.array([kind == "empty" for kind in kinds], bool),
        bool(kinds) and all(kind == "as_double" for kind in kinds),
    )


def _delimited(encoded: bytes, field: int) -> Iterator[tuple[int, int]]:
    for number, wire_type, at, end in _fields(encoded, 0, len(encoded)):
        if number == field and wire_type == _DELIMITED:
            yield at, end


def _fields(encoded: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield number, wire type, start and end of each field's contents.

    The message was parsed before: nothing here can run over its end.
    """
    while at < end:
        tag, at = _varint(encoded, at)
        match tag & 7:
            case 0:
                _, after = _varint(encoded, at)
            case 1:
                after = at + 8
            case 2:
                length, at = _varint(encoded, at)
                after = at + length
            case 5:
                after = at + 4
            case wire_type:
                raise DecodeError(f"a metric uses wire type {wire_type}, which OTLP does not")
        yield tag >> 3, tag & 7, at, after
        at = after


def _varint(encoded: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = encoded[at]
        at += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return number, at
