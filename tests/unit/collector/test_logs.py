"""What is logged: lines or JSON, and no secrets in either."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime

import pytest
from opentelemetry.sdk.trace import TracerProvider

from gradwatch_collector.service.logs import JsonFormatter, TextFormatter

TOKEN = "gw_" + "Ab-_0" * 8 + "xyz"
SECRETS = (TOKEN, "hunter2")
TEXT = f"connecting to postgresql://gradwatch:hunter2@db/name with Bearer {TOKEN} failed, password=hunter2"


def record(message: str, *arguments: object, exc_info: object = None) -> logging.LogRecord:
    made = logging.getLogger("gradwatch_collector.service.ingest").makeRecord(
        "gradwatch_collector.service.ingest", logging.WARNING, "ingest.py", 1, message, arguments, None
    )
    made.exc_info = exc_info  # type: ignore[assignment]
    return made


def fail(message: str) -> None:
    raise ConnectionError(message)


def raised(message: str) -> object:
    try:
        fail(message)
    except ConnectionError:
        return sys.exc_info()


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
def test_no_secret_is_logged_in_a_message_or_a_traceback(formatter: logging.Formatter) -> None:
    line = formatter.format(record("no commit: %s", TEXT, exc_info=raised(TEXT)))
    assert "no commit" in line
    assert "ConnectionError" in line
    assert not [secret for secret in SECRETS if secret in line]


def test_a_json_line_says_when_how_bad_who_and_what() -> None:
    shown = json.loads(JsonFormatter().format(record('the "database" is away')))
    assert shown.keys() == {"time", "level", "logger", "message"}
    assert datetime.fromisoformat(shown["time"]).utcoffset() is not None
    assert (shown["level"], shown["logger"]) == ("warning", "gradwatch_collector.service.ingest")
    assert shown["message"] == 'the "database" is away'


def test_a_record_with_a_traceback_is_still_one_json_line() -> None:
    line = JsonFormatter().format(record("failed", exc_info=raised("two\nlines")))
    assert "\n" not in line
    assert "Traceback" in json.loads(line)["exception"]


def test_what_is_logged_within_a_span_names_it() -> None:
    with TracerProvider(shutdown_on_exit=False).get_tracer("test").start_as_current_span("commit") as span:
        shown = json.loads(JsonFormatter().format(record("slow")))
    assert shown["trace_id"] == f"{span.get_span_context().trace_id:032x}"
    assert shown["span_id"] == f"{span.get_span_context().span_id:016x}"
