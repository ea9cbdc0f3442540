"""The two encodings of OTLP/HTTP, protobuf and JSON, and how answers are written in them."""

from __future__ import annotations

import json
from typing import Any, Final

from google.protobuf import json_format

PROTOBUF: Final = "application/x-protobuf"
JSON: Final = "application/json"


def media_type(content_type: str) -> str:
    """Return a Content-Type header without its parameters, in lower case."""
    return content_type.partition(";")[0].strip().lower()


def encode(message: Any, media_type: str) -> bytes:
    """Encode a protobuf message, as JSON if that is the media type and as protobuf if it is anything else."""
    if media_type == JSON:
        return json.dumps(json_format.MessageToDict(message), separators=(",", ":")).encode()
    encoded: bytes = message.SerializeToString()
    return encoded
