"""PostgreSQL's partitions are made and dropped beside writers, readers and backups, and no row is lost."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import Engine, text

from gradwatch import conventions as c
from gradwatch_collector.records import Received
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.service import upkeep
from gradwatch_collector.service.lease import Lease
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage import partitions
from gradwatch_collector.storage.compaction import compact
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.database_clock import DatabaseClock
from gradwatch_collector.storage.partitions import maintain_partitions, make_rollup_partition
from gradwatch_collector.storage.reading import read_series
from gradwatch_collector.storage.retention import FOREVER, Policy, prune
from gradwatch_collector.storage.rolled_up import read_rollups
from gradwatch_collector.storage.segments import DAY
from gradwatch_collector.storage.series import SeriesIds
from gradwatch_collector.storage.writing import store
from tests.batches import START, at, batch, scalar, source
from tests.collector_process import eventually

DAYS = 86_400
WEEK = Policy(raw=7 * DAY, rollups=90 * DAY)

pytestmark = pytest.mark.postgresql


@pytest.fixture
def database(new_database: Callable[[str], str]) -> Iterator[Engine]:
    """A PostgreSQL database whose partitions are of today, long after the tests' time."""
    engine = db.connect(new_database("postgresql"))
    yield engine
    engine.dispose()


def receive(database: Engine, seconds: float, value: float) -> None:
    received = batch(source(), frames=[scalar(c.LOSS, [seconds], [value])])
    with transaction(database) as connection:
        (key,) = Registry().resolve(connection, [(received.source, at(seconds))])
        store(connection, SeriesIds(), [Received(key, received, at(seconds))])


def maintain(database: Engine, seconds: float) -> frozenset[str]:
    with transaction(database) as connection:
        return maintain_partitions(connection, at(seconds))


def compact_all(database: Engine, seconds: float) -> None:
    more = True
    while more:
        with transaction(database) as connection:
            more = compact(connection, at(seconds)).more


def stored(database: Engine) -> dict[str, int]:
    """Rows by partition, without those of the days on which the tests run."""
    with database.connect() as connection:
        names = connection.scalars(
            text("SELECT relname FROM pg_class WHERE relname ~ '_(default|d2025[0-9]+)$' AND relkind = 'r'")
        ).all()
        counts = {name: connection.scalar(text(f"SELECT count(*) FROM {name}")) for name in names}
    return {name: count or 0 for name, count in counts.items()}


def losses(database: Engine) -> list[float]:
    with database.connect() as connection:
        (point,) = read_series(connection, "run", c.LOSS.name)
    assert point.values is not None
    values: list[float] = point.values.tolist()
    return values


@contextlib.contextmanager
def backup_of(database: Engine, *tables: str) -> Iterator[None]:
    """Hold what `pg_dump` holds on every table from its first moment to its last."""
    with database.connect() as connection, connection.begin():
        connection.execute(text(f"LOCK TABLE {', '.join(tables)} IN ACCESS SHARE MODE"))
        yield


def test_partitions_are_made_ahead_and_dropped_once_empty(database: Engine) -> None:
    assert maintain(database, 0) == frozenset()
    made = stored(database)
    assert {"frame_d20250615", "frame_d20250618", "block_d20250615", "block_d20250618"} <= set(made)
    receive(database, 0, 1.0)  # on 2025-06-15
    maintain(database, 10 * DAYS)
    assert stored(database)["frame_d20250615"] == 1
    assert "frame_d20250616" not in stored(database)
    compact_all(database, 10 * DAYS)
    maintain(database, 10 * DAYS)
    assert "frame_d20250615" not in stored(database)
    assert losses(database) == [1.0]


def test_rows_that_came_before_their_partition_are_moved_into_it(database: Engine) -> None:
    receive(database, DAYS, 1.0)
    compact_all(database, 3 * DAYS)
    receive(database, DAYS + 1, 2.0)
    receive(database, 9 * DAYS, 3.0)
    assert (stored(database)["frame_default"], stored(database)["block_default"]) == (2, 1)
    assert maintain(database, 0) == frozenset()
    now = stored(database)
    assert (now["frame_default"], now["frame_d20250616"]) == (1, 1)
    assert (now["block_default"], now["block_d20250616"]) == (0, 1)
    receive(database, DAYS + 2, 4.0)
    assert stored(database)["frame_d20250616"] == 2
    assert losses(database) == [1.0, 2.0, 4.0, 3.0]


def test_a_moved_partition_is_like_one_that_was_there_before(database: Engine) -> None:
    receive(database, DAYS, 1.0)
    maintain(database, 0)
    with database.connect() as connection:
        stored_as = connection.execute(
            text(
                "SELECT attrelid, array_agg((attname, attstorage, attnotnull)::text ORDER BY attnum)"
                " FROM pg_attribute WHERE attnum > 0"
                " AND attrelid IN ('frame'::regclass, 'frame_d20250616'::regclass) GROUP BY attrelid"
            )
        )
        (one, other) = [columns for _, columns in stored_as]
        assert one == other
        assert connection.scalar(
            text("SELECT count(*) FROM pg_inherits WHERE inhparent = 'frame_pkey'::regclass")
        ) == connection.scalar(text("SELECT count(*) FROM pg_inherits WHERE inhparent = 'frame'::regclass"))


