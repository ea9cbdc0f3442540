"""What is left of numbers that were pruned is shown wherever the numbers were."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from click.testing import CliRunner
from sqlalchemy import Engine, event

from gradwatch import conventions as c
from gradwatch.cli import main
from gradwatch_collector.api.heat_map import heat_map
from gradwatch_collector.api.metric_points import SeriesQuery, list_series
from gradwatch_collector.api.moments import exactly, parse_moment
from gradwatch_collector.records import ProcessKey, Received
from gradwatch_collector.storage.compaction import compact
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.retention import Policy, prune
from gradwatch_collector.storage.segments import DAY
from gradwatch_collector.storage.series import SeriesIds
from gradwatch_collector.storage.writing import store
from tests.batches import at, batch, frame, scalar, source
from tests.schemas import valid

DAYS = 86_400


def receive(database: Engine, *frames: Any, rank: int = 0) -> None:
    key = ProcessKey("run", 1, rank, "one")
    with transaction(database) as connection:
        store(connection, SeriesIds(), [Received(key, batch(source(rank=rank), frames=frames), at(0))])


def roll_up(database: Engine, *, until: float) -> None:
    """Compact all, and roll up the days before a moment."""
    more = True
    while more:
        with transaction(database) as connection:
            more = compact(connection, at(until + 100 * DAYS)).more
    prune(lambda: transaction(database), Policy(raw=0, rollups=1000 * DAY), at(until))


def series(database: Engine, metric: c.Metric = c.LOSS, **asked: Any) -> list[Any]:
    with database.connect() as connection:
        page = list_series(connection, SeriesQuery("run", metric.name, **asked))
    assert page is not None
    found: list[Any] = valid(page, "series-list")["series"]
    return found


def test_a_series_goes_on_in_its_roll_ups(database: Engine) -> None:
    receive(database, scalar(c.LOSS, [*range(100), DAYS, DAYS + 1], [*range(100), 7.0, np.nan]))
    roll_up(database, until=DAYS)
    (one,) = series(database)
    assert [point["value"] for point in one["points"]] == [None, 7.0]
    assert one["rollups"] == [
        {
            "time": exactly(at(last)),
            "count": last - first + 1,
            "fields": {
                "value": {"nonfinite": 0, "min": first, "max": last, "mean": (first + last) / 2, "last": last}
            },
        }
        for first, last in ((64, 99), (0, 63))
    ]
    assert one["next_until"] is None


def test_values_that_were_not_finite_are_counted_and_null(database: Engine) -> None:
    receive(database, scalar(c.LOSS, range(66), [1.0] * 63 + [np.inf] + [np.nan] * 2))
    roll_up(database, until=DAYS)
    (one,) = series(database)
    newest, oldest = (rollup["fields"]["value"] for rollup in one["rollups"])
    assert newest == {"nonfinite": 2, "min": None, "max": None, "mean": None, "last": None}
    assert oldest == {"nonfinite": 1, "min": 1, "max": 1, "mean": 1, "last": None}


def test_points_and_roll_ups_are_paged_as_one(database: Engine) -> None:
    receive(database, scalar(c.LOSS, range(64 * 20), range(64 * 20)))
    receive(database, scalar(c.LOSS, range(DAYS, DAYS + 25), range(25)))
    roll_up(database, until=DAYS)
    seen: list[str] = []
    until = None
    while True:
        (one,) = series(database, points=10, until=until)
        page = sorted((each["time"] for each in (*one["points"], *one["rollups"])), reverse=True)
        assert 0 < len(page) <= 10
        seen += page
        if one["next_until"] is None:
            break
        until = parse_moment(one["next_until"])
    every = [*range(63, 64 * 20, 64), *range(DAYS, DAYS + 25)]
    assert seen == [exactly(at(second)) for second in sorted(every, reverse=True)]
    (one,) = series(database, since=at(64 * 18), until=at(DAYS))
    assert (len(one["points"]), len(one["rollups"])) == (1, 2)


def test_a_page_has_the_roll_ups_of_its_own_points(database: Engine) -> None:
    layers = [{c.LAYER_NAME: name} for name in "abc"]
    for rank in (0, 1):
        told = [[float(10 * rank + n)] * 64 for n in range(3)]
        receive(database, frame(c.LAYER_GRADIENT_NORM, layers, range(64), told), rank=rank)
        receive(database, frame(c.LAYER_GRADIENT_NORM, layers[1:2], [100], [[50.0]]), rank=rank)
    with transaction(database) as connection:
        connection.exec_driver_sql("UPDATE metric SET kind = 'gauge'")
    roll_up(database, until=DAYS)
    cursor, found = None, []
    with database.connect() as connection:
        while True:
            query = SeriesQuery("run", c.LAYER_GRADIENT_NORM.name, limit=2, cursor=cursor)
            page = list_series(connection, query)
            assert page is not None
            found += page["series"]
            if (cursor := page["next_cursor"]) is None:
                break
    assert [
        (each["rank"], each["labels"][c.LAYER_NAME], [r["fields"]["value"]["last"] for r in each["rollups"]])
        for each in found
    ] == [
        (rank, name, [*([50.0] if name == "b" else []), 10 * rank + n])
        for rank in (0, 1)
        for n, name in enumerate("abc")
    ]


def test_fields_of_a_histogram_have_statistics_each(database: Engine) -> None:
    told = {"count": [2.0, 4.0], "sum": [3.0, 9.0]}
    frames = [frame(c.LAYER_GRADIENT_NORM, [{}], [1, 2], [values], field) for field, values in told.items()]
    receive(database, *frames)
    roll_up(database, until=DAYS)
    (one,) = series(database, c.LAYER_GRADIENT_NORM)
    (rollup,) = one["rollups"]
    assert rollup["count"] == 2
    assert rollup["fields"] == {
        "count": {"nonfinite": 0, "min": 2, "max": 4, "mean": 3, "last": 4},
        "sum": {"nonfinite": 0, "min": 3, "max": 9, "mean": 6, "last": 9},
        "min": None,
        "max": None,
    }


def test_reading_costs_one_statement_more_where_nothing_is_rolled_up(database: Engine) -> None:
    receive(database, scalar(c.LOSS, range(10), range(10)))
    told: list[str] = []
    event.listen(database, "before_cursor_execute", lambda *called: told.append(called[2]))
    series(database)
    assert len([statement for statement in told if "rollup" in statement]) == 1
    told.clear()
    with database.connect() as connection:
        heat_map(connection, "run", c.LOSS.name)
    assert len([statement for statement in told if "rollup" in statement]) == 1


def test_a_heat_map_has_the_largest_of_what_was_rolled_up(database: Engine) -> None:
    layers = [{c.LAYER_NAME: name} for name in "ab"]
    random = np.random.default_rng(3)
    values = random.normal(size=(2, 640)).astype(np.float32).astype(float)
    values[1, 70] = np.nan
    values[0, 128:192] = np.nan
    receive(database, frame(c.LAYER_GRADIENT_NORM, layers, range(640), values.tolist()))
    receive(database, frame(c.LAYER_GRADIENT_NORM, layers, [2 * DAYS], [[1.0], [2.0]]))
    roll_up(database, until=DAYS)
    stretches = 2 * DAYS // 64  # a stretch for each bucket of the first day
    with database.connect() as connection:
        found = heat_map(connection, "run", c.LAYER_GRADIENT_NORM.name, stretches=stretches)
    assert found is not None
    assert found.edges[0] == at(63)
    buckets = values.reshape(2, 10, 64)
    largest = np.where(np.isnan(buckets).all(axis=2), np.nan, np.fmax.reduce(buckets, axis=2))
    known = found.values[:, ~np.isnan(found.values).all(axis=0) | found.nonfinite.any(axis=0)]
    np.testing.assert_array_equal(known, np.hstack([largest, [[1.0], [2.0]]]))
    assert found.nonfinite.sum() == 2
    assert found.nonfinite[0, 2]
    assert found.nonfinite[1, 1]


def test_the_command_line_shows_points_and_what_is_left_of_older_ones(
    database: Engine, database_url: str
) -> None:
    receive(database, scalar(c.LOSS, [*range(70), DAYS], [*range(70), 7.0]))
    roll_up(database, until=DAYS)
    shown = CliRunner().invoke(main, ["metrics", "show", c.LOSS.name, "--run", "run", "--db", database_url])
    assert shown.exit_code == 0, shown.output
    assert [line.split(None, 3)[-1] for line in shown.output.splitlines()[1:]] == [
        "7.0",
        "6 points: nonfinite=0 min=64.0 max=69.0 mean=66.5 last=69.0",
        "64 points: nonfinite=0 min=0.0 max=63.0 mean=31.5 last=63.0",
    ]
    as_json = ["metrics", "show", c.LOSS.name, "--run", "run", "--db", database_url, "--format", "json"]
    (one,) = json.loads(CliRunner().invoke(main, as_json).output)["series"]
    assert [rollup["count"] for rollup in one["rollups"]] == [6, 64]
