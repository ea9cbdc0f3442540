"""The database: how a URL becomes an engine, how a transaction begins, and which schema is in it."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import psycopg
from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from gradwatch.assets import asset_dir
from gradwatch_collector.service import audit
from gradwatch_collector.storage import arrays, schema
from gradwatch_collector.storage.partitions import maintain_partitions

# Alembic takes half a second to import: only what migrates imports it.
if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

POSTGRESQL: Final = "postgresql"
# The newest migration: a database that has it needs no look at the others.
REVISION: Final = "0014_what_is_usual"
T = TypeVar("T")
_BUSY_SECONDS: Final = 30
# SQLite takes 32 766, PostgreSQL 65 535.
_MOST_PARAMETERS: Final = 10_000
_CONNECT_SECONDS: Final = 10
# Large enough that a frame of 300 float32 values wastes little of its page; larger pages write more for each
# row that lands at the end of its series in the key's index.
_PAGE_BYTES: Final = 8192
_SECRET_OPTIONS: Final = ("password", "sslpassword")
# 8 MB in one transaction: ingest waits for it.
_PAGES_AT_ONCE: Final = 1_000
_MIGRATION_LOCK: Final = 0x6772_6164_7761_7463  # "gradwatc"
# A process that is suspended in the middle of a transaction must not hold its locks for ever: after this
# PostgreSQL ends the transaction. As long as the evaluator's lease (`lease.py`).
_IDLE_SECONDS: Final = 10
# How long a peer that has vanished without a word is waited for.
_TCP_SECONDS: Final = 20
# SQLSTATE classes that are not about the data. "Not now": connection, rollback, resources, object in use,
# operator, system. "Not like this": a transaction that was idle for too long or meets a standby, credentials,
# no such database, a schema or rights that are being changed. Somebody will see to it; senders keep their data.
_TRANSIENT_CLASSES: Final = frozenset({"08", "40", "53", "55", "57", "58", "25", "28", "3D", "42"})
# A damaged file or index. (XX000 may be an error that the data itself brings about.)
_DAMAGED: Final = frozenset({"XX001", "XX002"})
_SQLITE_BROKEN: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


# Alembic announces its dialect each time the schema version is read.
logging.getLogger("alembic.runtime.migration").setLevel(logging.WARNING)


class DatabaseError(Exception):
    """The database cannot be used; the message is one line, names no password and says what to do."""


class SchemaState(Enum):
    """How the schema in the database compares to the one this version knows."""

    EMPTY = "empty"
    OLDER = "older"
    CURRENT = "current"
    NEWER = "newer"


@dataclass(frozen=True, slots=True)
class SchemaVersion:
    """The revision in the database (None if empty), the newest one known here, and how they compare."""

    current: str | None
    head: str
    state: SchemaState


def connect(url: str, *, must_exist: bool = False) -> Engine:
    """Return an engine for ``sqlite:///path``, ``postgresql://...`` or the path of a SQLite file.

    Nothing is migrated. With ``must_exist`` a SQLite file that is not there is an error, not created.

    Raises:
        DatabaseError: the URL is not understood, or nothing answers there.
    """
    parsed = _parse(url)
    sqlite_file = parsed.get_backend_name() == "sqlite"
    if sqlite_file:
        _check_file(parsed, must_exist)
    engine = _sqlite_engine(parsed) if sqlite_file else _postgresql_engine(parsed)
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
    except SQLAlchemyError as error:
        engine.dispose()
        raise DatabaseError(f"cannot open {describe(engine)}: {_reason(error)}") from error
    return engine


def of_one_moment(engine: Engine) -> Engine:
    """Return the engine for transactions that only read, and whose statements all tell of one moment."""
    if engine.dialect.name == "sqlite":
        return engine  # there they do anyway
    return engine.execution_options(isolation_level="REPEATABLE READ")


def describe(engine: Engine) -> str:
    """Return the engine's URL without its password, wherever in the URL that stands."""
    return engine.url.difference_update_query(_SECRET_OPTIONS).render_as_string(hide_password=True)


