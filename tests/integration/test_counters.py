"""Whatever happens to runs, what is kept counted by the hour tells what a plain count of all of them tells."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, func, select, update

from gradwatch_collector.objectives import counters
from gradwatch_collector.objectives.changes import load_changed, tell_changed
from gradwatch_collector.objectives.counters import keep_counted
from gradwatch_collector.objectives.counting import Tallies, load_kept
from gradwatch_collector.objectives.evaluation import evaluate_objectives
from gradwatch_collector.objectives.exclusions import What, exclude, withdraw
from gradwatch_collector.objectives.indicator import Indicator
from gradwatch_collector.runs.facts import nanos
from gradwatch_collector.runs.turns import take_turns
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.upsert import upsert
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
from gradwatch_slo.objective import Objective
from gradwatch_slo.report import ObjectiveReport
from gradwatch_slo.runs import Status
from gradwatch_slo.windows import TimeWindow
from tests.stored_runs import DAY, HOUR, MINUTE, NOW, StoredRun, run, store_runs

TEAMS = ("audio", "vision", None)
MICROSECOND = timedelta(microseconds=1)


def objective(measure: Measure, window: TimeWindow, *group_by: str, **where: tuple[str, ...]) -> Objective:
    return Objective(
        name="an-objective",
        indicator="an-indicator",
        target=Decimal("0.9"),
        measure=measure,
        window=window,
        selection=Selection(tuple(where.items())),
        group_by=group_by,
    )


WEEK = TimeWindow(Duration(1, "w"))
MONTH = TimeWindow(Duration(1, "M"), NOW.replace(month=1, day=1, hour=0))
OBJECTIVES = (
    objective(SuccessRate(), WEEK),
    objective(SuccessRate(30 * MINUTE), MONTH, "team", tier=("production",)),
    objective(Convergence(45 * MINUTE), WEEK, "team", "job"),
    objective(CountRatio(Selection(), Selection((("reason", ("OOM",)),)), inverted=True), MONTH, "tier"),
    objective(UnitRatio("step", "nonfinite"), WEEK, "team"),
    objective(Threshold("memory_headroom", "gt", Decimal("0.1"), 30 * MINUTE), MONTH, tier=("production",)),
    objective(Convergence(baseline_run="pinned"), WEEK, "team"),
)
INDICATORS = [Indicator.of(each) for each in OBJECTIVES]


# --- The same by a plain count ---------------------------------------------------------------------------


@dataclass
class Exclusion:
    what: What
    withdrawn: bool = False

    def is_about(self, row: StoredRun) -> bool:
        if self.withdrawn:
            return False
        if self.what.single_run is not None:
            return bool(self.what.single_run == row["run_id"])
        if row["ended_at"] is None or self.what.start is None or self.what.end is None:
            return False
        within = self.what.start <= row["ended_at"] < self.what.end
        return within and all(row[name] in values for name, values in self.what.fields.items())


def counted(measure: Measure, row: StoredRun, as_of: int, pinned: StoredRun | None) -> tuple[int, int]:
    if isinstance(measure, UnitRatio):
        steps, nonfinite, _ = row.get("summary", (None, None, None))
        is_open = row["ended_at"] is None or row["ended_at"] > as_of
        return (0, 0) if is_open or nonfinite is None else (steps - nonfinite, nonfinite)
    found = quality(measure, row, as_of, pinned)
    return int(found == "good"), int(found == "bad")


def quality(measure: Measure, row: StoredRun, as_of: int, pinned: StoredRun | None) -> str | None:
    is_open = row["ended_at"] is None
    if isinstance(measure, Convergence):
        own = row["deadline_seconds"]
        fixed = None if measure.deadline is None else measure.deadline.total_seconds()
        if measure.baseline_run is not None and pinned not in (None, row):
            reached = pinned["target_reached_at"]  # type: ignore[index]
            took = 0 if reached is None else reached - pinned["started_at"]  # type: ignore[index]
            fixed = 1.5 * took / 10**9 if took > 0 else None
        limit = own if own is not None else fixed
        if row["target"] is None or limit is None:
            return None
        reached = row["target_reached_at"]
        if reached is not None and (not is_open or reached <= as_of):
            return "good" if reached - row["started_at"] <= limit * 10**9 else "bad"
        passed = as_of - row["started_at"] > limit * 10**9
        return "bad" if not is_open or passed else None
    if is_open:
        return None
    lasted = row["ended_at"] - row["started_at"]
    if isinstance(measure, Threshold):
        headroom = row.get("summary", (None, None, None))[2]
        if headroom is None or lasted < measure.min_duration.total_seconds() * 10**9:
            return None
        return "good" if headroom > float(measure.bound) else "bad"
    if row["status"] == "succeeded" and lasted < measure.min_duration.total_seconds() * 10**9:  # type: ignore[union-attr]
        return None
    if isinstance(measure, CountRatio):
        return "bad" if row["reason"] == "OOM" else "good"
    return {"succeeded": "good", "failed": "bad", "lost": "bad"}.get(row["status"])


def plainly(
    each: Objective,
    rows: dict[str, StoredRun],
    exclusions: list[Exclusion],
    as_of: datetime,
    *,
    past: bool,
) -> dict[tuple[Any, ...], tuple[int, int]]:
    window, at = each.window.at(as_of), nanos(as_of)
    counts: dict[tuple[Any, ...], tuple[int, int]] = {}
    for row in rows.values():
        if row["ended_at"] is None:
            if past or row["started_at"] > at:
                continue
        elif not (nanos(window.start) <= row["ended_at"] <= at):
            continue
        if any(exclusion.is_about(row) for exclusion in exclusions):
            continue
        if any(row[name] not in values for name, values in each.selection.fields):
            continue
        group = tuple(row[name] for name in each.group_by)
        good, bad = counts.get(group, (0, 0))
        more, worse = counted(each.measure, row, at, rows.get("pinned"))
        counts[group] = good + more, bad + worse
    return {group: found for group, found in counts.items() if any(found)}


def told(reports: list[ObjectiveReport]) -> dict[tuple[Any, ...], tuple[int, int]]:
    return {tuple(each.group.values()): (each.good, each.bad) for each in reports if each.total}


# --- What may happen -------------------------------------------------------------------------------------

stored_runs = st.builds(
    run,
    st.sampled_from(Status),
    started=st.integers(-9 * 24 * 4, 0).map(lambda quarters: NOW + quarters * HOUR / 4),
    lasted=st.integers(0, 16).map(lambda quarters: quarters * HOUR / 4),
    target=st.sampled_from([None, "loss<=1"]),
    reason=st.sampled_from([None, "OOM"]),
    team=st.sampled_from(TEAMS),
    tier=st.sampled_from(["production", "experiment"]),
    deadline=st.sampled_from([None, 30 * MINUTE]),
)
periods = st.builds(
    lambda first, length, teams: What(
        start=nanos(NOW + first * DAY), end=nanos(NOW + (first + length) * DAY), fields=teams
    ),
    st.integers(-9, 0),
    st.integers(1, 9),
    st.sampled_from([{}, {"team": ["audio"]}, {"team": ["audio", "vision"]}]),
)
# Steps, how many of them were not finite, and the memory that was left.
summaries = st.tuples(
    st.integers(9, 99), st.none() | st.integers(0, 9), st.sampled_from([None, 0.05, 0.1, 0.2])
)
acts = st.one_of(
    st.tuples(st.just("store"), st.lists(stored_runs, min_size=1, max_size=6)),
    st.tuples(st.just("correct"), st.tuples(st.integers(0, 99), stored_runs)),
    st.tuples(st.just("reach"), st.tuples(st.integers(0, 99), st.integers(0, 60))),
    st.tuples(st.just("summarise"), st.tuples(st.integers(0, 99), summaries)),
    st.tuples(st.just("exclude"), periods | st.integers(0, 99)),
    st.tuples(st.just("withdraw"), st.integers(0, 9)),
    st.tuples(st.just("count"), st.integers(1, 40)),
    st.tuples(st.just("wait"), st.integers(1, 90)),
)


@dataclass
class World:
    """The runs as the database has them, and as plain rows."""

    connection: Connection
    rows: dict[str, StoredRun] = field(default_factory=dict)
    exclusions: list[tuple[int, Exclusion]] = field(default_factory=list)
    now: datetime = NOW

    def do(self, act: str, what: Any) -> None:
        getattr(self, act)(what)

    def store(self, runs: list[StoredRun]) -> None:
        store_runs(self.connection, runs)
        self.rows |= {each["run_id"]: each for each in runs}

    def correct(self, what: tuple[int, StoredRun]) -> None:
        if row := self._row(what[0]):
            self._change(row, {name: value for name, value in what[1].items() if name != "run_id"})

    def reach(self, what: tuple[int, int]) -> None:
        row = self._row(what[0])
        if row and row["target"] is not None:
            self._change(row, {"target_reached_at": row["started_at"] + what[1] * 60 * 10**9})

    def summarise(self, what: tuple[int, tuple[int, int | None, float | None]]) -> None:
        if row := self._row(what[0]):
            row["summary"] = what[1]
            values = dict(zip(("steps", "nonfinite_steps", "memory_headroom"), what[1], strict=True))
            statement = upsert(self.connection, schema.run_summary, update=values)
            self.connection.execute(statement, {"run_id": row["run_id"], **values})
            tell_changed(self.connection, [row["ended_at"]])

    def exclude(self, what: What | int) -> None:
        if isinstance(what, int):
            row = self._row(what)
            if row is None:
                return
            what = What(single_run=row["run_id"])
        number = exclude(self.connection, what, "a test", now=nanos(self.now))
        self.exclusions.append((number, Exclusion(what)))

    def withdraw(self, which: int) -> None:
        standing = [each for each in self.exclusions if not each[1].withdrawn]
        if standing:
            number, exclusion = standing[which % len(standing)]
            withdraw(self.connection, number, now=nanos(self.now))
            exclusion.withdrawn = True

    def count(self, steps: int) -> None:
        left = iter(range(steps))
        keep_counted(self.connection, INDICATORS, nanos(self.now), lambda: next(left, None) is not None)

    def wait(self, minutes: int) -> None:
        self.now += minutes * MINUTE

    def _row(self, which: int) -> StoredRun | None:
        rows = list(self.rows.values())
        return rows[which % len(rows)] if rows else None

    def _change(self, row: StoredRun, changes: dict[str, Any]) -> None:
        run_id, before = row["run_id"], row["ended_at"]
        self.connection.execute(update(schema.run).where(schema.run.c.run_id == run_id).values(changes))
        row |= changes
        tell_changed(self.connection, [before, row["ended_at"]])

    def check(self, ago: timedelta) -> None:
        exclusions = [each for _, each in self.exclusions]
        for as_of in (self.now, self.now - ago):
            for each in OBJECTIVES:
                past = as_of < self.now
                reports = evaluate_objectives(self.connection, [each], nanos(as_of), past=past)
                assert told(reports) == plainly(each, self.rows, exclusions, as_of, past=past), (each, as_of)


def unwound(database: Engine, story: Callable[[World], None]) -> None:
    """Let the story happen in a transaction that never was."""
    with database.connect() as connection, connection.begin() as transaction:
        story(World(connection))
        transaction.rollback()


def test_counts_kept_by_the_hour_are_what_a_plain_count_of_all_runs_is(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "_RUNS_AT_ONCE", 3)

    @settings(max_examples=30, deadline=None)
    @given(
        st.lists(st.sampled_from([20 * MINUTE, None]), max_size=1),
        st.lists(stored_runs, max_size=20),
        st.lists(acts, max_size=12),
        st.integers(0, 3 * 24 * 60),
    )
    def check(
        pinned: list[timedelta | None],
        before: list[StoredRun],
        story: list[tuple[str, Any]],
        minutes_ago: int,
    ) -> None:
        def happens(world: World) -> None:
            world.store([run(run_id="pinned", reached=reached, started=NOW - DAY) for reached in pinned])
            world.store(before)
            world.count(20)
            for act, what in story:
                world.do(act, what)
                world.check(minutes_ago * MINUTE)

        unwound(database, happens)

    check()


def test_where_a_window_begins_and_ends_within_an_hour_the_rest_of_the_hour_does_not_count(
    database: Engine,
) -> None:
    every_quarter = [run(started=NOW - quarter * HOUR / 4, lasted=timedelta(0)) for quarter in range(9 * 96)]

    def happens(world: World) -> None:
        world.store(every_quarter)
        count_until_settled(world.connection, NOW)
        for minutes in range(0, 75, 5):
            world.check(minutes * MINUTE)

    unwound(database, happens)


def count_until_settled(connection: Connection, now: datetime) -> None:
    """Hours that changed are counted some at a time."""
    for _ in range(200):
        if keep_counted(connection, INDICATORS, nanos(now)):
            return
    raise AssertionError("it never settled")


def test_what_was_counted_is_not_read_from_the_runs_again(
    database: Engine,
) -> None:
    old = [run(started=NOW - days * DAY, lasted=HOUR) for days in range(1, 40)]
    with database.begin() as connection:
        store_runs(connection, old)
        count_until_settled(connection, NOW)
        connection.execute(schema.run.delete())
        (report,) = evaluate_objectives(connection, OBJECTIVES[:1], nanos(NOW))
        assert report.good == 7
        assert load_changed(connection) == []


def test_what_changes_in_an_hour_is_read_from_the_runs_until_it_is_counted_again(database: Engine) -> None:
    failed = run(Status.FAILED, started=NOW - 2 * DAY)
    with database.begin() as connection:
        store_runs(connection, [failed])
        count_until_settled(connection, NOW)
        connection.execute(update(schema.run).values(status=Status.SUCCEEDED))
        (report,) = evaluate_objectives(connection, OBJECTIVES[:1], nanos(NOW))
        assert (report.good, report.bad) == (0, 1)  # nobody told
        tell_changed(connection, [failed["ended_at"]])
        (report,) = evaluate_objectives(connection, OBJECTIVES[:1], nanos(NOW))
        assert (report.good, report.bad) == (1, 0)
        assert len(load_changed(connection)) == 1
        keep_counted(connection, INDICATORS, nanos(NOW))
        assert load_changed(connection) == []
        (report,) = evaluate_objectives(connection, OBJECTIVES[:1], nanos(NOW))
        assert (report.good, report.bad) == (1, 0)


def test_the_past_is_counted_little_by_little_while_it_may_go_on(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "_RUNS_AT_ONCE", 2)
    with database.begin() as connection:
        store_runs(connection, [run(started=NOW - days * DAY, lasted=HOUR) for days in range(1, 40)])
        for _ in range(20):
            assert not keep_counted(connection, INDICATORS, nanos(NOW), iter([True, True, False]).__next__)
        count_until_settled(connection, NOW)


def test_a_clock_that_is_set_back_leaves_counts_as_they_are(database: Engine) -> None:
    with database.begin() as connection:
        store_runs(connection, [run(started=NOW - hours * HOUR, lasted=MINUTE) for hours in range(1, 5)])
        for minutes in (-55, 5, -25, 5, 65):
            assert keep_counted(connection, INDICATORS, nanos(NOW + minutes * MINUTE))
            (report,) = evaluate_objectives(connection, OBJECTIVES[:1], nanos(NOW + minutes * MINUTE))
            assert report.good == 4


def test_a_run_that_ends_while_its_period_is_being_excluded_is_excluded(database: Engine) -> None:
    late = run(Status.FAILED, started=NOW - 5 * HOUR)
    outage = What(start=nanos(NOW - 6 * HOUR), end=nanos(NOW - 2 * HOUR))
    with transaction(database) as connection:
        store_runs(connection, [run(started=NOW - 2 * DAY)])
        count_until_settled(connection, NOW)

    def end() -> None:
        with transaction(database) as connection:
            take_turns(connection, [late["run_id"]])
            store_runs(connection, [late])

    with ThreadPoolExecutor(1) as pool:
        with transaction(database) as connection:
            exclude(connection, outage, "a known outage", now=nanos(NOW))
            ending = pool.submit(end)
            with pytest.raises(TimeoutError):
                ending.result(0.3)
        ending.result(60)
    with transaction(database) as connection:
        count_until_settled(connection, NOW)
        (report,) = evaluate_objectives(connection, OBJECTIVES[:1], nanos(NOW))
    assert (report.good, report.bad) == (1, 0)


def test_what_is_held_against_a_pinned_run_is_counted_anew_once_that_changes(database: Engine) -> None:
    pinned = run(run_id="pinned", reached=20 * MINUTE, started=NOW - 60 * DAY)
    with database.begin() as connection:
        store_runs(connection, [pinned, *(run(reached=25 * MINUTE, started=NOW - DAY) for _ in range(3))])
        count_until_settled(connection, NOW)
        by_week = evaluate_objectives(connection, OBJECTIVES[-1:], nanos(NOW))
        assert [(each.good, each.bad) for each in by_week] == [(3, 0)]
        tallies = Tallies(connection)
        assert tallies.key(INDICATORS[-1]) in load_kept(connection)
        reached_at = pinned["started_at"] + 10 * 60 * 10**9
        of_pinned = schema.run.c.run_id == "pinned"
        connection.execute(update(schema.run).where(of_pinned).values(target_reached_at=reached_at))
        for _ in range(2):
            by_week = evaluate_objectives(connection, OBJECTIVES[-1:], nanos(NOW))
            assert [(each.good, each.bad) for each in by_week] == [(0, 3)]
            count_until_settled(connection, NOW)
        assert set(load_kept(connection)) == set(map(Tallies(connection).key, INDICATORS))


def test_what_is_asked_for_no_more_is_forgotten(database: Engine) -> None:
    with database.begin() as connection:
        store_runs(connection, [run(started=NOW - DAY)])
        count_until_settled(connection, NOW)
        keep_counted(connection, INDICATORS[:1], nanos(NOW))
        assert set(load_kept(connection)) == {Tallies(connection).key(INDICATORS[0])}
        counts = schema.slo_count.c
        assert connection.scalar(select(func.count(counts.indicator_id.distinct()))) == 1


def test_an_hour_is_counted_only_once_it_has_been_over_for_two_minutes(database: Engine) -> None:
    ended = NOW.replace(hour=11, minute=30)
    with database.begin() as connection:
        store_runs(connection, [run(started=ended - HOUR, lasted=HOUR)])

        def counted(now: datetime) -> int:
            count_until_settled(connection, now)
            return connection.scalar(select(func.count()).select_from(schema.slo_count)) or 0

        assert counted(NOW + 119 * timedelta(seconds=1)) == 0
        assert counted(NOW + 120 * timedelta(seconds=1)) > 0
