"""Hours that have to be counted again: told by whoever changes a run, read by whoever counts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from sqlalchemy import Connection, insert, select

from gradwatch_collector.storage import schema

# Hours are numbered from 1970 in UTC: every time zone's days are made of them, or of them and a part of one.
HOUR: Final = 3600 * 1_000_000_000


def tell_changed(connection: Connection, moments: Iterable[int | None]) -> None:
    """Have the hours of these moments (Unix nanoseconds; None is none) counted again, within a transaction."""
    hours = {at // HOUR for at in moments if at is not None}
    if hours:
        connection.execute(insert(schema.run_change), [{"hour": hour} for hour in sorted(hours)])


def load_changed(connection: Connection) -> list[int]:
    """Return the hours of which something is not as it was counted, in order."""
    return sorted(connection.scalars(select(schema.run_change.c.hour).distinct()))
