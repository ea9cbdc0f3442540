"""Slices of time, on real databases: by a plain count of the same runs, in zones whose clocks change."""

from __future__ import annotations

from calendar import monthrange
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import count, pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from gradwatch_collector.objectives.counters import keep_counted
from gradwatch_collector.objectives.evaluation import evaluate_objectives
from gradwatch_collector.objectives.indicator import Indicator
from gradwatch_collector.runs.facts import nanos
from gradwatch_slo.counts import Counts
from gradwatch_slo.durations import Duration
from gradwatch_slo.indicators import Selection, SuccessRate
from gradwatch_slo.objective import Objective
from gradwatch_slo.report import ObjectiveReport, to_json
from gradwatch_slo.runs import Status
from gradwatch_slo.slices import Slicing
from gradwatch_slo.windows import TimeWindow
from tests.stored_runs import DAY, HOUR, MINUTE, NOW, StoredRun, run, store_runs

GOOD_ENOUGH = Decimal("0.5")
MOMENT = timedelta(microseconds=1)


def objective(window: TimeWindow, slicing: Slicing, target: str = "0.9") -> Objective:
    return Objective(
        name="an-objective",
        indicator="an-indicator",
        target=Decimal(target),
        window=window,
        measure=SuccessRate(),
        selection=Selection(),
        slicing=slicing,
    )


def ended(at: datetime, *, failed: bool = False) -> StoredRun:
    return run(Status.FAILED if failed else Status.SUCCEEDED, started=at - MINUTE, lasted=MINUTE)


def report(database: Engine, runs: Sequence[StoredRun], each: Objective, as_of: datetime) -> ObjectiveReport:
    with database.begin() as connection:
        store_runs(connection, runs)
        (only,) = evaluate_objectives(connection, [each], nanos(as_of))
    return only


@pytest.mark.parametrize(
    ("zone", "start"),
    [
        ("America/Santiago", datetime(2026, 9, 6)),
        ("Africa/Cairo", datetime(2026, 4, 24)),
        ("America/Havana", datetime(2026, 3, 8)),
        ("Europe/Berlin", datetime(2026, 3, 29, 2, 30)),
    ],
)
def test_the_last_day_of_a_week_whose_first_hour_was_skipped_is_judged(
    database: Engine, zone: str, start: datetime
) -> None:
    of_zone = ZoneInfo(zone)
    mornings = [(start + day * DAY).replace(hour=10, tzinfo=of_zone).astimezone(UTC) for day in range(7)]
    runs = [ended(morning, failed=morning == mornings[-1]) for morning in mornings]
    weekly = TimeWindow(Duration(1, "w"), (start - 8 * 7 * DAY).replace(tzinfo=of_zone))
    end = (start + 7 * DAY).replace(tzinfo=of_zone).astimezone(UTC)
    found = report(database, runs, objective(weekly, Slicing(Duration(1, "d"), GOOD_ENOUGH)), end - MOMENT)
    assert (found.good, found.bad) == (6, 1)


def test_days_that_end_within_an_hour_are_told_apart(database: Engine) -> None:
    # Clocks of Lord Howe go on by half an hour: before that its days begin at 13:30 UTC, then at 13:00.
    monthly = TimeWindow(Duration(1, "M"), datetime(2026, 10, 1, tzinfo=ZoneInfo("Australia/Lord_Howe")))
    midnight = datetime(2026, 10, 10, 13, tzinfo=UTC)
    runs = [ended(midnight - MINUTE, failed=True), ended(midnight + MINUTE)]
    daily = objective(monthly, Slicing(Duration(1, "d"), GOOD_ENOUGH))
    found = report(database, runs, daily, datetime(2026, 10, 20, tzinfo=UTC))
    assert (found.good, found.bad) == (1, 1)


