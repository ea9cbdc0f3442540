"""A heat map says of every cell what a dense computation over all stored values says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine

from gradwatch import conventions as c
from gradwatch_collector.api.heat_map import HeatMap, heat_map
from gradwatch_collector.records import Batch, Frame, MetricIdentity, ProcessKey, Received, Source
from gradwatch_collector.storage.compaction import compact
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.series import SeriesIds, attribute_set
from gradwatch_collector.storage.writing import store

METRIC = MetricIdentity("norm", "1", "gauge")
YEAR = 365 * 86_400 * 1_000_000_000


def layers(*names: str) -> Any:
    return attribute_set([{c.LAYER_NAME: name} for name in names])


def keep(database: Engine, points: Any, times: Any, values: Any, rank: int = 0) -> None:
    key = ProcessKey("run", 1, rank, f"r{rank}")
    frame = Frame(METRIC, "value", points, np.asarray(times, np.int64), np.asarray(values))
    source = Source("run", 1, rank, key.instance, {})
    with transaction(database) as connection:
        store(connection, SeriesIds(), [Received(key, Batch(source, (frame,)), 1)])


def read(database: Engine, **options: Any) -> HeatMap | None:
    with database.connect() as connection:
        return heat_map(connection, "run", "norm", **options)


def dense(times: Any, values: Any, edges: Any) -> tuple[Any, Any]:
    """Cell by cell, the slow way."""
    found = np.full((len(values), len(edges) - 1), np.nan)
    bad = np.zeros(found.shape, bool)
    for row, column in np.ndindex(found.shape):
        inside = values[row][(edges[column] <= times) & (times < edges[column + 1])]
        finite = inside[np.isfinite(inside)]
        found[row, column] = finite.max() if finite.size else np.nan
        bad[row, column] = len(finite) < len(inside)
    return found, bad


@pytest.mark.parametrize("compacted", [False, True], ids=["frames", "blocks"])
@pytest.mark.parametrize("stretches", [1, 7, 500])
def test_every_cell_is_the_largest_finite_value_of_its_time(
    database: Engine, stretches: int, compacted: bool
) -> None:
    random = np.random.default_rng(7)
    times = np.cumsum(random.integers(1, 1000, 300)) * 1_000
    values = random.normal(size=(5, 300)).astype(np.float32)
    values[random.random(values.shape) < 0.05] = np.nan
    values[3, 17:40] = np.inf
    for start in range(0, 300, 50):
        keep(database, layers(*"abcde"), times[start : start + 50], values[:, start : start + 50])
    if compacted:
        with transaction(database) as connection:
            assert compact(connection, YEAR * 60).blocks
    found = read(database, stretches=stretches)
    assert found is not None
    assert [row[c.LAYER_NAME] for row in found.rows] == list("abcde")
    wanted, bad = dense(times, values, found.edges)
    np.testing.assert_array_equal(found.values, wanted)
    np.testing.assert_array_equal(found.nonfinite, bad)


def test_ranks_and_split_sets_share_the_rows_of_their_layers(database: Engine) -> None:
    keep(database, layers("a", "b"), [1000, 2000], [[1.0, 5.0], [2.0, 6.0]])
    keep(database, layers("b", "c"), [1000, 2000], [[9.0, 3.0], [4.0, 8.0]], rank=1)
    found = read(database, stretches=2)
    assert found is not None
    assert [row[c.LAYER_NAME] for row in found.rows] == ["a", "b", "c"]
    np.testing.assert_array_equal(found.values, [[1, 5], [9, 6], [4, 8]])
    of_one = read(database, stretches=2, rank=1)
    assert of_one is not None
    assert [row[c.LAYER_NAME] for row in of_one.rows] == ["b", "c"]


def test_integers_and_floats_of_one_layer_meet(database: Engine) -> None:
    keep(database, layers("a"), [1000], np.array([[3]], np.int64))
    keep(database, layers("a"), [2000], [[0.5]])
    found = read(database, stretches=2)
    assert found is not None
    np.testing.assert_array_equal(found.values, [[3.0, 0.5]])


def test_the_newest_time_is_in_the_last_cell_whatever_its_nanoseconds(database: Engine) -> None:
    newest = 1_750_000_000_000_000_000
    keep(database, layers("a"), [newest - 1_000_003, newest], [[1.0, 2.0]])
    found = read(database, stretches=3)
    assert found is not None
    assert found.edges.tolist() == [newest - 1_000_003, newest - 666_669, newest - 333_334, newest + 1]
    np.testing.assert_array_equal(found.values, [[1.0, np.nan, 2.0]])


def test_a_run_without_such_numbers_has_no_map(database: Engine) -> None:
    assert read(database) is None
