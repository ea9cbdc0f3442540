from __future__ import annotations

import random
import statistics
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slo_facts import HOUR, MINUTE, NOW, objective, run

from gradwatch_slo.baseline import baseline_thresholds
from gradwatch_slo.indicators import Convergence, CountRatio, Selection, SuccessRate
from gradwatch_slo.report import evaluate
from gradwatch_slo.runs import RunFacts, Status
from gradwatch_slo.standing import standings

MINUTE_OR_LONGER = SuccessRate(min_duration=MINUTE)
SECOND = timedelta(seconds=1)


def judged(measure: Any, *runs: RunFacts, **moments: Any) -> tuple[int, int]:
    """Good and bad among the runs."""
    (report,) = evaluate([objective(measure)], runs, NOW, **moments)
    return report.good, report.bad


GOOD, BAD, NOT_COUNTED = (1, 0), (0, 1), (0, 0)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"status": Status.SUCCEEDED}, GOOD),
        ({"status": Status.FAILED}, BAD),
        ({"status": Status.LOST}, BAD),
        ({"status": Status.CANCELLED}, NOT_COUNTED),
        ({"status": Status.CANCELLED, "reason": "preempted"}, NOT_COUNTED),
        ({"status": Status.CANCELLED, "reason": "SIGTERM"}, NOT_COUNTED),
        ({"status": Status.FAILED, "reason": "preempted"}, NOT_COUNTED),
        ({"status": Status.FAILED, "reason": "ValueError"}, BAD),
        ({"status": Status.RUNNING}, NOT_COUNTED),
        ({"status": Status.FAILED, "will_retry": True}, NOT_COUNTED),
        ({"status": Status.FAILED, "excluded": True}, NOT_COUNTED),
        ({"status": Status.SUCCEEDED, "excluded": True}, NOT_COUNTED),
        ({"status": Status.SUCCEEDED, "lasted": MINUTE}, GOOD),
        ({"status": Status.SUCCEEDED, "lasted": MINUTE - SECOND}, NOT_COUNTED),
        # Short failures are no smoke runs: they count.
        ({"status": Status.FAILED, "lasted": SECOND}, BAD),
    ],
)
def test_success_counts_a_run_as_the_contract_says(facts: dict[str, Any], expected: tuple[int, int]) -> None:
    assert judged(MINUTE_OR_LONGER, run(**facts)) == expected


def test_without_a_minimum_duration_even_an_instant_success_counts() -> None:
    assert judged(SuccessRate(), run(lasted=timedelta(0))) == GOOD


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"reached": 30 * MINUTE}, GOOD),
        ({"reached": 30 * MINUTE + SECOND}, BAD),
        ({"reached": None, "target": "loss<=1"}, BAD),
        ({"reached": None}, NOT_COUNTED),
        ({"reached": 30 * MINUTE, "deadline": None}, NOT_COUNTED),
        ({"reached": 10 * MINUTE, "excluded": True}, NOT_COUNTED),
        # Reaching the target in time is what counts, not how the run ended afterwards.
        ({"reached": 10 * MINUTE, "status": Status.FAILED}, GOOD),
        ({"reached": 10 * MINUTE, "status": Status.CANCELLED}, GOOD),
        ({"target": "loss<=1", "status": Status.FAILED}, BAD),
        ({"target": "loss<=1", "status": Status.LOST}, BAD),
        ({"target": "loss<=1", "status": Status.CANCELLED}, BAD),
        # Still running: counted as soon as the result can no longer change.
        ({"status": Status.RUNNING, "reached": 10 * MINUTE}, GOOD),
        ({"status": Status.RUNNING, "reached": 50 * MINUTE}, BAD),
        ({"status": Status.RUNNING, "target": "loss<=1", "started": NOW - HOUR}, BAD),
        ({"status": Status.RUNNING, "target": "loss<=1", "started": NOW - 30 * MINUTE}, NOT_COUNTED),
        (
            {"status": Status.FAILED, "will_retry": True, "target": "loss<=1", "started": NOW - 9 * MINUTE},
            NOT_COUNTED,
        ),
        ({"status": Status.FAILED, "will_retry": True, "target": "loss<=1", "started": NOW - HOUR}, BAD),
    ],
)
def test_convergence_counts_a_run_as_the_contract_says(
    facts: dict[str, Any], expected: tuple[int, int]
) -> None:
    assert judged(Convergence(), run(**{"deadline": 30 * MINUTE} | facts)) == expected


def test_the_runs_own_deadline_comes_before_the_objectives() -> None:
    fixed = Convergence(deadline=20 * MINUTE)
    assert judged(fixed, run(reached=25 * MINUTE)) == BAD
    assert judged(fixed, run(reached=25 * MINUTE, deadline=30 * MINUTE)) == GOOD
    assert judged(fixed, run(reached=15 * MINUTE, deadline=10 * MINUTE)) == BAD