@contextlib.contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """Begin a transaction that writes; commit at the end, roll back on an error.

    SQLite has one writer at a time. The write lock is taken at the start, because a transaction that has read
    before cannot wait for it, and threads of this process queue for it here: SQLite's own waiting is by
    polling, and a busy ingest would leave the evaluator without a turn.
    """
    with (
        _writer_lock(engine),
        engine.connect().execution_options(writes=True) as connection,
        connection.begin(),
    ):
        if engine.dialect.name == POSTGRESQL:
            # For this transaction only: behind a pooler the session is somebody else's next.
            connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = '{_IDLE_SECONDS}s'")
        yield connection


def size_of(connection: Connection) -> int:
    """Return the bytes that the database takes up, SQLite's write-ahead log not counted."""
    size: int = connection.exec_driver_sql(
        "SELECT pg_database_size(current_database())"
        if connection.dialect.name == POSTGRESQL
        else "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
    ).scalar_one()
    return size


def is_transient(error: SQLAlchemyError) -> bool:
    """Return whether the same statements may succeed later: they failed for what the database is, not the data.

    It was away, busy, full, deadlocked, broken, or its schema is being changed.
    """
    if isinstance(error, PoolTimeoutError):
        return True
    if not isinstance(error, DBAPIError):
        return False
    cause = error.orig
    if isinstance(cause, psycopg.Error):
        if cause.sqlstate is None:
            return isinstance(cause, psycopg.OperationalError | psycopg.InterfaceError)
        return cause.sqlstate[:2] in _TRANSIENT_CLASSES or cause.sqlstate in _DAMAGED
    if isinstance(cause, sqlite3.OperationalError):
        return True
    # The lower byte is the error, the rest says more about it. Errors of the module itself have none.
    return getattr(cause, "sqlite_errorcode", 0) & 0xFF in _SQLITE_BROKEN


def return_pages(connection: Connection) -> int:
    """Give some of the pages that a SQLite file has no use for back to the file system; return how many.

    PostgreSQL does the like by itself, and by dropping partitions.
    """
    if connection.dialect.name != "sqlite":
        return 0
    free = _free_pages(connection)
    for _ in range(min(free, _PAGES_AT_ONCE)):
        # One by one: whatever the number asked for, Python's sqlite3 stops after the first.
        connection.exec_driver_sql("PRAGMA incremental_vacuum(1)")
    # None, in a file that was made without `auto_vacuum`.
    return free - _free_pages(connection)


def _free_pages(connection: Connection) -> int:
    return int(connection.exec_driver_sql("PRAGMA freelist_count").scalar_one())


def batched(items: Collection[T], width: int = 1, *, most: int = _MOST_PARAMETERS) -> Iterator[list[T]]:
    """Yield the items in lists that fit into one statement as parameters, ``width`` each, ``most`` in all."""
    ordered, at_once = list(items), most // width
    for start in range(0, len(ordered), at_once):
        yield ordered[start : start + at_once]


def placeholders(connection: Connection, statement: str) -> str:
    """Return the statement with the driver's own placeholders instead of ``?``."""
    return statement if connection.dialect.name == "sqlite" else statement.replace("?", "%s")


def is_deadlock(error: SQLAlchemyError) -> bool:
    """Return whether PostgreSQL chose this transaction to end a deadlock or a serialization conflict."""
    cause = error.orig if isinstance(error, DBAPIError) else None
    return isinstance(cause, psycopg.Error) and (cause.sqlstate or "").startswith("40")


def schema_version(engine: Engine) -> SchemaVersion:
    """Return which schema the database has."""
    script = _scripts()
    head = script.get_current_head()
    assert head is not None
    with engine.connect() as connection:
        current = _revision(connection)
    if current is None:
        state = SchemaState.EMPTY
    elif current == head:
        state = SchemaState.CURRENT
    else:
        known = {revision.revision for revision in script.walk_revisions()}
        state = SchemaState.OLDER if current in known else SchemaState.NEWER
    return SchemaVersion(current, head, state)


