"""Packed columns: what is written byte by byte is what protobuf reads, and no step is lost on the way."""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from torch import nn

import gradwatch
from gradwatch import conventions as names
from gradwatch.aggregate import LayerAggregate, aggregate_rows
from gradwatch.calibration import thin_cost
from gradwatch.interval import Interval
from gradwatch.packed_otlp import metrics_request
from gradwatch.step_log import MOST_WAITING
from gradwatch.telemetry import MetricSeries, Point
from gradwatch.testing import InMemoryExporter

Watching = Callable[..., gradwatch.Watch]
ATTRIBUTES = st.dictionaries(
    st.text(max_size=200),
    st.text() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.booleans() | st.binary(),
    max_size=4,
)
TIMES = st.integers(0, 2**63 - 1)
SERIES = st.one_of(
    st.tuples(st.just("d"), st.lists(st.tuples(TIMES, st.floats()), max_size=300)),
    st.tuples(st.just("q"), st.lists(st.tuples(TIMES, st.integers(-(2**63), 2**63 - 1)), max_size=300)),
)


def same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


@given(ATTRIBUTES, SERIES)
def test_packed_series_read_back_as_protobuf(
    attributes: dict[str, str], packed: tuple[str, list[tuple[int, float]]]
) -> None:
    typecode, points = packed
    series = MetricSeries(
        names.LOSS, attributes, array("q", [t for t, _ in points]), array(typecode, [v for _, v in points])
    )
    resource = Resource(attributes=[KeyValue(key="a", value=AnyValue(int_value=1))])
    scope = InstrumentationScope(name="gradwatch")
    request = ExportMetricsServiceRequest.FromString(
        metrics_request(resource.SerializeToString(), scope.SerializeToString(), [series, series])
    )
    (owner,) = request.resource_metrics
    assert owner.resource == resource
    assert owner.scope_metrics[0].scope == scope
    first, second = owner.scope_metrics[0].metrics
    assert first == second or any(map(math.isnan, series.values))
    assert (first.name, first.description, first.unit) == (
        names.LOSS.name, names.LOSS.description, names.LOSS.unit,
    )  # fmt: skip
    read = first.gauge.data_points
    assert [point.time_unix_nano for point in read] == list(series.times)
    which = "as_double" if typecode == "d" else "as_int"
    assert {point.WhichOneof("value") for point in read} <= {which}
    assert all(same(getattr(p, which), v) for p, v in zip(read, series.values, strict=True))
    for point in read:
        told = {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in point.attributes}
        assert told.keys() == attributes.keys()
        assert all(same(told[key], value) if isinstance(value, float) else told[key] == value
                   for key, value in attributes.items())  # fmt: skip


@given(
    st.integers(1, 4).flatmap(
        lambda width: st.lists(
            st.lists(
                st.floats(0.0, allow_infinity=True) | st.sampled_from([0.0, 5e-324, math.nan, 1.7e308]),
                min_size=width,
                max_size=width,
            ),
            min_size=1,
            max_size=20,
        )
    )
)
def test_rows_are_aggregated_as_one_value_at_a_time(rows: list[list[float]]) -> None:
    packed = [LayerAggregate() for _ in rows[0]]
    aggregate_rows(array("d", [norm for row in rows for norm in row]), packed)
    for layer, aggregate in enumerate(packed):
        single = LayerAggregate()
        for row in rows:
            single.add(row[layer])
        told, expected = aggregate.point(1, 2, {}), single.point(1, 2, {})
        if expected is None or told is None:
            assert told is expected
        else:
            assert told._replace(sum=0.0) == expected._replace(sum=0.0)
            assert told.sum == pytest.approx(expected.sum)


