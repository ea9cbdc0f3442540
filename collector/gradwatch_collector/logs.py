"""What the collector says on standard error: lines for people or JSON for machines, and never a secret."""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime
from typing import Final

from opentelemetry import trace

FORMATS: Final = ("text", "json")
# Tokens, credentials of any scheme, and passwords in URLs. Nothing is meant to log them; what libraries put
# into an exception's text is not ours to know.
_SECRETS: Final = (
    re.compile(r"gw_[\w-]{20,}"),
    re.compile(r"(?i)(?<=bearer )\S+|(?<=basic )\S+"),
    re.compile(r"(?<=://)[^/\s@]*:[^/\s@]*(?=@)"),
    re.compile(r"(?i)(?<=password=)[^\s&'\"]+"),
)
_HIDDEN: Final = "***"


def configure(form: str) -> None:
    """Send everything logged to standard error, from level INFO on. ``form``: one of :data:`FORMATS`."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("alembic").setLevel(logging.WARNING)


class TextFormatter(logging.Formatter):
    """One line a record, and the traceback below it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines, without secrets."""
        return without_secrets(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message``.

    ``exception`` is added where there is one, ``trace_id`` and ``span_id`` within a span of our own.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the object, without secrets."""
        fields = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            fields |= {"trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"}
        # Before it is encoded: afterwards a quotation mark that ends a secret is no longer one.
        return json.dumps({name: without_secrets(value) for name, value in fields.items()})


def without_secrets(text: str) -> str:
    """Return the text with what looks like a token, a credential or a password replaced."""
    for pattern in _SECRETS:
        text = pattern.sub(_HIDDEN, text)
    return text


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
