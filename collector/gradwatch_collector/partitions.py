"""PostgreSQL's daily partitions of `frame`: made a few days ahead, dropped once compaction has emptied them.

Frames outside of them (a sender's clock is off, or a replay is late) land in the default partition and are
compacted from there like any other.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import Connection, text

DAYS_AHEAD: Final = 3
_KEPT_DAYS: Final = 2
_PREFIX: Final = "frame_d"
_LOCK: Final = 0x6772_6164_7061_7274  # "gradpart"
_NANOS: Final = 1_000_000_000


def maintain_partitions(connection: Connection, now: int) -> None:
    """Make the partitions of today and the next days, and drop empty ones of days gone by.

    Does nothing on SQLite. ``now`` in Unix nanoseconds. Safe to call from many collectors.
    """
    if connection.dialect.name != "postgresql":
        return
    # Rather try again later than make every writer queue behind a lock that is not to be had.
    connection.execute(text("SET LOCAL lock_timeout = '2s'"))
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    today = datetime.fromtimestamp(now // _NANOS, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    existing = set(
        connection.scalars(
            text(
                "SELECT child.relname FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid "
                "WHERE inhparent = 'frame'::regclass"
            )
        )
    )
    for offset in range(DAYS_AHEAD + 1):
        day = today + timedelta(days=offset)
        if _name(day) not in existing:
            _create(connection, day)
    oldest_kept = _name(today - timedelta(days=_KEPT_DAYS))
    for name in sorted(existing):
        if name.startswith(_PREFIX) and name < oldest_kept:
            _drop_if_empty(connection, name)


def _name(day: datetime) -> str:
    return f"{_PREFIX}{day:%Y%m%d}"


def _create(connection: Connection, day: datetime) -> None:
    lower = int(day.timestamp()) * _NANOS
    upper = int((day + timedelta(days=1)).timestamp()) * _NANOS
    # PostgreSQL refuses a partition for rows the default one holds already: then they all stay there.
    early = connection.scalar(
        text("SELECT 1 FROM frame_default WHERE time >= :lower AND time < :upper LIMIT 1"),
        {"lower": lower, "upper": upper},
    )
    if early is None:
        connection.execute(
            text(f"CREATE TABLE {_name(day)} PARTITION OF frame FOR VALUES FROM ({lower}) TO ({upper})")
        )


def _drop_if_empty(connection: Connection, name: str) -> None:
    # Locked before it is looked at: a frame that arrives in between would be lost. The parent comes first,
    # as it does for the writers, so that the two cannot wait for each other.
    connection.execute(text(f"LOCK TABLE frame, {name} IN ACCESS EXCLUSIVE MODE"))
    if connection.scalar(text(f"SELECT 1 FROM {name} LIMIT 1")) is None:  # noqa: S608 - a name we made
        connection.execute(text(f"DROP TABLE {name}"))
