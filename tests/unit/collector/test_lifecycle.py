"""How a run stands follows from how its processes stand."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gradwatch import conventions as c
from gradwatch_collector.runs.clocks import TOLERANCE
from gradwatch_collector.runs.lifecycle import (
    DECISION_NANOS,
    HEARTBEAT_NANOS,
    ProcessState,
    heartbeat_of,
    latest_of,
    roll_up,
    spoken_for,
    stands,
    survival,
)
from gradwatch_slo.runs import Status


def process(
    rank: int, status: Status, ended_at: int | None = 20, reason: str | None = None, **known: Any
) -> ProcessState:
    told = ended_at if status not in (Status.RUNNING, Status.LOST) else None
    return ProcessState(
        rank,
        status,
        reason,
        **{"started_at": 10, "ended_at": ended_at, "last_seen_at": ended_at or 15, "told_at": told, **known},
    )


def supervisor(
    status: Status, reason: str | None = None, ended_at: int | None = 25, **known: Any
) -> ProcessState:
    known = {"pid": 42, "instance": "supervisor", **known}
    return process(-1, status, None if status is Status.RUNNING else ended_at, reason, **known)


RUNNING = process(0, Status.RUNNING, None)
SUCCEEDED = process(0, Status.SUCCEEDED)
SILENT = process(0, Status.LOST, 15, "heartbeat_timeout")

GLOO = {
    c.EXCEPTION_TYPE: "RuntimeError",
    c.EXCEPTION_MESSAGE: "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:4242",
}


@st.composite
def told(draw: st.DrawFn) -> ProcessState:
    """A process at any point of its life, its clock known or not."""
    status = draw(st.sampled_from(Status))
    ended_at = None if status is Status.RUNNING else draw(st.integers(5, 20))
    return process(
        draw(st.integers(0, 3)),
        status,
        ended_at,
        draw(st.sampled_from(["ValueError", "SIGTERM"])),
        started_at=draw(st.integers(0, 5)),
        last_seen_at=draw(st.integers(5, 20)),
        clock_known=draw(st.booleans()),
        active_at=draw(st.none() | st.integers(5, 5 * TOLERANCE)),
        host=draw(st.sampled_from(["a", "b"])),
        instance=draw(st.sampled_from(["x", "y"])),
        supervisor=draw(st.sampled_from([None, "x", "y"])),
        pid=1,
        parent_pid=draw(st.sampled_from([None, 1])),
        evidence=draw(st.sampled_from([{}, GLOO])),
    )


processes = told()
ranks = st.lists(processes, max_size=6, unique_by=lambda each: each.rank)
# An instance is one process, wherever it is.
supervisors = st.lists(processes, max_size=2, unique_by=lambda each: each.instance)


def test_an_attempt_runs_while_a_rank_runs_and_none_failed() -> None:
    state = roll_up([SUCCEEDED, replace(RUNNING, rank=1)])
    assert (state.status, state.ended_at) == (Status.RUNNING, None)


def test_an_attempt_succeeds_when_all_its_ranks_did() -> None:
    state = roll_up([SUCCEEDED, process(1, Status.SUCCEEDED, 30)])
    assert (state.status, state.ended_at, state.rank_count) == (Status.SUCCEEDED, 30, 2)


def test_one_failed_rank_fails_the_attempt_even_while_others_run() -> None:
    state = roll_up([RUNNING, process(1, Status.FAILED, 18, "ValueError")])
    assert (state.status, state.reason, state.cause_rank, state.ended_at) == (
        Status.FAILED,
        "ValueError",
        1,
        18,
    )


def test_the_first_rank_to_fail_is_the_cause_and_terminated_peers_do_not_outvote_it() -> None:
    state = roll_up(
        [
            process(0, Status.CANCELLED, 16, "SIGTERM"),
            process(1, Status.FAILED, 19, "RuntimeError"),
            process(2, Status.FAILED, 17, "ValueError"),
            process(3, Status.CANCELLED, 21, "SIGTERM"),
        ]
    )
    assert (state.status, state.reason, state.cause_rank) == (Status.FAILED, "ValueError", 2)


def test_an_attempt_is_lost_only_if_all_its_ranks_fell_silent() -> None:
    lost = process(0, Status.LOST, reason="heartbeat_timeout")
    assert roll_up([lost, replace(lost, rank=1)]).status is Status.LOST
    state = roll_up([lost, process(1, Status.CANCELLED, reason="SIGTERM")])
    assert (state.status, state.reason, state.cause_rank) == (Status.FAILED, "heartbeat_timeout", 0)


def test_a_silent_rank_says_nothing_while_its_peers_run() -> None:
    assert roll_up([process(0, Status.LOST), replace(RUNNING, rank=1)]).status is Status.RUNNING


def test_a_rank_started_again_within_the_attempt_stands_as_its_newest_process() -> None:
    dead = process(0, Status.FAILED, 12)
    again = replace(SUCCEEDED, started_at=13)
    assert roll_up([again, dead]).status is Status.SUCCEEDED


def test_a_cancelled_rank_cancels_the_attempt() -> None:
    state = roll_up([SUCCEEDED, process(1, Status.CANCELLED, reason="interrupted")])
    assert (state.status, state.reason) == (Status.CANCELLED, "interrupted")


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (Status.FAILED, "SIGKILL"),
        (Status.FAILED, "oom_killed"),
        (Status.FAILED, "segfault"),
        (Status.FAILED, "exit 3"),
        (Status.CANCELLED, "SIGTERM"),
        (Status.SUCCEEDED, None),
    ],
)
@pytest.mark.parametrize("silent", [RUNNING, SILENT])
def test_a_rank_that_told_nothing_ended_as_its_supervisor_saw(
    silent: ProcessState, status: Status, reason: str | None
) -> None:
    seen = supervisor(status, reason, evidence={c.EVIDENCE: "seen"})
    state = roll_up([replace(silent, parent_pid=42)], [seen])
    assert stands(state, 26) is status
    assert (state.status, state.reason, state.ended_at, state.rank_count) == (status, reason, 25, 1)
    if status is Status.FAILED:
        assert (state.cause_rank, state.evidence) == (0, {c.EVIDENCE: "seen"})


@pytest.mark.parametrize(
    "below", [{}, {"parent_pid": 43}, {"parent_pid": 43, "supervisor": "supervisor"}], ids=str
)
def test_exit_code_0_of_a_shell_says_nothing_of_a_rank_below_it(below: dict[str, Any]) -> None:
    shell = supervisor(Status.SUCCEEDED)
    assert roll_up([replace(RUNNING, **below)], [shell]).status is Status.RUNNING
    assert roll_up([replace(SILENT, **below)], [shell]).status is Status.LOST


def test_a_rank_that_outlives_the_shell_above_it_goes_on() -> None:
    shell = supervisor(Status.FAILED, "SIGKILL")
    below = replace(RUNNING, parent_pid=43, active_at=24)
    state = roll_up([below], [shell])
    assert stands(state, 25 + survival(HEARTBEAT_NANOS)) is Status.RUNNING  # it may yet be heard
    assert stands(state, 26 + survival(HEARTBEAT_NANOS)) is Status.FAILED
    slow = roll_up([below], [shell], heartbeat=6 * HEARTBEAT_NANOS)
    assert stands(slow, 26 + survival(HEARTBEAT_NANOS)) is Status.RUNNING  # it says less often that it lives
    later = 26 + TOLERANCE
    assert roll_up([replace(below, active_at=later)], [shell]).status is Status.RUNNING
    assert roll_up([replace(below, active_at=later, parent_pid=42)], [shell]).status is Status.FAILED
    silent = replace(SILENT, ended_at=later, active_at=later)
    assert roll_up([silent], [shell]).status is Status.LOST
    done = replace(SUCCEEDED, ended_at=later, active_at=later)
    assert roll_up([done], [shell]).status is Status.SUCCEEDED


def test_who_is_silent_below_a_shell_that_failed_is_not_waited_for() -> None:
    state = roll_up([SILENT], [supervisor(Status.FAILED, "exit 1")])
    assert (state.reason, stands(state, 26)) == ("exit 1", Status.FAILED)


def test_an_attempt_whose_ranks_have_succeeded_goes_on_with_its_command() -> None:
    assert roll_up([SUCCEEDED], [supervisor(Status.RUNNING)]).status is Status.RUNNING
    assert roll_up([SUCCEEDED], [supervisor(Status.SUCCEEDED)]).status is Status.SUCCEEDED
    assert roll_up([SUCCEEDED], [supervisor(Status.LOST)]).status is Status.SUCCEEDED


def test_a_rank_that_told_its_exception_keeps_it() -> None:
    state = roll_up([process(0, Status.FAILED, 20, "ValueError")], [supervisor(Status.FAILED, "exit 1")])
    assert (state.status, state.reason, state.ended_at) == (Status.FAILED, "ValueError", 20)


@pytest.mark.parametrize("reason", ["exit 1", "segfault", "SIGKILL"])
def test_a_command_that_failed_after_its_rank_had_succeeded_failed(reason: str) -> None:
    state = roll_up([SUCCEEDED], [supervisor(Status.FAILED, reason)])
    assert (state.status, state.reason, state.cause_rank) == (Status.FAILED, reason, 0)
    state = roll_up([SUCCEEDED, process(1, Status.SUCCEEDED)], [supervisor(Status.FAILED, reason)])
    assert (state.status, state.reason, state.cause_rank) == (Status.FAILED, reason, None)


def test_a_rank_that_succeeded_is_not_overruled_where_another_explains_the_failure() -> None:
    members = [SUCCEEDED, process(1, Status.FAILED, 19, "ValueError")]
    state = roll_up(members, [supervisor(Status.FAILED, "exit 1")])
    assert (state.reason, state.cause_rank) == ("ValueError", 1)


def test_a_cancelled_rank_stays_cancelled_whatever_its_exit_code() -> None:
    cancelled = process(0, Status.CANCELLED, 20, "SIGTERM")
    assert roll_up([cancelled], [supervisor(Status.FAILED, "exit 143")]).status is Status.CANCELLED


@pytest.mark.parametrize(
    ("status", "reason"), [(Status.FAILED, "exit 2"), (Status.SUCCEEDED, None), (Status.RUNNING, None)]
)
def test_a_command_of_which_no_rank_spoke_stands_by_its_supervisors_word(
    status: Status, reason: str | None
) -> None:
    state = roll_up([], [supervisor(status, reason)])
    assert (state.status, state.reason, state.rank_count, state.cause_rank) == (status, reason, 0, None)


def test_silence_is_judged_by_rank_and_supervisor_together() -> None:
    lost = process(0, Status.LOST, 15, "heartbeat_timeout")
    assert roll_up([lost], [supervisor(Status.RUNNING)]).status is Status.RUNNING
    assert roll_up([RUNNING], [supervisor(Status.LOST, "heartbeat_timeout")]).status is Status.RUNNING
    assert roll_up([lost], [supervisor(Status.LOST, "heartbeat_timeout")]).status is Status.LOST


def test_each_host_has_its_own_supervisor() -> None:
    here, there = (process(rank, Status.LOST, 15, "heartbeat_timeout", host=f"h{rank}") for rank in (0, 1))
    seen = [
        supervisor(Status.FAILED, "oom_killed", host="h1"),
        supervisor(Status.CANCELLED, "SIGTERM", host="h0"),
    ]
    state = roll_up([here, there], seen)
    assert (state.status, state.reason, state.cause_rank) == (Status.FAILED, "oom_killed", 1)


@pytest.mark.parametrize("later", [0, 1])
def test_of_several_supervisors_on_a_host_each_speaks_for_its_own_ranks(later: int) -> None:
    """As below ``torchrun --no-python gradwatch run``."""
    killed, told = (
        process(rank, status, ended_at, reason, supervisor=f"s{rank}", parent_pid=42)
        for rank, status, ended_at, reason in (
            (1, Status.RUNNING, None, None),
            (0, Status.CANCELLED, 26, "SIGTERM"),
        )
    )
    seen = [
        supervisor(Status.FAILED, "SIGKILL", 25, instance="s1", started_at=10 - later),
        supervisor(Status.CANCELLED, "SIGTERM", 27, instance="s0", started_at=9 + later),
    ]
    state = roll_up([told, killed], seen)
    assert (state.status, state.reason, state.cause_rank) == (Status.FAILED, "SIGKILL", 1)
    own = [replace(SUCCEEDED, rank=rank, supervisor=f"s{rank}", parent_pid=42) for rank in (0, 1)]
    assert roll_up(own, seen).cause_rank == 1  # its exit handler failed
    # Nobody knows which is whose, if the ranks do not say.
    assert roll_up([replace(killed, supervisor=None)], seen).status is Status.RUNNING


def test_a_silent_rank_is_the_cause_of_peers_that_only_lost_their_connection() -> None:
    peer = process(0, Status.FAILED, 16, "RuntimeError", evidence=GLOO)
    silent = process(1, Status.LOST, 15, "heartbeat_timeout")
    assert roll_up([peer, silent]).cause_rank == 1
    state = roll_up([peer, silent], [supervisor(Status.FAILED, "SIGKILL")])
    assert (state.cause_rank, state.reason) == (1, "SIGKILL")
    told = replace(peer, reason="ValueError", evidence={c.EXCEPTION_TYPE: "ValueError"})
    assert roll_up([told, silent], [supervisor(Status.FAILED, "exit 1")]).reason == "ValueError"


def test_heartbeats_come_as_often_as_silence_is_long() -> None:
    assert heartbeat_of(180 * 10**9) == 30 * 10**9
    assert heartbeat_of(30 * 10**9) == heartbeat_of(6 * 10**9) == HEARTBEAT_NANOS


@pytest.mark.parametrize(("beats", "cause"), [(0, None), (1, 1)])
@pytest.mark.parametrize("supervised", [False, True], ids=["alone", "supervised"])
@pytest.mark.parametrize("heartbeat", [HEARTBEAT_NANOS, 6 * HEARTBEAT_NANOS])
def test_of_ranks_that_fell_silent_within_a_heartbeat_none_is_the_cause(
    beats: int, cause: int | None, supervised: bool, heartbeat: int
) -> None:
    later = heartbeat if beats else heartbeat - 1
    victim = process(0, Status.LOST, 15 + later, "heartbeat_timeout")
    first = process(1, Status.LOST, 15, "heartbeat_timeout")
    told = process(2, Status.CANCELLED, 16, "SIGTERM")
    end = 2 * heartbeat
    seen = [supervisor(Status.FAILED, "exit 1", ended_at=end)] if supervised else []
    state = roll_up([victim, first, told], seen, heartbeat=heartbeat)
    assert (state.status, state.cause_rank) == (Status.FAILED, cause)
    assert (state.reason, state.ended_at) == (("exit 1", end) if supervised else ("heartbeat_timeout", 15))


@pytest.mark.parametrize("name", ["torch.distributed.DistBackendError", "torch.distributed.DistNetworkError"])
def test_a_failure_of_its_own_comes_before_an_earlier_one_that_blames_a_peer(name: str) -> None:
    peer = process(0, Status.FAILED, 16, "DistBackendError", evidence={c.EXCEPTION_TYPE: name})
    own = process(1, Status.FAILED, 17, "ValueError", evidence={c.EXCEPTION_TYPE: "ValueError"})
    assert roll_up([peer, own]).cause_rank == 1


def test_where_one_clock_is_not_known_receipt_decides_which_rank_failed_first() -> None:
    known = process(0, Status.FAILED, 5000, "ValueError", told_at=5001)
    hour_behind = process(1, Status.FAILED, 1410, "KeyError", told_at=5003, clock_known=False)
    assert roll_up([known, hour_behind]).cause_rank == 0
    assert roll_up([replace(known, told_at=5005, clock_known=False), hour_behind]).cause_rank == 1


def test_an_attempt_that_will_be_retried_failed_and_its_run_goes_on() -> None:
    state = roll_up([process(0, Status.FAILED, 20, "ValueError")], [supervisor(Status.FAILED, will_retry=True)])
    assert (state.status, state.reason, state.will_retry) == (Status.FAILED, "ValueError", True)
    assert stands(state, 10 * DECISION_NANOS) is Status.RUNNING


def test_a_run_goes_on_until_its_supervisor_has_had_time_to_say_whether_it_tries_again() -> None:
    failed = process(0, Status.FAILED, 20, "ValueError")
    undecided = roll_up([failed], [supervisor(Status.RUNNING)])
    assert undecided.status is Status.FAILED
    assert stands(undecided, 20 + DECISION_NANOS) is Status.RUNNING
    assert stands(undecided, 21 + DECISION_NANOS) is Status.FAILED
    for word in ([], [supervisor(Status.FAILED, "exit 1")], [supervisor(Status.LOST)]):
        assert stands(roll_up([failed], word), 20) is Status.FAILED


def test_the_latest_attempt_is_that_of_the_highest_number_or_else_of_the_latest_start() -> None:
    assert latest_of({1: 50, 2: 10}, numbered=True) == 2
    assert latest_of({1: 50, 2: 10}, numbered=False) == 1
    assert latest_of({1: 50, 2: 50}, numbered=False) == 2


def test_a_supervisor_speaks_for_the_last_attempt_that_its_command_began() -> None:
    assert spoken_for([1], {1: False}) == {1: 1}
    assert spoken_for([1, 2, 3], {1: False}) == {3: 1}
    assert spoken_for([1, 2, 3], {1: False, 3: False}) == {2: 1, 3: 3}
    assert spoken_for([1, 2], {1: True}) == {1: 1}
    assert spoken_for([], {1: True, 2: False}) == {1: 1, 2: 2}
    assert spoken_for([1, 2], {}) == {}


@given(ranks, supervisors)
def test_only_a_running_attempt_has_no_end_and_none_ends_before_it_started(
    members: list[ProcessState], seen: list[ProcessState]
) -> None:
    assume(members or seen)
    state = roll_up(members, seen)
    assert (state.ended_at is None) == (state.status is Status.RUNNING)
    assert state.ended_at is None or state.ended_at >= state.started_at


@given(ranks, supervisors, st.randoms(use_true_random=False))
def test_the_order_in_which_processes_are_read_changes_nothing(
    members: list[ProcessState], seen: list[ProcessState], random: Random
) -> None:
    assume(members or seen)
    state = roll_up(members, seen)
    random.shuffle(members)
    random.shuffle(seen)
    assert roll_up(members, seen) == state


@given(st.lists(processes, min_size=1, max_size=6, unique_by=lambda each: each.rank))
def test_a_told_failure_is_never_outvoted(members: list[ProcessState]) -> None:
    failed = [each for each in members if each.status is Status.FAILED]
    state = roll_up(members)
    assert (state.status is Status.FAILED) >= bool(failed)
    own = [each for each in failed if each.evidence != GLOO]
    if own and all(each.clock_known for each in own):
        assert state.ended_at == min(each.ended_at for each in own if each.ended_at is not None)
