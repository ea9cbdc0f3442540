"""Moments as text, to the nanosecond: what `datetime` cannot hold."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

_NANOS: Final = 1_000_000_000
_LAST: Final = 2**63 - 1
_RFC3339: Final = re.compile(
    r"(\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?([Zz]|[+-]\d\d:\d\d)", re.ASCII
)


def exactly(nanos: int) -> str:
    """Return Unix nanoseconds as RFC 3339 UTC with all nine digits, which sort as text."""
    seconds, rest = divmod(nanos, _NANOS)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


def parse_moment(text: str) -> int:
    """Return the Unix nanoseconds of an RFC 3339 moment, or of a number that says them.

    Raises:
        ValueError: it is neither, or not between 1970 and 2262.
    """
    nanos = int(text) if re.fullmatch("[0-9]{1,19}", text) else _parse(text)
    if not 0 <= nanos <= _LAST:
        raise ValueError(f"{text!r:.80} is not between 1970 and 2262")
    return nanos


def _parse(text: str) -> int:
    # In the query of a URL a plus sign is a space.
    found = _RFC3339.fullmatch(re.sub(r" (?=\d\d:\d\d$)", "+", text))
    if found is None:
        raise ValueError(f"{text!r:.80} is no moment such as 2026-01-31T12:00:00Z, nor Unix nanoseconds")
    whole, fraction, zone = found.groups()
    seconds = int(datetime.fromisoformat(f"{whole}{zone.upper()}").timestamp())
    return seconds * _NANOS + int((fraction or "").ljust(9, "0"))