def test_a_day_that_a_zone_skipped_is_no_slice(database: Engine) -> None:
    # Samoa went from 29 to 31 December 2011.
    weekly = TimeWindow(Duration(1, "w"), datetime(2011, 12, 30, tzinfo=ZoneInfo("Pacific/Apia")))
    daily, skipped = objective(weekly, Slicing(Duration(1, "d"))), datetime(2011, 12, 30, 10, tzinfo=UTC)
    assert report(database, [ended(skipped)], daily, skipped).total == 0
    assert report(database, [], daily, skipped + DAY).total == 1


def test_days_with_one_failure_each_are_judged_by_all_their_runs(database: Engine) -> None:
    runs = [ended(NOW - day * DAY - 3 * HOUR, failed=number == 0) for day in range(28) for number in range(30)]
    rolling = TimeWindow(Duration(4, "w"))
    found = report(database, runs, objective(rolling, Slicing(Duration(1, "d")), "0.99"), NOW)
    # The first and the last day are cut.
    printed = to_json(found)
    assert (printed["total"], printed["bad"], printed["sli"]) == (27, 27 / 30, 29 / 30)
    assert (printed["good"], found.events) == (27 - 27 / 30, Counts(27 * 29, 27))
    assert printed["verdict"] == "breached"
    assert found.alerting


# --- The same by a plain count ---

# Around days on which clocks of the zone change.
ZONES = {
    "America/Santiago": (datetime(2026, 4, 5), datetime(2026, 9, 6)),
    "Europe/Berlin": (datetime(2026, 3, 29), datetime(2026, 10, 25)),
    "Australia/Lord_Howe": (datetime(2026, 4, 5), datetime(2026, 10, 4)),
    "Africa/Cairo": (datetime(2026, 4, 24), datetime(2026, 10, 30)),
    "UTC": (datetime(2026, 3, 1),),
}
MONTHS = {"M": 1, "Q": 3}
LENGTHS = {"m": MINUTE, "h": HOUR, "d": DAY, "w": 7 * DAY}


@dataclass(frozen=True)
class Case:
    """``start``: of the calendar, on the wall of its zone; None for a rolling window."""

    zone: str
    start: datetime | None
    window: str
    length: str
    as_of: datetime
    runs: tuple[tuple[datetime, bool], ...]


def later(start: datetime, length: Duration, times: int, months: int = 0) -> datetime:
    """What a clock on the wall shows so many lengths, and whole months before them, later."""
    if length.unit in MONTHS:
        months, times = months + times * length.count * MONTHS[length.unit], 0
    years, month = divmod(start.month - 1 + months, 12)
    last = monthrange(start.year + years, month + 1)[1]
    moved = start.replace(year=start.year + years, month=month + 1, day=min(start.day, last))
    return moved + times * length.count * LENGTHS.get(length.unit, DAY)