def upgrade(engine: Engine, *, now: Callable[[], int] = time.time_ns) -> list[str]:
    """Bring the schema up to date, one transaction a migration; return the revisions applied.

    Collectors that start together wait for each other. ``now`` (Unix nanoseconds) decides which partitions
    come first.

    Raises:
        DatabaseError: the database was written by a newer version, holds someone else's tables, or fails.
    """
    version = schema_version(engine)
    if version.state is SchemaState.NEWER:
        raise _newer(engine, version)
    applied: list[str] = []
    with failing_in_one_line(engine, "upgrade"):
        while revision := _apply_next(engine):
            applied.append(revision)
        with transaction(engine) as connection:
            maintain_partitions(connection, now())
            if applied:
                audit.record(
                    connection, audit.operator(), "db.upgraded", applied[-1], {"applied": applied}, now=now()
                )
    return applied


@dataclass(frozen=True, slots=True)
class StepBack:
    """A migration that a downgrade takes back, and what goes with it: nothing, if ``loses`` is empty."""

    revision: str
    loses: str


def steps_back(engine: Engine, revision: str) -> list[StepBack]:
    """Return what `downgrade` would do, in order; nothing if the database has that schema.

    Raises:
        DatabaseError: ``revision`` is no schema that the database can be taken back to.
    """
    with failing_in_one_line(engine, "read"):
        version = schema_version(engine)
    if version.state is SchemaState.NEWER:
        raise _newer(engine, version)
    if version.current is None:
        raise DatabaseError(f"{describe(engine)} has no gradwatch tables")
    script = _scripts()
    steps = list(script.iterate_revisions(version.current, "base"))
    known = [*(step.revision for step in steps), "base"]
    if revision not in known:
        raise DatabaseError(
            f"{describe(engine)} cannot be taken back from schema {version.current} to {revision!r}: "
            f"choose {', '.join(known[1:])}"
        )
    return [StepBack(step.revision, step.module.loses) for step in steps[: known.index(revision)]]


def downgrade(engine: Engine, revision: str, *, now: Callable[[], int] = time.time_ns) -> None:
    """Take the schema back to ``revision`` (``base`` drops every table). ``now`` in Unix nanoseconds.

    Raises:
        DatabaseError: as from `steps_back`, or the database fails; then nothing has changed.
    """
    from alembic import command

    steps_back(engine, revision)
    with failing_in_one_line(engine, "downgrade"), transaction(engine) as connection:
        _lock_migrations(connection)
        command.downgrade(_config(connection), revision)
        if inspect(connection).has_table(schema.audit.name):
            audit.record(connection, audit.operator(), "db.downgraded", revision, now=now())


@contextlib.contextmanager
def failing_in_one_line(engine: Engine, act: str) -> Iterator[None]:
    """Turn what the database says about a failure into a `DatabaseError`; ``act`` is what was to be done."""
    try:
        yield
    except SQLAlchemyError as error:
        raise DatabaseError(f"cannot {act} {describe(engine)}: {_reason(error)}") from error


def require_current(engine: Engine) -> None:
    """Check that this version and the database's schema belong together.

    Raises:
        DatabaseError: they do not; the message says which command to run.
    """
    with engine.connect() as connection:
        if _revision(connection) == REVISION:
            return
    version = schema_version(engine)
    if version.state is SchemaState.NEWER:
        raise _newer(engine, version)
    if version.state is not SchemaState.CURRENT:
        held = "has no gradwatch tables" if version.state is SchemaState.EMPTY else "has an older schema"
        raise DatabaseError(f"{describe(engine)} {held}: run `gradwatch db upgrade --db URL`")


def _newer(engine: Engine, version: SchemaVersion) -> DatabaseError:
    return DatabaseError(
        f"{describe(engine)} has schema {version.current}, which this version of gradwatch does not know: "
        "upgrade gradwatch"
    )


