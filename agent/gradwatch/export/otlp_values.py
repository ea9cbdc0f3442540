"""Attributes as OTLP has them."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, TypeVar

from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

from gradwatch.telemetry import Attributes, AttributeValue

T = TypeVar("T")
_BEYOND: Final = 2**63


def key_values(attributes: Attributes) -> list[KeyValue]:
    """One message for each attribute."""
    return [_key_value(key, value) for key, value in attributes.items()]


def encoded_attribute(number: int, key: str, value: AttributeValue) -> bytes:
    """One attribute as the field of this number."""
    # A cache would take 0.0 for -0.0.
    encode = _encoded_once if isinstance(value, str) else _encoded
    return encode(number, key, value)


def _encoded(number: int, key: str, value: AttributeValue) -> bytes:
    return field(number, _key_value(key, value).SerializeToString())


# The names of layers come again at every export.
_encoded_once = lru_cache(maxsize=4096)(_encoded)


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    octets = bytearray()
    while value > 0x7F:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)


def _key_value(key: str, value: AttributeValue) -> KeyValue:
    return KeyValue(key=text(key), value=_any_value(value))


def _any_value(value: AttributeValue) -> AnyValue:
    if isinstance(value, str):
        return AnyValue(string_value=text(value))
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int):
        # OTLP's integers have 64 bits, and Python's, such as a step given to `checkpoint`, have no end.
        return AnyValue(int_value=value) if -_BEYOND <= value < _BEYOND else AnyValue(string_value=str(value))
    if isinstance(value, float):
        return AnyValue(double_value=value)
    return AnyValue(bytes_value=value)


def text(value: T) -> T | str:
    """The value, fit to be sent if it is a string."""
    if not isinstance(value, str) or value.isascii():
        return value
    # Half a surrogate pair, as from an undecodable file name, is no UTF-8, and must not cost the ending.
    return value.encode(errors="replace").decode()
