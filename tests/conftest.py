"""Real databases for every test that asks for one: SQLite files, and a PostgreSQL server of the tests' own."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, make_url, text

from gradwatch_collector.storage import database as db
from tests.collector_process import eventually
from tests.control_groups import limited_group
from tests.postgresql import own_server

POSTGRESQL_URL = "GRADWATCH_TEST_POSTGRESQL"
BACKENDS = (pytest.param("sqlite", id="sqlite"), pytest.param("postgresql", marks=pytest.mark.postgresql))


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """URL of a server where databases may be created: the one named by the environment, else our own."""
    if url := os.environ.get(POSTGRESQL_URL):
        yield url
        return
    with own_server() as server:
        # Dozens of databases are made and thrown away; nobody needs them after a power cut.
        server.psql("ALTER SYSTEM SET fsync = off; SELECT pg_reload_conf();")
        yield server.get_uri()


@pytest.fixture(scope="session")
def new_postgresql(postgresql_server: str) -> Iterator[Callable[[str | None], str]]:
    """Make a database, a copy of ``template`` if one is given, and return its URL."""
    server = make_url(postgresql_server).set(drivername="postgresql+psycopg")
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    made: list[str] = []
    prefix = f"gradwatch_test_{os.getpid()}"  # xdist workers may share a server
    numbers = itertools.count()

    def make(template: str | None = None) -> str:
        name = f"{prefix}_{next(numbers)}"
        copied = "" if template is None else f" TEMPLATE {make_url(template).database}"
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}{copied}"))
        made.append(name)
        return server.set(database=name).render_as_string(hide_password=False)

    yield make
    if POSTGRESQL_URL in os.environ:  # our own server takes them along when it goes
        with admin.connect() as connection:
            for name in made:
                connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture(scope="session")
def template(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """URL of a migrated, empty database of a kind, which tests copy."""
    made: dict[str, str] = {}

    def of(kind: str) -> str:
        if kind not in made:
            made[kind] = (
                f"sqlite:///{tmp_path_factory.mktemp('template')}/gradwatch.db"
                if kind == "sqlite"
                else request.getfixturevalue("new_postgresql")(None)
            )
            engine = db.connect(made[kind])
            db.upgrade(engine)
            engine.dispose()
        return made[kind]

    return of


@pytest.fixture
def new_database(
    request: pytest.FixtureRequest, template: Callable[[str], str], tmp_path: Path
) -> Callable[[str], str]:
    """Make a migrated, empty database of a kind, the test's own, and return its URL."""

    def make(kind: str) -> str:
        if kind == "postgresql":
            copy: str = request.getfixturevalue("new_postgresql")(template(kind))
            return copy
        path = tmp_path / "gradwatch.db"
        shutil.copy(make_url(template(kind)).database or "", path)
        return f"sqlite:///{path}"

    return make


@pytest.fixture(params=BACKENDS)
def database_url(request: pytest.FixtureRequest, new_database: Callable[[str], str]) -> str:
    """URL of a migrated, empty database of the test's own, once for SQLite and once for PostgreSQL."""
    return new_database(request.param)


@pytest.fixture
def database(database_url: str) -> Iterator[Engine]:
    """A migrated, empty database of the test's own, once for SQLite and once for PostgreSQL."""
    engine = db.connect(database_url)
    yield engine
    engine.dispose()


@pytest.fixture(params=BACKENDS)
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """A database without any table, once for SQLite and once for PostgreSQL."""
    if request.param == "postgresql":
        url = request.getfixturevalue("new_postgresql")(None)
    else:
        url = f"sqlite:///{tmp_path}/empty.db"
    engine = db.connect(url)
    yield engine
    engine.dispose()


@pytest.fixture
def limited() -> Iterator[Path]:
    """A control group whose processes the kernel kills if they take much memory; empty at the end."""
    group = limited_group()
    if group is None:
        pytest.skip("no control group with a limit can be made here")
    yield group
    eventually(lambda: not (group / "cgroup.procs").read_text(), "the group to be empty")
    group.rmdir()
