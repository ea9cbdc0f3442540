"""Windows and moments as a person names them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch_slo.periods import MOMENT, moment_before, read_moment, read_window, read_zone
from gradwatch_slo.windows import Window

BERLIN = ZoneInfo("Europe/Berlin")
NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def looked_at(text: str, zone: tzinfo = UTC, as_of: datetime = NOW) -> tuple[Window, datetime]:
    chosen = read_window(text, zone)
    at = chosen.judged_at(as_of)
    return chosen.window.at(at), at


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("2025", "2025-01-01", "2026-01-01"),
        ("2026-Q3", "2026-07-01", "2026-10-01"),
        ("2026-10", "2026-10-01", "2026-11-01"),
        ("2024-02", "2024-02-01", "2024-03-01"),
        ("2026-10-05", "2026-10-05", "2026-10-06"),
    ],
)
def test_a_period_that_is_over_is_looked_at_in_its_last_moment(text: str, start: str, end: str) -> None:
    window, at = looked_at(text)
    assert (window.start, window.end, window.rolling) == (utc(start), utc(end), False)
    assert at == utc(end) - MOMENT


def test_a_period_that_goes_on_is_looked_at_now() -> None:
    window, at = looked_at("2026-Q4")
    assert (window.start, window.end, at) == (utc("2026-10-01"), utc("2027-01-01"), NOW)


def test_a_period_belongs_to_its_time_zone_and_clocks_change_in_it() -> None:
    month, _ = looked_at("2026-10", BERLIN)
    assert (month.start, month.end) == (utc("2026-09-30 22:00"), utc("2026-10-31 23:00"))
    day, _ = looked_at("2026-10-25", BERLIN)
    assert day.end - day.start == timedelta(hours=25)


def test_a_duration_is_a_rolling_window_that_ends_at_the_moment_of_the_report() -> None:
    window, at = looked_at("7d")
    assert (window.start, window.end, window.rolling, at) == (NOW - timedelta(days=7), NOW, True, NOW)


@pytest.mark.parametrize(
    "text",
    ["", "2026-13", "2026-00", "2026-Q5", "2026-02-30", "26-10", "october", "7", "1969", "2026-10-", "0d"],
)
def test_what_is_no_window_is_refused_with_what_is_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a duration such as 7d, or a period such as 2026, 2026-Q4,"):
        read_window(text, UTC)


def test_a_period_that_has_not_begun_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one that has begun"):
        looked_at("2026-12")
    assert looked_at("2026-12", as_of=utc("2026-12-01"))[1] == utc("2026-12-01")


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2026-10-05", "2026-10-05 21:59:59.999999"),  # its end in Berlin
        ("2026-10-05T12:00:00Z", "2026-10-05 12:00"),
        ("2026-10-05t12:00:00.5+02:00", "2026-10-05 10:00:00.5"),
        ("2026-11-29", "2026-11-29 12:00"),  # today: now
    ],
)
def test_a_moment_is_rfc_3339_or_the_end_of_a_day(text: str, at: str) -> None:
    assert read_moment(text, BERLIN, NOW) == utc(at)


@pytest.mark.parametrize(
    "text",
    ["", "yesterday", "2026-10", "20261005", "2026-02-30", "2026-10-05T12:00:00", "2026-10-05T25:00:00Z",
     "1900-01-01", "2026-W40-1"],
)  # fmt: skip
def test_what_is_no_moment_is_refused_with_what_is_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a date or a moment with its zone, such as 2026-10-05 or"):
        read_moment(text, UTC, NOW)


@pytest.mark.parametrize("text", ["2026-11-30", "2026-11-29T12:00:01Z"])
def test_the_future_is_no_moment_that_has_been(text: str) -> None:
    with pytest.raises(ValueError, match="still to come"):
        read_moment(text, UTC, NOW)


@pytest.mark.parametrize("name", ["Europe/Berlim", "", "..", "/etc/passwd", "Europe"])
def test_what_is_no_time_zone_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected an IANA time zone such as UTC or Europe/Berlin"):
        read_zone(name)
    assert read_zone("Europe/Berlin") == BERLIN


@given(
    st.sampled_from(["2026-10", "2025-Q4", "2026", "2026-03-30", "7d", "1M", "36h"]),
    st.sampled_from([ZoneInfo("UTC"), BERLIN, ZoneInfo("Pacific/Apia")]),
)
def test_the_window_before_ends_where_a_window_begins(text: str, zone: ZoneInfo) -> None:
    window, _ = looked_at(text, zone)
    before = read_window(text, zone).window.at(moment_before(window))
    assert before.start < before.end <= window.start
    assert window.start - before.end <= MOMENT
