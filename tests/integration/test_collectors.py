"""Several collectors, each a process, on one database: ingest is shared, one evaluates, and any may die."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import time
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, make_url, select

from gradwatch_collector.service.lease import LEASE_SECONDS
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage import schema
from tests.collector_process import Collector, collector, eventually
from tests.crowd import Crowd, lost_and_twice

# A tick is a second; what else runs on the machine may delay it.
PATIENCE = LEASE_SECONDS + 10


@pytest.fixture
def two(database_url: str) -> Iterator[list[Collector]]:
    with collector(database_url) as one, collector(database_url) as other:
        yield [one, other]


def holder(database: Engine) -> tuple[int, int]:
    """Process and term of the one that evaluates."""
    with database.connect() as connection:
        row = connection.execute(select(schema.lease)).one()
    return int((row.holder or ":0:").split(":")[-2]), row.term


def by_role(database: Engine, two: list[Collector]) -> tuple[Collector, Collector]:
    """The collector that evaluates, and the other."""
    pids = [each.process.pid for each in two]
    pid = eventually(lambda: pid if (pid := holder(database)[0]) in pids else None, "one to evaluate")
    first = two[pids.index(pid)]
    return first, two[1 - pids.index(pid)]


def evaluates(database: Engine, one: Collector) -> bool:
    return holder(database)[0] == one.process.pid


def test_when_the_one_that_evaluates_is_killed_another_does_within_the_lease(
    database: Engine, two: list[Collector]
) -> None:
    first, other = by_role(database, two)
    crowd = Crowd(other.url, first.url, count=4)
    try:
        crowd.await_more(20)
        began = time.monotonic()
        first.process.send_signal(signal.SIGKILL)
        eventually(lambda: evaluates(database, other), "the other to evaluate", PATIENCE)
        assert time.monotonic() - began < PATIENCE
        with collector(first.database, "--listen", first.url.removeprefix("http://")):
            crowd.finish()
    finally:
        crowd.give_up()
    assert lost_and_twice(first.database, crowd.sent) == (0, 0)


def test_one_that_ends_in_order_hands_over_at_once(database: Engine, two: list[Collector]) -> None:
    first, other = by_role(database, two)
    first.process.terminate()
    assert first.process.wait(30) == 0
    eventually(lambda: evaluates(database, other), "the other to evaluate", LEASE_SECONDS / 2)


def test_one_that_is_suspended_and_wakes_up_changes_nothing(database: Engine, two: list[Collector]) -> None:
    first, other = by_role(database, two)
    crowd = Crowd(other.url, count=3)
    try:
        crowd.await_more(20)
        suspend(first)
        eventually(lambda: evaluates(database, other), "the other to evaluate", PATIENCE)
        term = holder(database)[1]
        first.process.send_signal(signal.SIGCONT)
        give_up = time.monotonic() + 5
        while time.monotonic() < give_up:
            assert (evaluates(database, other), holder(database)[1]) == (True, term)
            time.sleep(0.1)
        # It serves what the other finds, and takes telemetry in.
        assert {run["status"] for run in first.runs().values()} == {"running"}
        assert first.get("/readyz").status_code == 200
        crowd.finish()
    finally:
        first.process.send_signal(signal.SIGCONT)
        crowd.give_up()
    assert lost_and_twice(first.database, crowd.sent) == (0, 0)
    with database.connect() as connection:
        history = list(connection.scalars(select(schema.run_history.c.status)))
    assert history == ["running"] * 3


def suspend(one: Collector) -> None:
    """Stop the process, but not while it has SQLite's file locked: then nobody could write, whoever it is."""
    file = make_url(one.database).database if one.database.startswith("sqlite") else None
    while True:
        one.process.send_signal(signal.SIGSTOP)
        if file is None or _is_writable(file):
            return
        one.process.send_signal(signal.SIGCONT)
        time.sleep(0.05)


def _is_writable(file: str) -> bool:
    with contextlib.closing(sqlite3.connect(file, timeout=0.5, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        connection.execute("ROLLBACK")
        return True


def test_silence_is_told_by_whichever_of_them_is_left(database_url: str) -> None:
    engine = db.connect(database_url)
    with (
        collector(database_url, "--lost-after", "8") as one,
        collector(database_url, "--lost-after", "8") as other,
    ):
        first, left = by_role(engine, [one, other])
        crowd = Crowd(first.url, count=1)
        try:
            crowd.await_more(5)
        finally:
            crowd.give_up()
        crowd.finish()
        first.process.send_signal(signal.SIGKILL)
        left.await_status("run-0", "lost")
    engine.dispose()
