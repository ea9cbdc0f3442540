"""Several collectors, each a process, on one database: ingest is shared, one evaluates, and any may die."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, select

from gradwatch import conventions as c
from gradwatch_collector.service.lease import LEASE_SECONDS
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import transaction
from tests.collector_process import Collector, collector, eventually
from tests.crowd import Crowd, lost_and_twice

# A tick is a second; what else runs on the machine may delay it.
PATIENCE = LEASE_SECONDS + 10
SUSPENDED = str(Path(__file__).parents[1] / "suspended_collector.py")


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


def test_one_that_is_suspended_before_it_writes_and_wakes_up_changes_nothing(
    database: Engine, database_url: str, tmp_path: Path
) -> None:
    record_leases(database)
    moment = tmp_path / "now"
    with collector(database_url, program=(sys.executable, SUSPENDED, str(moment))) as first:
        eventually(lambda: evaluates(database, first), "it to evaluate")
        with collector(database_url) as other:
            crowd = Crowd(other.url, count=3)
            try:
                crowd.await_more(20)
                moment.touch()
                eventually(lambda: not moment.exists(), "it to be suspended")
                eventually(lambda: evaluates(database, other), "the other to evaluate", PATIENCE)
                term = holder(database)[1]
                eventually(lambda: done(database)[-1][0] == term, "the other to have evaluated")
                woken = time.time()
                first.process.send_signal(signal.SIGCONT)
                eventually(lambda: evaluated_at(first) > woken, "it to go on")
                # It serves what the other finds, and takes telemetry in.
                assert {run["status"] for run in first.runs().values()} == {"running"}
                assert first.get("/readyz").status_code == 200
                crowd.finish()
            finally:
                first.process.send_signal(signal.SIGCONT)
                crowd.give_up()
            assert holder(database) == (other.process.pid, term)
    # It had looked at its clock before it was suspended: whatever it wrote would be told of that moment.
    assert done(database) == sorted(done(database))
    assert lost_and_twice(database_url, crowd.sent) == (0, 0)
    with database.connect() as connection:
        history = list(connection.scalars(select(schema.run_history.c.status)))
    assert history == ["running"] * 3


def evaluated_at(one: Collector) -> float:
    found = re.search(rf"^{c.COLLECTOR_EVALUATED_TIMESTAMP.name} (\S+)", one.get("/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def record_leases(database: Engine) -> None:
    """Let the database keep every state that the lease was in."""
    record = "INSERT INTO lease_record (term, done_at) VALUES (NEW.term, NEW.done_at)"
    statements = ["CREATE TABLE lease_record (place INTEGER PRIMARY KEY, term BIGINT, done_at BIGINT)"]
    if database.dialect.name == "sqlite":
        statements.append(f"CREATE TRIGGER recorded AFTER UPDATE ON lease BEGIN {record}; END")
    else:
        statements = [
            "CREATE TABLE lease_record (place BIGSERIAL PRIMARY KEY, term BIGINT, done_at BIGINT)",
            f"CREATE FUNCTION record() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN {record}; RETURN NEW; END'",
            "CREATE TRIGGER recorded AFTER UPDATE ON lease FOR EACH ROW EXECUTE FUNCTION record()",
        ]
    with transaction(database) as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def done(database: Engine) -> list[tuple[int, int]]:
    """Term of the lease and when its holder last did what it is for, after every change, in their order."""
    with database.connect() as connection:
        rows = connection.exec_driver_sql("SELECT term, done_at FROM lease_record ORDER BY place")
        return [(row.term, row.done_at) for row in rows]


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
