from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gradwatch_slo.durations import Duration, parse_length
from gradwatch_slo.windows import TimeWindow

DAY = timedelta(days=1)
moments = st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))
durations = st.builds(Duration, st.integers(1, 40), st.sampled_from("mhdwMQY"))


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize("text", ["1m", "12h", "28d", "4w", "1M", "1Q", "1Y"])
def test_a_duration_reads_as_it_is_written(text: str) -> None:
    assert str(Duration.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "28", "d", "0d", "-1d", "1.5d", "1 d", "1s", "1D", "1d2h", "٣d", "101Y", "9" * 30 + "d"]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a duration"):
        Duration.parse(text)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("0s", timedelta(0)),
        ("60s", timedelta(seconds=60)),
        ("2h", timedelta(hours=2)),
        ("3155760000s", timedelta(days=36525)),
    ],
)
def test_lengths_of_time_know_seconds_and_zero(text: str, length: timedelta) -> None:
    assert parse_length(text) == length


@pytest.mark.parametrize(
    "text", ["1M", "60", "s", "-1s", "1e3s", "36526d", "3155760001s", "9" * 99 + "s", "999999999w"]
)
def test_what_is_no_length_of_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a length of time"):
        parse_length(text)


@pytest.mark.parametrize(
    ("duration", "start"),
    [
        ("28d", "2026-03-03 12:00"),
        ("1M", "2026-02-28 12:00"),
        ("1Q", "2025-12-31 12:00"),
        ("1Y", "2025-03-31 12:00"),
    ],
)
def test_a_rolling_window_reaches_back_from_the_moment(duration: str, start: str) -> None:
    window = TimeWindow(Duration.parse(duration)).at(utc("2026-03-31 12:00"))
    assert (window.start, window.end, window.rolling) == (utc(start), utc("2026-03-31 12:00"), True)


@pytest.mark.parametrize(
    ("duration", "anchor", "start", "end"),
    [
        ("1M", "2026-01-01", "2026-03-01", "2026-04-01"),
        ("1Q", "2020-01-01", "2026-01-01", "2026-04-01"),
        ("1w", "2026-01-05", "2026-03-30", "2026-04-06"),
        # The last day of the month stays the last day: it does not wander to the 28th.
        ("1M", "2026-01-31", "2026-03-31", "2026-04-30"),
        ("1Y", "2024-02-29", "2026-02-28", "2027-02-28"),
        ("1d", "2030-06-01", "2026-03-31", "2026-04-01"),
    ],
)
def test_a_calendar_window_contains_the_moment(duration: str, anchor: str, start: str, end: str) -> None:
    window = TimeWindow(Duration.parse(duration), utc(anchor)).at(utc("2026-03-31 12:00"))
    assert (window.start, window.end, window.rolling) == (utc(start), utc(end), False)


@given(durations, moments, moments)
def test_calendar_windows_follow_each_other_without_a_gap(
    duration: Duration, anchor: datetime, moment: datetime
) -> None:
    rule = TimeWindow(duration, anchor)
    window = rule.at(moment)
    assert window.start <= moment < window.end
    assert rule.at(window.end).start == window.end


@pytest.mark.parametrize(
    ("duration", "zone", "moment", "start", "end"),
    [
        # Clocks go from 2 to 3 on 2026-03-29 and from 3 to 2 on 2026-10-25.
        ("1d", "Europe/Berlin", "2026-03-29 12:00", "2026-03-28 23:00", "2026-03-29 22:00"),
        ("1d", "Europe/Berlin", "2026-10-25 12:00", "2026-10-24 22:00", "2026-10-25 23:00"),
        ("1M", "Europe/Berlin", "2026-03-15 12:00", "2026-02-28 23:00", "2026-03-31 22:00"),
        ("1M", "Asia/Kathmandu", "2026-03-31 18:14", "2026-02-28 18:15", "2026-03-31 18:15"),
        ("1w", "America/New_York", "2026-03-09 12:00", "2026-03-09 04:00", "2026-03-16 04:00"),
        ("12h", "Europe/Berlin", "2026-03-29 12:00", "2026-03-29 11:00", "2026-03-29 23:00"),
    ],
)
def test_a_calendar_window_begins_when_the_clocks_of_its_zone_say_so(
    duration: str, zone: str, moment: str, start: str, end: str
) -> None:
    anchor = datetime(2026, 1, 5 if duration == "1w" else 1, tzinfo=ZoneInfo(zone))
    window = TimeWindow(Duration.parse(duration), anchor).at(utc(moment))
    assert (window.start, window.end) == (utc(start), utc(end))


@given(
    durations,
    st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1)),
    # Half an hour of summer time; a whole day that was skipped; clocks that change at midnight.
    st.sampled_from(
        ["Europe/Berlin", "Australia/Lord_Howe", "Pacific/Apia", "America/Havana", "Asia/Kathmandu"]
    ),
    moments,
)
@example(Duration(1, "d"), datetime(2011, 1, 1), "Pacific/Apia", utc("2011-12-30 09:59"))
@example(Duration(1, "d"), datetime(2011, 1, 1), "Pacific/Apia", utc("2011-12-30 10:00"))
@example(Duration(1, "d"), datetime(2026, 1, 1, 2, 30), "Europe/Berlin", utc("2026-10-25 01:10"))
# Clocks show 3:10 and skipped 2:30: the day begins at 3:30.
@example(Duration(1, "d"), datetime(2026, 1, 1, 2, 30), "Europe/Berlin", utc("2026-03-29 01:10"))
def test_windows_of_a_time_zone_follow_each_other_without_a_gap(
    duration: Duration, start: datetime, zone: str, moment: datetime
) -> None:
    rule = TimeWindow(duration, start.replace(tzinfo=ZoneInfo(zone)))
    window = rule.at(moment)
    assert window.start <= moment < window.end
    assert rule.at(window.end).start == window.end
    assert rule.at(window.start) == window
    clock, before = (at.astimezone(rule.calendar_start.tzinfo) for at in (window.start, window.start - 2 * DAY))
    if not duration.is_exact and clock.time() != start.time():
        assert clock.utcoffset() > before.utcoffset()  # it would have come within what was skipped


@given(durations, moments)
def test_a_rolling_window_ends_at_the_moment(duration: Duration, moment: datetime) -> None:
    window = TimeWindow(duration).at(moment)
    assert window.rolling
    assert window.start < window.end == moment