def test_a_day_of_which_too_much_came_early_stays_where_it_is(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "_MOST_BYTES", 2_000)
    for day in (1, 1 + 0.1, 2):
        receive(database, day * DAYS, 1.0)
    assert maintain(database, 0) == {"frame_d20250616"}
    now = stored(database)
    assert (now["frame_default"], now["frame_d20250617"]) == (2, 1)
    assert "frame_d20250618" in now
    assert losses(database) == [1.0] * 3


def test_writers_and_compaction_go_on_while_their_rows_are_moved(database: Engine) -> None:
    stop = threading.Event()
    sent: list[float] = []

    def write() -> None:
        while not stop.is_set():
            sent.append(float(len(sent)))
            receive(database, len(sent) * 600, sent[-1])

    def rearrange() -> None:
        while not stop.is_set():
            with transaction(database) as connection:
                compact(connection, at(100 * DAYS))

    threads = [threading.Thread(target=each) for each in (write, rearrange)]
    for thread in threads:
        thread.start()
    for day in range(20):
        until = time.monotonic() + 10
        while maintain(database, day * DAYS) and time.monotonic() < until:
            pass
    stop.set()
    for thread in threads:
        thread.join()
    assert losses(database) == sent


def test_a_backup_keeps_partitions_from_being_made_and_nothing_else_from_going_on(database: Engine) -> None:
    with backup_of(database, "frame", "block", "rollup"):
        left = maintain(database, 0)
        assert {"frame_d20250615", "block_d20250618"} < left
        receive(database, 0, 1.0)
        compact_all(database, 10 * DAYS)
        pruned = prune(lambda: transaction(database), WEEK, at(10 * DAYS))
        assert (pruned.blocks, pruned.rollups) == (1, 5)
        receive(database, 10 * DAYS, 2.0)
    now = stored(database)
    assert (now["frame_default"], now["rollup_default"]) == (1, 5)
    assert maintain(database, 10 * DAYS) == frozenset()
    with transaction(database) as connection:
        make_rollup_partition(connection, START, at(10 * DAYS))
    now = stored(database)
    assert (now["frame_default"], now["frame_d20250625"]) == (0, 1)
    assert (now["rollup_default"], now["rollup_d20250601"]) == (0, 5)
    with database.connect() as connection:
        (rolled,) = read_rollups(connection, "run", c.LOSS.name)
    assert (losses(database), rolled.last.tolist()) == ([2.0], [1.0])


def test_an_empty_partition_that_somebody_reads_is_dropped_another_time(database: Engine) -> None:
    maintain(database, 0)
    with backup_of(database, "frame", "block"):
        maintain(database, 10 * DAYS)
        assert "frame_d20250615" in stored(database)
    maintain(database, 10 * DAYS)
    assert "frame_d20250615" not in stored(database)


def test_what_waits_for_a_lock_waits_as_before_once_partitions_were_made(database: Engine) -> None:
    with transaction(database) as connection:
        maintain_partitions(connection, START)
        assert connection.scalar(text("SHOW lock_timeout")) == "0"


def test_upkeep_goes_on_during_a_backup_and_says_once_what_is_still_to_be_made(
    database: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upkeep, "_INTERVAL_SECONDS", 0.05)
    caplog.set_level(logging.INFO, logger=upkeep.__name__)
    with transaction(database) as connection:
        (day,) = connection.scalars(text("SELECT max(relname) FROM pg_class WHERE relname ~ '^frame_d[0-9]+$'"))
        connection.execute(text(f"DROP TABLE {day}"))
    receive(database, 0, 1.0)
    lease = Lease(database, seconds=600)
    assert lease.acquire()
    running = upkeep.Upkeep(database, lease, DatabaseClock(), Policy(raw=7 * DAY, rollups=FOREVER))
    with contextlib.ExitStack() as stack:
        backup = stack.enter_context(contextlib.ExitStack())
        backup.enter_context(backup_of(database, "frame", "block", "rollup"))
        stack.callback(running.stop)
        running.start()
        unmade = f"partitions that cannot be made yet: {day}"
        eventually(lambda: unmade in caplog.messages, "a word of what is to be made")
        eventually(lambda: stored(database)["rollup_default"], "what is old to be compacted and rolled up")
        backup.close()
        made = "partitions that cannot be made yet: none"
        eventually(lambda: made in caplog.messages, "the partition to be made")
    assert [each for each in caplog.messages if not each.startswith("pruned")] == [unmade, made]
