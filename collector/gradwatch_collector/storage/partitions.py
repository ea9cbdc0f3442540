"""PostgreSQL's partitions by time: made ahead or when they are needed, dropped once they have been emptied.

`frame` and `block` have one a day: compaction empties the first, retention the second. `rollup` has one a
month. Rows outside of them (a sender's clock is off, or a replay is late) land in the default partition and are
compacted and pruned from there like any other, or moved once a partition is made for them.

Who makes or drops one needs locks that a backup withholds for hours, and writers queue behind whoever waits for
them. So nobody waits long: what cannot be done now is done another time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from psycopg.errors import DeadlockDetected, LockNotAvailable
from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from gradwatch_collector.storage import schema

DAYS_AHEAD: Final = 3
_KEPT_DAYS: Final = 2
_DAILY: Final = ("frame", "block")
_MONTHLY: Final = "rollup"
# Of roll-ups. What claims to be older comes from a clock that is off.
_OLDEST_DAYS: Final = 3 * 366
_LOCK: Final = 0x6772_6164_7061_7274  # "gradpart"
_LOCK_MILLIS: Final = 100
# What is moved out of the default partition, about a second's work: writers wait for it.
_MOST_BYTES: Final = 64 << 20
_ROW_BYTES: Final = 1 << 10
_NANOS: Final = 1_000_000_000

_Range = tuple[datetime, datetime]


def maintain_partitions(connection: Connection, now: int) -> frozenset[str]:
    """Make the partitions of today and the next days, and drop empty ones of days gone by.

    Returns the names of those that are still to be made, because somebody reads their table for long or the
    default partition holds too many of their rows: till then rows go there. Does nothing on SQLite. ``now`` in
    Unix nanoseconds. Safe to call from many collectors.
    """
    if connection.dialect.name != "postgresql":
        return frozenset()
    if not connection.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _LOCK}):
        return frozenset()  # somebody else is at it
    today = _midnight(now)
    existing = _existing(connection)
    days = [today + timedelta(days=offset) for offset in range(DAYS_AHEAD + 1)]
    left: set[str] = set()
    # One table after the other, as writers go, and first what needs the stronger locks: a writer may wait for
    # the weak one meanwhile, and hold what keeps us from the strong one.
    for table in (*_DAILY, _MONTHLY):
        _drop_empty(connection, table, sorted(existing), today - timedelta(days=_KEPT_DAYS))
        if table in _DAILY:
            missing = [(day, day + timedelta(days=1)) for day in days if _name(table, day) not in existing]
            left.update(_make(connection, table, missing))
    return frozenset(left)


def make_rollup_partition(connection: Connection, time: int, now: int) -> None:
    """Make the partition of `rollup` for a moment, if it is to have one of its own. In Unix nanoseconds."""
    if connection.dialect.name != "postgresql" or not 0 <= now - time <= _OLDEST_DAYS * 86_400 * _NANOS:
        return
    first = _midnight(time).replace(day=1)
    if not _exists(connection, _name(_MONTHLY, first)):
        _make(connection, _MONTHLY, [(first, (first + timedelta(days=31)).replace(day=1))])


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


def _exists(connection: Connection, name: str) -> bool:
    return connection.scalar(text("SELECT to_regclass(:name)"), {"name": name}) is not None


def _make(connection: Connection, table: str, ranges: Sequence[_Range]) -> list[str]:
    """Make partitions; return the names of those that could not be made now."""
    movable = [each for each in ranges if _early_bytes(connection, table, each) <= _MOST_BYTES]

    def make() -> None:
        # The parent first, as for the writers, so that the two cannot wait for each other. Readers go on until
        # the default partition is needed, of which no row may change any more.
        connection.execute(text(f"LOCK TABLE ONLY {table} IN SHARE ROW EXCLUSIVE MODE"))
        connection.execute(text(f"LOCK TABLE {table}_default IN ACCESS EXCLUSIVE MODE"))
        for each in movable:
            _attach(connection, table, each)

    made = movable if movable and _unless_locked(connection, make) else []
    return [_name(table, each[0]) for each in ranges if each not in made]


def _attach(connection: Connection, table: str, days: _Range) -> None:
    name = _name(table, days[0])
    if _exists(connection, name):
        return  # somebody else was faster
    lower, upper = _bounds(days)
    columns = ", ".join(schema.metadata.tables[table].c.keys())
    connection.execute(text(f"CREATE TABLE {name} (LIKE {table} INCLUDING ALL)"))
    connection.execute(
        text(
            f"WITH early AS (DELETE FROM {table}_default WHERE time >= {lower} AND time < {upper} "  # noqa: S608 - our names
            f"RETURNING {columns}) INSERT INTO {name} ({columns}) SELECT {columns} FROM early"
        )
    )
    connection.execute(
        text(f"ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES FROM ({lower}) TO ({upper})")
    )


def _early_bytes(connection: Connection, table: str, days: _Range) -> int:
    """Return about how much the default partition holds of the rows of a partition that is not there yet."""
    payload = ("times", "f32", "f64", "i64", "packed")
    size = " + ".join(f"coalesce(pg_column_size({name}), 0)" for name in payload)
    lower, upper = _bounds(days)
    return int(
        connection.scalar(
            text(
                f"SELECT coalesce(sum({_ROW_BYTES} + {size}), 0) FROM {table}_default "  # noqa: S608 - our names
                "WHERE time >= :lower AND time < :upper"
            ),
            {"lower": lower, "upper": upper},
        )
        or 0
    )


def _bounds(days: _Range) -> tuple[int, int]:
    return int(days[0].timestamp()) * _NANOS, int(days[1].timestamp()) * _NANOS


def _drop_empty(connection: Connection, table: str, existing: Sequence[str], before: datetime) -> None:
    """Drop partitions that began before a day and have no rows."""
    for name in existing:
        parent, _, began = name.partition("_d")
        is_old = parent == table and began.isdigit() and began < f"{before:%Y%m%d}"
        if is_old and not _drop_if_empty(connection, table, name):
            return  # nor are the locks of the others to be had


def _drop_if_empty(connection: Connection, table: str, name: str) -> bool:
    """Drop a partition unless it has rows; return False where its locks are not to be had."""
    is_empty = text(f"SELECT NOT EXISTS (SELECT 1 FROM {name})")  # noqa: S608 - a name we made

    def drop() -> None:
        # Looked at again under the lock: a row that arrives in between would be lost. The parent comes
        # first, as it does for the writers, so that the two cannot wait for each other.
        connection.execute(text(f"LOCK TABLE {table}, {name} IN ACCESS EXCLUSIVE MODE"))
        if connection.scalar(is_empty):
            connection.execute(text(f"DROP TABLE {name}"))

    return not connection.scalar(is_empty) or _unless_locked(connection, drop)


def _unless_locked(connection: Connection, change: Callable[[], None]) -> bool:
    """Return whether the change was made; without its locks, which are waited for briefly, nothing is."""
    try:
        with connection.begin_nested():
            connection.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_MILLIS}ms'"))
            change()
            connection.execute(text("SET LOCAL lock_timeout TO DEFAULT"))
    except OperationalError as error:
        if not isinstance(error.orig, LockNotAvailable | DeadlockDetected):
            raise
        return False
    return True
