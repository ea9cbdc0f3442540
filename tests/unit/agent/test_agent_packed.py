"""Packed columns: what is written byte by byte is what protobuf reads, and no step is lost on the way."""

from __future__ import annotations

import gzip
import math
import os
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry._logs import LogRecord as SdkLogRecord
from opentelemetry._logs import SeverityNumber
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk.metrics import export as sdk
from opentelemetry.sdk.resources import Resource as SdkResource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope as SdkScope
from torch import nn

import gradwatch
from gradwatch import conventions as names
from gradwatch.export import exporter as exporter_module
from gradwatch.export.aggregate import LayerAggregate, _moves, aggregate_rows, bucket_index
from gradwatch.export.columns import tensor
from gradwatch.export.interval import Interval
from gradwatch.export.otlp import _is_compressed
from gradwatch.export.otlp_encoding import encoded_resource, logs_request, metrics_request
from gradwatch.export.otlp_values import encoded_attribute
from gradwatch.export.spool_records import gzipped
from gradwatch.loop.calibration import thin_cost
from gradwatch.loop.loss import LossCapture
from gradwatch.loop.observer import StepObserver
from gradwatch.loop.step_log import MOST_WAITING
from gradwatch.telemetry import Event, HistogramPoint, MetricPoints, MetricSeries, Point, StepRecord
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
    request = ExportMetricsServiceRequest.FromString(
        metrics_request(resource.SerializeToString(), [series, series])
    )
    (owner,) = request.resource_metrics
    assert owner.resource == resource
    assert owner.scope_metrics[0].scope == InstrumentationScope(name="gradwatch")
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
    matrix = torch.tensor(rows, dtype=torch.float64)
    # Blocks of which some have nothing but normal numbers in them, and others have everything.
    for layer, statistics in enumerate(aggregate_rows(matrix.split(3))):
        single = LayerAggregate()
        for row in rows:
            single.add(row[layer])
        expected = single.point(1, 2, {})
        if expected is None or statistics is None:
            assert statistics is expected
        else:
            told = HistogramPoint(1, 2, {}, *statistics)
            assert told._replace(sum=0.0) == expected._replace(sum=0.0)
            assert told.sum == pytest.approx(expected.sum)


def test_at_every_bound_a_bucket_by_bits_is_the_bucket_by_definition() -> None:
    bounds = {
        math.ldexp(2.0 ** (i / 8 - 1), e) for e in range(-1074, 1025) for i in range(8) if e < 1024 or i < 1
    }
    values = sorted(
        near
        for bound in bounds
        for near in (math.nextafter(bound, 0.0), bound, math.nextafter(bound, math.inf))
        if 0.0 < near < math.inf
    )
    told = aggregate_rows([torch.tensor([values], dtype=torch.float64)])
    assert [layer.offset for layer in told if layer] == [bucket_index(value) for value in values]
    assert all(layer and layer.buckets == [1] for layer in told)


def test_the_users_default_device_and_dtype_stay_out_of_our_numbers() -> None:
    matrix = torch.rand(5, 3, dtype=torch.float64)
    expected = aggregate_rows([matrix])
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float16)
    _moves.cache_clear()
    try:
        assert aggregate_rows([matrix]) == expected
        assert tensor(array("d")).device.type == "cpu"
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        _moves.cache_clear()


