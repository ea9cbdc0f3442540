"""What the collector says on standard error: lines for people or JSON for machines, and never a secret.

Nothing is meant to log one; but what libraries put into the text of an exception is not ours to know.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Final

from opentelemetry import trace

from gradwatch.redaction import redact_text

FORMATS: Final = ("text", "json")


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
        return redact_text(super().format(record))


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
            "message": redact_text(record.getMessage()),
        }
        if record.exc_info:
            fields["exception"] = redact_text(self.formatException(record.exc_info))
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            fields |= {"trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"}
        return json.dumps(fields)


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