@pytest.mark.parametrize("every", [1, 7, None])
def test_every_step_arrives_once_with_its_own_numbers_while_exports_run_beside_it(
    exporter: InMemoryExporter, every: int | None
) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias], "lr": 1e-9}], lr=0.5)
    losses, rates = [], []
    with gradwatch.watch(model, optimizer, every=every, exporter=exporter, export_interval=0.001) as watch:
        for step in range(2000):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 3)).square().mean() * (step + 1)
            loss.backward()
            if step % 5 == 0:
                optimizer.param_groups[0]["lr"] = 1e-12 * step
            optimizer.step()
            losses.append(loss.item())
            rates.append(optimizer.param_groups[0]["lr"])
            if step % 97 == 0:
                losses[-1] = float(step)
                watch.log(loss=float(step))
    assert len(exporter.metrics) > 20
    steps = {point.time: int(point.value) for point in exporter.points(names.STEP_INDEX)}
    assert list(steps.values()) == list(range(2000))
    assert list(steps) == sorted(steps)
    told = {steps[point.time]: point.value for point in exporter.points(names.LOSS)}
    assert told == dict(enumerate(losses))
    for group, expected in ((0, rates), (1, [1e-9] * 2000)):
        points = exporter.points(names.LEARNING_RATE, **{names.PARAM_GROUP: group})
        assert {steps[point.time]: point.value for point in points} == dict(enumerate(expected))
    observed = [int(point.value) for point in exporter.points(names.OBSERVED_STEPS)]
    assert sum(observed) == len(exporter.values(names.GRADIENT_NORM))
    if every is not None:
        assert [steps[p.time] for p in exporter.points(names.GRADIENT_NORM)] == list(range(0, 2000, every))
    durations = exporter.points(names.STEP_DURATION)
    ends = list(steps)
    assert [p.time for p in durations] == ends[1:]
    assert [p.value for p in durations] == pytest.approx([(b - a) / 1e9 for a, b in pairwise(ends)])


def test_steps_nobody_takes_are_given_up_and_counted() -> None:
    interval = Interval(0)
    log = interval.open_log(0, 0)
    log.leads = True
    for end in range(MOST_WAITING + 1):
        log.losses.append(1.0)
        log.ends.append(end + 1)
    assert log.is_full()
    fresh = interval.open_log(0, MOST_WAITING + 1)
    fresh.losses.append(2.0)
    fresh.ends.append(MOST_WAITING + 2)
    fresh.closed = True
    batches = {batch.metric.name: list(batch.points) for batch in interval.points(10**9, 1, 0)}
    (step,) = batches[names.STEP_INDEX.name]
    assert isinstance(step, Point)
    assert step.value == MOST_WAITING + 1
    (dropped,) = batches[names.AGENT_DROPPED.name]
    assert isinstance(dropped, Point)
    assert dropped.value == MOST_WAITING + 1


def test_a_target_for_the_captured_loss_is_reached_at_its_step(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watching(model, optimizer, every=1000, target="loss<=0.5"):
        for step in range(40):
            optimizer.zero_grad()
            (model(torch.zeros(1, 1)).sum() * 0 + (0.4 if step >= 30 else 1.0)).backward()
            optimizer.step()
    (event,) = exporter.find_events(names.TARGET_REACHED.name)
    assert event.attributes[names.STEP] == 30
    assert event.attributes[names.TARGET_VALUE] == pytest.approx(0.4)


def test_calibration_measures_something_and_leaves_training_alone() -> None:
    state, threads = torch.get_rng_state(), threading.active_count()
    cost = thin_cost()
    assert 0 < cost < 10**7
    assert torch.equal(torch.get_rng_state(), state)
    assert threading.active_count() == threads


def test_overhead_counts_thin_steps_observed_steps_and_our_own_threads() -> None:
    interval = Interval(0)
    interval.thin_cost = 5_000.0
    log = interval.open_log(0, 0)
    log.leads = True
    log.closed = True
    for end in range(1, 12):
        log.losses.append(None)
        log.ends.append(end * 1_000_000)
    log.observed, log.spent = 1, 70_000
    (overhead,) = (
        batch.points[0]
        for batch in interval.points(10**9, 1, 0, background=30_000)
        if batch.metric is names.AGENT_OVERHEAD
    )
    assert isinstance(overhead, Point)
    assert overhead.value == pytest.approx((70_000 + 10 * 5_000 + 30_000) / 10_000_000)
