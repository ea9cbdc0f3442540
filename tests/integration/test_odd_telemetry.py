"""What OTLP lets a sender say and our agent never does: the run that it is about can be shown all the same."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from gradwatch import conventions as c
from tests.collector_process import Collector
from tests.fuzzing.samples import events_request
from tests.otlp_clients import ProtobufClient, attributes, gauge, metrics_request
from tests.schemas import valid

SECOND = 1_000_000_000
START = 1_750_000_000 * SECOND


def shown(served: Collector, *sent: Metric, **resource: Any) -> Any:
    """A run that sent these metrics, as the API shows it; ``resource`` by the names in conventions."""
    told = {c.RUN_ID: f"run-{uuid4().hex}", **{getattr(c, name): value for name, value in resource.items()}}
    with ProtobufClient(served.url, served.grpc) as client:
        assert client.send(events_request(told, [c.RUN_STARTED], START)).code == 0
        assert client.send(metrics_request(told, *sent)).code == 0
    answer = served.get(f"/api/v1/runs/{told[c.RUN_ID]}")
    assert answer.status_code == 200, answer.text
    valid(answer.json(), "run-detail")
    return answer.json()


def norms(optimizer: Any, **point: float) -> Metric:
    metric = Metric(name=c.LAYER_GRADIENT_NORM.name)
    labels = attributes({c.LAYER_NAME: "fc", c.OPTIMIZER: optimizer})
    metric.exponential_histogram.data_points.add(time_unix_nano=START, attributes=labels, **point)
    return metric


def test_norms_of_a_layer_may_come_without_sum_least_and_greatest(served: Collector) -> None:
    (layer,) = shown(served, norms(0, count=3))["layers"]
    assert (layer["steps_observed"], layer["mean"], layer["min"], layer["max"]) == (3, None, None, None)
    (layer,) = shown(served, norms(0, count=2, sum=3.0, max=float("inf")))["layers"]
    assert (layer["steps_observed"], layer["mean"], layer["min"], layer["max"]) == (2, 1.5, None, None)


@pytest.mark.parametrize("optimizer", ["Adam", [0, 1], {"lr": 1}, True, 1.5])
def test_an_optimizer_that_is_no_number_is_unknown(served: Collector, optimizer: Any) -> None:
    (layer,) = shown(served, norms(optimizer, count=1, sum=1.0))["layers"]
    assert layer["optimizer"] is None


def test_a_shard_of_an_optimizer_that_is_no_number_is_unknown(served: Collector) -> None:
    share = gauge(c.LAYER_GRADIENT_SHARD_SQUARE.name, (START, 4.0), **{c.LAYER_NAME: "fc", c.OPTIMIZER: [0]})
    (layer,) = shown(served, share, gauge(c.STEP_INDEX.name, (START, 0)))["layers"]
    assert (layer["optimizer"], layer["mean"]) == (None, 2.0)


def test_durations_that_cannot_be_are_no_time(served: Collector) -> None:
    times = range(START, START + 4 * SECOND, SECOND)
    found = shown(
        served,
        gauge(c.STEP_INDEX.name, *zip(times, range(4), strict=True)),
        gauge(c.STEP_DURATION.name, *zip(times, (1.7e308, 1.7e308, -1.0, 2.0), strict=True)),
        gauge(c.DATA_WAIT.name, *zip(times, (-1e300, float("nan"), float("inf"), 0.5), strict=True)),
    )["effective_time"]
    assert found["waiting_seconds"] == 0.5
    assert found["productive_seconds"] == pytest.approx(2e9 + 1.5)


def test_a_run_of_which_only_a_supervisor_spoke_has_no_ranks(served: Collector) -> None:
    assert shown(served, SUPERVISOR=True)["rank_count"] == 0


def test_no_path_leads_elsewhere(served: Collector) -> None:
    for path in ("/v1/metrics/", "/api/v1/metrics/", "/metrics/"):
        assert served.get(path, allow_redirects=False).status_code == 404