def test_layers_of_several_layouts_are_one_point_each() -> None:
    interval = Interval(0)
    log = interval.open_log(0, 0)
    log.closed = True
    first, second = ("a", "b", "c"), ("c", "d")
    seen: dict[str, list[float]] = {}
    for step in range(50):
        layers, indices = ((first, (0, 1, 2)), (first, (0, 2)), (second, (0, 1)))[step % 3]
        norms = [math.nan if (step + i) % 7 == 0 else 0.1 * step + i for i in indices]
        for i, norm in zip(indices, norms, strict=True):
            seen.setdefault(layers[i], []).extend([norm] if math.isfinite(norm) else [])
        log.add(StepRecord(0, step, step + 1, None, layers, indices, norms, 1.0, False, False, 0))
        log.losses.append(None)
        log.ends.append(step + 1)
    (histograms,) = (b for b in interval.points(10**9, 1, 0) if b.metric is names.LAYER_GRADIENT_NORM)
    told = {point.attributes[names.LAYER_NAME]: point for point in histograms.points}
    assert told.keys() == seen.keys()
    assert len(histograms) == 4
    for layer, norms in seen.items():
        single = LayerAggregate()
        for norm in norms:
            single.add(norm)
        expected = single.point(0, 10**9, {names.LAYER_NAME: layer})
        assert isinstance(expected, HistogramPoint)
        assert told[layer]._replace(sum=0.0) == expected._replace(sum=0.0)
        assert told[layer].sum == pytest.approx(expected.sum)
    assert interval.points(2 * 10**9, 1, 0) != []
    assert all(len(rows.norms) == 0 for rows in log.rows)


# --- What the SDK's own encoders would have sent -----------------------------------------------------------

NUMBERS = st.builds(
    Point, TIMES, st.floats(allow_nan=False) | st.integers(-(2**63), 2**63 - 1), ATTRIBUTES, TIMES
)  # fmt: skip
HISTOGRAMS = st.builds(
    HistogramPoint, TIMES, TIMES, ATTRIBUTES, st.integers(0, 2**62), st.floats(allow_nan=False),
    st.floats(allow_nan=False), st.floats(allow_nan=False), st.integers(0, 2**62), st.integers(-9000, 9000),
    st.lists(st.integers(0, 2**62), max_size=40),
)  # fmt: skip
SDK_ATTRIBUTES = st.dictionaries(
    st.text(min_size=1, max_size=200),
    st.text() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans(),
    max_size=4,
)


def sdk_metric(batch: MetricPoints) -> sdk.Metric:
    data: Any
    if batch.metric.kind == "exponential_histogram":
        points: list[Any] = [
            sdk.ExponentialHistogramDataPoint(
                p.attributes, p.start, p.time, p.total, p.sum, 3, p.zero_count,
                sdk.Buckets(p.offset, list(p.buckets)), sdk.Buckets(0, []), 0, p.minimum, p.maximum,
            )
            for p in batch.points if isinstance(p, HistogramPoint)
        ]  # fmt: skip
        data = sdk.ExponentialHistogram(points, sdk.AggregationTemporality.DELTA)
    else:
        points = [
            sdk.NumberDataPoint(p.attributes, p.start, p.time, p.value)
            for p in batch.points
            if isinstance(p, Point)
        ]
        is_sum = batch.metric.kind == "sum"
        data = sdk.Sum(points, sdk.AggregationTemporality.DELTA, True) if is_sum else sdk.Gauge(points)
    return sdk.Metric(batch.metric.name, batch.metric.description, batch.metric.unit, data)


def comparable(attributes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if not isinstance(value, float) or value == value}


@given(*(st.lists(points, min_size=1, max_size=5) for points in (NUMBERS, NUMBERS, HISTOGRAMS)))
def test_points_are_what_the_sdk_would_have_sent(
    gauges: list[Point], sums: list[Point], histograms: list[HistogramPoint]
) -> None:
    clean: Any = lambda points: [p._replace(attributes=comparable(p.attributes)) for p in points]  # noqa: E731
    batches = [
        MetricPoints(names.LOGGED, clean([gauge._replace(start=0) for gauge in gauges])),
        MetricPoints(names.OBSERVED_STEPS, clean(sums)),
        MetricPoints(names.LAYER_GRADIENT_NORM, clean(histograms)),
    ]
    attributes = {"service.name": "job", "training.rank": 3}
    scope = sdk.ScopeMetrics(SdkScope("gradwatch"), [sdk_metric(batch) for batch in batches], "")
    expected = encode_metrics(sdk.MetricsData([sdk.ResourceMetrics(SdkResource(attributes), [scope], "")]))
    told = metrics_request(encoded_resource(attributes), batches)
    assert ExportMetricsServiceRequest.FromString(told) == expected


