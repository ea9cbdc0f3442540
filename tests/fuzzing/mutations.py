"""Spoiling requests with their structure in mind: fields of messages, bytes on the wire, JSON trees and texts.

Whatever is random comes from the ``Random`` that is passed in, so that a seed tells everything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from random import Random
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

from gradwatch import conventions as c

_DEEPEST: Final = 130  # protobuf gives up at a hundred messages within each other
_INTEGERS: Final = (
    *(
        sign * (1 << bits) + off
        for bits in (0, 7, 31, 32, 53, 63, 64)
        for sign in (1, -1)
        for off in (-1, 0, 1)
    ),
    1_750_000_000_000_000_000,
)
_FLOATS: Final = (0.0, -0.0, 5e-324, 1.8e308, 3.5e38, -1e300, 0.1, 2.0**63, math.nan, math.inf, -math.inf)
_NAMES: Final = (
    *c.RESOURCE_ATTRIBUTES,
    *c.ATTRIBUTES,
    *(metric.name for metric in c.METRICS),
    *(event.name for event in c.EVENTS),
)
_TEXTS: Final = (
    *("", "\0", "a\0b", " ", "none", "null", "NaN", "-1", "0", "1e9", "\u0661\u0662", "9" * 5000),
    *("x" * 255, "x" * 256, "x" * 257, "\U0001f525" * 256, "x" * 70_000, "\u202e\ufeff\uffff", "\x1b[31m\r\n"),
    *("'; DROP TABLE run; --", "%s %n {0} \\", "../../etc/passwd", "succeeded", "running", "lost"),
)
_BYTES: Final = tuple(
    bytes([fill]) * size for size in (0, 1, 7, 8, 9, 15, 16, 17, 300) for fill in (0, 65, 255)
)
_JSON_ODDITIES: Final = (
    *(None, True, False, 0, -1, 1.5, 1e300, 10**30, 2**63, 2**64, -(2**63) - 1, math.nan, math.inf),
    *([], {}, [[]], [None], {"": None}, "\ud800", "\udfff\ud800", "0x10", " 1 ", "1_0", "+1", "1.0"),
    *("Infinity", "-Infinity", "zz", "ABCDEF", "abc", "0" * 32, "A" * 16, "==", "////"),
    *_TEXTS,
)


def spoil_message(dice: Random, message: Any) -> None:
    """Change some fields anywhere within a message, which stays one."""
    for _ in range(dice.choice((1, 1, 2, 4))):
        _spoil_node(dice, _descend(dice, message))


def _descend(dice: Random, message: Any) -> Any:
    while dice.random() > 0.1:
        below = [value for field, value in message.ListFields() if field.message_type is not None]
        if not below:
            return message
        chosen = dice.choice(below)
        message = chosen if hasattr(chosen, "ListFields") else dice.choice(chosen)
    return message


def _spoil_node(dice: Random, message: Any) -> None:
    if isinstance(message, AnyValue) and dice.random() < 0.2:
        _bury(dice, message)
    elif isinstance(message, KeyValue) and dice.random() < 0.3:
        message.key = dice.choice(_NAMES)
    else:
        there = [field for field, _ in message.ListFields()]
        fields = there if there and dice.random() < 0.6 else message.DESCRIPTOR.fields
        if fields:
            _spoil_field(dice, message, dice.choice(fields))


def _bury(dice: Random, value: Any) -> None:
    """Put a value deep within lists and maps."""
    for _ in range(dice.choice((1, 3, 20, 45, 49, 50, 60, _DEEPEST))):
        held = AnyValue()
        held.CopyFrom(value)
        if dice.random() < 0.5:
            value.array_value.values.append(held)
        else:
            value.kvlist_value.values.append(KeyValue(key=dice.choice("abc"), value=held))
        if value.ByteSize() > 4_000:
            return


def _spoil_field(dice: Random, message: Any, field: Any) -> None:
    held = getattr(message, field.name)
    if not field.is_repeated:
        if dice.random() < 0.2:
            message.ClearField(field.name)
        elif field.message_type is not None:
            held.SetInParent()
            _spoil_node(dice, held)
        else:
            setattr(message, field.name, _scalar(dice, field))
    elif field.message_type is not None:
        _spoil_list(dice, held)
    else:
        held.extend(_scalar(dice, field) for _ in range(dice.choice((1, 2, 200))))


def _spoil_list(dice: Random, held: Any) -> None:
    match dice.randrange(5) if held else 0:
        case 0:
            held.add()
        case 1:
            held.extend([dice.choice(held)] * dice.choice((1, 2, 30)))
        case 2:
            del held[dice.randrange(len(held))]
        case 3:
            held.reverse()
        case 4:
            # The same again, and something different about it: conflicting attributes, duplicate points.
            held.add().CopyFrom(dice.choice(held))
            _spoil_node(dice, held[-1])


def _scalar(dice: Random, field: Any) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_BOOL:
            return dice.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return dice.choice(_FLOATS)
        case FieldDescriptor.CPPTYPE_STRING:
            if field.type == FieldDescriptor.TYPE_BYTES:
                return dice.choice(_BYTES)
            return dice.choice(_NAMES if dice.random() < 0.4 else _TEXTS)
    least, most = _RANGES[field.cpp_type]
    return dice.choice([number for number in _INTEGERS if least <= number <= most])


_RANGES: Final = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def spoil_wire(dice: Random, encoded: bytes, others: Sequence[bytes]) -> bytes:
    """Change bytes of an encoded message, which may end to be one. ``others``: what may be mixed in."""
    return dice.choice(_WIRE)(dice, encoded, others)


def _cut(dice: Random, encoded: bytes) -> tuple[int, int]:
    start = dice.randrange(len(encoded) + 1)
    return start, min(len(encoded), start + dice.choice((1, 2, 8, 40)))


def _truncated(dice: Random, encoded: bytes, _: Sequence[bytes]) -> bytes:
    return encoded[: dice.randrange(len(encoded) + 1)]


def _flipped(dice: Random, encoded: bytes, _: Sequence[bytes]) -> bytes:
    octets = bytearray(encoded)
    for _ in range(dice.choice((1, 1, 3, 10)) if octets else 0):
        octets[dice.randrange(len(octets))] ^= 1 << dice.randrange(8)
    return bytes(octets)


def _overwritten(dice: Random, encoded: bytes, _: Sequence[bytes]) -> bytes:
    # A length or a tag, as likely as not.
    octets = bytearray(encoded)
    if octets:
        octets[dice.randrange(len(octets))] = dice.choice((0, 1, 3, 0x7F, 0x80, 0xFF))
    return bytes(octets)


def _doubled(dice: Random, encoded: bytes, _: Sequence[bytes]) -> bytes:
    start, end = _cut(dice, encoded)
    return encoded[:end] + encoded[start:end] * dice.choice((1, 3, 100)) + encoded[end:]


def _shortened(dice: Random, encoded: bytes, _: Sequence[bytes]) -> bytes:
    start, end = _cut(dice, encoded)
    return encoded[:start] + encoded[end:]


def _stuffed(dice: Random, encoded: bytes, _: Sequence[bytes]) -> bytes:
    at = dice.randrange(len(encoded) + 1)
    return encoded[:at] + dice.randbytes(dice.choice((1, 4, 60))) + encoded[at:]


def _merged(dice: Random, encoded: bytes, others: Sequence[bytes]) -> bytes:
    return encoded + dice.choice(others)


def _extended(dice: Random, encoded: bytes, _: Sequence[bytes]) -> bytes:
    return encoded + dice.choice(_UNKNOWN)


def _not_text(dice: Random, encoded: bytes, _: Sequence[bytes]) -> bytes:
    bad = dice.choice((b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80"))
    word = dice.choice((b"training", b"gradient", b"name", b"run"))
    return encoded.replace(word, bad.ljust(len(word), b"x")[: len(word)], dice.choice((1, -1)))


# Fields 999 and 2: varints (overlong and endless too), groups (closed, open, deep), fixed, absurd lengths.
_UNKNOWN: Final = (
    *(b"\xb8\x3e\x01", b"\xb8\x3e" + b"\xff" * 9 + b"\x01", b"\xb8\x3e" + b"\xff" * 12),
    *(b"\xb8\x3e" + b"\x80" * 9 + b"\x00", b"\x00\x00", b"\x10\x01", b"\xbe\x3e", b"\xbf\x3e"),
    *(b"\xbb\x3e\xbc\x3e", b"\xbb\x3e", b"\xbc\x3e", b"\xbb\x3e" * 200 + b"\xbc\x3e" * 200),
    *(b"\xbd\x3e1234", b"\xb9\x3e12345678", b"\xba\x3e\xff\xff\xff\xff\x0f", b"\xba\x3e\x05abc"),
    *(b"\x0a\x00", b"\x0a\x02\x0a\x00", b"\x0a\x80\x80\x80\x80\x00", b"\x0b\x0c", b"\x0a\x04\x0b\x0c\x0b\x0c"),
)
_WIRE: Final[Sequence[Callable[[Random, bytes, Sequence[bytes]], bytes]]] = (
    *(_truncated, _flipped, _overwritten, _doubled, _shortened, _stuffed, _merged, _extended, _not_text),
)


def spoil_tree(dice: Random, tree: Any) -> None:
    """Change some values anywhere within a JSON object, which stays one."""
    for _ in range(dice.choice((1, 1, 2, 4))):
        node = tree
        while True:
            below = [
                each
                for each in (node.values() if isinstance(node, dict) else node)
                if each and isinstance(each, dict | list)
            ]
            if not below or dice.random() < 0.1:
                break
            node = dice.choice(below)
        _spoil_json_node(dice, node)


def _spoil_json_node(dice: Random, node: Any) -> None:
    if isinstance(node, list):
        node.append(dice.choice(node) if node and dice.random() < 0.5 else _oddity(dice))
        return
    keys = list(node)
    if not keys or dice.random() < 0.1:
        node[dice.choice(("", "\ud800", "notOfThisVersion", "traceId", "value", "asInt", "@type"))] = _oddity(
            dice
        )
        return
    key = dice.choice(keys)
    match dice.randrange(6):
        case 0:
            del node[key]
        case 1:
            node["".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in key)] = node.pop(
                key
            )
        case 2 if isinstance(node[key], str | int | float):
            node[key] = str(node[key]) if not isinstance(node[key], str) else len(node[key])
        case 3:
            for _ in range(dice.choice((1, 30, 110))):
                node[key] = [node[key]] if dice.random() < 0.5 else {"arrayValue": {"values": [node[key]]}}
        case _:
            node[key] = _oddity(dice)


def _oddity(dice: Random) -> Any:
    return deepcopy(dice.choice(_JSON_ODDITIES))  # it may be spoiled in its turn


def spoil_text(dice: Random, text: str) -> bytes:
    """Change a JSON text, which may end to be one."""
    at = dice.randrange(len(text) + 1)
    match dice.randrange(9):
        case 0:
            return text[:at].encode()
        case 1:
            return _flipped(dice, text.encode(), ())
        case 2:
            return (
                text[:at]
                + dice.choice(("NaN", "null", ",", "}", "]", '"', "\0", "\\u", "1e999", "/*"))
                + text[at:]
            ).encode()
        case 3:
            return dice.choice((b"\xef\xbb\xbf", b"\xff\xfe", b" \n", b"\0")) + text.encode()
        case 4:
            return text.encode(dice.choice(("utf-16", "utf-32", "utf-8-sig")))
        case 5:
            depth = dice.choice((10, 200, 1_000, 5_000))
            opened, closed = dice.choice((("[", "]"), ('{"a":', "}"), ('{"resourceMetrics":[', "]}")))
            return (opened * depth + "1" + closed * dice.choice((0, depth))).encode()
        case 6:
            # A key twice: of the values JSON readers take the last.
            return text.replace('"resource":', '"resource":null,"resource":', 1).encode()
        case 7:
            return json.dumps(_oddity(dice)).encode()
        case _:
            return text.replace('"', "'", dice.choice((1, -1))).encode()
