"""A copy of a SQLite database that is in use, whole and of one moment."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from gradwatch_collector.storage.database import DatabaseError


def back_up(engine: Engine, path: Path) -> None:
    """Write everything that is committed to a new file; it is there in full, and on disk, or not at all.

    Writers go on meanwhile: the copy is what one of SQLite's read transactions sees, without free pages.

    Raises:
        DatabaseError: not SQLite, the file is there already, or it cannot be written.
    """
    if engine.dialect.name != "sqlite":
        raise DatabaseError(
            "PostgreSQL makes its own backups: pg_dump --format=custom --file=FILE URL (docs/operations.md)"
        )
    if path.exists():
        raise DatabaseError(f"{path} is there already: choose another name")
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)
        # VACUUM begins its own transaction and can be in no other.
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            driver = connection.connection.driver_connection
            assert driver is not None
            driver.execute("VACUUM INTO ?", (str(partial),))
        _sync(partial)
        partial.rename(path)
        _sync(path.parent)
    except UnicodeEncodeError as error:
        raise DatabaseError(f"found {os.fsencode(path)!r}, expected a name in UTF-8 for SQLite") from error
    except (SQLAlchemyError, OSError, sqlite3.Error) as error:
        partial.unlink(missing_ok=True)
        raise DatabaseError(f"cannot write {path}: {error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