def test_a_negative_zero_is_not_taken_for_the_zero_before_it() -> None:
    told = [encoded_attribute(7, "training.x", zero) for zero in (0.0, -0.0)]
    assert told[0] != told[1]


@given(st.lists(st.tuples(TIMES, SDK_ATTRIBUTES), min_size=1, max_size=4))
def test_events_are_what_the_sdk_would_have_sent(events: list[tuple[int, dict[str, Any]]]) -> None:
    attributes = {"service.name": "job"}
    told = logs_request(encoded_resource(attributes), [Event("training.x", t, known) for t, known in events])
    records = [
        ReadableLogRecord(
            SdkLogRecord(
                timestamp=t, observed_timestamp=t, severity_number=SeverityNumber.INFO, attributes=known,
                event_name="training.x",
            ),
            SdkResource(attributes),
            SdkScope("gradwatch"),
        )
        for t, known in events
    ]  # fmt: skip
    expected = encode_logs(records)
    assert ExportLogsServiceRequest.FromString(told) == expected


def test_half_a_character_does_not_cost_the_event() -> None:
    told = logs_request(b"", [Event("x", 1, {"path": "a\udcff", "data": b"\xff"})])
    (record,) = ExportLogsServiceRequest.FromString(told).resource_logs[0].scope_logs[0].log_records
    assert [pair.value.string_value or pair.value.bytes_value for pair in record.attributes] == ["a?", b"\xff"]


