"""Runs, attempts and processes follow from what arrives, on every database."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from gradwatch import conventions as c
from gradwatch_collector.records import NO_RANK, Batch, Frame, Received
from gradwatch_collector.runs.turns import take_turns
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import transaction
from tests.batches import at, batch, event, scalar, source
from tests.story import Story

STARTED = event(c.RUN_STARTED, 0)
HEARTBEAT = event(c.RUN_HEARTBEAT, 5, 1, STEP=7)


def ended(seconds: float, status: str, reason: str | None = None, **attributes: Any) -> Any:
    return event(c.RUN_ENDED, seconds, 9, STATUS=status, REASON=reason, **attributes)


@pytest.fixture
def story(database: Engine) -> Story:
    return Story(database)


def test_a_started_event_makes_a_run(story: Story) -> None:
    story.receive(batch(source(model="mlp", dataset="digits", team="vision", tier="production"), STARTED), 1)
    run = story.run()
    assert (run["run_id"], run["job"], run["status"]) == ("run", "digits", "running")
    assert (run["model"], run["dataset"], run["team"], run["tier"]) == ("mlp", "digits", "vision", "production")
    assert (run["started_at"], run["last_seen_at"], run["ended_at"]) == (at(0), at(1), None)


def test_telemetry_without_a_run_event_is_no_run(story: Story) -> None:
    story.receive(batch(source(), frames=[scalar(c.LOSS, [0], [1.0])]), 1)
    assert story.rows(schema.run) == []
    assert len(story.rows(schema.process)) == 1
    assert story.wait(1000) == []


def test_an_unknown_tier_is_an_experiment(story: Story) -> None:
    story.receive(batch(source(tier="prodution"), STARTED), 1)
    assert story.run()["tier"] == "experiment"


@pytest.mark.parametrize(
    ("status", "reason"),
    [("succeeded", None), ("failed", "ValueError"), ("cancelled", "SIGTERM")],
)
def test_an_ended_event_ends_the_run_as_it_says(story: Story, status: str, reason: str | None) -> None:
    story.receive(batch(source(), STARTED), 1)
    story.receive(batch(source(), ended(9, status, reason)), 10)
    run = story.run()
    assert (run["status"], run["reason"], run["ended_at"]) == (status, reason, at(9))
    assert story.history() == [(1, "running", None), (1, status, reason)]


def test_the_same_batches_again_change_nothing(story: Story) -> None:
    told = [batch(source(), STARTED), batch(source(), ended(9, "failed", "ValueError"))]
    for received in told:
        story.receive(received, 10)
    before = story.run(), story.history()
    for received in told:
        story.receive(received, 10)
    assert (story.run(), story.history()) == before


def test_an_ending_that_is_sent_again_after_its_correction_changes_nothing(story: Story) -> None:
    story.receive(batch(source(), STARTED), 1)
    first = batch(source(), event(c.RUN_ENDED, 12, 5, STATUS="failed", REASON="exit 1", WILL_RETRY=True))
    story.receive(first, 12)
    story.receive(batch(source(), event(c.RUN_ENDED, 40, 6, STATUS="cancelled", REASON="SIGTERM")), 40)
    story.receive(first, 41)
    assert (story.run()["status"], story.run()["reason"], story.run()["ended_at"]) == (
        "cancelled",
        "SIGTERM",
        at(40),
    )
    assert [entry[1] for entry in story.history()] == ["running", "cancelled"]


def test_the_later_of_two_endings_in_a_batch_stands(story: Story) -> None:
    endings = [event(c.RUN_ENDED, at, at, STATUS=status) for at, status in ((40, "cancelled"), (12, "failed"))]
    story.receive(batch(source(), STARTED, *endings), 41)
    assert (story.run()["status"], story.run()["ended_at"]) == ("cancelled", at(40))


def test_steps_and_loss_follow_the_newest_point(story: Story) -> None:
    story.receive(batch(source(), STARTED), 1)
    frames = [scalar(c.STEP_INDEX, [1, 2, 3], [0, 1, 2]), scalar(c.LOSS, [1, 2, 3], [3.0, 2.0, 1.0])]
    story.receive(batch(source(), frames=frames), 3)
    assert (story.run()["last_step"], story.run()["last_loss"]) == (2, 1.0)


def test_what_a_rank_tells_late_does_not_take_the_run_back(story: Story) -> None:
    def step(step: int, loss: float) -> list[Frame]:
        return [scalar(c.STEP_INDEX, [step], [step]), scalar(c.LOSS, [step], [loss])]

    slow, fast = source(rank=1), source(rank=0)
    story.receive(batch(slow, STARTED, frames=step(2, 3.0)), 2)
    story.receive(batch(fast, STARTED, frames=step(9, 1.0)), 9)
    story.receive(batch(slow, frames=step(4, math.nan)), 10)
    assert (story.run()["last_step"], story.run()["last_loss"]) == (9, 1.0)
    assert not story.run()["last_loss_nonfinite"]
    story.receive(batch(slow, frames=step(10, 0.5)), 11)
    assert (story.run()["last_step"], story.run()["last_loss"]) == (10, 0.5)


def test_memory_that_was_told_of_late_is_not_what_is_left_now(story: Story) -> None:
    def used(seconds: float, share: float) -> list[Frame]:
        peak, limit = (
            scalar(c.DEVICE_MEMORY_PEAK, [seconds], [share]),
            scalar(c.DEVICE_MEMORY_LIMIT, [seconds], [1.0]),
        )
        return [peak, limit]

    story.receive(batch(source(), STARTED, frames=used(5, 0.5)), 5)
    story.receive(batch(source(), frames=used(3, 0.9)), 6)
    assert [row["memory_headroom"] for row in story.rows(schema.process)] == [0.5]
    story.receive(batch(source(), frames=used(7, 0.75)), 7)
    assert [row["memory_headroom"] for row in story.rows(schema.process)] == [0.25]


def test_a_heartbeat_moves_the_last_sign_of_life_and_the_step(story: Story) -> None:
    story.receive(batch(source(), STARTED), 1)
    story.receive(batch(source(), HEARTBEAT), 6)
    assert (story.run()["last_seen_at"], story.run()["last_step"]) == (at(6), 7)


def test_a_nan_loss_is_flagged_and_stored_as_no_number(story: Story) -> None:
    story.receive(batch(source(), STARTED, frames=[scalar(c.LOSS, [1], [float("nan")])]), 1)
    assert (story.run()["last_loss"], story.run()["last_loss_nonfinite"]) == (None, True)


def test_silence_makes_a_run_lost_at_its_last_sign_of_life(story: Story) -> None:
    story.receive(batch(source(), STARTED), 1)
    assert story.wait(31) == []
    assert story.wait(31.5) == ["run"]
    run = story.run()
    assert (run["status"], run["reason"], run["ended_at"]) == ("lost", "heartbeat_timeout", at(1))


def test_silence_counts_only_while_a_collector_was_up(story: Story) -> None:
    story.receive(batch(source(), STARTED), 1)
    assert story.wait(110, up_since=100) == []
    assert story.wait(131, up_since=100) == ["run"]


def test_a_run_that_ended_is_never_lost(story: Story) -> None:
    story.receive(batch(source(), STARTED, ended(2, "succeeded")), 3)
    assert story.wait(1000) == []


def test_a_late_sign_of_life_corrects_lost_to_running(story: Story) -> None:
    story.receive(batch(source(), STARTED), 1)
    story.wait(100)
    story.receive(batch(source(), event(c.RUN_HEARTBEAT, 100, 1)), 101)
    run = story.run()
    assert (run["status"], run["reason"], run["ended_at"]) == ("running", None, None)
    assert [entry[1] for entry in story.history()] == ["running", "lost", "running"]


def test_a_late_ending_corrects_lost(story: Story) -> None:
    story.receive(batch(source(), STARTED), 1)
    story.wait(100)
    story.receive(batch(source(), ended(9, "succeeded")), 101)
    run = story.run()
    assert (run["status"], run["ended_at"]) == ("succeeded", at(9))
    assert [entry[1] for entry in story.history()] == ["running", "lost", "succeeded"]


def test_metrics_that_arrive_after_the_ending_do_not_revive_the_run(story: Story) -> None:
    story.receive(batch(source(), STARTED, ended(2, "succeeded")), 3)
    story.receive(batch(source(), frames=[scalar(c.STEP_INDEX, [2], [41])]), 4)
    assert (story.run()["status"], story.run()["last_step"]) == ("succeeded", 41)


def test_attempts_count_new_instances_of_a_rank_in_the_order_they_were_seen(story: Story) -> None:
    for instance in ("one", "two", "one", "three"):
        story.receive(batch(source(instance=instance), STARTED), 1)
    keys = [(row["attempt"], row["instance"]) for row in story.rows(schema.process)]
    assert keys == [(1, "one"), (2, "two"), (3, "three")]


def test_a_new_registry_remembers_the_attempts(story: Story) -> None:
    story.receive(batch(source(instance="one"), STARTED), 1)
    key = story.receive(batch(source(instance="two"), STARTED), 1)
    restarted = Story(story.database)
    assert restarted.receive(batch(source(instance="two"), HEARTBEAT), 2) == key


def test_the_run_stands_as_its_latest_attempt(story: Story) -> None:
    story.receive(batch(source(attempt=1), STARTED, ended(2, "failed", "ValueError")), 3)
    story.receive(batch(source(attempt=2, instance="two"), event(c.RUN_STARTED, 5)), 5)
    assert (story.run()["status"], story.run()["attempt"]) == ("running", 2)
    story.receive(batch(source(attempt=2, instance="two"), ended(9, "succeeded")), 9)
    assert (story.run()["status"], story.run()["started_at"]) == ("succeeded", at(0))
    assert [row["status"] for row in story.rows(schema.attempt)] == ["failed", "succeeded"]


def test_the_first_rank_to_fail_is_the_cause(story: Story) -> None:
    for rank in (0, 1):
        story.receive(batch(source(rank=rank, instance=f"r{rank}"), STARTED), 1)
    story.receive(batch(source(rank=0, instance="r0"), ended(9, "cancelled", "SIGTERM")), 9)
    story.receive(batch(source(rank=1, instance="r1"), ended(8, "failed", "ValueError")), 10)
    run = story.run()
    assert (run["status"], run["reason"], run["rank_count"]) == ("failed", "ValueError", 2)
    assert story.rows(schema.attempt)[0]["cause_rank"] == 1


def test_a_sender_whose_clock_is_ahead_did_nothing_after_it_was_received(story: Story) -> None:
    story.receive(batch(source(), event(c.RUN_STARTED, 3601)), 1)
    story.receive(batch(source(), event(c.TARGET_REACHED, 3660, 1), ended(3700, "succeeded")), 100)
    run = story.run()
    assert (run["started_at"], run["target_reached_at"], run["ended_at"]) == (at(1), at(60), at(100))


def test_the_target_is_reached_when_it_first_held(story: Story) -> None:
    story.receive(batch(source(target="val_loss<=0.5", deadline=60.0), STARTED), 1)
    story.receive(batch(source(), event(c.TARGET_REACHED, 20, 1)), 21)
    story.receive(batch(source(), event(c.TARGET_REACHED, 30, 2)), 31)
    run = story.run()
    assert (run["target"], run["deadline_seconds"], run["target_reached_at"]) == ("val_loss<=0.5", 60.0, at(20))


def test_an_ending_nobody_defined_is_a_failure(story: Story) -> None:
    story.receive(batch(source(), STARTED, ended(2, "exploded")), 3)
    assert story.run()["status"] == "failed"


def test_ranks_that_end_at_once_in_two_collectors_end_the_run(story: Story) -> None:
    for rank in (0, 1):
        story.receive(batch(source(rank=rank, instance=f"r{rank}"), STARTED), 1)
    first_done, go_on = threading.Event(), threading.Event()

    def first() -> None:
        with transaction(story.database) as connection:
            received = batch(source(rank=0, instance="r0"), ended(5, "succeeded"))
            take_turns(connection, ["run"])
            (key,) = story.registry.resolve(connection, [(received.source, at(6))])
            story.registry.apply(connection, [Received(key, received, at(6))])
            first_done.set()
            assert go_on.wait(30)

    def second() -> None:
        assert first_done.wait(30)
        threading.Timer(0.2, go_on.set).start()
        Story(story.database).receive(batch(source(rank=1, instance="r1"), ended(5, "succeeded")), 6)

    with ThreadPoolExecutor() as pool:
        for result in [pool.submit(first), pool.submit(second)]:
            result.result(60)
    assert story.run()["status"] == "succeeded"


def test_two_collectors_that_hear_of_the_same_runs_in_opposite_orders_never_deadlock(story: Story) -> None:
    def tell(rank: int, runs: Sequence[str]) -> None:
        collector = Story(story.database)
        for second in range(1, 40):
            started = [batch(source(run, rank=rank, instance=f"r{rank}"), STARTED) for run in runs]
            heard = [
                batch(
                    source(run, rank=rank, instance=f"r{rank}"),
                    event(c.RUN_HEARTBEAT, second, second, STEP=second),
                )
                for run in runs
            ]
            collector.receive_group([(each, second) for each in (started if second == 1 else heard)])

    with ThreadPoolExecutor() as pool:
        for result in [pool.submit(tell, 0, "abcdefgh"), pool.submit(tell, 1, "hgfedcba")]:
            result.result(60)
    assert {row["last_step"] for row in story.rows(schema.run)} == {39}


def test_who_finds_nobody_silent_waits_for_no_writer(story: Story) -> None:
    story.receive(batch(source(), STARTED), 1)
    if story.database.dialect.name == "sqlite":
        pytest.skip("one writer at a time")
    with transaction(story.database) as connection, ThreadPoolExecutor(1) as pool:
        take_turns(connection, {"run"})
        assert pool.submit(story.wait, 5).result(timeout=30) == []
        late = pool.submit(story.wait, 40)
        with pytest.raises(TimeoutError):
            late.result(timeout=0.5)
        connection.rollback()
        assert late.result(timeout=30) == ["run"]


def test_two_collectors_that_meet_instances_of_a_run_at_once_count_different_attempts(story: Story) -> None:
    together = threading.Barrier(2)

    def begin(run: str, instance: str) -> int:
        together.wait(30)
        return Story(story.database).receive(batch(source(run, instance=instance), STARTED), 1).attempt

    with ThreadPoolExecutor() as pool:
        for run in map(str, range(20)):
            attempts = [pool.submit(begin, run, instance) for instance in ("one", "two")]
            assert {each.result(60) for each in attempts} == {1, 2}


@pytest.mark.parametrize(
    ("peak", "limit"),
    [
        (math.inf, 1.0),
        (math.nan, 1.0),
        (1.0, math.nan),
        (1.0, 0.0),
        (1.0, -1.0),
        (1e308, 5e-324),
        (-math.inf, 1.0),
    ],
)
def test_headroom_that_cannot_be_is_unknown(story: Story, peak: float, limit: float) -> None:
    frames = [scalar(c.DEVICE_MEMORY_PEAK, [1], [peak]), scalar(c.DEVICE_MEMORY_LIMIT, [1], [limit])]
    story.receive(batch(source(), STARTED, frames=frames), 1)
    (process,) = story.rows(schema.process)
    assert process["memory_headroom"] is None


TOLD = st.sampled_from(
    [
        {"events": [STARTED]},
        {"events": [HEARTBEAT]},
        {"events": [event(c.TARGET_REACHED, 6, 2)]},
        {"events": [ended(9, "succeeded")]},
        {"events": [ended(9, "failed", "ValueError")]},
        {"frames": [scalar(c.LOSS, [3], [0.5]), scalar(c.STEP_INDEX, [3], [12])]},
        {"frames": [scalar(c.LOSS, [4], [math.nan])]},
        {"events": [STARTED, HEARTBEAT], "frames": [scalar(c.STEP_INDEX, [5], [20])]},
    ]
)
SENDERS = st.builds(
    dict,
    run_id=st.sampled_from(["a", "b"]),
    rank=st.sampled_from([0, 1, NO_RANK]),
    instance=st.sampled_from(["one", "two"]),
    attempt=st.sampled_from([None, None, 1, 2]),
)
EXAMPLES = count()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(SENDERS, TOLD), min_size=1, max_size=8))
def test_batches_that_share_a_transaction_do_what_they_do_one_after_the_other(
    story: Story, told: list[tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    example = next(EXAMPLES)

    def batches(kind: str) -> list[tuple[Batch, float]]:
        senders = [source(**{**sender, "run_id": f"{kind}-{example}-{sender['run_id']}"}) for sender, _ in told]
        return [
            (batch(sender, *what.get("events", ()), frames=what.get("frames", ())), 10 + number / 8)
            for number, (sender, (_, what)) in enumerate(zip(senders, told, strict=True))
        ]

    story.receive_group(batches("together"))
    for each, seconds in batches("apart"):
        story.receive(each, seconds)

    def left(kind: str) -> list[list[dict[str, Any]]]:
        tables = (schema.process, schema.attempt, schema.run, schema.run_history)
        start = f"{kind}-{example}-"
        return [
            [
                {**row, "run_id": row["run_id"].removeprefix(start), "history_id": None}
                for row in story.rows(table)
                if row["run_id"].startswith(start)
            ]
            for table in tables
        ]

    assert left("together") == left("apart")
    assert left("apart")[0]
