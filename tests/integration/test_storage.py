"""What was sent is read back exactly, on every database: each sample once, whatever was sent twice or late."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, func, select, text

from gradwatch import conventions as c
from gradwatch_collector.records import (
    Batch,
    EventRecord,
    Frame,
    MetricIdentity,
    ProcessKey,
    Received,
    Source,
    SpanRecord,
)
from gradwatch_collector.storage import compaction, packed, schema, segments
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage.compaction import compact
from gradwatch_collector.storage.database import of_one_moment, transaction
from gradwatch_collector.storage.reading import PointSeries, read_series
from gradwatch_collector.storage.series import MAX_SETS, SeriesIds, attribute_set
from gradwatch_collector.storage.writing import store

SECOND = 1_000_000_000
DAY = 86_400 * SECOND
START = 1_750_000_000 * SECOND
LATER = START + 100 * DAY
NORM = MetricIdentity("norm", "{norm}", "gauge")
KEY = ProcessKey("run", 1, 0, "one")


def layers(*names: str) -> list[Mapping[str, Any]]:
    return [{c.LAYER_NAME: name} for name in names]


def frame(points: Sequence[Mapping[str, Any]], times: Sequence[int], values: Any, **changes: Any) -> Frame:
    settings = {"metric": NORM, "field": "value", "packed": None} | changes
    return Frame(
        attribute_set=attribute_set(list(points)),
        times=np.array(times, np.int64) * SECOND + START,
        values=None if values is None else np.array(values).reshape(len(points), len(times)),
        **settings,
    )


def received(*frames: Frame, key: ProcessKey = KEY, events: Any = (), spans: Any = ()) -> Received:
    source = Source(key.run_id, key.attempt, key.rank, key.instance, {})
    return Received(key, Batch(source, frames, events, spans), START)


def write(database: Engine, *frames: Frame, series: SeriesIds | None = None) -> None:
    with transaction(database) as connection:
        store(connection, series or SeriesIds(), [received(*frames)])


def read(database: Engine, **selection: Any) -> list[PointSeries]:
    with database.connect() as connection:
        return read_series(connection, "run", "norm", **selection)


def contents(found: Iterable[PointSeries]) -> dict[str, dict[int, float]]:
    """Value by second, by layer."""
    return {
        point.attributes.get(c.LAYER_NAME, ""): {
            (time - START) // SECOND: value
            for time, value in zip(point.times.tolist(), np.asarray(point.values).tolist(), strict=True)
        }
        for point in found
    }


def compact_all(database: Engine, now: int = LATER, **limits: int) -> None:
    more = True
    while more:
        with transaction(database) as connection:
            more = compact(connection, now, **limits).more


def rows(database: Engine, table: Any) -> int:
    with database.connect() as connection:
        return connection.scalar(select(func.count()).select_from(table)) or 0


class CutOffError(Exception):
    """The process died before the commit."""


def cut_off(database: Engine, work: Callable[[Connection], object]) -> None:
    with transaction(database) as connection:
        work(connection)
        raise CutOffError


EXTREMES = [np.nan, np.inf, -np.inf, -0.0, 5e-324, 0.1, 1e300, 2.0**-149]


@pytest.mark.parametrize("compacted", [False, True])
def test_every_number_comes_back_as_it_was_sent(database: Engine, compacted: bool) -> None:
    write(database, frame([{}], range(len(EXTREMES)), EXTREMES))
    if compacted:
        compact_all(database)
        assert (rows(database, schema.frame), rows(database, schema.block)) == (0, 1)
    (point,) = read(database)
    np.testing.assert_array_equal(point.values, EXTREMES)
    assert np.signbit(np.asarray(point.values)[3])


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize(
    ("sent", "kept"), [([2**63 - 1, -(2**63)], np.int64), ([0.5, 0.25], np.float32), ([0.1, 0.2], np.float64)]
)
def test_values_keep_the_narrowest_type_that_holds_them(
    database: Engine, sent: list[float], kept: type, compacted: bool
) -> None:
    write(database, frame([{}], [0, 1], sent))
    if compacted:
        compact_all(database)
    (point,) = read(database)
    assert point.values is not None
    assert point.values.dtype == kept
    assert point.values.tolist() == sent


def test_a_resent_batch_is_stored_once(database: Engine) -> None:
    sent = frame(layers("a", "b"), [0], [1.0, 2.0]), frame([{}], [3, 4], [3.0, 4.0])
    write(database, *sent)
    write(database, *sent)
    assert rows(database, schema.frame) == 2
    assert contents(read(database)) == {"a": {0: 1.0}, "b": {0: 2.0}, "": {3: 3.0, 4: 4.0}}


@pytest.mark.parametrize("until", [None, START + 640 * SECOND])
def test_the_newest_times_are_read_without_the_older_ones(database: Engine, until: int | None) -> None:
    times = range(1_000)
    write(database, frame(layers("a", "b"), times, [times, times]))
    compact_all(database)
    write(database, *(frame(layers("a", "b"), [time], [time, time]) for time in range(1_000, 1_010)))
    block = schema.block.c
    with transaction(database) as connection:
        first = connection.scalar(select(func.min(block.time)))
        # Nobody can read this block: whoever tries fails.
        connection.execute(schema.block.update().where(block.time == first).values(f32=None, i64=None))
    with pytest.raises(ValueError, match="no payload"):
        read(database)
    last = 1_009 if until is None else 640
    for newest in (1, 5, 20):
        kept = {second: float(second) for second in range(last - newest + 1, last + 1)}
        assert contents(read(database, newest=newest, until=until)) == {"a": kept, "b": kept}


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=150, unique=True), min_size=1, max_size=4),
    st.sets(st.integers(0, 3)),
    st.integers(1, 50),
    st.integers(0, 420),
)
def test_the_newest_times_are_the_newest_of_all(
    database: Engine, sent: list[list[int]], compacted: set[int], newest: int, until: int
) -> None:
    with transaction(database) as connection:
        for table in (schema.frame, schema.block):
            connection.execute(table.delete())
    for turn, times in enumerate(sent):
        # Now integers, now floats, in frames of one time and of many.
        kind = int if turn % 2 else float
        for part in np.array_split(sorted(times), 3):
            if len(part):
                write(database, frame([{}], part.tolist(), [kind(time) for time in part]))
        if turn in compacted:
            compact_all(database)
    high = START + until * SECOND
    every = contents(read(database, until=high)).get("", {})
    kept = dict(sorted(every.items())[-newest:])
    assert contents(read(database, until=high, newest=newest)).get("", {}) == kept


def test_a_resend_that_is_cut_differently_loses_nothing(database: Engine) -> None:
    write(database, frame([{}], [1, 2, 3], [1.0, 2.0, 3.0]))
    write(database, frame([{}], [1, 2, 3, 4, 5], [1.0, 2.0, 3.0, 4.0, 5.0]))
    write(database, frame([{}], [4, 6], [4.0, 6.0]))
    assert contents(read(database)) == {"": {n: float(n) for n in (1, 2, 3, 4, 5, 6)}}


def test_both_halves_of_a_split_batch_survive(database: Engine) -> None:
    write(database, frame(layers("a", "b"), [0], [1.0, 2.0]))
    write(database, frame(layers("c", "d"), [0], [3.0, 4.0]))
    write(database, frame(layers("a", "b", "c", "d"), [0, 1], [[1.0, 5], [2.0, 6], [3.0, 7], [4.0, 8]]))
    assert contents(read(database)) == {
        "a": {0: 1.0, 1: 5.0},
        "b": {0: 2.0, 1: 6.0},
        "c": {0: 3.0, 1: 7.0},
        "d": {0: 4.0, 1: 8.0},
    }


def test_sets_that_keep_growing_fall_back_to_one_series_a_point(database: Engine) -> None:
    series = SeriesIds()
    for step in range(2 * MAX_SETS):
        names = [f"layer{n}" for n in range(step + 2)]
        values = [float(n) for n in range(step + 2)]
        write(database, frame(layers(*names), [step], values), series=series)
    found = contents(read(database))
    assert len(found) == 2 * MAX_SETS + 1
    assert found["layer0"] == dict.fromkeys(range(2 * MAX_SETS), 0.0)
    with database.connect() as connection:
        widths = list(connection.scalars(select(schema.attribute_set.c.width)))
    assert sum(width > 1 for width in widths) == MAX_SETS


def test_packed_fields_are_read_by_point_and_survive_compaction(database: Engine) -> None:
    points = layers("a", "b")
    for second in range(3):
        at = (packed.join([b"a%d" % second, b"b%d" % second * 200]),)
        write(database, frame(points, [second], None, field="buckets", packed=at))
    before = read(database, field="buckets")
    compact_all(database)
    assert rows(database, schema.frame) == 0
    for found in (before, read(database, field="buckets")):
        assert [point.packed for point in found] == [
            (b"a0", b"a1", b"a2"),
            (b"b0" * 200, b"b1" * 200, b"b2" * 200),
        ]


def test_reading_selects_by_time_attributes_rank_and_attempt(database: Engine) -> None:
    write(database, frame(layers("a", "b"), range(10), np.arange(20.0)))
    with transaction(database) as connection:
        other = ProcessKey("run", 2, 1, "two")
        store(connection, SeriesIds(), [received(frame(layers("a"), [0], [7.0]), key=other)])
    for _ in range(2):
        selected = read(
            database,
            attributes={c.LAYER_NAME: "b"},
            since=START + 3 * SECOND,
            until=START + 5 * SECOND,
        )
        assert contents(selected) == {"b": {3: 13.0, 4: 14.0, 5: 15.0}}
        assert contents(read(database, rank=1)) == contents(read(database, attempt=2)) == {"a": {0: 7.0}}
        compact_all(database)


def test_frames_become_blocks_of_64_to_256_times_once_there_are_enough(database: Engine) -> None:
    series = SeriesIds()
    for second in range(compaction._READY_FRAMES - 1):
        write(database, frame([{}], [second], [float(second)]), series=series)
    compact_all(database, now=START)
    assert rows(database, schema.block) == 0
    write(database, frame([{}], range(1000, 1600), np.arange(1000.0, 1600.0)), series=series)
    compact_all(database, now=START)
    assert rows(database, schema.frame) == 0
    with database.connect() as connection:
        counts = list(connection.scalars(select(schema.block.c.count)))
    assert sum(counts) == compaction._READY_FRAMES - 1 + 600
    assert all(compaction.MIN_TIMES <= count <= segments.MAX_TIMES for count in counts)


def test_a_slow_series_does_not_end_in_many_small_blocks(database: Engine) -> None:
    for second in range(10):
        write(database, frame([{}], [second], [float(second)]))
        compact_all(database)
    assert rows(database, schema.block) == 1
    assert contents(read(database)) == {"": {second: float(second) for second in range(10)}}


def test_compaction_says_that_there_is_more_of_a_long_series(database: Engine) -> None:
    series = SeriesIds()
    with transaction(database) as connection:
        for second in range(600):
            store(connection, series, [received(frame([{}], [second], [float(second)]))])
    compact_all(database)
    assert rows(database, schema.frame) == 0


def test_no_block_reaches_into_the_next_day(database: Engine) -> None:
    hours = range(96)
    write(database, frame([{}], [hour * 3600 for hour in hours], np.arange(96.0)))
    compact_all(database)
    write(database, frame([{}], [hour * 3600 + 1 for hour in hours], np.arange(96.0)))
    compact_all(database)
    block = schema.block.c
    with database.connect() as connection:
        spans = connection.execute(select(block.time, block.last_time, block.count)).all()
    assert [first // DAY for first, _, _ in spans] == [last // DAY for _, last, _ in spans]
    assert (len(spans), sum(count for _, _, count in spans)) == (5, 192)
    assert len(contents(read(database))[""]) == 192


def test_a_frame_that_comes_weeks_late_opens_no_block_but_its_own(database: Engine) -> None:
    series = SeriesIds()
    for day in range(20):
        seconds = np.arange(day * 86_400, day * 86_400 + 256)
        write(database, frame([{}], seconds, seconds.astype(float)), series=series)
    compact_all(database)
    late, fresh = 86_400 + 300, range(20 * 86_400, 20 * 86_400 + 130)
    write(database, frame([{}], [late], [1.5]), series=series)
    for second in fresh:
        write(database, frame([{}], [second], [2.5]), series=series)
    with transaction(database) as connection:
        stats = compact(connection, LATER)
    assert (stats.frames, stats.values) == (131, 131)
    held = contents(read(database))[""]
    assert (len(held), held[late], held[fresh[-1]]) == (20 * 256 + 131, 1.5, 2.5)


def test_of_wide_frames_less_is_held_at_once(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_BYTES_AT_ONCE", 100)
    points = layers(*"abcdefg")
    for second in range(6):
        write(database, frame(points, [second], np.full(7, float(second))))
    with transaction(database) as connection:
        stats = compact(connection, LATER)
    assert (stats.frames, stats.more) == (2, True)
    compact_all(database)
    assert rows(database, schema.frame) == 0
    assert contents(read(database)) == {name: {s: float(s) for s in range(6)} for name in "abcdefg"}


def test_of_frames_of_many_times_less_is_held_at_once(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "_BYTES_AT_ONCE", 1_000)
    for start in range(0, 500, 100):
        write(database, frame([{}], range(start, start + 100), np.arange(100.0)))
    with transaction(database) as connection:
        stats = compact(connection, LATER)
    assert (stats.frames, stats.more) == (2, True)


def test_of_large_packed_values_less_is_held_at_once_and_in_a_block(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "_BYTES_AT_ONCE", 100_000)
    monkeypatch.setattr(segments, "_MAX_BYTES", 50_000)
    sent = [packed.join([b"%d" % second + bytes(20_000)]) for second in range(12)]
    for second in range(8):
        write(database, frame([{}], [second], None, field="buckets", packed=(sent[second],)))
    write(database, frame([{}], range(8, 12), None, field="buckets", packed=tuple(sent[8:])))
    with transaction(database) as connection:
        stats = compact(connection, LATER)
    assert (stats.frames, stats.blocks, stats.more) == (5, 2, True)
    compact_all(database)
    assert rows(database, schema.frame) == 0
    with database.connect() as connection:
        counts = connection.scalars(select(schema.block.c.count).order_by(schema.block.c.time)).all()
        assert sum(counts) == 12
        assert max(counts) <= 3
        (found,) = read_series(connection, "run", "norm", "buckets")
    assert found.packed == tuple(packed.split(each)[0] for each in sent)


def test_one_call_of_compaction_is_bounded_and_says_that_there_is_more(database: Engine) -> None:
    for name in "abcd":
        write(database, frame(layers(name), range(50), np.arange(50.0)))
    with transaction(database) as connection:
        stats = compact(connection, LATER, max_values=60)
    assert (stats.series, stats.values, stats.more) == (2, 100, True)
    compact_all(database, max_values=60)
    assert rows(database, schema.frame) == 0


def looked_at(database: Engine, monkeypatch: pytest.MonkeyPatch, frames: int) -> list[int]:
    """Go round once, looking at so many frames a call; return how many series each call compacted."""
    monkeypatch.setattr(compaction, "_LOOKED_AT", frames)
    series, after = [], 0
    while True:
        with transaction(database) as connection:
            stats = compact(connection, LATER, after=after)
        series.append(stats.series)
        after = stats.after
        if not after:
            return series


def test_a_round_of_compaction_reaches_every_series_however_little_one_call_looks_at(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in {"a": 1, "b": 30, "c": 2, "d": 5, "e": 1}.items():
        for second in range(count):
            write(database, frame(layers(name), [second], [1.0]))
    assert looked_at(database, monkeypatch, frames=8) == [1, 1, 2, 1]
    assert rows(database, schema.frame) == 0


def test_series_that_are_not_ready_keep_no_other_from_being_compacted(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = (LATER - START) // SECOND
    for name in "abcd":
        write(database, frame(layers(name), [late], [1.0]))
        write(database, frame(layers(name), [late + 1], [1.0]))
    write(database, frame(layers("e"), [0], [1.0]))
    assert sum(looked_at(database, monkeypatch, frames=5)) == 1
    assert (rows(database, schema.frame), rows(database, schema.block)) == (8, 1)


def test_looking_for_what_is_ready_costs_the_same_however_much_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = db.connect(f"sqlite:///{tmp_path}/many.db")
    db.upgrade(engine)
    monkeypatch.setattr(compaction, "_LOOKED_AT", 50)

    def instructions() -> int:
        """How many instructions of its machine SQLite needs for one call."""
        counted: list[int] = []
        with transaction(engine) as connection:
            driver: Any = connection.connection.driver_connection
            driver.set_progress_handler(lambda: counted.append(1), 10)
            compact(connection, START)
            driver.set_progress_handler(None, 0)
        return len(counted) * 10

    ids = SeriesIds()
    costs = []
    for waiting in (100, 2_000):
        names = map(str, range(waiting))
        write(engine, *(frame(layers(name), [0], [1.0]) for name in names), series=ids)
        costs.append(instructions())
    engine.dispose()
    assert costs[1] < 1.2 * costs[0]


def test_idle_compaction_gives_the_space_of_frames_back(tmp_path: Path) -> None:
    engine = db.connect(f"sqlite:///{tmp_path}/space.db")
    db.upgrade(engine)

    def free_pages() -> int:
        with engine.connect() as connection:
            return connection.exec_driver_sql("PRAGMA freelist_count").scalar() or 0

    for second in range(200):
        write(engine, frame(layers(*map(str, range(300))), [second], np.full(300, 0.5)))
    compact_all(engine)
    assert free_pages() > 0
    compact_all(engine)
    assert free_pages() == 0
    engine.dispose()


def test_a_compaction_that_is_cut_off_changes_nothing(database: Engine) -> None:
    write(database, frame([{}], range(5), np.arange(5.0)))
    with pytest.raises(CutOffError):
        cut_off(database, lambda connection: compact(connection, LATER))
    assert (rows(database, schema.frame), rows(database, schema.block)) == (1, 0)
    assert contents(read(database)) == {"": {n: float(n) for n in range(5)}}


STEPS = st.lists(
    st.one_of(
        st.just("compact"),
        st.tuples(
            st.sampled_from(["ab", "a", "ba", "bc"]),
            st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True).map(sorted),
        ),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_any_order_of_arrivals_resends_and_compactions_reads_back_the_distinct_points(
    database: Engine, steps: list[Any]
) -> None:
    with transaction(database) as connection:
        for table in (schema.frame, schema.block, schema.series, schema.attribute_set):
            connection.execute(table.delete())
    expected: dict[str, dict[int, float]] = {}
    for step in steps:
        if step == "compact":
            compact_all(database)
            continue
        names, times = step
        for name in names:
            expected.setdefault(name, {}).update({time: value_of(name, time) for time in times})
        write(database, frame(layers(*names), times, [[value_of(n, t) for t in times] for n in names]))
    assert contents(read(database)) == expected


def value_of(name: str, time: int) -> float:
    # It follows from the point and the time, as that of a sample that is sent again; some need float64.
    return (ord(name) * 1000 + time) * (0.5, 0.1, 1e300)[time % 3]


def test_writers_that_intern_the_same_series_at_once_agree(database: Engine) -> None:
    start = threading.Barrier(4)

    def write_one(second: int) -> None:
        start.wait()
        write(database, frame(layers("a", "b"), [second], [1.0, 2.0]))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_one, range(4)))
    assert rows(database, schema.series) == 1
    assert contents(read(database)) == {"a": dict.fromkeys(range(4), 1.0), "b": dict.fromkeys(range(4), 2.0)}


def test_ids_of_a_transaction_that_was_rolled_back_are_forgotten(database: Engine) -> None:
    series = SeriesIds()
    sent = frame([{}], [0], [1.0])
    with pytest.raises(CutOffError):
        cut_off(database, lambda connection: store(connection, series, [received(sent)]))
    series.forget()
    write(database, sent, series=series)
    assert contents(read(database)) == {"": {0: 1.0}}


def test_events_and_spans_are_stored_once_and_heartbeats_not_at_all(database: Engine) -> None:
    events = [
        EventRecord(c.RUN_STARTED.name, START, 0, 9, None, {}),
        EventRecord(c.RUN_HEARTBEAT.name, START, 1, 9, None, {}),
    ]
    span = SpanRecord("ab" * 16, "cd" * 8, None, "step", 1, START, START + 1, 0, {"x": 1}, [])
    for _ in range(2):
        with transaction(database) as connection:
            store(connection, SeriesIds(), [received(events=events, spans=[span])])
    with database.connect() as connection:
        assert list(connection.scalars(select(schema.event.c.name))) == [c.RUN_STARTED.name]
        assert list(connection.scalars(select(schema.span.c.name))) == ["step"]


def test_the_sample_view_shows_one_row_a_value(database: Engine) -> None:
    if database.dialect.name != "postgresql":
        pytest.skip("the view is for Grafana's PostgreSQL data source")
    write(database, frame(layers("a", "b"), [0, 1], [[1.5, np.nan], [3.0, 4.0]]))
    query = text(
        "SELECT attributes ->> :layer, (nanos - :start) / 1000000000, value::text, metric FROM sample "
        "WHERE run_id = 'run' ORDER BY 1, 2"
    )
    for _ in range(2):
        with database.connect() as connection:
            found = [tuple(row) for row in connection.execute(query, {"layer": c.LAYER_NAME, "start": START})]
        assert found == [
            ("a", 0, "1.5", "norm"),
            ("a", 1, "NaN", "norm"),
            ("b", 0, "3", "norm"),
            ("b", 1, "4", "norm"),
        ]
        compact_all(database)


def test_a_segment_row_needs_no_python_object_a_value(database: Engine) -> None:
    segment = segments.Segment(np.arange(2, dtype=np.int64), np.ones((3, 2), np.float32))
    with database.connect() as connection:
        row = segments.to_row(segment, connection, compress=False)
    assert isinstance(row[2], bytes if database.dialect.name == "sqlite" else np.ndarray)


def test_who_reads_sees_one_moment(database: Engine) -> None:
    write(database, frame(layers("a"), [0], [1.0]))
    with of_one_moment(database).connect() as connection:
        before = connection.scalar(text("SELECT count(*) FROM frame"))
        write(database, frame(layers("a"), [1], [1.0]))
        assert connection.scalar(text("SELECT count(*) FROM frame")) == before == 1
    with of_one_moment(database).connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM frame")) == 2
