"""A backup that is taken while telemetry comes in holds everything that was acknowledged before it began."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import make_url

from gradwatch_collector.storage import database as db
from tests.collector_process import collector, gradwatch
from tests.crowd import Crowd, lost
from tests.postgresql import tool


def test_a_sqlite_backup_is_whole_and_can_be_served(new_database: Callable[[str], str], tmp_path: Path) -> None:
    database, copy = new_database("sqlite"), tmp_path / "backup.db"
    with collector(database) as running:
        crowd = Crowd(running.url)
        try:
            crowd.await_more(50)
            before = crowd.sent
            done = gradwatch("db", "backup", str(copy), "--db", database)
            assert done.returncode == 0, done.stderr
            crowd.await_more(1)
            crowd.finish()
        finally:
            crowd.give_up()
    assert sorted(path.name for path in tmp_path.glob("backup.db*")) == ["backup.db"]
    with sqlite3.connect(copy) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
    engine = db.connect(f"sqlite:///{copy}")
    db.require_current(engine)
    with engine.connect() as connection:
        assert lost(connection, before) == 0
        assert connection.exec_driver_sql("PRAGMA auto_vacuum").scalar() == 2
    engine.dispose()
    with collector(f"sqlite:///{copy}") as restored:
        assert set(restored.runs()) == set(before)


def test_a_backup_overwrites_nothing_and_leaves_nothing_behind_when_it_fails(
    new_database: Callable[[str], str], tmp_path: Path
) -> None:
    database, taken = new_database("sqlite"), tmp_path / "taken.db"
    taken.write_text("precious")
    refused = gradwatch("db", "backup", str(taken), "--db", database)
    assert (refused.returncode, taken.read_text()) == (1, "precious")
    assert "is there already" in refused.stderr
    nowhere = gradwatch("db", "backup", str(tmp_path / "no" / "where.db"), "--db", database)
    assert nowhere.returncode == 1
    assert nowhere.stderr.startswith("Error: cannot write")
    assert "Traceback" not in nowhere.stderr
    no_text = gradwatch("db", "backup", os.fsdecode(os.fsencode(tmp_path) + b"/\xff.db"), "--db", database)
    assert no_text.returncode == 1
    assert no_text.stderr.startswith("Error: found b'")
    assert no_text.stderr.endswith("xff.db', expected a name in UTF-8 for SQLite\n")


@pytest.mark.postgresql
def test_a_postgresql_dump_restores_to_what_was_acknowledged(
    new_database: Callable[[str], str], new_postgresql: Callable[[str | None], str], tmp_path: Path
) -> None:
    database, dump = new_database("postgresql"), tmp_path / "gradwatch.dump"
    with collector(database) as running:
        crowd = Crowd(running.url)
        try:
            crowd.await_more(50)
            before = crowd.sent
            run(tool("pg_dump"), "--format=custom", f"--file={dump}", address(database))
            crowd.finish()
        finally:
            crowd.give_up()
    restored = new_postgresql(None)
    run(tool("pg_restore"), "--no-owner", "--exit-on-error", f"--dbname={address(restored)}", str(dump))
    engine = db.connect(restored)
    db.require_current(engine)
    with engine.connect() as connection:
        assert lost(connection, before) == 0
    engine.dispose()
    with collector(restored) as running:
        assert set(running.runs()) == set(before)
    refused = gradwatch("db", "backup", str(tmp_path / "copy.db"), "--db", database)
    assert refused.returncode == 1
    assert "pg_dump --format=custom" in refused.stderr


def address(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