def _apply_next(engine: Engine) -> str | None:
    from alembic import command

    with transaction(engine) as connection:
        _lock_migrations(connection)
        # Looked at under the lock: somebody else may have migrated while we waited for it.
        current = _revision(connection)
        if current is None and "run" in inspect(connection).get_table_names():
            raise DatabaseError(
                f"{describe(engine)} holds a table `run` that gradwatch did not make: choose another database"
            )
        pending = _scripts().iterate_revisions("head", current or "base")
        following = next(reversed(list(pending)), None)
        if following is None:
            return None
        command.upgrade(_config(connection), following.revision)
        return following.revision


def _revision(connection: Connection) -> str | None:
    """Return the revision that the database has; None without any."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return revision


def _scripts() -> ScriptDirectory:
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(_config())


def _config(connection: Connection | None = None) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(asset_dir("migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _lock_migrations(connection: Connection) -> None:
    if connection.dialect.name == POSTGRESQL:
        # Transaction-scoped, so that it works behind a pooler. Whoever waits finds nothing left to do.
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        # A migration that cannot get its table lock must not make every other query queue behind it.
        connection.execute(text("SET LOCAL lock_timeout = '10s'"))


# --- Engines -------------------------------------------------------------------------------------------


def _parse(url: str) -> URL:
    expected = "expected sqlite:///PATH or postgresql://USER@HOST/NAME"
    if "://" not in url and url:
        return URL.create("sqlite", database=url)
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise DatabaseError(f"the database URL cannot be read; {expected}") from error
    if parsed.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        return parsed.set(drivername="sqlite")
    raise DatabaseError(f"unknown kind of database {parsed.drivername!r}; {expected}")


def _check_file(url: URL, must_exist: bool) -> None:
    if not url.database or url.database == ":memory:":
        raise DatabaseError("SQLite needs a file, such as sqlite:///gradwatch.db: memory ends with the process")
    path = Path(url.database)
    if must_exist and not path.exists():
        raise DatabaseError(f"there is no database at {path}: start a collector, or name another with --db")
    if not path.absolute().parent.is_dir():
        raise DatabaseError(f"cannot open {path}: the folder {path.absolute().parent} does not exist")


def _sqlite_engine(url: URL) -> Engine:
    engine = create_engine(url, connect_args={"timeout": _BUSY_SECONDS}, pool_timeout=_BUSY_SECONDS)

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None  # transactions begin below, not by the driver's guess
        for pragma in (
            f"busy_timeout = {_BUSY_SECONDS * 1000}",
            # These two only take effect before the first table.
            f"page_size = {_PAGE_BYTES}",
            "auto_vacuum = incremental",
            "journal_mode = wal",
            "synchronous = full",  # acknowledged means on disk, not in the page cache
            "foreign_keys = on",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgresql_engine(url: URL) -> Engine:
    engine = create_engine(
        url,
        pool_pre_ping=True,
        # prepare_threshold: prepared statements do not survive PgBouncer's transaction pooling.
        connect_args={
            "connect_timeout": _CONNECT_SECONDS,
            "prepare_threshold": None,
            "keepalives_idle": _TCP_SECONDS // 2,
            "keepalives_interval": _TCP_SECONDS // 4,
            "keepalives_count": 2,
            "tcp_user_timeout": _TCP_SECONDS * 1000,
        },
    )
    event.listen(engine, "connect", lambda connection, _: arrays.register(connection))
    return engine


_writer_locks: weakref.WeakKeyDictionary[Engine, threading.Lock] = weakref.WeakKeyDictionary()


def _writer_lock(engine: Engine) -> contextlib.AbstractContextManager[object]:
    if engine.dialect.name == POSTGRESQL:
        return contextlib.nullcontext()
    return _writer_locks.setdefault(engine, threading.Lock())


def _reason(error: SQLAlchemyError) -> str:
    cause = error.orig if isinstance(error, DBAPIError) else error
    # psycopg lists every address it tried; the first line says what was wrong.
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