def test_an_export_starts_no_threads_of_torchs_own() -> None:
    """Torch's pool belongs to the thread that computes: one of ours would take a core from training."""
    code = """
import os, threading, torch
from gradwatch import conventions as names
from gradwatch.export.interval import Interval
from gradwatch.export.otlp_encoding import metrics_request
from gradwatch.telemetry import StepRecord

def export():
    interval = Interval(0)
    log = interval.open_log(0, 0)
    log.leads = log.closed = True
    layers = tuple(map(str, range(400)))
    for step in range(40_000):
        if step % 100 == 0:
            some = tuple(range(step % 3, 400))
            row = [0.0 if step == 900 else 1.0 + i for i in some]
            log.add(StepRecord(0, step, step + 1, None, layers, some, row, 1.0, False, False, 0))
        log.losses.append(1.0)
        log.ends.append(step + 1)
    before = len(os.listdir("/proc/self/task"))
    log.last_steps(30_000)
    metrics_request(b"", interval.points(10**9, 1, 0))
    print(len(os.listdir("/proc/self/task")) - before)

thread = threading.Thread(target=export)
thread.start()
thread.join()
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"}
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert told.stdout.split() == ["0"]


def test_a_pacer_rests_after_its_slice_of_processor_time_and_not_after_a_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, used, rests = [100.0], [5.0], []

    class Clocks:
        perf_counter = staticmethod(lambda: now[0])
        thread_time = staticmethod(lambda: used[0])
        sleep = staticmethod(lambda seconds: rests.append(used[0]))

    monkeypatch.setattr(exporter_module, "time", Clocks)
    pace = exporter_module.Pacer()
    pace()
    rests.clear()
    for _ in range(200):  # pieces of 50 us, each after training had the lock for 5 ms
        now[0] += 0.00505
        used[0] += 0.00005
        pace()
    assert len(rests) == pytest.approx(200 * 0.00005 / 0.0003, rel=0.2)
    assert max(b - a for a, b in pairwise(rests)) < 0.001


@pytest.mark.parametrize("every", [1, 7, None])
def test_every_step_arrives_once_with_its_own_numbers_while_exports_run_beside_it(
    exporter: InMemoryExporter, every: int | None
) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias], "lr": 1e-9}], lr=0.5)
    losses, rates = [], []
    with gradwatch.watch(model, optimizer, every=every, exporter=exporter, export_interval=0.001) as watch:
        for step in range(1000):
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
    assert list(steps.values()) == list(range(1000))
    assert list(steps) == sorted(steps)
    told = {steps[point.time]: point.value for point in exporter.points(names.LOSS)}
    assert told == dict(enumerate(losses))
    for group, expected in ((0, rates), (1, [1e-9] * 1000)):
        points = exporter.points(names.LEARNING_RATE, **{names.PARAM_GROUP: group})
        assert {steps[point.time]: point.value for point in points} == dict(enumerate(expected))
    observed = [int(point.value) for point in exporter.points(names.OBSERVED_STEPS)]
    assert sum(observed) == len(exporter.values(names.GRADIENT_NORM))
    if every is not None:
        assert [steps[p.time] for p in exporter.points(names.GRADIENT_NORM)] == list(range(0, 1000, every))
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


@pytest.mark.parametrize("slow", ["hook", "backward"])
def test_calibration_finds_what_hooks_and_wrappers_cost(monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    def slowed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            time.sleep(0.002)
            return function(*arguments, **named)

        return run

    owner, name = (StepObserver, "observe_thinly") if slow == "hook" else (LossCapture, "wrap_backward")
    make = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: slowed(make(*arguments)))
    assert thin_cost() > 1_000_000


def test_calibration_does_not_mind_what_training_has_set() -> None:
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            assert thin_cost() > 0
    finally:
        torch.set_default_dtype(kept)


def test_overhead_counts_thin_steps_observed_steps_and_our_own_threads() -> None:
    interval = Interval(0)
    interval.thin_cost = 5_000.0
    log = interval.open_log(0, 0)
    log.leads = True
    log.closed = True
    for end in range(1, 12):
        log.losses.append(None)
        log.ends.append(end * 1_000_000)
    log.observe(1_000_000, ("layer",), (0,), [1.0], 1.0)
    log.spent = 70_000
    (overhead,) = (
        batch.points[0]
        for batch in interval.points(10**9, 1, 0, background=30_000)
        if batch.metric is names.AGENT_OVERHEAD
    )
    assert isinstance(overhead, Point)
    assert overhead.value == pytest.approx((70_000 + 10 * 5_000 + 30_000) / 10_000_000)


def test_the_steps_that_were_observed_are_those_in_the_histograms_of_the_same_interval() -> None:
    """The last step, whose loss may still be replaced, is in neither."""
    interval = Interval(0)
    log = interval.open_log(0, 0)
    for closed, counted in ((False, 2), (True, 1)):
        for end in range(0 if closed else 3):
            log.losses.append(None)
            log.ends.append(end)
            log.observe(end, ("layer",), (0,), [1.0], 1.0)
        log.closed = closed
        points = {
            batch.metric: batch.points[0] for batch in interval.points(9, 1, 0) if hasattr(batch, "points")
        }
        assert points[names.OBSERVED_STEPS].value == counted
        assert points[names.LAYER_GRADIENT_NORM].total == counted


@pytest.mark.parametrize(
    ("url", "environ", "compressed"),
    [
        ("http://localhost:4318/v1/logs", {}, False),
        ("http://127.0.0.2:4318/v1/logs", {}, False),
        ("http://[::1]:4318/v1/logs", {}, False),
        ("http://10.0.0.1:4318/v1/logs", {}, True),
        ("https://collector/v1/logs", {}, True),
        ("https://collector/v1/logs", {"OTEL_EXPORTER_OTLP_COMPRESSION": "none"}, False),
        ("http://localhost/v1/logs", {"OTEL_EXPORTER_OTLP_LOGS_COMPRESSION": "gzip"}, True),
    ],
)
def test_what_leaves_the_machine_is_compressed_unless_told(
    url: str, environ: dict[str, str], compressed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OTEL_EXPORTER_OTLP_COMPRESSION", "OTEL_EXPORTER_OTLP_LOGS_COMPRESSION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert _is_compressed("logs", url) is compressed
    body = bytes(range(256)) * 400
    assert gzip.decompress(gzipped(body)) == body
