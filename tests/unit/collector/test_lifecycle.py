"""How a run stands follows from how its processes stand."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from gradwatch_collector.lifecycle import ProcessState, roll_up
from gradwatch_slo.runs import Status


def process(rank: int, status: Status, ended_at: int | None = 20, reason: str | None = None) -> ProcessState:
    return ProcessState(
        rank=rank, status=status, reason=reason, started_at=10, ended_at=ended_at, last_seen_at=ended_at or 15
    )


RUNNING = process(0, Status.RUNNING, None)
SUCCEEDED = process(0, Status.SUCCEEDED)

processes = st.builds(
    ProcessState,
    rank=st.integers(0, 3),
    status=st.sampled_from(Status),
    reason=st.none(),
    started_at=st.integers(0, 5),
    ended_at=st.none() | st.integers(5, 20),
    last_seen_at=st.integers(5, 20),
)


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


@given(st.lists(processes, min_size=1, max_size=8))
def test_only_a_running_attempt_has_no_end_and_none_ends_before_it_started(members: list[ProcessState]) -> None:
    state = roll_up(members)
    assert (state.ended_at is None) == (state.status is Status.RUNNING)
    assert state.ended_at is None or state.ended_at >= state.started_at


@given(st.lists(processes, min_size=1, max_size=8, unique_by=lambda p: p.rank), st.randoms())
def test_the_order_in_which_processes_are_read_changes_nothing(
    members: list[ProcessState], random: object
) -> None:
    shuffled = list(members)
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis gives a random.Random
    one, other = roll_up(members), roll_up(shuffled)
    assert (one.status, one.ended_at) == (other.status, other.ended_at)