def history(*minutes: int, **facts: Any) -> list[RunFacts]:
    """Good runs long ago that took so many minutes to their target, one after the other."""
    start = NOW - timedelta(days=60)
    return [run(started=start + i * HOUR, reached=took * MINUTE, **facts) for i, took in enumerate(minutes)]


def test_the_baseline_is_one_and_a_half_times_the_median_of_five_earlier_good_runs() -> None:
    earlier = history(10, 20, 30, 40, 50)
    assert judged(Convergence(), *earlier, run(reached=45 * MINUTE)) == GOOD
    assert judged(Convergence(), *earlier, run(reached=45 * MINUTE + SECOND)) == BAD
    assert judged(Convergence(), *earlier[1:], run(reached=MINUTE)) == NOT_COUNTED


def test_an_even_number_of_earlier_runs_has_the_mean_of_the_middle_two() -> None:
    earlier = history(10, 20, 30, 40, 50, 60)
    assert judged(Convergence(), *earlier, run(reached=52 * MINUTE + 30 * SECOND)) == GOOD
    assert judged(Convergence(), *earlier, run(reached=52 * MINUTE + 31 * SECOND)) == BAD


@pytest.mark.parametrize(
    "other",
    [
        {"job": "another"},
        {"model": "another"},
        {"dataset": None},
        {"status": Status.FAILED},
        {"status": Status.CANCELLED},
        {"excluded": True},
        {"lasted": timedelta(days=80)},  # still running when the run started
    ],
)
def test_only_good_runs_of_the_same_work_that_had_ended_are_a_baseline(other: dict[str, Any]) -> None:
    earlier = [*history(10, 20, 30, 40), *history(50, **other)]
    assert judged(Convergence(), *earlier, run(reached=MINUTE)) == NOT_COUNTED


def test_later_runs_do_not_move_a_frozen_threshold() -> None:
    earlier = history(20, 20, 20, 20, 20)
    judged_run = run(reached=25 * MINUTE)
    later = [run(started=NOW - HOUR, reached=MINUTE, lasted=2 * MINUTE) for _ in range(40)]
    known = standings([*later, judged_run, *earlier], NOW, NOW)
    assert baseline_thresholds(known)[judged_run.run_id] == 30 * MINUTE


def test_a_run_that_took_no_time_is_not_its_own_baseline() -> None:
    runs = [run(lasted=timedelta(0), reached=timedelta(0)) for _ in range(6)]
    assert baseline_thresholds(standings(runs, NOW, NOW)) == {}


def test_runs_one_right_after_the_other_are_earlier_runs() -> None:
    start = NOW - timedelta(days=1)
    runs = [run(started=start + i * HOUR, reached=20 * MINUTE) for i in range(7)]
    assert set(baseline_thresholds(standings(runs, NOW, NOW))) == {runs[5].run_id, runs[6].run_id}


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 60), st.integers(0, 60)), max_size=40), st.randoms()
)
def test_the_sweep_finds_what_a_search_through_all_runs_finds(
    spans: list[tuple[int, int, int]], shuffler: random.Random
) -> None:
    start = NOW - timedelta(days=5)
    runs = [
        run(started=start + at * MINUTE, lasted=(took + 1) * MINUTE, reached=min(reached, took) * MINUTE)
        for at, took, reached in spans
    ]
    expected = {}
    for each in runs:
        earlier = [
            other.target_reached_at - other.started_at
            for other in runs
            if other.ended_at is not None
            and other.target_reached_at is not None
            and other.ended_at <= each.started_at
        ]
        if len(earlier) >= 5:
            seconds = statistics.median(length.total_seconds() for length in earlier)
            expected[each.run_id] = timedelta(seconds=1.5 * seconds)
    shuffler.shuffle(runs)
    assert baseline_thresholds(standings(runs, NOW, NOW)) == expected


def test_a_ratio_of_counts_follows_its_where() -> None:
    total = Selection((("status", ("succeeded", "failed")),))
    oom = Selection((("reason", ("OutOfMemoryError",)),))
    runs = [
        run(),
        run(lasted=SECOND),
        run(Status.FAILED, reason="OutOfMemoryError"),
        run(Status.FAILED, reason="ValueError"),
        run(Status.LOST),
        run(Status.RUNNING),
    ]
    assert judged(CountRatio(total, oom, inverted=True), *runs) == (3, 1)
    assert judged(CountRatio(total, oom), *runs) == (1, 3)
    assert judged(CountRatio(total, oom, inverted=True, min_duration=MINUTE), *runs) == (2, 1)