def bounds(case: Case) -> Iterator[datetime]:
    """Where slices of the window begin that contains the moment, without an end; in order."""
    zone, window, length = ZoneInfo(case.zone), Duration.parse(case.window), Duration.parse(case.length)
    if case.start is None:
        size = length.count * LENGTHS[length.unit]
        passed = case.as_of - window.count * LENGTHS[window.unit] - datetime(1970, 1, 1, tzinfo=UTC)
        for number in count(-(-passed // size)):
            yield datetime(1970, 1, 1, tzinfo=UTC) + number * size
    assert case.start is not None

    def moment(wall: datetime) -> datetime:
        return wall.replace(tzinfo=zone).astimezone(UTC)

    if window.unit in "mh":
        size = window.count * LENGTHS[window.unit]
        begin = moment(case.start) + (case.as_of - moment(case.start)) // size * size
        number, wall = 0, begin.astimezone(zone).replace(tzinfo=None)
    else:
        number = next(n for n in count(-400) if moment(later(case.start, window, n + 1)) > case.as_of)
        wall = later(case.start, window, number)
        begin = moment(wall)
    yield begin
    for place in count(1):
        if length.unit in "mh":
            yield begin + place * length.count * LENGTHS[length.unit]
        elif length.unit in MONTHS and window.unit in MONTHS:
            ahead = number * window.count * MONTHS[window.unit]
            yield moment(later(case.start, length, place, ahead))
        else:
            yield moment(later(wall, length, place))


def end_of(case: Case) -> datetime:
    if case.start is None:
        return case.as_of + MOMENT
    whole = Case(case.zone, case.start, case.window, case.window, case.as_of, ())
    begins = bounds(whole)
    next(begins)
    return min(next(begins), case.as_of + MOMENT)


def recounted(case: Case) -> list[Counts]:
    """Good and bad runs of each slice that is over and in which any ended."""
    found = []
    end = end_of(case)
    for begin, following in pairwise(bounds(case)):
        if following > end:
            return [each for each in found if each.total]
        within = [failed for at, failed in case.runs if begin <= at < following]
        found.append(Counts(within.count(False), within.count(True)))
    raise AssertionError("bounds end")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    zone = draw(st.sampled_from(list(ZONES)))
    centre = draw(st.sampled_from(ZONES[zone]))
    is_rolling = draw(st.booleans())
    start = None
    if not is_rolling:
        day = draw(st.one_of(st.integers(-8, 8), st.just((datetime(2026, 1, 31) - centre).days)))
        clock = draw(st.sampled_from([0, 30, 120, 150, 23 * 60]))
        start = centre + day * DAY + clock * MINUTE
    as_of = (
        centre.replace(tzinfo=UTC)
        + draw(st.integers(-48, 240)) * HOUR
        + draw(st.sampled_from([0, 29])) * MINUTE
    )
    quarters = st.integers(-5 * 96, 5 * 96).map(lambda number: number * 15 * MINUTE)
    moments = st.one_of(quarters, st.integers(-60, 5).map(lambda days: days * DAY)).map(lambda by: as_of + by)
    return Case(
        zone,
        start,
        draw(st.sampled_from(["2d", "36h", "1w", "4w"] if is_rolling else ["1d", "36h", "1w", "1M", "1Q"])),
        draw(st.sampled_from(["15m", "1h", "90m", "1d", "2d", "1w"] + ([] if is_rolling else ["1M", "2M"]))),
        as_of,
        tuple(draw(st.lists(st.tuples(moments, st.booleans()), max_size=15))),
    )


SATURDAY = datetime(2026, 9, 12, 13, tzinfo=UTC)
QUARTER = Case(
    "UTC",
    datetime(2026, 1, 31),
    "1Q",
    "1M",
    datetime(2026, 7, 30, 23, 59, 59, 999_999, tzinfo=UTC),
    ((datetime(2026, 7, 30, 12, tzinfo=UTC), True),),
)


@pytest.mark.parametrize("is_kept", [False, True])
def test_any_slices_are_judged_as_a_plain_count_of_their_runs_says(database: Engine, is_kept: bool) -> None:
    @settings(max_examples=100, deadline=None)
    @given(cases())
    @example(Case("America/Santiago", datetime(2026, 1, 4), "1w", "1d", SATURDAY, ((SATURDAY - DAY, True),)))
    @example(QUARTER)
    def check(case: Case) -> None:
        start = None if case.start is None else case.start.replace(tzinfo=ZoneInfo(case.zone))
        window, length = TimeWindow(Duration.parse(case.window), start), Duration.parse(case.length)
        each, in_part = (objective(window, Slicing(length, target)) for target in (GOOD_ENOUGH, None))
        with database.connect() as connection, connection.begin() as begun:
            store_runs(connection, [ended(at, failed=failed) for at, failed in case.runs])
            while is_kept and not keep_counted(connection, [Indicator.of(each)], nanos(case.as_of)):
                pass
            whole, partly = evaluate_objectives(connection, [each, in_part], nanos(case.as_of))
            begun.rollback()
        expected = recounted(case)
        good = sum(2 * counts.good >= counts.total for counts in expected)
        assert (whole.good, whole.bad) == (good, len(expected) - good)
        lost = sum((Fraction(counts.bad, counts.total) for counts in expected), Fraction())
        assert (partly.bad, partly.total) == (lost, len(expected))
        assert partly.events == sum(expected, Counts())

    check()
