"""What all answers have in common: limits, cursors, moments."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, Final

from gradwatch_collector.runs.facts import moment

MAX_LIMIT: Final = 1_000

Json = dict[str, Any]


class BadCursorError(ValueError):
    """A cursor that this version did not give out."""

    def __init__(self, cursor: str) -> None:
        super().__init__(f"cursor {cursor!r:.80} is not one this server gave out")


def open_number(cursor: str) -> int:
    """Return the row id that a cursor is.

    Raises:
        BadCursorError: it is none.
    """
    if not re.fullmatch("[0-9]{1,18}", cursor):
        raise BadCursorError(cursor)
    return int(cursor)


def timestamp(nanos: int | None) -> str | None:
    """Return Unix nanoseconds as RFC 3339 UTC with microseconds."""
    return None if nanos is None else moment(nanos).isoformat(timespec="microseconds").replace("+00:00", "Z")


def seconds_between(earlier: str, later: str) -> float:
    """Return the seconds from one RFC 3339 moment to another, at least 0."""
    return max(0.0, (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds())
