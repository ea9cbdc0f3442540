"""OTLP/JSON requests as the protobuf that says the same, so that one decoder reads both.

OTLP's JSON is protobuf's own with three differences (https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding):
trace and span ids are hexadecimal and not base64, enums are integers, unknown fields are ignored. The library
knows everything but the ids.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from google.protobuf import json_format

from gradwatch_collector.otlp.errors import MalformedError

_IDS: Final = frozenset({"trace_id", "span_id", "parent_span_id"})
_LONGEST_REASON: Final = 300

# JSON can write what is no text. No protobuf can say it, and in a key or an error the library fails over it.
_ESCAPED_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")

# Key in an object -> where to go on, or None where there is an id.
_Ids = Mapping[str, Any]


class JsonRequest:
    """Reads one kind of request. ``message``: its protobuf class."""

    def __init__(self, message: Any) -> None:
        self._message = message
        self._ids = _ids_within(message.DESCRIPTOR, frozenset())

    def to_protobuf(self, body: bytes) -> bytes:
        """Return the request encoded as protobuf.

        Raises:
            MalformedError: it is not JSON, or not such a request; the message says where.
        """
        try:
            told = json.loads(body.decode(), parse_constant=_refuse_constant)
            if not isinstance(told, dict):
                self._refuse(f"it is a JSON {type(told).__name__} and no object")
            if _ESCAPED_SURROGATE.search(body) and not _is_text(told):
                self._refuse("half of a surrogate pair is no text")
            _ids_to_base64(told, self._ids)
            message = json_format.ParseDict(told, self._message(), ignore_unknown_fields=True)
            encoded: bytes = message.SerializeToString()
        except RecursionError:
            self._refuse("it is nested too deeply")
        # What the library makes of strange values in strange places is not always its own error.
        except (json_format.ParseError, ValueError, TypeError, AttributeError, OverflowError) as error:
            self._refuse(" ".join(str(error).split()))
        return encoded

    def _refuse(self, reason: str) -> NoReturn:
        name = self._message.DESCRIPTOR.name
        raise MalformedError(f"the body is not an {name} in JSON: {reason[:_LONGEST_REASON]}") from None


def _ids_within(descriptor: Any, above: frozenset[str]) -> _Ids:
    """Return the ways to ids below a message type. ``above``: the types on the way here, which may recur."""
    found: dict[str, Any] = {}
    for field in descriptor.fields:
        names = (field.json_name, field.name)
        if field.name in _IDS:
            found |= dict.fromkeys(names)
        elif field.message_type is not None and field.message_type.full_name not in above:
            below = _ids_within(field.message_type, above | {descriptor.full_name})
            if below:
                found |= dict.fromkeys(names, below)
    return found


def _ids_to_base64(told: Any, ids: _Ids) -> None:
    if isinstance(told, list):
        for each in told:
            _ids_to_base64(each, ids)
    elif isinstance(told, dict):
        for key in told.keys() & ids.keys():
            if ids[key] is not None:
                _ids_to_base64(told[key], ids[key])
            elif isinstance(told[key], str):
                told[key] = base64.b64encode(_from_hex(key, told[key])).decode()


def _is_text(told: Any) -> bool:
    try:
        json.dumps(told, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _from_hex(key: str, text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise MalformedError(f"{key} is {text!r:.80}; it must be hexadecimal") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f'{name} is not JSON; OTLP writes "{name}"')
