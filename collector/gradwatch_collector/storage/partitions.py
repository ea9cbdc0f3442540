"""PostgreSQL's partitions by time: made ahead or when they are needed, dropped once they have been emptied.

`frame` and `block` have one a day: compaction empties the first, retention the second. `rollup` has one a
month. Rows outside of them (a sender's clock is off, or a replay is late) land in the default partition and are
compacted and pruned from there like any other.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

DAYS_AHEAD: Final = 3
_KEPT_DAYS: Final = 2
_DAILY: Final = ("frame", "block")
_MONTHLY: Final = "rollup"
# Of roll-ups. What claims to be older comes from a clock that is off.
_OLDEST_DAYS: Final = 3 * 366
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
    today = _midnight(now)
    existing = _existing(connection)
    for table in _DAILY:
        for offset in range(DAYS_AHEAD + 1):
            day = today + timedelta(days=offset)
            if _name(table, day) not in existing:
                _create(connection, table, day, day + timedelta(days=1))
    # A backup reads every table for hours and lets nobody drop one meanwhile.
    connection.execute(text("SET LOCAL lock_timeout = '100ms'"))
    for name in sorted(existing):
        table, _, began = name.partition("_d")
        if began.isdigit() and began < f"{today - timedelta(days=_KEPT_DAYS):%Y%m%d}":
            _drop_if_empty(connection, table, name)


def make_rollup_partition(connection: Connection, time: int, now: int) -> None:
    """Make the partition of `rollup` for a moment, if it is to have one of its own. In Unix nanoseconds."""
    if connection.dialect.name != "postgresql" or not 0 <= now - time <= _OLDEST_DAYS * 86_400 * _NANOS:
        return
    first = _midnight(time).replace(day=1)
    if connection.scalar(text("SELECT to_regclass(:name)"), {"name": _name(_MONTHLY, first)}) is None:
        connection.execute(text("SET LOCAL lock_timeout = '2s'"))
        _create(connection, _MONTHLY, first, (first + timedelta(days=31)).replace(day=1))


def _midnight(time: int) -> datetime:
    return datetime.fromtimestamp(time // _NANOS, UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def _existing(connection: Connection) -> set[str]:
    return set(
        connection.scalars(
            text(
                "SELECT child.relname FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid "
                "JOIN pg_class parent ON parent.oid = inhparent WHERE parent.relkind = 'p' "
                "AND parent.relname = ANY(:tables) AND pg_table_is_visible(parent.oid)"
            ),
            {"tables": [*_DAILY, _MONTHLY]},
        )
    )


def _name(table: str, begin: datetime) -> str:
    return f"{table}_d{begin:%Y%m%d}"


def _create(connection: Connection, table: str, begin: datetime, end: datetime) -> None:
    lower, upper = (int(moment.timestamp()) * _NANOS for moment in (begin, end))
    # PostgreSQL refuses a partition for rows the default one holds already: then they all stay there.
    early = connection.scalar(
        text(f"SELECT 1 FROM {table}_default WHERE time >= :lower AND time < :upper LIMIT 1"),  # noqa: S608 - our names
        {"lower": lower, "upper": upper},
    )
    if early is None:
        name = _name(table, begin)
        connection.execute(
            text(f"CREATE TABLE {name} PARTITION OF {table} FOR VALUES FROM ({lower}) TO ({upper})")
        )


def _drop_if_empty(connection: Connection, table: str, name: str) -> None:
    is_empty = text(f"SELECT NOT EXISTS (SELECT 1 FROM {name})")  # noqa: S608 - a name we made
    if not connection.scalar(is_empty):
        return
    try:
        with connection.begin_nested():
            # Looked at again under the lock: a row that arrives in between would be lost. The parent comes
            # first, as it does for the writers, so that the two cannot wait for each other.
            connection.execute(text(f"LOCK TABLE {table}, {name} IN ACCESS EXCLUSIVE MODE"))
            if connection.scalar(is_empty):
                connection.execute(text(f"DROP TABLE {name}"))
    except OperationalError:
        return  # somebody reads it; next time
