"""Pruning leaves what it should, in numbers that a dense computation gives, and gives the space back."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, Table, func, select, text

from gradwatch import conventions as c
from gradwatch.cli import main
from gradwatch_collector.api.layers import layer_summaries
from gradwatch_collector.records import Batch, EventRecord, Frame, ProcessKey, Received, SpanRecord
from gradwatch_collector.runs.effective_time import effective_time
from gradwatch_collector.runs.facts import load_runs
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.service import audit
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage import packed, retention, schema, segments
from gradwatch_collector.storage.compaction import compact
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.reading import read_series
from gradwatch_collector.storage.retention import FOREVER, Policy, Pruned, age, due, policy_for, prune
from gradwatch_collector.storage.rolled_up import PointRollup, read_rollups
from gradwatch_collector.storage.rollups import roll_up
from gradwatch_collector.storage.segments import DAY
from gradwatch_collector.storage.series import SeriesIds
from gradwatch_collector.storage.writing import store
from tests.batches import START, at, batch, event, frame, scalar, source
from tests.collector_process import collector, eventually

DAYS = 86_400
WEEK = Policy(raw=7 * DAY, rollups=90 * DAY)


def receive(database: Engine, received: Batch, seconds: float, series: SeriesIds | None = None) -> ProcessKey:
    """Take a batch in as the collector does, at a moment of the test's time."""
    with transaction(database) as connection:
        registry = Registry()
        (key,) = registry.resolve(connection, [(received.source, at(seconds))])
        store(connection, series or SeriesIds(), [Received(key, received, at(seconds))])
        registry.apply(connection, [Received(key, received, at(seconds))])
    return key


def compact_all(database: Engine, seconds: float) -> None:
    more = True
    while more:
        with transaction(database) as connection:
            more = compact(connection, at(seconds)).more


def prune_at(database: Engine, seconds: float, policy: Policy = WEEK) -> Pruned:
    return prune(lambda: transaction(database), policy, at(seconds))


def rows(database: Engine, table: Table) -> int:
    with database.connect() as connection:
        return connection.scalar(select(func.count()).select_from(table)) or 0


def rolled(database: Engine, metric: c.Metric = c.LOSS, field: str = "value") -> list[PointRollup]:
    with database.connect() as connection:
        return read_rollups(connection, "run", metric.name, field)


def start(seconds: float = 0, **attributes: Any) -> Batch:
    return batch(source(**attributes), event(c.RUN_STARTED, seconds))


def losses(seconds: Sequence[float], values: Sequence[float]) -> Batch:
    return batch(source(), frames=[scalar(c.LOSS, seconds, values)])


def test_whole_days_that_are_too_old_become_roll_ups_and_the_others_stay(database: Engine) -> None:
    receive(database, start(), 0)
    days = [0, 3, 6]
    for day in days:
        receive(database, losses(np.arange(100) + day * DAYS, np.arange(100.0) + day), day * DAYS + 100)
    compact_all(database, 7 * DAYS)
    pruned = prune_at(database, 11 * DAYS)
    assert (pruned.values, pruned.blocks) == (200, 2)
    with database.connect() as connection:
        (left,) = read_series(connection, "run", c.LOSS.name)
    assert left.times.tolist() == [at(6 * DAYS + n) for n in range(100)]
    (point,) = rolled(database)
    assert point.times.tolist() == [at(day * DAYS + n) for day in (0, 3) for n in (63, 99)]
    assert point.count.tolist() == [64, 36, 64, 36]
    assert point.minimum.tolist() == [0, 64, 3, 67]
    assert point.maximum.tolist() == [63, 99, 66, 102]
    assert point.mean.tolist() == [31.5, 81.5, 34.5, 84.5]
    assert point.last.tolist() == [63, 99, 66, 102]
    assert prune_at(database, 11 * DAYS) == Pruned()


def test_nan_and_infinities_are_counted_and_spoil_nothing(database: Engine) -> None:
    receive(database, losses(range(3), [1.0, np.nan, 3.0]), 3)
    receive(database, losses(range(DAYS, DAYS + 2), [np.inf, np.nan]), DAYS + 2)
    compact_all(database, 2 * DAYS)
    prune_at(database, 20 * DAYS)
    (point,) = rolled(database)
    assert point.nonfinite.tolist() == [1, 2]
    np.testing.assert_array_equal(point.mean, [2.0, np.nan])
    np.testing.assert_array_equal(point.last, [3.0, np.nan])
    assert point.total == 4.0


