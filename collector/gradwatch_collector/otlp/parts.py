"""Of how many messages a request is made, counted before any of them is built.

Two bytes can be a message, and as an object it takes hundreds: what a body takes in memory, and how long it
takes to read, depends on how many messages it has, not on its length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final

from google.protobuf.message import DecodeError

from gradwatch_collector.otlp.errors import TooLargeError

# Tag -> the table of what is within, empty where nothing in it needs to be counted.
_Table = Mapping[int, Any]
_VARINT, _DELIMITED = 0, 2
_WIDTHS: Final = {1: 8, 5: 4}
DEFAULT_PARTS: Final = 100_000


class Parts:
    """Counts the parts of one request, ``most`` at most; ``hold`` is told of them before they are built."""

    def __init__(self, most: int = DEFAULT_PARTS, hold: Callable[[int], None] = lambda _: None) -> None:
        self.count = 0
        self._most = most
        self._hold = hold

    def add(self, encoded: bytes, message: Any) -> None:
        """Count what an encoded message of a class has within. What is none counts until it stops being one.

        Raises:
            TooLargeError: they are too many.
            DecodeError: it has groups, which OTLP does not use.
            UnavailableError: there is no room for them now.
        """
        try:
            found = _count(encoded, _table(message.DESCRIPTOR), self._most - self.count)
        except _TooManyError:
            raise TooLargeError(f"the request has more than {self._most} parts; send fewer at once") from None
        self.count += found
        self._hold(found)


class _TooManyError(Exception):
    pass


def _count(encoded: bytes, fields: _Table, most: int) -> int:
    """Walk as protobuf does, depth first, and stop where that would refuse to go on."""
    count, at, end = 0, 0, len(encoded)
    above: list[tuple[int, _Table]] = []
    try:
        while True:
            while at >= end:
                if at > end or not above:
                    return count
                end, fields = above.pop()
            tag, at = _varint(encoded, at)
            if tag & 7 != _DELIMITED:
                at = _behind(encoded, at, tag & 7)
                continue
            size, at = _varint(encoded, at)
            within = fields.get(tag)
            if within is not None:
                count += 1
                if count > most:
                    raise _TooManyError
            if within:
                above.append((end, fields))
                end, fields = at + size, within
            else:
                at += size
    except IndexError:
        return count


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


def _tabled(descriptor: Any, known: dict[str, dict[int, Any]]) -> _Table:
    # Types recur: a value may be a list of values.
    if descriptor.full_name in known:
        return known[descriptor.full_name]
    table = known[descriptor.full_name] = {}
    for field in descriptor.fields:
        tag = field.number << 3 | _DELIMITED
        if field.message_type is not None:
            table[tag] = _tabled(field.message_type, known)
        elif field.is_repeated and field.type in (field.TYPE_BYTES, field.TYPE_STRING):
            table[tag] = {}
    return table
