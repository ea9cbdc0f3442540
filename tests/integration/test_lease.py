"""A lease has one holder, by the database's clock, and whoever held it before cannot write."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from sqlalchemy import Engine, select, update

from gradwatch_collector.service.lease import Lease, LeaseLostError
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.database_clock import DatabaseClock, database_now

SECOND = 1_000_000_000


def expire(database: Engine) -> None:
    with transaction(database) as connection:
        connection.execute(update(schema.lease).values(expires_at=database_now(connection)))


def term(database: Engine) -> int:
    with database.connect() as connection:
        return connection.execute(select(schema.lease.c.term)).scalar_one()


def write_as(holder: Lease) -> None:
    with holder.transaction() as connection:
        connection.execute(schema.run_history.insert().values(**ENTRY))


ENTRY = {"run_id": "r", "attempt": 1, "recorded_at": 1, "status": "lost", "evidence": {}}


def entries(database: Engine) -> int:
    with database.connect() as connection:
        return len(connection.execute(select(schema.run_history)).all())


def test_one_holds_it_until_it_expires_then_another_does_under_the_next_term(database: Engine) -> None:
    one, other = Lease(database), Lease(database)
    assert (one.acquire(), other.acquire(), one.acquire(), other.acquire()) == (True, False, True, False)
    assert term(database) == 1
    expire(database)
    assert (other.acquire(), one.acquire()) == (True, False)
    assert term(database) == 2


def test_whoever_slept_through_the_end_of_its_lease_cannot_write(database: Engine) -> None:
    sleeper, other = Lease(database), Lease(database)
    sleeper.acquire()
    write_as(sleeper)
    expire(database)
    with pytest.raises(LeaseLostError):
        write_as(sleeper)
    other.acquire()
    with pytest.raises(LeaseLostError):
        write_as(sleeper)
    assert entries(database) == 1
    write_as(other)
    assert entries(database) == 2


def test_a_lease_that_nobody_took_meanwhile_is_taken_again_under_a_new_term(database: Engine) -> None:
    one = Lease(database)
    one.acquire()
    expire(database)
    assert one.acquire()
    assert term(database) == 2
    write_as(one)


def test_nobody_else_takes_it_while_its_holder_writes(database: Engine) -> None:
    if database.dialect.name != "postgresql":
        pytest.skip("SQLite has one writer: the other would wait for the file")
    one, other = Lease(database, seconds=0.2), Lease(database)
    one.acquire()
    with one.transaction():
        time.sleep(0.3)
        assert not other.acquire()
    assert other.acquire()


def test_a_released_lease_is_free_at_once(database: Engine) -> None:
    one, other = Lease(database), Lease(database)
    one.acquire()
    one.release()
    assert other.acquire()
    one.release()
    assert not one.acquire()


def test_a_new_process_is_a_new_holder(database: Engine) -> None:
    Lease(database).acquire()
    assert not Lease(database).acquire()


def test_a_transaction_that_is_suspended_is_ended_by_postgresql(
    new_database: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "_IDLE_SECONDS", 1)
    engine = db.connect(new_database("postgresql"))
    one, other = Lease(engine, seconds=0.5), Lease(engine)
    one.acquire()
    with pytest.raises(db.DBAPIError) as refused, one.transaction() as connection:
        time.sleep(1.5)
        assert other.acquire()
        connection.execute(schema.run_history.insert().values(**ENTRY))
    assert db.is_transient(refused.value)
    assert entries(engine) == 0
    engine.dispose()


@pytest.mark.parametrize("wrong_by", [-3600, 0, 86_400])
def test_the_databases_clock_counts_whatever_our_own_says(database: Engine, wrong_by: int) -> None:
    clock = DatabaseClock(lambda: time.time_ns() + wrong_by * SECOND)
    with database.connect() as connection:
        clock.set(connection)
        told = database_now(connection)
    assert abs(clock.now() - told) < SECOND / 2
    assert abs(told - time.time_ns()) < SECOND


def test_a_reading_in_which_the_process_slept_is_not_believed(database: Engine) -> None:
    readings = iter([0, 100 * SECOND, 5, 6])
    clock = DatabaseClock(lambda: next(readings))
    with database.connect() as connection:
        clock.set(connection)
    assert clock.now() == 5
