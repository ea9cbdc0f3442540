"""A loop goes on whatever it calls raises, and ends when it is told."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest
from sqlalchemy.exc import OperationalError

from gradwatch_collector.service.lease import LeaseLostError
from gradwatch_collector.service.loop import Loop

AWAY = OperationalError("SELECT 1", {}, Exception("it is away\nfor a while"))


def twice(raised: Exception | None = None) -> tuple[Callable[[], None], threading.Event]:
    """What raises this each time, and an event that is set when it was called a second time."""
    calls, again = [], threading.Event()

    def act() -> None:
        calls.append(1)
        if len(calls) == 2:
            again.set()
        if raised is not None:
            raise raised

    return act, again


@pytest.mark.parametrize(
    ("raised", "level", "told"),
    [
        (AWAY, logging.WARNING, "chores waits for the database: (builtins.Exception) it is away"),
        (LeaseLostError(), logging.INFO, "chores is another collector's now"),
        (ValueError("odd"), logging.ERROR, "chores failed, trying again"),
    ],
)
def test_what_raises_is_told_and_called_again_and_keeps_nobody_else_waiting(
    caplog: pytest.LogCaptureFixture, raised: Exception, level: int, told: str
) -> None:
    caplog.set_level(logging.INFO)
    (failing, failed_again), (other, other_again) = twice(raised), twice()
    loop = Loop("chores", 0.001, failing, other)
    loop.start()
    try:
        assert failed_again.wait(30)
        assert other_again.wait(30)
    finally:
        assert loop.stop()
    assert {(record.levelno, record.getMessage()) for record in caplog.records} == {(level, told)}


def test_what_is_under_way_is_finished_before_a_loop_ends() -> None:
    begun, finished = threading.Event(), threading.Event()

    def act() -> None:
        begun.set()
        while loop.goes_on:
            pass
        finished.set()

    loop = Loop("chores", 0.001, act)
    loop.start()
    assert begun.wait(30)
    assert loop.goes_on
    assert loop.stop()
    assert finished.is_set()


def test_what_hangs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradwatch_collector.service.loop._STOP_SECONDS", 0.01)
    begun, may_end = threading.Event(), threading.Event()

    def act() -> None:
        begun.set()
        may_end.wait(30)

    loop = Loop("chores", 0.001, act)
    loop.start()
    assert begun.wait(30)
    assert not loop.stop()
    may_end.set()
    assert loop.stop()
