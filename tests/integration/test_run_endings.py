"""Endings that take more than one voice: supervisors, retries, wrong clocks, replays, outages."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
from sqlalchemy import Engine

from gradwatch import conventions as c
from gradwatch_collector.api.run_list import list_runs
from gradwatch_collector.api.views import show_run
from gradwatch_collector.records import NO_RANK, Batch, EventRecord, Source
from gradwatch_collector.storage import schema
from tests.batches import at, batch, event, scalar, source
from tests.story import Story

HOUR = 3600.0


@pytest.fixture
def story(database: Engine) -> Story:
    return Story(database)


def rank(number: int = 0, attempt: int = 1, run_id: str = "run") -> Source:
    return source(run_id, rank=number, attempt=attempt, instance=f"a{attempt}r{number}")


def child(parent: int = 42, supervisor: str = "supervisor1", number: int = 0) -> Source:
    """A rank that says whose it is."""
    sender = rank(number)
    told = {c.PARENT_PID: parent, c.SUPERVISOR_INSTANCE: supervisor}
    return replace(sender, resource={**sender.resource, **told})


def watcher(attempt: int = 1, run_id: str = "run", instance: str = "supervisor{}") -> Source:
    sender = source(run_id, rank=NO_RANK, attempt=attempt, instance=instance.format(attempt), supervisor=True)
    return replace(sender, resource={**sender.resource, c.PROCESS_PID: 42})


def started(seconds: float) -> EventRecord:
    return event(c.RUN_STARTED, seconds)


def beat(seconds: float) -> EventRecord:
    return event(c.RUN_HEARTBEAT, seconds, 1)


def ended(seconds: float, status: str, reason: str | None = None, **told: Any) -> EventRecord:
    return event(c.RUN_ENDED, seconds, 9, STATUS=status, REASON=reason, **told)


def killed(seconds: float, **told: Any) -> EventRecord:
    return ended(seconds, "failed", "SIGKILL", EVIDENCE="ended by signal 9", **told)


def reached(seconds: float) -> EventRecord:
    return event(c.TARGET_REACHED, seconds, 2, TARGET="val_loss<=0.5", TARGET_VALUE=0.4)


def live(story: Story, sender: Source, begin: float, until: float, *, clock: float = 0) -> None:
    """A sender that starts, and sends heartbeats every 5 s; its clock is ``clock`` seconds ahead of ours."""
    story.receive(batch(sender, started(begin + clock)), begin + 0.1)
    seconds = begin + 5
    while seconds <= until:
        story.receive(batch(sender, beat(seconds + clock)), seconds + 0.1)
        seconds += 5


def show(story: Story, run_id: str = "run") -> Any:
    with story.database.connect() as connection:
        return show_run(connection, run_id)


# --- Supervisors --------------------------------------------------------------------------------------


def test_a_supervisor_is_no_rank_and_no_attempt(story: Story) -> None:
    story.receive(batch(watcher(), started(0)), 0)
    story.receive(batch(source(instance="unnumbered", model="mlp"), started(1)), 1)
    shown = show(story)
    assert (shown["rank_count"], shown["attempt"], shown["model"], shown["status"]) == (1, 1, "mlp", "running")
    (attempt,) = shown["attempts"]
    assert [process["instance"] for process in attempt["processes"]] == ["unnumbered"]
    assert [(each["rank"], each["instance"]) for each in attempt["supervisors"]] == [(None, "supervisor1")]
    assert shown["environment"]["training.model"] == "mlp"


def test_a_killed_rank_has_the_reason_and_the_evidence_that_its_supervisor_saw(story: Story) -> None:
    for sender in (watcher(), child()):
        story.receive(batch(sender, started(0)), 0)
    story.receive(batch(watcher(), killed(9)), 9)
    shown = show(story)
    assert (shown["status"], shown["reason"], shown["ended_at"]) == (
        "failed",
        "SIGKILL",
        "2025-06-15T15:06:49.000000Z",
    )
    (attempt,) = shown["attempts"]
    assert (attempt["cause_rank"], attempt["evidence"][c.EVIDENCE]) == (0, "ended by signal 9")
    assert shown["history"][0]["evidence"] == {"rank": 0, c.EVIDENCE: "ended by signal 9"}


def test_a_command_of_which_no_rank_spoke_is_a_run(story: Story) -> None:
    story.receive(batch(watcher(), started(0)), 0)
    story.receive(batch(watcher(), ended(2, "failed", "exit 2")), 2)
    run = story.run()
    assert (run["status"], run["reason"], run["rank_count"], run["ended_at"]) == ("failed", "exit 2", 0, at(2))


def test_a_run_is_lost_only_when_rank_and_supervisor_are_silent(story: Story) -> None:
    story.receive(batch(rank(), started(0)), 0)
    live(story, watcher(), 0, 100)
    story.wait(101)
    assert story.run()["status"] == "running"
    story.wait(129)
    assert story.run()["status"] == "running"
    story.wait(131)
    run = story.run()
    assert (run["status"], run["reason"]) == ("lost", "heartbeat_timeout")


def test_a_rank_that_lives_keeps_a_run_whose_supervisor_is_silent(story: Story) -> None:
    story.receive(batch(watcher(), started(0)), 0)
    live(story, rank(), 0, 100)
    story.wait(101)
    assert story.run()["status"] == "running"


def test_any_order_of_arrival_gives_the_same_end(story: Story) -> None:
    words = {
        "a": (rank(0), started(0), ended(20, "cancelled", "SIGTERM")),
        "b": (rank(1), started(0), beat(10)),
        "c": (watcher(), started(0), killed(21)),
        "d": (rank(2), started(0), ended(19.5, "failed", "ValueError")),
    }
    ends = set()
    for order in permutations(words):
        run_id = "".join(order)
        for number, name in enumerate(order):
            sender, *events = words[name]
            mine = Source(run_id, sender.attempt, sender.rank, sender.instance, sender.resource)
            story.receive(Batch(mine, events=tuple(events)), 22 + number / 10)
        shown = show(story, run_id)
        ends.add((shown["status"], shown["reason"], shown["ended_at"], shown["attempts"][0]["cause_rank"]))
    assert len(ends) == 1
    ((status, reason, _, cause),) = ends
    assert (status, reason, cause) == ("failed", "ValueError", 2)


@pytest.mark.parametrize("later", [0, 1])
def test_of_two_supervisors_on_a_host_each_tells_of_its_own_rank(story: Story, later: int) -> None:
    """torchrun --no-python gradwatch run: rank 1 is killed, and torchrun ends rank 0."""
    supervisors = [watcher(instance=f"s{number}") for number in (0, 1)]
    for number, sender in enumerate(supervisors):
        story.receive(batch(sender, started(0.5 * (number == later))), 0.5)
    ranks = [child(supervisor=f"s{number}", number=number) for number in (0, 1)]
    for sender in ranks:
        story.receive(batch(sender, started(1)), 1)
    story.receive(batch(supervisors[1], killed(20)), 20)
    story.receive(batch(ranks[0], ended(21, "cancelled", "SIGTERM")), 21)
    story.receive(batch(supervisors[0], ended(21.5, "cancelled", "SIGTERM")), 21.5)
    run = story.run()
    assert (run["status"], run["reason"]) == ("failed", "SIGKILL")
    assert story.rows(schema.attempt)[0]["cause_rank"] == 1


def test_training_that_outlives_its_shell_runs_until_it_is_silent(story: Story) -> None:
    """sh -c "train & sleep 6": the shell returns 0."""
    live(story, watcher(), 0, 5)
    story.receive(batch(child(43), started(1)), 1)
    story.receive(batch(watcher(), ended(6, "succeeded")), 6)
    for seconds in range(7, 60, 5):
        story.receive(batch(child(43), beat(seconds)), seconds)
        story.wait(seconds + 1)
        assert story.run()["status"] == "running"
    story.wait(90)
    assert (story.run()["status"], story.run()["ended_at"]) == ("lost", at(57))


def test_training_killed_below_a_shell_that_returns_0_did_not_succeed(story: Story) -> None:
    """sh -c "train | tee log", and the trainer gets SIGKILL."""
    live(story, watcher(), 0, 5)
    live(story, child(43), 1, 6)
    story.receive(batch(watcher(), ended(7, "succeeded")), 7)
    story.wait(40)
    assert (story.run()["status"], story.run()["reason"]) == ("lost", "heartbeat_timeout")


def test_training_goes_on_when_the_shell_above_it_dies(story: Story) -> None:
    live(story, watcher(), 0, 5)
    story.receive(batch(child(43), started(1)), 1)
    story.receive(batch(watcher(), killed(9)), 9)
    for seconds in range(10, 60, 5):
        story.receive(batch(child(43), beat(seconds)), seconds)
        story.wait(seconds + 1)
    story.receive(batch(child(43), ended(61, "succeeded")), 61)
    assert [entry[1] for entry in story.history()] == ["running", "succeeded"]


def test_training_that_was_taken_for_dead_and_is_heard_again_runs(story: Story) -> None:
    live(story, watcher(), 0, 5)
    story.receive(batch(child(43), started(1)), 1)
    story.receive(batch(watcher(), killed(9)), 9)
    story.wait(20)
    assert story.run()["status"] == "failed"
    story.receive(batch(child(43), beat(25)), 25)
    assert [entry[1] for entry in story.history()] == ["running", "failed", "running"]


def test_os_exit_0_of_the_command_itself_is_a_success(story: Story) -> None:
    live(story, watcher(), 0, 5)
    live(story, child(42), 1, 6)
    story.receive(batch(watcher(), ended(7, "succeeded")), 7)
    assert story.run()["status"] == "succeeded"


def test_a_run_goes_on_with_its_command_though_its_training_has_succeeded(story: Story) -> None:
    """sh -c "train; evaluate; exit 5"."""
    live(story, watcher(), 0, 5)
    story.receive(batch(child(43), started(1), ended(6, "succeeded")), 6)
    for seconds in range(10, 100, 5):
        story.receive(batch(watcher(), beat(seconds)), seconds)
        story.wait(seconds + 1)
    story.receive(batch(watcher(), ended(100, "failed", "exit 5")), 100)
    assert story.history() == [(1, "running", None), (1, "failed", "exit 5")]


# --- Attempts -----------------------------------------------------------------------------------------


def test_an_attempt_that_will_be_retried_does_not_end_the_run(story: Story) -> None:
    live(story, watcher(), 0, 10)
    live(story, rank(), 0, 10)
    story.receive(batch(rank(), ended(12, "failed", "ValueError")), 12)
    assert story.run()["status"] == "running"  # the supervisor lives, and has not said what it does
    story.receive(batch(watcher(), ended(13, "failed", "exit 1", WILL_RETRY=True)), 13)
    for seconds in range(15, 75, 5):
        story.receive(batch(watcher(), beat(seconds)), seconds)
        story.wait(seconds + 1)
    assert (story.run()["status"], story.run()["ended_at"]) == ("running", None)
    (attempt,) = show(story)["attempts"]
    assert (attempt["status"], attempt["reason"], attempt["will_retry"]) == ("failed", "ValueError", True)
    story.receive(batch(watcher(2), started(75)), 75)
    story.receive(batch(rank(0, 2), started(76), ended(80, "succeeded")), 80)
    story.receive(batch(watcher(2), ended(81, "succeeded")), 81)
    assert [entry[1] for entry in story.history()] == ["running", "running", "succeeded"]
    story.wait(1000)
    second, first = show(story)["attempts"]
    assert (second["status"], second["will_retry"]) == ("succeeded", False)
    assert (first["status"], first["reason"], first["will_retry"]) == ("failed", "ValueError", True)


def test_a_retry_that_never_comes_leaves_the_failure(story: Story) -> None:
    live(story, watcher(), 0, 10)
    story.receive(batch(watcher(), ended(12, "failed", "exit 1", WILL_RETRY=True)), 12)
    story.wait(42)
    assert story.run()["status"] == "running"
    story.wait(43)
    run = story.run()
    assert (run["status"], run["reason"], run["ended_at"]) == ("failed", "exit 1", at(12))
    assert not show(story)["attempts"][0]["will_retry"]


def test_a_retry_that_no_supervisor_promised_is_waited_for_longer(story: Story) -> None:
    """A worker of torchrun says that torchrun starts it again; until it watches nobody speaks."""
    story.receive(batch(rank(), started(0), ended(12, "failed", "ValueError", WILL_RETRY=True)), 12)
    story.wait(312)
    assert story.run()["status"] == "running"
    story.wait(313)
    assert (story.run()["status"], story.run()["ended_at"]) == ("failed", at(12))


def test_a_supervisor_that_was_told_to_stop_takes_its_promise_back(story: Story) -> None:
    live(story, watcher(), 0, 10)
    story.receive(batch(watcher(), ended(12, "failed", "exit 1", WILL_RETRY=True)), 12)
    correction = event(c.RUN_ENDED, 40, 10, STATUS="cancelled", REASON="SIGTERM")
    story.receive(batch(watcher(), correction), 40)
    run = story.run()
    assert (run["status"], run["reason"], run["ended_at"]) == ("cancelled", "SIGTERM", at(40))


def test_a_failed_rank_ends_the_run_if_its_supervisor_lives_on_and_says_nothing(story: Story) -> None:
    live(story, watcher(), 0, 10)
    story.receive(batch(rank(), started(0), ended(12, "failed", "ValueError")), 12)
    for seconds in range(15, 50, 5):
        story.receive(batch(watcher(), beat(seconds)), seconds)
        story.wait(seconds + 0.5)
        assert story.run()["status"] == ("running" if seconds + 0.5 <= 42 else "failed")


def test_what_torchrun_starts_again_is_the_next_attempt_of_one_supervisor(story: Story) -> None:
    live(story, watcher(), 0, 10)
    for number in (0, 1):
        story.receive(batch(rank(number), started(0)), 0)
    story.receive(batch(rank(0), ended(11, "failed", "ValueError")), 11)
    story.receive(batch(rank(1), ended(12, "cancelled", "SIGTERM")), 12)
    for number in (0, 1):
        story.receive(batch(rank(number, 2), started(15)), 15)
    assert (story.run()["status"], story.run()["attempt"]) == ("running", 2)
    story.receive(batch(watcher(), killed(20)), 20)
    story.wait(31)  # the workers are not its own children: they would have been heard by now
    run = story.run()
    assert (run["status"], run["reason"], run["attempt"]) == ("failed", "SIGKILL", 2)
    assert [row["reason"] for row in story.rows(schema.attempt)] == ["ValueError", "SIGKILL"]


def test_a_supervisor_goes_on_in_the_attempt_that_its_command_began(story: Story) -> None:
    live(story, watcher(), 0, 10)
    story.receive(batch(rank(), started(0)), 0)
    story.receive(batch(rank(0, 2), started(15)), 15)
    same = source("run", rank=NO_RANK, attempt=2, instance="supervisor1", supervisor=True)
    live(story, same, 16, 60)
    story.receive(batch(rank(0, 2), ended(61, "succeeded")), 61)
    story.receive(batch(same, ended(62, "succeeded")), 62)
    second, first = show(story)["attempts"]
    assert (second["status"], [each["status"] for each in second["supervisors"]]) == (
        "succeeded",
        ["succeeded"],
    )
    assert first["supervisors"] == []
    story.wait(63)
    assert show(story)["attempts"][1]["status"] == "lost"  # it told nothing, and nobody saw it end


@pytest.mark.parametrize("numbers", [(None, None), (1, 2)], ids=["counted by us", "numbered"])
def test_an_older_attempt_that_is_heard_of_later_does_not_undo_the_newer_one(
    story: Story, numbers: tuple[int | None, int | None]
) -> None:
    """Attempt 1 failed on a host while nobody listened; its disk is read after attempt 2 had succeeded."""
    older, newer = (source(attempt=number, instance=f"host{number}") for number in numbers)
    newer = replace(newer, instance="other host")
    story.receive(batch(newer, started(1000), beat(1005)), 1005)
    story.receive(batch(newer, ended(1100, "succeeded")), 1100)
    # An ending goes ahead of everything else that was kept.
    story.receive(batch(older, ended(20, "failed", "ValueError")), 1200)
    assert story.run()["status"] == "succeeded"
    story.receive(batch(older, started(0), beat(5)), 1200.1)
    story.wait(1300)
    run = story.run()
    assert (run["status"], run["started_at"], run["ended_at"]) == ("succeeded", at(0), at(1100))
    assert [entry[1:] for entry in story.history()] == [("running", None), ("succeeded", None)]
    failed = next(row for row in story.rows(schema.attempt) if row["status"] == "failed")
    assert (failed["started_at"], failed["ended_at"]) == (at(0), at(20))


def test_a_killed_attempt_that_is_replayed_leaves_the_one_that_runs(story: Story) -> None:
    newer, older = source(instance="new"), source(instance="old")
    live(story, newer, 1000, 1010)
    replay(story, older, 60, 1011)
    live_again = batch(newer, beat(1025))
    story.receive(live_again, 1025)
    story.wait(1030)
    assert (story.run()["status"], story.run()["attempt"], story.run()["last_seen_at"]) == (
        "running",
        1,
        at(1025),
    )
    assert sorted(row["status"] for row in story.rows(schema.attempt)) == ["lost", "running"]


# --- Clocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hours", [-1, 1], ids=["behind", "ahead"])
def test_moments_are_ours_whatever_the_senders_clock_says(story: Story, hours: int) -> None:
    clock = hours * HOUR
    live(story, rank(), 0, 60, clock=clock)
    assert story.wait(62) == []
    story.receive(batch(rank(), ended(64 + clock, "succeeded")), 64.1)
    run = story.run()
    assert [round((run[name] - at(0)) / 1e9) for name in ("started_at", "ended_at", "last_seen_at")] == [
        0,
        64,
        64,
    ]


@pytest.mark.parametrize("hours", [-1, 1], ids=["behind", "ahead"])
def test_a_run_with_a_wrong_clock_is_lost_when_it_is_silent_and_not_before(story: Story, hours: int) -> None:
    live(story, rank(), 0, 60, clock=hours * HOUR)
    assert story.wait(90) == []
    assert story.wait(91) == ["run"]
    assert round((story.run()["ended_at"] - at(0)) / 1e9) == 60


@pytest.mark.parametrize("hours", [-1, 1], ids=["behind", "ahead"])
def test_the_first_rank_to_fail_is_the_cause_though_its_peers_clock_is_wrong(story: Story, hours: int) -> None:
    clock = hours * HOUR
    live(story, rank(0), 0, 20)
    live(story, rank(1), 0, 20, clock=clock)
    story.receive(batch(rank(0), ended(21, "failed", "ValueError")), 21.2)
    story.receive(batch(rank(1), ended(25 + clock, "failed", "RuntimeError")), 25.2)
    run = story.run()
    assert (run["reason"], run["ended_at"]) == ("ValueError", at(21))


def test_a_clock_ahead_is_known_though_nobody_listened_at_first(story: Story) -> None:
    """An hour ahead; the collector comes after half an hour, and everything is replayed before it is live."""
    ahead, late = HOUR, HOUR / 2
    story.receive(batch(rank(), started(ahead)), late)
    for number in range(1, 361):
        story.receive(batch(rank(), beat(5 * number + ahead)), late + number / 100)
    live_from = int(late) + 10
    for seconds in range(live_from, live_from + 30, 5):
        story.receive(batch(rank(), beat(seconds + ahead)), seconds)
    story.receive(batch(rank(), ended(live_from + 31 + ahead, "succeeded")), live_from + 31)
    run = story.run()
    assert [round((run[name] - at(0)) / 1e9) for name in ("started_at", "ended_at")] == [0, live_from + 31]


def target_at(story: Story) -> float | None:
    at_all = story.run()["target_reached_at"]
    return None if at_all is None else (at_all - at(0)) / 1e9


@pytest.mark.parametrize("when", ["before its clock is known", "after"])
@pytest.mark.parametrize("hours", [-1, 1], ids=["behind", "ahead"])
def test_a_target_is_reached_by_our_clock_whatever_the_senders_says(
    story: Story, hours: int, when: str
) -> None:
    clock, took = hours * HOUR, 7 if when == "before its clock is known" else 37
    live(story, rank(), 0, took, clock=clock)
    story.receive(batch(rank(), reached(took + clock)), took + 0.1)
    for seconds in range(took + 3, 60, 5):
        # Each time by another collector, as after a restart, and the target is told again.
        restarted = Story(story.database)
        restarted.receive(batch(rank(), reached(took + clock), beat(seconds + clock)), seconds + 0.1)
    told = target_at(story)
    assert told is not None
    assert round(told) == took
    assert round((story.run()["started_at"] - at(0)) / 1e9) == 0


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_the_first_rank_to_reach_the_target_is_known_though_its_peers_clocks_are_wrong(
    story: Story, order: tuple[int, ...]
) -> None:
    clocks = (-HOUR, 0.0, HOUR)
    for number in order:
        story.receive(batch(rank(number), started(clocks[number])), 0.1)
    for number in order:
        # The first is the one whose clock is behind; the one that is right is in between.
        took = 5 + number
        story.receive(batch(rank(number), reached(took + clocks[number])), took + 0.1)
    for seconds in range(5, 30, 5):
        for number in order:
            story.receive(batch(rank(number), beat(seconds + clocks[number])), seconds + 0.1)
    told = target_at(story)
    assert told is not None
    assert round(told) == 5


@pytest.mark.parametrize("hours", [-1, 1], ids=["set back", "set forward"])
def test_a_target_stays_where_it_was_when_a_known_clock_is_set(story: Story, hours: int) -> None:
    live(story, rank(), 0, 60)
    story.receive(batch(rank(), reached(61)), 61)
    clock = hours * HOUR
    for seconds in range(65, 90, 5):
        story.receive(batch(rank(), beat(seconds + clock)), seconds)
    (process,) = story.rows(schema.process)
    assert process["clock"]["offset"] == clock * 1e9
    assert target_at(story) == 61


@pytest.mark.parametrize("told", [-500.0, 700.0], ids=["before its start", "after it was received"])
def test_a_target_is_reached_between_the_start_and_when_that_was_received(story: Story, told: float) -> None:
    live(story, rank(), 0, 60)
    story.receive(batch(rank(), reached(told)), 62)
    assert target_at(story) == (0 if told < 0 else 62)
    # A run that begins earlier than was known is no reason to take the moment back.
    story.receive(batch(rank(1), started(-20)), 63)
    assert target_at(story) == (0 if told < 0 else 62)


def test_a_target_that_is_heard_of_before_anything_else_counts(story: Story) -> None:
    story.receive(batch(rank(), reached(20)), 21)
    assert story.rows(schema.run) == []
    story.receive(batch(rank(), beat(25)), 25)
    assert target_at(story) == 21  # since when it is known
    story.receive(batch(rank(), started(0)), 26)
    assert (target_at(story), story.run()["started_at"]) == (20, at(0))


def test_an_attempt_that_reaches_the_target_again_was_not_the_first(story: Story) -> None:
    live(story, rank(), 0, 60)
    story.receive(batch(rank(), reached(50)), 61)
    live(story, rank(attempt=2), 100, 160)
    story.receive(batch(rank(attempt=2), reached(150)), 161)
    assert target_at(story) == 50


# --- What arrives late --------------------------------------------------------------------------------


def replay(story: Story, sender: Source, until: float, received: float) -> None:
    """Everything that a sender kept while nobody listened, from 0 to ``until``, within a second."""
    story.receive(batch(sender, started(0)), received)
    seconds, delay = 5.0, 0.01
    while seconds <= until:
        story.receive(
            batch(sender, beat(seconds), frames=[scalar(c.STEP_INDEX, [seconds], [seconds])]), received + delay
        )
        seconds, delay = seconds + 5, delay + 0.01


def test_old_telemetry_of_a_run_that_ended_leaves_its_ending(story: Story) -> None:
    story.receive(batch(rank(), started(0)), 0)
    story.receive(batch(rank(), ended(60, "succeeded")), HOUR)
    before = story.run()
    replay(story, rank(), 55, HOUR + 1)
    story.wait(HOUR + 100)
    run = story.run()
    assert (run["status"], run["ended_at"], run["started_at"]) == ("succeeded", before["ended_at"], at(0))
    assert run["last_step"] == 55
    assert [entry[1] for entry in story.history()] == ["running", "succeeded"]


def test_a_killed_run_that_is_replayed_was_lost_at_the_last_moment_of_its_data(story: Story) -> None:
    replay(story, rank(), 60, HOUR)
    run = story.run()
    assert (run["started_at"], run["last_seen_at"]) == (at(0), at(60))
    assert story.wait(HOUR + 5) == []
    assert story.wait(HOUR + 11) == ["run"]
    run = story.run()
    assert (run["status"], run["ended_at"], run["last_seen_at"]) == ("lost", at(60), at(60))


def test_a_replay_with_a_pause_does_not_bring_a_dead_run_to_life(story: Story) -> None:
    story.receive(batch(rank(), started(0)), HOUR)
    story.receive(batch(rank(), beat(5)), HOUR + 5.2)  # the collector asked to wait
    story.receive(batch(rank(), beat(10)), HOUR + 5.3)
    story.wait(HOUR + 16)
    run = story.run()
    assert (run["status"], run["started_at"], run["ended_at"]) == ("lost", at(0), at(10))


def test_the_replay_of_a_lost_run_moves_its_end_and_does_not_revive_it(story: Story) -> None:
    live(story, rank(), 0, 10)
    story.wait(50)
    assert story.run()["ended_at"] == at(10.1)
    replay(story, rank(), 60, HOUR)
    run = story.run()
    assert (run["status"], run["ended_at"]) == ("lost", at(60))
    assert [entry[1] for entry in story.history()] == ["running", "lost"]


def test_old_data_after_a_sign_of_life_do_not_shorten_the_limit(story: Story) -> None:
    live(story, rank(), 0, 60)
    story.receive(batch(rank(), frames=[scalar(c.STEP_INDEX, [1], [1])]), 61)
    assert story.wait(90) == []
    assert story.wait(91) == ["run"]
    assert story.run()["ended_at"] == at(60.1)


def test_a_replay_is_judged_by_its_data_though_the_collector_has_just_come_up(story: Story) -> None:
    replay(story, rank(), 60, HOUR)
    assert story.wait(HOUR + 11, up_since=HOUR - 1) == ["run"]


def test_a_run_that_catches_up_with_its_backlog_is_not_lost_on_the_way(story: Story) -> None:
    replay(story, rank(), HOUR, HOUR)
    story.receive(batch(rank(), beat(HOUR + 9)), HOUR + 9)
    assert story.wait(HOUR + 20) == []
    run = story.run()
    assert (run["status"], run["started_at"], run["last_seen_at"]) == ("running", at(0), at(HOUR + 9))


# --- Many at once -------------------------------------------------------------------------------------


def fleet(story: Story, runs: int, until: float) -> list[str]:
    names = [f"r{number}" for number in range(runs)]
    for number, name in enumerate(names):
        for seconds in (0, until):
            sender = source(name, instance=name)
            story.receive(
                batch(sender, event(c.RUN_STARTED if not seconds else c.RUN_HEARTBEAT, seconds)),
                seconds + number / 10,
            )
    return names


def statuses(story: Story) -> list[str]:
    with story.database.connect() as connection:
        return [run["status"] for run in list_runs(connection)["runs"]]


def test_runs_of_an_outage_are_lost_only_after_ten_times_the_limit(story: Story) -> None:
    names = fleet(story, 6, 10)
    for seconds in range(35, 310, 5):
        story.wait(seconds)
    assert statuses(story) == ["running"] * 6
    story.wait(311)
    assert sorted(statuses(story)) == ["lost"] * 6
    assert all(row["outage_at"] is None for row in story.rows(schema.run))
    assert len(names) == 6


def test_four_silent_runs_are_no_outage(story: Story) -> None:
    fleet(story, 4, 10)
    story.wait(41)
    assert statuses(story) == ["lost"] * 4


def test_few_of_many_silent_runs_are_no_outage(story: Story) -> None:
    fleet(story, 5, 10)
    for number in range(20):
        story.receive(batch(source(f"other{number}"), event(c.RUN_STARTED, 40)), 40)
    story.wait(41)
    assert sorted(statuses(story)) == ["lost"] * 5 + ["running"] * 20
