"""What every indicator counts, on real databases: by itself, and against a plain count of the same runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, insert

from gradwatch_collector.objectives.baselines import baseline, threshold
from gradwatch_collector.objectives.burn_rates import burn_rates
from gradwatch_collector.objectives.counters import keep_counted
from gradwatch_collector.objectives.evaluation import evaluate_objectives
from gradwatch_collector.objectives.exclusions import What, exclude, withdraw
from gradwatch_collector.objectives.indicator import Indicator
from gradwatch_collector.runs.facts import nanos
from gradwatch_collector.runs.quality import WORST
from gradwatch_collector.storage import schema
from gradwatch_slo.durations import Duration
from gradwatch_slo.indicators import (
    Convergence,
    CountRatio,
    Measure,
    Selection,
    SuccessRate,
    Threshold,
    UnitRatio,
)
from gradwatch_slo.links import BurnRateAlert
from gradwatch_slo.objective import Objective
from gradwatch_slo.objectives import default_objectives
from gradwatch_slo.report import ObjectiveReport
from gradwatch_slo.rules import look_backs
from gradwatch_slo.runs import Status
from gradwatch_slo.slices import Slicing
from gradwatch_slo.windows import TimeWindow
from tests.stored_runs import DAY, HOUR, MINUTE, NOW, StoredRun, run, store_runs

PAGE = (Path(__file__).parents[2] / "docs" / "slo.md").read_text("utf-8")
MINUTE_OR_LONGER = SuccessRate(min_duration=MINUTE)
SECOND = timedelta(seconds=1)
GOOD, BAD, NOT_COUNTED = (1, 0), (0, 1), (0, 0)
ZONES = ("UTC", "Europe/London")
finite = st.floats(min_value=WORST, max_value=-WORST, exclude_min=True)
MONTHLY = TimeWindow(Duration(1, "M"), NOW.replace(month=1, day=1, hour=0))


def objective(measure: Measure, **changes: Any) -> Objective:
    """A 90 % objective over 28 rolling days."""
    ordinary = {"window": TimeWindow(Duration(28, "d")), "selection": Selection()}
    return Objective(
        name="an-objective",
        indicator="an-indicator",
        target=Decimal("0.9"),
        measure=measure,
        **(ordinary | changes),
    )


def report(
    database: Engine, runs: Sequence[StoredRun], measure: Measure, as_of: datetime = NOW, **changes: Any
) -> ObjectiveReport:
    """The one report of an objective over these runs."""
    with database.begin() as connection:
        store_runs(connection, runs)
    with database.connect() as connection:
        (only,) = evaluate_objectives(connection, [objective(measure, **changes)], nanos(as_of))
    return only


def judged(database: Engine, measure: Measure, *runs: StoredRun, **changes: Any) -> tuple[int, int]:
    """Good and bad among the runs."""
    found = report(database, runs, measure, **changes)
    return found.good, found.bad


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
        ({"status": Status.SUCCEEDED, "lasted": MINUTE}, GOOD),
        ({"status": Status.SUCCEEDED, "lasted": MINUTE - SECOND}, NOT_COUNTED),
        # Short failures are no smoke runs: they count.
        ({"status": Status.FAILED, "lasted": SECOND}, BAD),
    ],
)
def test_success_counts_a_run_as_the_contract_says(
    database: Engine, facts: dict[str, Any], expected: tuple[int, int]
) -> None:
    assert judged(database, MINUTE_OR_LONGER, run(**facts)) == expected


def test_without_a_minimum_duration_even_an_instant_success_counts(database: Engine) -> None:
    assert judged(database, SuccessRate(), run(lasted=timedelta(0))) == GOOD


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"reached": 30 * MINUTE}, GOOD),
        ({"reached": 30 * MINUTE + timedelta(microseconds=1)}, BAD),
        ({"target": "loss<=1"}, BAD),
        ({"reached": None}, NOT_COUNTED),
        ({"reached": 30 * MINUTE, "deadline": None}, NOT_COUNTED),
        ({"reached": 30 * MINUTE, "deadline": None, "baseline": 30 * MINUTE}, GOOD),
        ({"reached": 30 * MINUTE, "deadline": None, "baseline": 29 * MINUTE}, BAD),
        ({"reached": 30 * MINUTE, "baseline": 29 * MINUTE}, GOOD),
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
    ],
)
def test_convergence_counts_a_run_as_the_contract_says(
    database: Engine, facts: dict[str, Any], expected: tuple[int, int]
) -> None:
    assert judged(database, Convergence(), run(**{"deadline": 30 * MINUTE} | facts)) == expected


def test_the_runs_own_deadline_comes_before_the_objectives_and_that_before_the_baseline(
    database: Engine,
) -> None:
    fixed = Convergence(deadline=20 * MINUTE)
    late, early = run(reached=25 * MINUTE), run(reached=15 * MINUTE)
    own = run(reached=25 * MINUTE, deadline=30 * MINUTE), run(reached=15 * MINUTE, deadline=10 * MINUTE)
    usual = run(reached=25 * MINUTE, baseline=30 * MINUTE), run(reached=15 * MINUTE, baseline=10 * MINUTE)
    for each, expected in zip((late, early, *own, *usual), (BAD, GOOD, GOOD, BAD, BAD, GOOD), strict=True):
        other = {**each, "job": each["run_id"]}
        one_job = Selection((("job", (each["run_id"],)),))
        assert judged(database, fixed, other, selection=one_job) == expected


# A million times the first is 1000999.9999999999; the second is between two microseconds.
@pytest.mark.parametrize(("deadline", "microseconds"), [(1.001, 1_001_000), (1.000_000_6, 1_000_001)])
def test_a_runs_own_deadline_is_rounded_to_a_microsecond(
    database: Engine, deadline: float, microseconds: int
) -> None:
    took = [timedelta(microseconds=microseconds + over) for over in (0, 1)]
    runs = [run(reached=each, deadline_seconds=deadline) for each in took]
    assert judged(database, Convergence(), *runs) == (1, 1)


def test_a_pinned_run_that_took_no_time_is_not_known(database: Engine) -> None:
    pinned = run(reached=0 * MINUTE)
    assert judged(database, Convergence(baseline_run=pinned["run_id"]), pinned, run(reached=MINUTE)) == (0, 0)


def test_a_pinned_run_is_what_convergence_is_held_against_as_it_stands_now(database: Engine) -> None:
    pinned = run(reached=10 * MINUTE, tier="experiment")
    measure = Convergence(baseline_run=pinned["run_id"])
    production = {"selection": Selection((("tier", ("production",)),))}
    runs = [run(reached=15 * MINUTE), run(reached=15 * MINUTE + SECOND), run(reached=HOUR, deadline=HOUR)]
    # What is usual for the job says nothing any more, nor does a pinned run that is not known.
    usual = run(reached=16 * MINUTE, baseline=20 * MINUTE)
    assert judged(database, measure, *runs, usual, **production) == (1, 0)
    assert judged(database, measure, pinned, **production) == (2, 2)
    with database.begin() as connection:
        took = pinned["target_reached_at"] - pinned["started_at"]
        sooner = schema.run.c.target_reached_at - took // 2
        changed = schema.run.update().where(schema.run.c.run_id == pinned["run_id"])
        connection.execute(changed.values(target_reached_at=sooner))
    assert judged(database, measure, **production) == (1, 3)


def test_a_ratio_of_counts_follows_its_where(database: Engine) -> None:
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
    assert judged(database, CountRatio(total, oom, inverted=True), *runs) == (3, 1)
    assert judged(database, CountRatio(total, oom)) == (1, 3)
    assert judged(database, CountRatio(total, oom, inverted=True, min_duration=MINUTE)) == (2, 1)


def test_a_threshold_counts_runs_whose_value_is_known(database: Engine) -> None:
    runs = [run() for _ in range(4)]
    values = zip(runs, (0.05, 0.1, 0.3, None), strict=True)
    with database.begin() as connection:
        connection.execute(
            schema.run_summary.insert(),
            [{"run_id": each["run_id"], "memory_headroom": value} for each, value in values],
        )
    assert judged(database, Threshold("memory_headroom", "gt", Decimal("0.1")), *runs, run()) == (1, 2)
    assert judged(database, Threshold("memory_headroom", "gte", Decimal("0.1"))) == (2, 1)
    assert judged(database, Threshold("memory_headroom", "lt", Decimal("0.1"))) == (1, 2)
    assert judged(database, Threshold("memory_headroom", "lte", Decimal("0.1"))) == (2, 1)


def summarised(database: Engine, runs: Sequence[StoredRun], name: str, values: Sequence[float | None]) -> None:
    """Tell one value of each run."""
    with database.begin() as connection:
        rows = [{"run_id": each["run_id"], name: value} for each, value in zip(runs, values, strict=True)]
        connection.execute(schema.run_summary.insert(), rows)


def test_a_value_that_compares_runs_may_be_held_against_a_pinned_run(database: Engine) -> None:
    usual, pinned, *runs = (run(run_id=each) for each in ("usual", "pinned", "a", "b", "c", "d"))
    summarised(database, [pinned, *runs], "step_cost", [0.5, 0.55, 0.6, 0.61, None])
    summarised(database, [usual], "step_cost_ratio", [0.1])
    measure = Threshold("step_cost_ratio", "lte", Decimal("1.2"), baseline_run="pinned")
    # What is usual says nothing any more, and the pinned run is not held against itself.
    assert judged(database, measure, usual, pinned, *runs) == (2, 1)
    with database.begin() as connection:
        costs = schema.run_summary.update().where(schema.run_summary.c.run_id == "pinned")
        connection.execute(costs.values(step_cost=0.46))
    assert judged(database, measure) == (1, 2)


@pytest.mark.parametrize("pinned", [None, 0.0, -WORST, WORST])
def test_nothing_is_held_against_a_pinned_run_of_which_nothing_is_known(
    database: Engine, pinned: float | None
) -> None:
    runs = [run(run_id="pinned"), run(), run()]
    summarised(database, runs, "collective_p95", [pinned, 0.001, 0.002])
    measure = Threshold("collective_p95_ratio", "lte", Decimal("1.5"), baseline_run="pinned")
    assert judged(database, measure, *runs) == ((2, 0) if pinned == -WORST else NOT_COUNTED)
    unknown = Threshold("collective_p95_ratio", "lte", Decimal("1.5"), baseline_run="nobody")
    assert judged(database, unknown) == NOT_COUNTED


def test_quality_is_held_against_a_pinned_run_of_the_same_aim(database: Engine) -> None:
    pinned = run(run_id="pinned", target="val_loss<=0.5")
    runs = [run(target=target) for target in ("val_loss <0.3", "val_loss<=0.9", "val_loss<=0.9")]
    others = [
        run(target=target) for target in ("val_loss>=0.9", "VAL_LOSS<=0.9", "val_loss2<1", "accuracy>0", None)
    ]
    summarised(database, [pinned, *runs], "quality", [-0.4, -0.3, -0.4, WORST])
    summarised(database, others, "quality", [1.0] * len(others))
    better = Threshold("quality_delta", "gt", Decimal(0), baseline_run="pinned")
    assert judged(database, better, pinned, *runs, *others) == (1, 2)
    no_worse = Threshold("quality_delta", "gte", Decimal(0), baseline_run="pinned")
    assert judged(database, no_worse) == (2, 1)
    with database.begin() as connection:
        diverged = schema.run_summary.update().where(schema.run_summary.c.run_id == "pinned")
        connection.execute(diverged.values(quality=WORST))
    assert judged(database, better) == NOT_COUNTED


def test_any_numbers_may_be_held_against_a_pinned_run(database: Engine) -> None:
    pinned, other = run(run_id="pinned", target="loss<1"), run(target="loss<1")
    with database.begin() as connection:
        store_runs(connection, [pinned, other])
    summarised(database, [pinned, other], "quality", [0.0, 0.0])
    of_both = schema.run_summary.c

    @settings(max_examples=100, deadline=None)
    @given(finite, finite, st.decimals(allow_nan=False, allow_infinity=False, places=6))
    def check(base: float, value: float, bound: Decimal) -> None:
        with database.begin() as connection:
            for run_id, quality in (("pinned", base), (other["run_id"], value)):
                change = schema.run_summary.update().where(of_both.run_id == run_id)
                connection.execute(change.values(quality=quality))
        found = judged(database, Threshold("quality_delta", "gt", bound, baseline_run="pinned"))
        limit = Fraction(base) + Fraction(bound)
        at_limit = abs(Fraction(value) - limit) <= max(abs(limit), abs(Fraction(base))) / 10**11
        # What twelve digits do not tell apart is the same.
        assert found == ((1, 0) if value > limit else (0, 1)) or at_limit

    check()


def test_a_run_shorter_than_the_threshold_asks_for_is_not_counted(database: Engine) -> None:
    runs = [run(lasted=MINUTE - SECOND), run(lasted=MINUTE), run(Status.FAILED, lasted=SECOND)]
    with database.begin() as connection:
        values = [{"run_id": each["run_id"], "effective_time_ratio": 0.5} for each in runs]
        connection.execute(schema.run_summary.insert(), values)
    ninety = Threshold("effective_time_ratio", "gte", Decimal("0.9"), min_duration=MINUTE)
    assert judged(database, ninety, *runs) == BAD


def test_a_ratio_of_units_adds_up_what_every_run_had(database: Engine) -> None:
    runs = [run(), run()]
    with database.begin() as connection:
        connection.execute(
            schema.run_summary.insert(),
            [
                {"run_id": runs[0]["run_id"], "steps": 1000, "observed_steps": 500, "unhealthy_steps": 3}
                | {"nonfinite_steps": 2, "checkpoints": 7, "failed_checkpoints": 1},
                {"run_id": runs[1]["run_id"], "steps": 50, "observed_steps": 50, "unhealthy_steps": None}
                | {"nonfinite_steps": 0, "checkpoints": 0, "failed_checkpoints": 0},
            ],
        )
    # What is not known of a run is not counted, and a run without a summary not at all.
    assert judged(database, UnitRatio("step", "unhealthy"), *runs, run()) == (497, 3)
    assert judged(database, UnitRatio("step", "nonfinite")) == (1048, 2)
    assert judged(database, UnitRatio("checkpoint", "failed")) == (6, 1)


def test_only_selected_runs_count(database: Engine) -> None:
    selection = Selection((("job", ("digits", "gpt")), ("tier", ("production",))))
    runs = [run(), run(job="gpt"), run(job="other"), run(tier="experiment")]
    assert report(database, runs, SuccessRate(), selection=selection).total == 2


@pytest.mark.parametrize(
    ("ended", "counted"),
    [(NOW, 1), (NOW - 28 * DAY, 1), (NOW - 28 * DAY - MINUTE, 0), (NOW - 14 * DAY, 1)],
)
def test_runs_are_selected_by_when_they_ended(database: Engine, ended: datetime, counted: int) -> None:
    runs = [run(started=ended - 3 * DAY, lasted=3 * DAY)]
    assert report(database, runs, SuccessRate()).total == counted


def test_a_run_belongs_to_the_calendar_month_it_ended_in(database: Engine) -> None:
    first = NOW.replace(day=1, hour=0)
    runs = [
        run(started=first - HOUR, lasted=HOUR),
        run(Status.FAILED, started=first - HOUR, lasted=HOUR - MINUTE),
    ]
    march = report(database, runs, SuccessRate(), window=MONTHLY)
    february = report(database, [], SuccessRate(), window=MONTHLY, as_of=first - MINUTE)
    assert (march.good, march.bad) == (1, 0)
    assert (february.good, february.bad) == (0, 1)


def test_groups_are_reported_apart_and_unknown_is_a_group(database: Engine) -> None:
    runs = [
        run(team="vision"),
        run(Status.FAILED, team=None),
        run(team="audio"),
        run(Status.RUNNING, team="text"),
    ]
    with database.begin() as connection:
        store_runs(connection, runs)
        reports = evaluate_objectives(
            connection, [objective(SuccessRate(), group_by=("team", "tier"))], nanos(NOW)
        )
    assert [(dict(each.group), each.good, each.bad) for each in reports] == [
        ({"team": None, "tier": "production"}, 0, 1),
        ({"team": "audio", "tier": "production"}, 1, 0),
        ({"team": "vision", "tier": "production"}, 1, 0),
    ]


def test_without_runs_every_default_objective_is_there(database: Engine) -> None:
    with database.connect() as connection:
        reports = evaluate_objectives(connection, default_objectives().objectives, nanos(NOW))
    names = dict.fromkeys(each.name for each in default_objectives().objectives)
    assert len(names) == 11
    assert [(each.name, dict(each.group), each.total) for each in reports] == [
        *((name, {"tier": tier}, 0) for name in names for tier in ("production", "experiment")),
    ]


@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize("length", [Duration(1, "h"), Duration(15, "m"), Duration(1, "d")])
def test_slices_of_time_are_judged_by_the_runs_that_ended_in_them(
    database: Engine, length: Duration, is_kept: bool
) -> None:
    now, begin = NOW - 6 * HOUR, NOW.replace(hour=0) - 3 * DAY
    # Of four runs in each slice 0, 1, 2, 4 and 4 failed; in the fourth none ended.
    runs = [
        run(
            Status.FAILED if number < slice_ else Status.SUCCEEDED,
            started=begin + slice_ * length.nominal,
            lasted=MINUTE,
        )
        for slice_ in range(6)
        if slice_ != 3
        for number in range(4)
    ]
    sliced = objective(SuccessRate(), slicing=Slicing(length, Decimal("0.5")))
    with database.begin() as connection:
        store_runs(connection, runs)
        if is_kept:
            assert keep_counted(connection, [Indicator.of(sliced)], nanos(now))
        (found,) = evaluate_objectives(connection, [sliced], nanos(begin + 28 * DAY))
    assert (found.good, found.bad) == (3, 2)


def test_a_slice_that_goes_on_is_not_judged_yet(database: Engine) -> None:
    runs = [run(Status.FAILED, started=NOW - HOUR, lasted=HOUR - MINUTE)]
    hourly = Slicing(Duration(1, "h"), Decimal("0.5"))
    assert report(database, runs, SuccessRate(), slicing=hourly).bad == 1
    assert report(database, [], SuccessRate(), as_of=NOW - 2 * MINUTE, slicing=hourly).total == 0


def test_slices_begin_with_the_calendar(database: Engine) -> None:
    half_past = TimeWindow(Duration(1, "d"), NOW.replace(hour=0, minute=30))
    # Before the calendar begins, too.
    runs = [run(started=NOW - days * DAY, lasted=MINUTE) for days in (0, 1)]
    runs += [run(Status.FAILED, started=each + 31 * MINUTE, lasted=MINUTE) for each in (NOW, NOW - DAY)]
    hourly = Slicing(Duration(1, "h"), Decimal("0.9"))
    for as_of in (NOW + 2 * HOUR, NOW - 22 * HOUR):
        found = report(database, runs, SuccessRate(), as_of=as_of, window=half_past, slicing=hourly)
        assert (found.good, found.bad) == (1, 1)
        runs = []


def test_a_run_that_goes_on_counts_in_the_window_that_is_open_now_and_in_no_earlier_one(
    database: Engine,
) -> None:
    late = run(Status.RUNNING, started=NOW - 40 * DAY, target="loss<=1", deadline=HOUR)
    with database.begin() as connection:
        store_runs(connection, [late])
        for ago, counted in ((0, 1), (30, 0)):
            as_of = nanos(NOW - ago * DAY)
            (found,) = evaluate_objectives(connection, [objective(Convergence())], as_of, past=ago > 0)
            assert found.bad == counted


def test_days_of_two_time_zones_are_counted_apart(database: Engine) -> None:
    # The two years begin in the same moment. The runs of one day in UTC are of two in London.
    start = datetime(2025, 7, 1, 22, 30, tzinfo=UTC)
    runs = [run(Status.FAILED, started=start, lasted=MINUTE), run(started=start + HOUR, lasted=MINUTE)]
    years = [TimeWindow(Duration(1, "Y"), datetime(2025, 1, 1, tzinfo=ZoneInfo(zone))) for zone in ZONES]
    daily = Slicing(Duration(1, "d"))
    objectives = [objective(SuccessRate(), window=year, slicing=daily) for year in years]
    with database.begin() as connection:
        store_runs(connection, runs)
        found = evaluate_objectives(connection, objectives, nanos(start + 3 * DAY))
    assert [(each.total, each.bad) for each in found] == [(1, Fraction(1, 2)), (2, Fraction(1))]


def burning_over(look_back: Duration) -> BurnRateAlert:
    """The alert of a policy that asks for the burn rate over this look-back."""
    return BurnRateAlert(
        policy="mine",
        severity="ticket",
        operator="gte",
        threshold=Decimal(3),
        look_back=look_back,
        alert_after=None,
        targets=(),
        when_breaching=True,
        when_no_data=False,
    )


def test_the_burn_rate_of_slices_is_that_of_the_objectives_own_window(database: Engine) -> None:
    midnight = NOW.replace(hour=0)
    today, rolling = TimeWindow(Duration(1, "d"), midnight), TimeWindow(Duration(28, "d"))
    hourly = Slicing(Duration(1, "h"), Decimal("0.5"))
    objectives = [
        objective(SuccessRate(), alerts=(burning_over(Duration(1, "d")),), slicing=hourly, window=window)
        for window in (today, rolling)
    ]
    # Whatever ended yesterday failed, and nothing that ended today.
    runs = [run(started=midnight + HOUR, lasted=MINUTE)]
    runs += [run(Status.FAILED, started=midnight - HOUR, lasted=MINUTE)]
    with database.begin() as connection:
        store_runs(connection, runs)
        rates = [each.rate for each in burn_rates(connection, objectives, nanos(NOW))]
    assert rates == [0, pytest.approx(5)]


@pytest.mark.parametrize("length", ["7m", "1h", "5h", "1d", "36h"])
def test_whatever_the_rules_of_slices_read_is_there_at_any_time_of_a_day(database: Engine, length: str) -> None:
    quarter = 15 * MINUTE
    runs = [run(started=NOW - number * quarter, lasted=MINUTE) for number in range(4 * 96 + 8)]
    runs += [run(started=NOW - number * MINUTE, lasted=SECOND) for number in range(28 * 60)]
    summaries = [
        {"run_id": each["run_id"], "steps": 9, "observed_steps": 9, "unhealthy_steps": 9} for each in runs
    ]
    of_steps = replace(objective(UnitRatio("step", "unhealthy"), unit="step"), target=Decimal("0.99"))
    bad_only = [
        replace(of_steps, slicing=Slicing(Duration.parse(length), target)) for target in (Decimal("0.9"), None)
    ]
    for each in bad_only:
        assert look_backs(each)
    # Before, at and after the ends of slices.
    moments = [NOW - hours * HOUR + seconds * SECOND for hours in range(25) for seconds in (-1, 0, 1)]
    with database.begin() as connection:
        store_runs(connection, runs)
        connection.execute(insert(schema.run_summary), summaries)
        for moment in moments:
            found = burn_rates(connection, bad_only, nanos(moment))
            assert [each.look_back for each in found] == [
                look_back for each in bad_only for look_back in look_backs(each)
            ]
            assert {each.rate for each in found} == {100}


def test_the_burn_rate_of_slices_is_that_of_what_was_lost_of_them(database: Engine) -> None:
    ends = [NOW - hours * HOUR - 30 * MINUTE for hours in range(8)]
    # One of four of each hour failed, and of the newest none.
    runs = [
        run(Status.FAILED if number == 0 and end != ends[0] else Status.SUCCEEDED, started=end, lasted=MINUTE)
        for end in ends
        for number in range(4)
    ]
    hourly = [
        objective(
            SuccessRate(), alerts=(burning_over(Duration(6, "h")),), slicing=Slicing(Duration(1, "h"), target)
        )
        for target in (Decimal("0.9"), None)
    ]
    with database.begin() as connection:
        store_runs(connection, runs)
        rates = [each.rate for each in burn_rates(connection, hourly, nanos(NOW))]
    # Five of six slices are bad, or a quarter of each of them is; and a tenth may be.
    assert rates == [pytest.approx(50 / 6), pytest.approx(12.5 / 6)]


# --- Exclusions ----------------------------------------------------------------------------------------


def test_an_excluded_run_counts_for_nothing_until_that_is_withdrawn(database: Engine) -> None:
    failed = run(Status.FAILED)
    assert judged(database, SuccessRate(), failed, run()) == (1, 1)
    with database.begin() as connection:
        number = exclude(connection, What(single_run=failed["run_id"]), "a test of the pager", now=nanos(NOW))
    assert judged(database, SuccessRate()) == GOOD
    with database.begin() as connection:
        withdraw(connection, number, now=nanos(NOW))
    assert judged(database, SuccessRate()) == (1, 1)


def test_a_period_is_excluded_for_whom_it_names_from_its_start_up_to_its_end(database: Engine) -> None:
    ends = [NOW - 3 * HOUR, NOW - 2 * HOUR, NOW - HOUR]
    runs = [run(Status.FAILED, started=ended - HOUR, team=team) for ended in ends for team in ("a", "b", None)]
    period = What(start=nanos(ends[0]), end=nanos(ends[2]), fields={"team": ["a"]})
    with database.begin() as connection:
        exclude(connection, period, "maintenance of a's cluster", now=nanos(NOW))
    assert judged(database, SuccessRate(), *runs) == (0, 7)


# --- Baselines -----------------------------------------------------------------------------------------


def history(*minutes: int, **facts: Any) -> list[StoredRun]:
    """Good runs long ago that took so many minutes to their target, one after the other."""
    start = NOW - 60 * DAY
    return [run(started=start + i * HOUR, reached=took * MINUTE, **facts) for i, took in enumerate(minutes)]


def baseline_at(database: Engine, runs: Sequence[StoredRun], started: datetime = NOW, **of: Any) -> Any:
    """In minutes, of the ordinary job."""
    with database.begin() as connection:
        store_runs(connection, runs)
        found = baseline(
            connection, **{"job": "digits", "model": "mlp", "dataset": "digits"} | of, started_at=nanos(started)
        )
    return None if found is None else found / (60 * 10**9)


def test_the_baseline_is_one_and_a_half_times_the_median_of_five_earlier_good_runs(database: Engine) -> None:
    assert baseline_at(database, history(10, 20, 30, 40)) is None
    assert baseline_at(database, history(50)) == 45


def test_a_baseline_is_as_the_page_works_it_out(database: Engine) -> None:
    assert "1.5 x 50 = 75 minutes" in PAGE
    assert "(47 + 50) / 2 = 48.5, and the one after it has 72.75 minutes" in PAGE
    runs = history(40, 44, 50, 61, 90, 47)
    assert baseline_at(database, runs[:5]) == 75
    assert baseline_at(database, runs[5:]) == 72.75


def test_the_newest_twenty_runs_are_the_baseline(database: Engine) -> None:
    # Ten each: one more or one less would have another median.
    assert baseline_at(database, history(*[100] * 30, *[40] * 10, *[20] * 10)) == 45


@pytest.mark.parametrize("order", [1, -1])
def test_of_runs_that_ended_in_one_moment_the_baseline_takes_the_same_whichever_was_stored_first(
    database: Engine, order: int
) -> None:
    ended = [(f"run-a{n}", 10) for n in range(20)] + [(f"run-b{n}", 100) for n in range(20)]
    runs = [run(run_id=name, started=NOW - DAY, reached=took * MINUTE) for name, took in ended]
    assert baseline_at(database, runs[::order]) == 15


@pytest.mark.parametrize(
    "other",
    [
        {"job": "another"},
        {"model": "another"},
        {"dataset": None},
        {"status": Status.FAILED},
        {"status": Status.CANCELLED},
        {"lasted": timedelta(days=80)},  # still running when the run started
    ],
)
def test_only_good_runs_of_the_same_work_that_had_ended_are_a_baseline(
    database: Engine, other: dict[str, Any]
) -> None:
    assert baseline_at(database, [*history(10, 20, 30, 40), *history(50, **other)]) is None


def test_runs_of_which_no_model_is_known_are_each_others_baseline(database: Engine) -> None:
    assert baseline_at(database, history(10, 10, 10, 10, 10, model=None), model=None) == 15


def test_an_excluded_run_is_no_baseline(database: Engine) -> None:
    runs = history(10, 20, 30, 40, 50)
    with database.begin() as connection:
        exclude(connection, What(single_run=runs[0]["run_id"]), "a broken clock", now=nanos(NOW))
    assert baseline_at(database, runs) is None


@given(st.lists(st.integers(0, 10**15), min_size=1, max_size=20))
def test_the_threshold_is_exact_for_whole_numbers(took: list[int]) -> None:
    in_order = sorted(took)
    middle = in_order[(len(took) - 1) // 2] + in_order[len(took) // 2]
    assert 4 * threshold(took) <= 3 * middle < 4 * (threshold(took) + 1)
