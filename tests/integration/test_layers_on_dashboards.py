"""The heat map's query: which norm is in which cell, however the numbers came and however they are stored."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from gradwatch_collector.storage import database as db
from gradwatch_collector.storage.compaction import compact
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.rollups import roll_up
from tests.batches import at
from tests.grafana import View
from tests.told_runs import LAYERS, tell_run

pytestmark = pytest.mark.postgresql

DASHBOARD = Path(__file__).parents[2] / "dashboards" / "grafana" / "gradwatch-run.json"
(QUERY,) = (
    target["rawSql"]
    for panel in json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    if panel["type"] == "heatmap"
    for target in panel["targets"]
)
YEAR = 365 * 86_400 * 1_000_000_000


@pytest.fixture
def database(new_database: Callable[[str], str]) -> Iterator[Engine]:
    engine = db.connect(new_database("postgresql"))
    yield engine
    engine.dispose()


def cells(database: Engine, since: float = -10, until: float = 1000) -> dict[tuple[int, str], float | None]:
    view = View(at(since) / 1e9, at(until) / 1e9, chosen={"run_id": "run"})
    with database.connect() as connection:
        found = connection.execute(text(view.sql(QUERY).replace(":", r"\:"))).all()
    return {(int(step), layer): norm for step, layer, norm in found}


def largest(losses: list[float], layer: int, first: int, width: int) -> float:
    """What `tell_run` says of a layer within some steps, in decades."""
    return math.log10((layer + 1) * max(losses[first : first + width]))


def test_a_cell_has_the_largest_norm_of_its_steps(database: Engine) -> None:
    losses = [2.0**-step for step in range(20)]
    tell_run(database, "run", 0, losses=losses)
    found = cells(database)
    # Two reports a cell, and the first layer first.
    assert list(found) == [(step, layer) for step in range(0, 20, 2) for layer in LAYERS]
    for (step, layer), norm in found.items():
        assert norm == pytest.approx(largest(losses, LAYERS.index(layer), step, 2))


def test_shards_of_a_layer_are_put_together(database: Engine) -> None:
    losses = [1.0 + step for step in range(20)]
    for rank in (0, 1):
        tell_run(database, "run", rank / 10, losses=losses, rank=rank, share=0.5)
    for (step, layer), norm in cells(database).items():
        assert norm == pytest.approx(largest(losses, LAYERS.index(layer), step, 2))


def test_of_a_layer_whose_shards_are_not_all_there_nothing_is_told(database: Engine) -> None:
    tell_run(database, "run", 0, share=0.5)
    tell_run(database, "run", 0, rank=1, share=0.5, layers=LAYERS[:1])
    assert {layer for (_, layer), norm in cells(database).items() if norm is not None} == {LAYERS[0]}


def test_what_is_not_finite_is_a_gap_and_what_is_zero_is_as_cold_as_it_gets(database: Engine) -> None:
    tell_run(database, "run", 0, losses=[math.nan, math.nan, 0, 0, 1, 1, math.inf, math.inf])
    found = cells(database)
    assert [found[step, LAYERS[0]] for step in (0, 2, 4, 6)] == [None, -12, 0, None]


def test_only_what_is_of_the_time_that_is_shown_is_in_it(database: Engine) -> None:
    tell_run(database, "run", 0, seconds=21, losses=[1.0] * 20)
    assert {step for step, _ in cells(database, 4.5, 8.5)} == {4, 6}


def test_a_map_is_the_same_after_compaction_and_keeps_its_peaks_when_it_is_rolled_up(database: Engine) -> None:
    losses = [1.0] * 50 + [100.0] + [1.0] * 149
    tell_run(database, "run", 0, seconds=200, losses=losses)
    before = cells(database)
    with transaction(database) as connection:
        assert compact(connection, YEAR * 60).blocks
    assert cells(database) == before
    with transaction(database) as connection:
        assert roll_up(connection, YEAR * 60, YEAR * 60).blocks
    rolled_up = cells(database)
    assert len(rolled_up) < len(before)
    assert max(norm for norm in rolled_up.values() if norm is not None) == pytest.approx(math.log10(200))
