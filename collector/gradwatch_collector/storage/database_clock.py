"""The database's clock: the one that several collectors have in common, whatever their own say."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from sqlalchemy import Connection, text

_POSTGRESQL: Final = text("SELECT (extract(epoch FROM clock_timestamp()) * 1000000000)::bigint")
# A file has no clock but its machine's. SQLite tells it in milliseconds.
_SQLITE: Final = text("SELECT CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER) * 1000000")
_SQLITE_RESOLUTION: Final = 1_000_000
# A reading that took longer says too little, as when the process was suspended in between.
_SLOWEST_READING: Final = 1_000_000_000


def database_now(connection: Connection) -> int:
    """Return the time by the database's clock, in Unix nanoseconds."""
    query = _POSTGRESQL if connection.dialect.name == "postgresql" else _SQLITE
    return int(connection.execute(query).scalar_one())


class DatabaseClock:
    """Tells the database's time without asking each time: our own clock, corrected by what was last read.

    When telemetry was received is compared with now by whichever collector evaluates: were each to use its
    own clock, one that is a minute behind would take every run for silent.
    """

    def __init__(self, ours: Callable[[], int] = time.time_ns) -> None:
        self._ours = ours
        self._offset = 0

    def now(self) -> int:
        """Return the time in Unix nanoseconds."""
        return self._ours() + self._offset

    def set(self, connection: Connection) -> None:
        """Read the database's clock. A difference within what the reading took is none."""
        before = self._ours()
        theirs = database_now(connection)
        took = self._ours() - before
        if took <= _SLOWEST_READING:
            offset = theirs - (before + took // 2)
            self._offset = offset if abs(offset) > took + _SQLITE_RESOLUTION else 0
