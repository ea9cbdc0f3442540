"""What a request will take once it is read, weighed before any of it is built.

Two bytes can be a message, and as an object it takes hundreds: what a body takes in memory, and how long it
takes to read, depends on how many messages it has, not on its length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError

from gradwatch_collector.otlp.errors import TooLargeError

# Tag -> the weight of one, the weight of a byte in it, and the table of what is within (empty where nothing in
# it needs to be weighed).
_Table = Mapping[int, tuple[int, int, Any]]
_VARINT, _DELIMITED = 0, 2
_WIDTHS: Final = {1: 8, 5: 4}
_NOTHING: Final = (0, 0, None)
TOO_MANY_PARTS: Final = "the request has more parts than there is memory for; send fewer at once"
# What becomes a row, and what is in it, in bytes of a request: from decoding to the commit each takes as much
# memory as so many bytes do. Measured: 1.0 to 2.4 KB for an item with one attribute, 0.1 KB for each more.
ITEM_WEIGHT: Final = 500
PART_WEIGHT: Final = 40
# Numbers in lists that may be one byte long: it takes 21 as a number here and there.
_NUMBER_WEIGHT: Final = 5
_OF_ANY_LENGTH: Final = {
    *(FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT32),
    *(FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_SINT32, FieldDescriptor.TYPE_SINT64),
    *(FieldDescriptor.TYPE_BOOL, FieldDescriptor.TYPE_ENUM),
}
# Texts that are not ASCII: with one emoji in it Python keeps four bytes for each character, in each copy.
_WIDE_WEIGHT: Final = 2
# Shorter ones are in what their part weighs.
_LONG_TEXT: Final = 1_024
_ITEMS: Final = {
    *("NumberDataPoint", "HistogramDataPoint", "ExponentialHistogramDataPoint", "SummaryDataPoint"),
    *("LogRecord", "Span"),
}
_DEFAULT: Final = 64 << 20


class Parts:
    """Weighs the parts of one request, ``most`` at most; ``hold`` is told of them before they are built."""

    def __init__(self, most: int = _DEFAULT, hold: Callable[[int], None] = lambda _: None) -> None:
        self.weight = 0
        self._most = most
        self._hold = hold

    def add(self, encoded: bytes, message: Any) -> None:
        """Weigh what an encoded message of a class has within. What is none counts until it stops being one.

        Raises:
            TooLargeError: it is too much.
            DecodeError: it has groups, which OTLP does not use.
            UnavailableError: there is no room for it now.
        """
        try:
            found = _weigh(encoded, _table(message.DESCRIPTOR), self._most - self.weight)
        except _TooHeavyError:
            raise TooLargeError(TOO_MANY_PARTS) from None
        self._take(found)

    def add_items(self, count: int) -> None:
        """Weigh rows that come of parts that were not weighed.

        Raises:
            TooLargeError: they are too many.
            UnavailableError: there is no room for them now.
        """
        self._add(count * ITEM_WEIGHT)

    def add_shared(self, labels: Iterable[bytes], count: int) -> None:
        """Weigh encoded attributes of which so many points have a copy each.

        Raises:
            TooLargeError: they are too much.
            UnavailableError: there is no room for them now.
        """
        self._add(count * sum(PART_WEIGHT + len(label) for label in labels))

    def _add(self, weight: int) -> None:
        if self.weight + weight > self._most:
            raise TooLargeError(TOO_MANY_PARTS)
        self._take(weight)

    def _take(self, weight: int) -> None:
        self.weight += weight
        self._hold(weight)


class _TooHeavyError(Exception):
    pass


def _weigh(encoded: bytes, fields: _Table, most: int) -> int:
    """Walk as protobuf does, depth first, and stop where that would refuse to go on."""
    weight, at, end = 0, 0, len(encoded)
    above: list[tuple[int, _Table]] = []
    try:
        while True:
            while at >= end:
                if at > end or not above:
                    return weight
                end, fields = above.pop()
            tag, at = _varint(encoded, at)
            each, of_byte, within = fields.get(tag, _NOTHING)
            weight += each
            if weight > most:
                raise _TooHeavyError
            if tag & 7 != _DELIMITED:
                at = _behind(encoded, at, tag & 7)
                continue
            size, at = _varint(encoded, at)
            if of_byte and (of_byte != _WIDE_WEIGHT or _is_wide(encoded, at, size)):
                weight += of_byte * min(size, end - at)
                if weight > most:
                    raise _TooHeavyError
            if within:
                above.append((end, fields))
                end, fields = at + size, within
            else:
                at += size
    except IndexError:
        return weight


def _is_wide(encoded: bytes, at: int, size: int) -> bool:
    return size >= _LONG_TEXT and not encoded[at : at + size].isascii()


def _behind(encoded: bytes, at: int, kind: int) -> int:
    if kind == _VARINT:
        return _varint(encoded, at)[1]
    if kind not in _WIDTHS:
        raise DecodeError(f"wire type {kind}, which OTLP does not use")
    return at + _WIDTHS[kind]


def _varint(encoded: bytes, at: int) -> tuple[int, int]:
    number = encoded[at]
    if number < 0x80:
        return number, at + 1
    number &= 0x7F
    for shift in range(7, 70, 7):
        at += 1
        number |= (encoded[at] & 0x7F) << shift
        if encoded[at] < 0x80:
            return number, at + 1
    raise DecodeError("a number of more than ten bytes")


@cache
def _table(descriptor: Any) -> _Table:
    return _tabled(descriptor, {})


def _tabled(descriptor: Any, known: dict[str, dict[int, tuple[int, int, Any]]]) -> _Table:
    # Types recur: a value may be a list of values.
    if descriptor.full_name in known:
        return known[descriptor.full_name]
    table = known[descriptor.full_name] = {}
    for field in descriptor.fields:
        tag = field.number << 3 | _DELIMITED
        message = field.message_type
        if message is not None:
            table[tag] = ITEM_WEIGHT if message.name in _ITEMS else PART_WEIGHT, 0, _tabled(message, known)
        elif field.type in (field.TYPE_BYTES, field.TYPE_STRING):
            each = PART_WEIGHT if field.is_repeated else 0
            table[tag] = each, _WIDE_WEIGHT if field.type == field.TYPE_STRING else 0, {}
        elif field.is_repeated and field.type in _OF_ANY_LENGTH:
            # One after the other in a field, or each in a field of its own.
            table[tag] = 0, _NUMBER_WEIGHT, {}
            table[field.number << 3 | _VARINT] = _NUMBER_WEIGHT, 0, {}
    return table