ARRIVALS = st.lists(
    st.one_of(
        st.just("compact"),
        st.just("prune"),
        st.lists(st.integers(0, 400), min_size=1, max_size=40, unique=True).map(sorted),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrivals=ARRIVALS)
def test_whatever_the_order_each_number_is_in_one_bucket_and_in_no_other(
    database: Engine, arrivals: list[Any]
) -> None:
    with transaction(database) as connection:
        for table in (schema.frame, schema.block, schema.rollup, schema.series):
            connection.execute(table.delete())
    sent: dict[int, float] = {}
    for arrival in [*arrivals, "compact", "prune"]:
        if arrival == "compact":
            compact_all(database, 19 * DAYS)
        elif arrival == "prune":
            prune_at(database, 20 * DAYS)
        else:
            # Across four midnights. Nothing is sent twice: `docs/decisions` says what becomes of that.
            new = [n for n in arrival if n not in sent]
            values = {n: (n * 37 % 101) * 0.25 for n in new}
            sent |= values
            if new:
                receive(database, losses([n * 1000 for n in new], list(values.values())), 5 * DAYS)
    found = rolled(database)
    if not sent:
        assert found == []
        return
    (point,) = found
    assert point.count.sum() == len(sent)
    assert point.minimum.min() == min(sent.values())
    assert point.maximum.max() == max(sent.values())
    assert point.total == pytest.approx(sum(sent.values()), rel=1e-5)
    assert set(point.times.tolist()) <= {at(n * 1000) for n in sent}
    assert all(point.last[i] == sent[(int(t) - START) // 10**12] for i, t in enumerate(point.times))


def roll_up_again(database: Engine, seconds: Sequence[float], values: Sequence[float]) -> PointRollup:
    """Take numbers in, roll them up at once, and return all roll-ups there are."""
    receive(database, losses(seconds, values), 5 * DAYS)
    compact_all(database, 19 * DAYS)
    prune_at(database, 20 * DAYS)
    (point,) = rolled(database)
    return point


def test_what_nobody_compacted_is_pruned_all_the_same(database: Engine) -> None:
    receive(database, losses(np.arange(100), np.arange(100.0)), 100)
    receive(database, losses([60 * DAYS], [1.0]), 100)  # a clock that was ahead: the series is not quiet yet
    assert rows(database, schema.block) == 0
    assert prune_at(database, 11 * DAYS).values == 100
    (point,) = rolled(database)
    assert point.count.tolist() == [64, 36]


def test_late_numbers_are_kept_though_their_bucket_would_end_with_one_that_is_there(database: Engine) -> None:
    roll_up_again(database, range(100), [1.0] * 100)
    # All of one row, whose first bucket ends at 63 as one does that is there.
    point = roll_up_again(database, [n + 0.5 for n in range(63)] + [63, *range(200, 250)], [2.0] * 114)
    assert [(int(t) - START) / 1e9 for t in point.times] == [63, 99, 200, 249]
    assert point.count.tolist() == [64, 36, 64, 49]
    assert point.mean.tolist() == [1, 1, 2, 2]


def test_a_late_bucket_hides_none_of_which_it_shares_the_end(database: Engine) -> None:
    roll_up_again(database, range(100), [1.0] * 100)
    point = roll_up_again(database, [98.5, 99], [2.0, 3.0])
    assert [(int(t) - START) / 1e9 for t in point.times] == [63, 98.5, 99]
    assert (point.count.tolist(), point.last.tolist()) == ([64, 1, 36], [1, 2, 1])


def test_a_time_that_ends_a_bucket_is_not_counted_again(database: Engine) -> None:
    first = roll_up_again(database, [5], [1.0])
    again = roll_up_again(database, [5], [1.0])
    assert (again.times.tolist(), again.count.tolist()) == (first.times.tolist(), [1])


def test_the_summary_of_layers_is_the_same_before_and_after(database: Engine) -> None:
    receive(database, start(), 0)
    layers = [{c.LAYER_NAME: name} for name in ("a", "b")]
    numbers = np.random.default_rng(1).integers(1, 50, (2, 100)).astype(float)
    told = {"count": numbers, "sum": numbers * 1.5, "min": numbers / 4, "max": numbers * 2}
    frames: list[Frame] = [
        frame(c.LAYER_GRADIENT_NORM, layers, range(100), values.tolist(), field)
        for field, values in told.items()
    ]
    receive(database, batch(source(), frames=frames), 100)
    compact_all(database, DAYS)

    def summaries() -> list[tuple[Any, ...]]:
        with database.connect() as connection:
            found = layer_summaries(connection, "run", 1)
        return [(one.layer, one.steps_observed, one.mean, one.minimum, one.maximum) for one in found]

    before = summaries()
    assert prune_at(database, 20 * DAYS).blocks == 4
    for old, new in zip(before, summaries(), strict=True):
        assert new[:2] == old[:2]
        assert new[2:] == pytest.approx(old[2:], rel=1e-6)


def test_effective_time_is_unknown_once_the_steps_are_rolled_up(database: Engine) -> None:
    receive(database, start(), 0)
    steps = [scalar(c.STEP_INDEX, range(10), range(10)), scalar(c.STEP_DURATION, range(10), [1.0] * 10)]
    receive(database, batch(source(), frames=steps), 10)
    compact_all(database, DAYS)
    with database.connect() as connection:
        (run,) = load_runs(connection)
        assert effective_time(connection, run) is not None
    prune_at(database, 20 * DAYS)
    with database.connect() as connection:
        assert effective_time(connection, run) is None


def test_what_slos_count_stays_and_the_rest_of_an_old_run_goes(database: Engine) -> None:
    span = SpanRecord("ab" * 16, "cd" * 8, None, "step", 1, at(1), at(2), 0, {}, [])
    log = EventRecord("", at(1), 7, 9, "a line", {})
    saved = event(c.CHECKPOINT_SAVED, 1, 1, STEP=1)
    receive(database, start(), 0)
    receive(database, Batch(source(), [scalar(c.LOSS, range(5), range(5))], (log, saved), (span,)), 5)
    receive(database, batch(source(), event(c.RUN_ENDED, 6, 9, STATUS="succeeded")), 6)
    with transaction(database) as connection:
        connection.execute(
            schema.finding.insert().values(
                run_id="run", attempt=1, rule="nonfinite", severity="ticket", state="resolved",
                first_seen=1, last_seen=1, evidence={},
            )
        )  # fmt: skip
    compact_all(database, DAYS)
    assert prune_at(database, 10 * DAYS) == Pruned(blocks=1, values=5, rollups=5, events=1, spans=1)
    with database.connect() as connection:
        assert set(connection.scalars(select(schema.event.c.name))) == {
            c.RUN_STARTED.name,
            c.CHECKPOINT_SAVED.name,
            c.RUN_ENDED.name,
        }
    assert prune_at(database, 100 * DAYS) == Pruned(old_rollups=5, events=3, series=1)
    kept = (schema.run, schema.attempt, schema.process, schema.checkpoint, schema.finding)
    assert [rows(database, table) for table in kept] == [1] * 5
    assert rows(database, schema.run_history) == 2
    gone = (schema.frame, schema.block, schema.rollup, schema.series, schema.event, schema.span)
    assert [rows(database, table) for table in gone] == [0] * 6


def test_what_a_live_run_told_of_itself_stays_as_long_as_it_lives(database: Engine) -> None:
    receive(database, start(), 0)
    receive(database, batch(source(), event(c.NONFINITE_STEP, 1, 1, STEP=1)), 1)
    prune_at(database, 200 * DAYS)
    assert rows(database, schema.event) == 2
    receive(database, batch(source(), event(c.RUN_ENDED, 200 * DAYS, 9, STATUS="failed")), 200 * DAYS)
    prune_at(database, 200 * DAYS)
    assert rows(database, schema.event) == 1  # the ending is new


def test_telemetry_of_no_run_is_forgotten_with_its_roll_ups(database: Engine) -> None:
    receive(database, losses(range(5), range(5)), 5)
    compact_all(database, DAYS)
    prune_at(database, 20 * DAYS)
    assert (rows(database, schema.process), rows(database, schema.series)) == (1, 1)
    assert prune_at(database, 100 * DAYS) == Pruned(old_rollups=5, series=1, senders=1)


def test_a_series_whose_process_still_speaks_is_kept(database: Engine) -> None:
    receive(database, start(), 0)
    receive(database, losses(range(5), range(5)), 5)
    compact_all(database, DAYS)
    prune_at(database, 20 * DAYS)
    receive(database, batch(source(), event(c.RUN_HEARTBEAT, 99 * DAYS, 2)), 99 * DAYS)
    assert prune_at(database, 100 * DAYS).series == 0
    assert rows(database, schema.series) == 1


def test_series_that_were_empty_before_their_process_fell_silent_go_in_the_end(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_ROWS_AT_ONCE", 2)
    receive(database, start(), 0)
    for step in range(5):
        receive(database, batch(source(), frames=[scalar(c.LOSS, [step], [1.0], layer=f"{step}")]), 5)
    compact_all(database, DAYS)
    prune_at(database, 20 * DAYS)
    receive(database, batch(source(), frames=[scalar(c.LEARNING_RATE, [99 * DAYS], [1.0])]), 99 * DAYS)
    other = source("other", instance="other")
    receive(database, batch(other, frames=[scalar(c.LOSS, [150 * DAYS], [1.0])]), 150 * DAYS)
    prune_at(database, 150 * DAYS)
    assert rows(database, schema.series) == 7
    compact_all(database, 189.1 * DAYS)
    forgotten = [prune_at(database, 189.1 * DAYS + 600 * turn).series for turn in range(4)]
    # The last of them still has its numbers: they go by whole days.
    assert (sum(forgotten), max(forgotten), rows(database, schema.series)) == (5, 2, 2)
    assert len(rolled(database, c.LEARNING_RATE)) == 1


def test_of_blocks_of_packed_values_few_are_held_at_once(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "_BYTES_AT_ONCE", 9 << 20)
    for day in range(5):
        loss = scalar(c.LOSS, [day * DAYS], [1.0])
        buckets = replace(loss, field="buckets", values=None, packed=(packed.join([b"counts"]),))
        receive(database, batch(source(), frames=[buckets]), day * DAYS)
    compact_all(database, 20 * DAYS)
    taken = []
    while not taken or taken[-1]:
        with transaction(database) as connection:
            taken.append(roll_up(connection, at(20 * DAYS), at(20 * DAYS)).blocks)
    assert taken == [3, 2, 0]
    (point,) = rolled(database, field="buckets")
    assert point.count.tolist() == [1.0] * 5


def test_whoever_comes_back_after_its_series_were_forgotten_is_stored_anew(database: Engine) -> None:
    now = 0.0
    series = SeriesIds(lambda: now)
    receive(database, losses([1], [1.0]), 1, series)
    series.keep()
    compact_all(database, DAYS)
    prune_at(database, 20 * DAYS)
    prune_at(database, 120 * DAYS)
    assert rows(database, schema.series) == 0
    now = 12 * 3600 + 1.0
    receive(database, losses([120 * DAYS], [2.0]), 120 * DAYS, series)
    with database.connect() as connection:
        (point,) = read_series(connection, "run", c.LOSS.name)
    assert np.asarray(point.values).tolist() == [2.0]


def test_old_runs_go_whole_where_that_is_asked_for(database: Engine) -> None:
    for name, ended in (("old", 10), ("new", 50 * DAYS)):
        told = source(name, instance=name)
        receive(database, batch(told, event(c.RUN_STARTED, 0), frames=[scalar(c.LOSS, [1], [1.0])]), 2)
        receive(database, batch(told, event(c.RUN_ENDED, ended, 9, STATUS="failed")), ended)
    receive(database, batch(source("live", instance="live"), event(c.RUN_STARTED, 0)), 2)
    failed = source("speaks", instance="speaks", attempt=1)
    receive(database, batch(failed, event(c.RUN_STARTED, 0), event(c.RUN_ENDED, 5, 9, STATUS="failed")), 5)
    other = source("speaks", instance="other", attempt=1, rank=1)
    receive(database, batch(other, event(c.RUN_HEARTBEAT, 59 * DAYS, 1)), 59 * DAYS)
    policy = Policy(raw=FOREVER, rollups=FOREVER, runs=30 * DAY)
    with database.connect() as connection:
        assert due(connection, policy, at(60 * DAYS)).runs == 1
    assert prune_at(database, 60 * DAYS, policy).runs == 1
    tables = (schema.run, schema.attempt, schema.process, schema.run_history, schema.event, schema.series)
    for table in tables:
        with database.connect() as connection:
            assert "old" not in connection.scalars(select(table.c.run_id)).all()
    with database.connect() as connection:
        assert {run.run_id for run in load_runs(connection)} == {"new", "live", "speaks"}
        assert connection.scalar(select(func.count()).select_from(schema.frame)) == 1


def test_a_pass_that_is_stopped_goes_on_another_time(database: Engine) -> None:
    for day in range(3):
        receive(database, losses([day * DAYS], [1.0]), day * DAYS)
    compact_all(database, 5 * DAYS)
    answers = iter([True, True])
    begin: Callable[[], Any] = lambda: transaction(database)  # noqa: E731
    pruned = prune(begin, WEEK, at(20 * DAYS), go_on=lambda: next(answers, False))
    assert pruned.blocks < 4
    prune_at(database, 20 * DAYS)
    (point,) = rolled(database)
    assert point.count.tolist() == [1, 1, 1]


def stored_bytes(database: Engine) -> int:
    if database.dialect.name == "sqlite":
        with database.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        return Path(database.url.database or "").stat().st_size
    with database.connect() as connection:
        return int(connection.scalar(text("SELECT pg_database_size(current_database())")) or 0)


def test_pruning_gives_the_space_back(empty_database: Engine) -> None:
    # Partitions of the days that are written are there, as they would be had the collector run then.
    db.upgrade(empty_database, now=lambda: START)
    layers = [{c.LAYER_NAME: f"layer{n}"} for n in range(300)]
    series, random = SeriesIds(), np.random.default_rng(1)
    small = stored_bytes(empty_database)
    for step in range(20):
        seconds = [step * 100 + n for n in range(100)]
        values = random.normal(size=(300, 100)).astype(np.float32).astype(float)
        told = frame(c.LAYER_GRADIENT_NORM, layers, seconds, values.tolist(), "sum")
        receive(empty_database, batch(source(), frames=[told]), 2000, series)
        series.keep()
    compact_all(empty_database, DAYS)
    prune_at(empty_database, 1 * DAYS)  # nothing is old; emptied frames are given back
    large = stored_bytes(empty_database)
    assert large - small > 1_500_000
    assert prune_at(empty_database, 20 * DAYS).values == 600_000
    assert stored_bytes(empty_database) - small < (large - small) / 5


def test_a_days_partition_goes_with_its_blocks(empty_database: Engine) -> None:
    if empty_database.dialect.name != "postgresql":
        pytest.skip("SQLite has no partitions")
    db.upgrade(empty_database, now=lambda: START)
    receive(empty_database, losses([0, DAYS], [1.0, 2.0]), 1)
    compact_all(empty_database, 3 * DAYS)

    def partitions() -> set[str]:
        days = text("SELECT relname FROM pg_class WHERE relname ~ '_d[0-9]+$' AND relkind = 'r'")
        with empty_database.connect() as connection:
            return {name for name in connection.scalars(days) if name < "block_d20250617" or name > "rollup"}

    prune_at(empty_database, 6 * DAYS)
    assert partitions() == {"block_d20250615", "block_d20250616"}
    prune_at(empty_database, 8 * DAYS)
    assert partitions() == {"block_d20250616", "rollup_d20250601"}
    prune_at(empty_database, 9 * DAYS)
    assert partitions() == {"rollup_d20250601"}
    prune_at(empty_database, 120 * DAYS)
    assert partitions() == set()


def test_the_command_tells_what_it_would_do_and_then_does_it(database: Engine, database_url: str) -> None:
    old = time.time() - 40 * DAYS - START / 1e9
    receive(database, losses([old], [1.0]), old)
    compact_all(database, old + 3600)

    def run(*options: str) -> str:
        shown = CliRunner().invoke(main, ["db", "prune", "--db", database_url, *options])
        assert shown.exit_code == 0, shown.output
        return shown.output

    assert "would prune 0 values" in run("--older-than", "forever", "--dry-run")
    assert "would prune 1 values in 1 blocks" in run("--dry-run")
    assert rows(database, schema.block) == 1
    assert "pruned 1 values in 1 blocks (now 5 rows of roll-ups)" in run()
    assert rows(database, schema.block) == 0


def pruned_by_hand(database_url: str, *options: str) -> Result:
    return CliRunner().invoke(main, ["db", "prune", "--db", database_url, *options])


def audited(database: Engine) -> dict[str, Any]:
    """What the audit log says, by act; without the making of the schema."""
    with database.connect() as connection:
        return {each.action: each.details for each in audit.entries(connection, 10)[:-1]}


def test_a_machine_whose_clock_is_ahead_prunes_by_the_databases(
    database: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    receive(database, losses([now - START / 1e9], [1.0]), now - START / 1e9)
    compact_all(database, now - START / 1e9 + 3600)
    monkeypatch.setattr(time, "time_ns", lambda: int(now * 1e9) + 400 * DAY)
    assert "would prune 0 values" in pruned_by_hand(database_url, "--dry-run").output
    assert "pruned 0 values" in pruned_by_hand(database_url).output
    assert rows(database, schema.block) == 1
    assert audited(database) == {}


def test_a_pass_by_hand_is_written_down_from_its_beginning_to_its_end(
    database: Engine, database_url: str
) -> None:
    old = time.time() - 40 * DAYS - START / 1e9
    receive(database, losses([old], [1.0]), old)
    compact_all(database, old + 3600)
    assert pruned_by_hand(database_url, "--older-than", "3d", "--rollups-older-than", "52w").exit_code == 0
    assert audited(database) == {
        "db.pruning": {"raw": 3 * DAY, "rollups": 364 * DAY, "runs": FOREVER},
        "db.pruned": asdict(Pruned(blocks=1, values=1, rollups=5)),
    }


def test_a_pass_that_fails_half_way_says_why_in_one_line_and_is_written_down(
    database: Engine, database_url: str
) -> None:
    old = time.time() - 40 * DAYS - START / 1e9
    span = SpanRecord("ab" * 16, "cd" * 8, None, "step", 1, at(old), at(old), 0, {}, [])
    receive(database, Batch(source(), [scalar(c.LOSS, [old], [1.0])], (), (span,)), old)
    compact_all(database, old + 3600)
    with transaction(database) as connection:
        if database.dialect.name == "sqlite":
            connection.exec_driver_sql(
                "CREATE TRIGGER kept BEFORE DELETE ON span BEGIN SELECT RAISE(ABORT, 'spans are kept'); END"
            )
        else:
            connection.exec_driver_sql(
                "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN RAISE 'spans are kept'; END $$;"
                "CREATE TRIGGER kept BEFORE DELETE ON span EXECUTE FUNCTION keep()"
            )
    failed = pruned_by_hand(database_url)
    assert failed.exit_code == 1
    assert re.fullmatch(r"Error: cannot prune (sqlite|postgresql)\S+: spans are kept\n", failed.output)
    assert rows(database, schema.block) == 0
    assert list(audited(database)) == ["db.pruning"]


def test_the_collector_prunes_by_itself(database: Engine, database_url: str) -> None:
    old = time.time() - 3 * DAYS - START / 1e9
    receive(database, losses([old], [1.0]), old)
    with collector(database_url, "--keep-raw", "1d"):
        eventually(lambda: rows(database, schema.rollup), "what is old to be rolled up")
    assert (rows(database, schema.frame), rows(database, schema.block)) == (0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--older-than", "soon"], "is not an age such as 12h"), (["--runs-older-than", "1h"], "a day at least")],
)
def test_an_age_that_is_none_is_refused(database_url: str, options: list[str], message: str) -> None:
    shown = CliRunner().invoke(main, ["db", "prune", "--db", database_url, *options])
    assert shown.exit_code == 2
    assert message in shown.output


def test_ages_are_told_in_hours_days_and_weeks() -> None:
    assert [age(text) for text in ("12h", "7d", "4w", "forever")] == [DAY // 2, 7 * DAY, 28 * DAY, FOREVER]
    assert age("99999w") == FOREVER
    for wrong in ("", "7", "d7", "-1d", "1.5d", "7 d"):
        with pytest.raises(ValueError, match="is not an age"):
            age(wrong)
    assert policy_for("sqlite") == Policy(30 * DAY, 365 * DAY)
    assert policy_for("postgresql", raw=DAY) == Policy(DAY, 90 * DAY)


def test_numbers_of_a_clock_that_is_ahead_go_by_that_clock(database: Engine) -> None:
    receive(database, losses([50 * DAYS], [1.0]), 0)
    compact_all(database, 60 * DAYS)
    prune_at(database, 50 * DAYS)
    assert rows(database, schema.block) == 1
    prune_at(database, 60 * DAYS)
    assert rows(database, schema.block) == 0


def test_pruning_and_ingest_take_turns(database: Engine) -> None:
    for day in range(30):
        receive(database, losses([day * DAYS], [1.0]), day * DAYS)
    compact_all(database, 40 * DAYS)
    turns: list[float] = []

    def interrupt() -> bool:
        receive(database, losses([60 * DAYS + len(turns)], [1.0]), 60 * DAYS)
        turns.append(1)
        return True

    prune(lambda: transaction(database), WEEK, at(60 * DAYS), go_on=interrupt)
    assert len(turns) > 3
    with database.connect() as connection:
        (point,) = read_series(connection, "run", c.LOSS.name)
    assert len(point.times) == len(turns)
