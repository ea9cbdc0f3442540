"""OTLP attributes as plain values, and who sent them."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any, Final

from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource

from gradwatch import conventions as c
from gradwatch_collector.otlp.errors import MalformedError
from gradwatch_collector.records import NO_RANK, AttributeValue, Source

# These are parts of keys, and PostgreSQL's index entries end at 2704 bytes.
_IDENTITY: Final = (c.RUN_ID, c.SERVICE_INSTANCE_ID, c.SERVICE_NAME)


def plain(value: AnyValue) -> AttributeValue:
    """Return a value as JSON can hold it: bytes as base64, NaN and infinities by protobuf's names for them."""
    match value.WhichOneof("value"):
        case "string_value":
            return clean(value.string_value)
        case "bool_value":
            return value.bool_value
        case "int_value":
            return value.int_value
        case "double_value":
            return _as_label(value.double_value)
        case "bytes_value":
            return base64.b64encode(value.bytes_value).decode()
        case "array_value":
            return [plain(each) for each in value.array_value.values]
        case "kvlist_value":
            return mapping(value.kvlist_value.values)
        case _:
            return None


def _as_label(value: float) -> AttributeValue:
    # PostgreSQL writes out what Python writes with an exponent: what comes back has to be the same label.
    return int(value) if 1e16 <= abs(value) < math.inf else number_or_name(value)


def mapping(attributes: Iterable[KeyValue]) -> dict[str, AttributeValue]:
    """Return attributes by key; OTLP keys are unique, and if they are not the first one counts."""
    found: dict[str, AttributeValue] = {}
    for attribute in attributes:
        found.setdefault(clean(attribute.key), plain(attribute.value))
    return found


def clean(text: str) -> str:
    """Return the text without NUL, which PostgreSQL cannot store."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def source_of(resource: Resource) -> Source:
    """Return who is speaking. Telemetry that names no run gets a digest of its resource as run id.

    Raises:
        MalformedError: rank or attempt is not a number that can be one, or a part of the key is too long.
    """
    attributes = mapping(resource.attributes)
    for name in _IDENTITY:
        if len(str(attributes.get(name, ""))) > c.MAX_IDENTITY:
            raise MalformedError(f"{name} is longer than {c.MAX_IDENTITY} characters")
    return Source(
        run_id=run_id_of(attributes),
        attempt=_integer(attributes, c.RUN_ATTEMPT, 1),
        rank=NO_RANK if attributes.get(c.SUPERVISOR) is True else _integer(attributes, c.RANK, 0) or 0,
        instance=str(attributes.get(c.SERVICE_INSTANCE_ID) or ""),
        resource=attributes,
    )


def run_id_of(resource: Mapping[str, AttributeValue]) -> str:
    """Return the run that a resource names, or a digest of the resource if it names none."""
    named = resource.get(c.RUN_ID)
    return str(named) if named not in (None, "") else f"resource-{digest(resource).hex()}"


def digest(value: Any) -> bytes:
    """Return 8 bytes that identify a JSON value."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return blake2b(canonical.encode(), digest_size=8).digest()


def number_or_name(value: float) -> float | str:
    """Return a number, or protobuf's name for one that JSON does not have."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _integer(attributes: Mapping[str, AttributeValue], name: str, least: int) -> int | None:
    value = attributes.get(name)
    if value in (None, ""):
        return None
    try:
        number = int(value) if isinstance(value, str | int) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None or not least <= number <= c.MAX_INT32:
        raise MalformedError(f"{name} must be an integer from {least}, not {value!r:.80}")
    return number
