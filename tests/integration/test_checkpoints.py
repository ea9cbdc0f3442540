"""Checkpoints of a run in the collector: each attempt to save once, the record, and the time that counted."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import Engine, func, select

from gradwatch import conventions as c
from gradwatch.cli import main
from gradwatch_collector.api.views import show_run
from gradwatch_collector.records import Batch, Received
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.series import SeriesIds
from gradwatch_collector.storage.writing import store
from tests.batches import at, batch, event, scalar, source
from tests.collector_process import collector, eventually, train
from tests.schemas import valid

STARTED = event(c.RUN_STARTED, 0)
NAME = "run/last.pt"


def saved(seconds: float, sequence: int, step: int) -> Any:
    return event(
        c.CHECKPOINT_SAVED, seconds, sequence,
        STEP=step, CHECKPOINT_NAME=NAME, CHECKPOINT_SIZE=1000, CHECKPOINT_DURATION=0.25,
    )  # fmt: skip


def failed(seconds: float, sequence: int, step: int) -> Any:
    return event(
        c.CHECKPOINT_FAILED, seconds, sequence,
        STEP=step, CHECKPOINT_NAME=NAME, CHECKPOINT_DURATION=0.5,
        EXCEPTION_TYPE="OSError", EXCEPTION_MESSAGE="No space left on device",
    )  # fmt: skip


def ended(seconds: float, sequence: int, status: str) -> Any:
    return event(c.RUN_ENDED, seconds, sequence, STATUS=status)


def receive(database: Engine, received: Batch, seconds: float) -> None:
    """As the ingest thread does."""
    registry = Registry()
    with transaction(database) as connection:
        (key,) = registry.resolve(connection, [(received.source, at(seconds))])
        store(connection, SeriesIds(), [Received(key, received, at(seconds))])
        registry.apply(connection, [Received(key, received, at(seconds))])


def show(database: Engine) -> Any:
    with database.connect() as connection:
        shown = show_run(connection, "run")
    valid(shown, "run-detail")
    return shown


def test_every_attempt_to_save_is_listed_newest_first_with_its_facts(database: Engine) -> None:
    receive(database, batch(source(), STARTED, saved(10, 1, 100), failed(20, 2, 200)), 21)
    newest, oldest = show(database)["checkpoints"]
    assert newest == {
        "time": newest["time"], "attempt": 1, "rank": 0, "state": "failed", "name": NAME, "step": 200,
        "bytes": None, "seconds": 0.5, "error": "OSError: No space left on device",
    }  # fmt: skip
    assert oldest == {
        "time": oldest["time"], "attempt": 1, "rank": 0, "state": "saved", "name": NAME, "step": 100,
        "bytes": 1000, "seconds": 0.25, "error": None,
    }  # fmt: skip
    assert newest["time"] > oldest["time"]


def test_the_record_counts_all_attempts_and_dates_the_last_good_one(database: Engine) -> None:
    first = batch(source(instance="one"), STARTED, saved(10, 1, 100), saved(20, 2, 200), ended(25, 3, "failed"))
    second = batch(source(instance="two"), event(c.RUN_STARTED, 30), saved(40, 1, 300), failed(50, 2, 400))
    receive(database, first, 25)
    receive(database, second, 60)
    record = show(database)["checkpoint_record"]
    assert (record["saved"], record["failed"], record["success_rate"]) == (3, 1, 0.75)
    assert (record["last_good_step"], record["last_good_age_seconds"]) == (300, 20)
    receive(database, batch(source(instance="two"), ended(70, 3, "succeeded")), 90)
    assert show(database)["checkpoint_record"]["last_good_age_seconds"] == 30


def test_a_run_that_never_saved_has_no_rate(database: Engine) -> None:
    receive(database, batch(source(), STARTED), 1)
    shown = show(database)
    assert shown["checkpoints"] == []
    assert shown["checkpoint_record"] == {
        "saved": 0, "failed": 0, "success_rate": None,
        "last_good_at": None, "last_good_step": None, "last_good_age_seconds": None,
    }  # fmt: skip
    assert set(shown["effective_time"].values()) == {None}


def test_the_same_batch_again_changes_nothing(database: Engine) -> None:
    told = batch(source(), STARTED, saved(10, 1, 100), failed(20, 2, 200))
    for _ in range(2):
        receive(database, told, 21)
    with database.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(schema.checkpoint)) == 2


def test_ranks_that_save_what_is_their_own_are_each_counted(database: Engine) -> None:
    for rank in (0, 1):
        receive(database, batch(source(rank=rank, instance=f"r{rank}"), STARTED, saved(10, 1, 5)), 11)
    shown = show(database)
    assert sorted(each["rank"] for each in shown["checkpoints"]) == [0, 1]
    assert shown["checkpoint_record"]["saved"] == 2


def test_a_clock_that_is_ahead_saved_nothing_after_it_was_received(database: Engine) -> None:
    receive(database, batch(source(), STARTED, saved(9999, 1, 100)), 30)
    assert show(database)["checkpoint_record"]["last_good_age_seconds"] == 0


def test_a_clock_that_is_behind_makes_no_checkpoint_older(database: Engine) -> None:
    """Its events arrive an hour late for as long as it is heard; a rank whose clock is right saved before."""
    right = batch(source(rank=1, instance="right"), STARTED, saved(1, 1, 10))
    receive(database, right, 1)
    behind = 3600
    receive(database, batch(source(), event(c.RUN_STARTED, -behind)), 0)
    for seconds in (5, 10, 15):
        told = [event(c.RUN_HEARTBEAT, seconds - behind, seconds)]
        if seconds == 10:
            told.append(saved(10 - behind, 11, 100))
        receive(database, batch(source(), *told), seconds)
    record = show(database)["checkpoint_record"]
    assert (record["last_good_step"], record["last_good_age_seconds"]) == (100, 5)


def test_what_a_foreign_sender_leaves_out_or_gets_wrong_is_null(database: Engine) -> None:
    odd = event(c.CHECKPOINT_SAVED, 5, 1, STEP="seven", CHECKPOINT_SIZE=1e300, CHECKPOINT_DURATION="NaN")
    receive(database, batch(source(), STARTED, odd), 6)
    (only,) = show(database)["checkpoints"]
    assert [only[name] for name in ("name", "step", "bytes", "seconds")] == [None] * 4


def steps(first: int, seconds: list[float], durations: list[float], waits: list[float]) -> list[Any]:
    return [
        scalar(c.STEP_INDEX, seconds, list(range(first, first + len(seconds)))),
        # The first step of a process has no beginning.
        scalar(c.STEP_DURATION, seconds[1:], durations[1:]),
        scalar(c.DATA_WAIT, seconds[1:], waits[1:]),
    ]


def test_effective_time_leaves_out_waiting_lost_steps_and_what_is_in_no_step(database: Engine) -> None:
    first = steps(0, [2, 3, 4, 5, 6], [0, 1, 1, 1, 1], [0, 0.25, 0, 0, 0.5])
    receive(database, batch(source(instance="one"), STARTED, ended(7, 1, "failed"), frames=first), 7)
    # Went on from the checkpoint at step 3: steps 3 and 4 are done again.
    second = steps(3, [12, 13, 14], [0, 1, 1], [0, 0, 0.125])
    started = event(c.RUN_STARTED, 10)
    receive(database, batch(source(instance="two"), started, ended(20, 1, "succeeded"), frames=second), 20)
    spent = show(database)["effective_time"]
    assert spent["productive_seconds"] == 1 + 1 - 0.25 + 1 + 1 - 0.125
    assert spent["waiting_seconds"] == 0.25 + 0.125
    assert spent["lost_seconds"] == 2
    assert spent["wall_seconds"] == 20
    assert spent["ratio"] == pytest.approx(3.625 / 20)


def test_work_that_a_second_process_of_one_attempt_repeats_counts_once(database: Engine) -> None:
    """torchrun started again by hand: both times it counts no restart."""
    for instance, began in (("one", 0), ("two", 10)):
        frames = steps(0, [began + 2, began + 3, began + 4], [0, 1, 1], [0, 0, 0])
        told = source(attempt=1, instance=instance)
        receive(database, batch(told, event(c.RUN_STARTED, began), frames=frames), began + 5)
    spent = show(database)["effective_time"]
    assert (spent["productive_seconds"], spent["lost_seconds"], spent["wall_seconds"]) == (2, 2, 15)


def test_an_older_attempt_that_is_heard_of_later_is_the_one_whose_steps_are_lost(database: Engine) -> None:
    for instance, began, waits in (("new", 10, 0), ("old", 0, 0.5)):
        frames = steps(0, [began + 2, began + 3, began + 4], [0, 1, 1], [0, waits, waits])
        told = batch(source(instance=instance), event(c.RUN_STARTED, began), frames=frames)
        receive(database, told, 15)
    spent = show(database)["effective_time"]
    assert (spent["productive_seconds"], spent["waiting_seconds"], spent["lost_seconds"]) == (2, 0, 2)


def test_a_step_waited_no_longer_than_it_took(database: Engine) -> None:
    frames = steps(0, [2, 3, 4], [0, 1, 1], [0, 5, 0.5])
    receive(database, batch(source(), STARTED, ended(5, 1, "succeeded"), frames=frames), 5)
    spent = show(database)["effective_time"]
    assert (spent["productive_seconds"], spent["waiting_seconds"], spent["ratio"]) == (0.5, 1.5, 0.1)


def test_effective_time_is_never_more_than_all_of_it(database: Engine) -> None:
    """A clock that is ahead, and a collector that came late: when it started is not known yet."""
    receive(database, batch(source(), event(c.RUN_STARTED, 3600)), 0.5)
    frames = steps(0, [3602, 3603, 3604], [0, 1, 1], [0, 0, 0])
    receive(database, batch(source(), frames=frames), 0.6)
    assert show(database)["effective_time"]["ratio"] == 1


def test_an_attempt_that_begins_again_at_zero_makes_all_before_it_lost(database: Engine) -> None:
    for instance, began in (("one", 0), ("two", 10)):
        frames = steps(0, [began + 2, began + 3, began + 4], [0, 1, 1], [0, 0, 0])
        told = batch(source(instance=instance), event(c.RUN_STARTED, began), frames=frames)
        receive(database, told, began + 5)
    spent = show(database)["effective_time"]
    assert (spent["productive_seconds"], spent["lost_seconds"], spent["wall_seconds"]) == (2, 2, 15)


SCRIPT = """
import sys, torch, gradwatch
folder = sys.argv[0] + ".checkpoints"
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
last = gradwatch.latest_checkpoint(folder)
if last is not None:
    model.load_state_dict(torch.load(last))
