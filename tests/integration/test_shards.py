"""Shares of a sharded layer's norm meet by step, whatever the ranks' clocks and budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from sqlalchemy import Engine

from gradwatch import conventions as c
from gradwatch.testing import InMemoryExporter
from gradwatch_collector.api.layers import LayerSummary, layer_summaries
from gradwatch_collector.records import Batch, ProcessKey, Received
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.series import SeriesIds
from gradwatch_collector.storage.writing import store
from tests.batches import SECOND, START, frame, scalar, source
from tests.unit.agent.distributed_loops import STEPS, fsdp
from tests.unit.agent.ranks import on_ranks


def send(
    database: Engine,
    rank: int,
    ends: Sequence[float],
    shares: Mapping[str, Mapping[float, float]],
    **attributes: int,
) -> None:
    """A rank whose step ``i`` ended at ``ends[i]``, with shares of layers by their time."""
    frames = [scalar(c.STEP_INDEX, ends, range(len(ends)))] + [
        frame(
            c.LAYER_GRADIENT_SHARD_SQUARE, [{c.LAYER_NAME: layer, **attributes}], list(at), [list(at.values())]
        )
        for layer, at in shares.items()
    ]
    key = ProcessKey("run", 1, rank, "one")
    with transaction(database) as connection:
        store(connection, SeriesIds(), [Received(key, Batch(source(rank=rank), tuple(frames), (), ()), START)])


def relay(database: Engine, rank: int, exporter: InMemoryExporter) -> None:
    """What a rank of the agent exported, as the receiver would decode it."""
    steps = exporter.points(c.STEP_INDEX)
    shares: dict[str, dict[float, float]] = {}
    origin = steps[0].time
    for point in exporter.points(c.LAYER_GRADIENT_SHARD_SQUARE):
        at = (point.time - origin) / SECOND
        shares.setdefault(str(point.attributes[c.LAYER_NAME]), {})[at] = point.value
    send(database, rank, [(point.time - origin) / SECOND for point in steps], shares)


def layers(database: Engine) -> dict[str, LayerSummary]:
    with database.connect() as connection:
        return {layer.layer: layer for layer in layer_summaries(connection, "run", 1)}


def test_a_step_counts_where_every_rank_that_holds_the_layer_looked(database: Engine) -> None:
    send(database, 0, [1.0, 2.0, 3.0], {"a": {1.0: 9.0, 2.0: 1.0, 3.0: 25.0}, "b": {3.0: 4.0}})
    # Another clock, and a budget that leaves room for every second step only.
    send(database, 1, [7.5, 8.5, 9.5], {"a": {7.5: 16.0, 9.5: 144.0}})
    found = layers(database)
    assert (found["a"].steps_observed, found["a"].minimum, found["a"].maximum) == (2, 5.0, 13.0)
    assert found["a"].mean == pytest.approx(9.0)
    assert (found["b"].steps_observed, found["b"].mean) == (1, 2.0)


def test_a_nan_in_one_share_leaves_the_step_out_and_the_layer_in(database: Engine) -> None:
    send(database, 0, [1.0, 2.0], {"a": {1.0: 9.0, 2.0: math.nan}})
    send(database, 1, [1.0, 2.0], {"a": {1.0: 16.0, 2.0: 1.0}})
    assert (layers(database)["a"].steps_observed, layers(database)["a"].maximum) == (1, 5.0)


def test_a_second_optimizers_shares_belong_to_the_step_in_progress(database: Engine) -> None:
    optimizer = {c.OPTIMIZER: 1}
    send(database, 0, [1.0, 2.0], {"a": {0.5: 9.0, 1.5: 0.0, 2.5: 7.0}}, **optimizer)
    send(database, 1, [4.0, 5.0], {"a": {3.5: 16.0, 4.5: 1.0}}, **optimizer)
    found = layers(database)["a"]
    assert (found.optimizer, found.steps_observed, found.minimum, found.maximum) == (1, 2, 1.0, 5.0)


def test_what_two_ranks_of_a_sharded_model_export_is_the_dense_models_norm(
    database: Engine, tmp_path: Path
) -> None:
    ranks = on_ranks({"fsdp": fsdp}, tmp_path, {})["fsdp"]
    for number, rank in enumerate(ranks):
        relay(database, number, rank.exporter)
    dense = ranks[0].truth.norms
    found = layers(database)
    assert found.keys() == dense[0].keys()
    for layer, summary in found.items():
        norms = [step[layer] for step in dense]
        assert summary.steps_observed == STEPS
        assert summary.mean == pytest.approx(sum(norms) / STEPS, rel=1e-4)
        assert (summary.minimum, summary.maximum) == pytest.approx((min(norms), max(norms)), rel=1e-4)