with gradwatch.watch(model, optimizer, resume=last) as watch:
    while watch.step < 40:
        optimizer.zero_grad()
        model(torch.randn(32, 8)).square().mean().backward()
        optimizer.step()
        if watch.step % 10 == 0:
            watch.save_checkpoint(model.state_dict(), f"{folder}/step{watch.step}.pt")
        if last is None and watch.step == 25:
            try:
                with watch.checkpoint(f"{folder}/step25.pt"):
                    raise OSError("tape torn")
            except OSError:
                raise SystemExit(3)
"""


def test_a_real_run_that_fails_and_goes_on_from_its_checkpoint(database: Engine, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    url = database.url.render_as_string(hide_password=False)
    with collector(url) as serving:
        for expected in (3, 0):
            process = train(script, serving, GRADWATCH_RUN_ID="real")
            _, errors = process.communicate(timeout=60)
            assert process.returncode == expected, errors
        serving.await_status("real", "succeeded")
        shown = eventually(
            lambda: found if (found := serving.show("real"))["checkpoint_record"]["saved"] == 4 else None,
            "four checkpoints",
        )
    assert [(each["attempt"], each["state"], each["step"]) for each in shown["checkpoints"]] == [
        (2, "saved", 40), (2, "saved", 30), (2, "verified", 20),
        (1, "failed", 25), (1, "saved", 20), (1, "saved", 10),
    ]  # fmt: skip
    assert shown["checkpoints"][3]["error"] == "OSError: tape torn"
    assert shown["checkpoint_record"]["success_rate"] == 0.8
    assert shown["effective_time"]["lost_seconds"] > 0
    assert 0 < shown["effective_time"]["ratio"] < 1
    table = CliRunner().invoke(main, ["runs", "show", "real", "--db", url])
    assert "CHECKPOINTS 4 of 5 saved" in table.output
    assert "EFFECTIVE TIME" in table.output
    whole = CliRunner().invoke(main, ["checkpoint", "verify", f"{script}.checkpoints", "--format", "json"])
    assert {each["step"] for each in json.loads(whole.output)["checkpoints"]} == {10, 20, 30, 40}
