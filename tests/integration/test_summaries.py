"""What is known of a run once it is over, on real databases: against plain computations of what was told."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality
from sqlalchemy import Engine, func, select

from gradwatch import conventions as c
from gradwatch_collector.objectives import summaries
from gradwatch_collector.objectives.changes import load_changed
from gradwatch_collector.objectives.evaluation import evaluate_objectives
from gradwatch_collector.objectives.exclusions import What, exclude
from gradwatch_collector.objectives.summaries import SETTLES_AFTER, summarise_due
from gradwatch_collector.otlp.metrics import MetricsDecoder
from gradwatch_collector.records import Frame
from gradwatch_collector.runs.silence import mark_silent
from gradwatch_collector.runs.step_health import HEALTHY, unhealthy
from gradwatch_collector.service.lease import Lease, LeaseLostError
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.compaction import compact
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.retention import Policy, prune
from gradwatch_slo.cost import PriceTable
from gradwatch_slo.indicators import Selection, Threshold
from gradwatch_slo.objectives import default_objectives
from tests.batches import SECOND, at, batch, event, frame, scalar, source
from tests.told_runs import tell, tell_run

PAGE = (Path(__file__).parents[2] / "docs" / "slo.md").read_text("utf-8")
HOUR = 3600
DAY = 86_400
SETTLED = SETTLES_AFTER / SECOND
PRICES = PriceTable("EUR", {"NVIDIA H200": Decimal("3.60")}, Decimal("0.36"))
GPU = {c.DEVICE_NAME: "NVIDIA H200"}


def summarised(
    database: Engine, run_id: str, *, seconds: float = 100 * DAY, prices: PriceTable | None = None
) -> dict[str, Any]:
    """The run's row, once all that is due by then is done."""
    while not summarise_due(database, lambda: transaction(database), prices, at(seconds)):
        pass
    return row(database, run_id)


def row(database: Engine, run_id: str) -> dict[str, Any]:
    with database.connect() as connection:
        found = connection.execute(
            select(schema.run_summary).where(schema.run_summary.c.run_id == run_id)
        ).mappings()
        return dict(found.one())


def due(database: Engine) -> int:
    with database.connect() as connection:
        return connection.scalar(select(func.count()).select_from(schema.summary_due)) or 0


def forget_changes(database: Engine) -> None:
    with transaction(database) as connection:
        connection.execute(schema.run_change.delete())


# --- Steps -----------------------------------------------------------------------------------------------


def plainly_unhealthy(norms: Sequence[float]) -> int:
    """One by one, as the page says it."""
    bad, usual = 0, list[float]()
    for norm in norms:
        if not math.isfinite(norm) or norm <= 0:
            bad += 1
            continue
        if len(usual) >= 16:
            median = statistics.median(usual[-64:])
            bad += norm > 10 * median or norm < median / 1000
        usual.append(norm)
    return bad


def wild(count: int, seed: int = 1) -> list[float]:
    """Norms that fall over the training, with noise, spikes, zeros and what is not finite."""
    rng = np.random.default_rng(seed)
    norms = np.exp(-np.linspace(0, 9, count)) * rng.lognormal(0, 0.5, count)
    kind = rng.random(count)
    norms[kind < 0.02] *= 100
    norms[(kind > 0.03) & (kind < 0.04)] *= 1e-5
    norms[(kind > 0.05) & (kind < 0.06)] = 0
    norms[(kind > 0.07) & (kind < 0.08)] = np.inf
    norms[(kind > 0.09) & (kind < 0.10)] = np.nan
    return [float(norm) for norm in norms]


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 63, 64, 65, 66, 1000, 40_000])
def test_a_norm_is_held_against_the_median_of_those_before_it(count: int) -> None:
    norms = wild(count, seed=count)
    assert unhealthy(np.array(norms)) == plainly_unhealthy(norms)


def test_a_run_that_converges_is_healthy_however_far_its_norms_fall() -> None:
    assert unhealthy(np.geomspace(100, 1e-6, 2000), HEALTHY) == 0


def told_norms(norms: Sequence[float], start: float = 0, first_step: int = 0) -> list[Frame]:
    ends = [start + 1 + step for step in range(len(norms))]
    return [
        scalar(c.STEP_INDEX, ends, [float(first_step + step) for step in range(len(norms))]),
        scalar(c.GRADIENT_NORM, ends, norms),
    ]


def tell_steps(
    database: Engine, run_id: str, norms: Sequence[float], *, rank: int = 0, attempt: int = 1, start: float = 0
) -> None:
    sender = source(run_id, rank=rank, attempt=attempt, instance=f"{run_id}-{attempt}-{rank}")
    end = start + len(norms) + 1
    tell(database, batch(sender, event(c.RUN_STARTED, start), frames=told_norms(norms, start)), end)
    tell(database, batch(sender, event(c.RUN_ENDED, end, 1, STATUS="succeeded")), end)


def test_steps_are_those_of_all_attempts_and_of_one_rank(database: Engine) -> None:
    norms = wild(500), wild(300, seed=2)
    for attempt, told in enumerate(norms, 1):
        for rank in (0, 1):
            tell_steps(database, "run", told, rank=rank, attempt=attempt, start=1000 * attempt)
    found = summarised(database, "run")
    assert (found["steps"], found["observed_steps"]) == (800, 800)
    assert found["unhealthy_steps"] == sum(map(plainly_unhealthy, norms))


def test_norms_of_sharded_gradients_are_put_together_before_they_are_judged(database: Engine) -> None:
    norms = wild(200)
    ends = [float(1 + step) for step in range(len(norms))]
    for rank, share in enumerate((0.25, 0.75)):
        sender = source("run", rank=rank, instance=str(rank))
        frames = [
            scalar(c.STEP_INDEX, ends, ends),
            scalar(c.GRADIENT_SHARD_SQUARE, ends, [share * norm * norm for norm in norms]),
        ]
        tell(database, batch(sender, event(c.RUN_STARTED, 0), frames=frames), 201)
        tell(database, batch(sender, event(c.RUN_ENDED, 201, 1, STATUS="succeeded")), 201)
    found = summarised(database, "run")
    assert (found["observed_steps"], found["unhealthy_steps"]) == (200, plainly_unhealthy(norms))


def counted(metric: c.Metric, *deltas: float) -> Frame:
    return scalar(metric, range(1, len(deltas) + 1), deltas)


def tell_ended(
    database: Engine, run_id: str, *frames: Frame, events: Sequence[Any] = (), rank: int = 0, **of: Any
) -> None:
    """A process that ran for an hour."""
    start = of.pop("start", 0)
    sender = source(run_id, rank=rank, attempt=of.pop("attempt", 1), instance=f"{run_id}-{rank}-{start}", **of)
    told = batch(sender, event(c.RUN_STARTED, start), *events, frames=frames)
    tell(database, told, start + HOUR)
    ended = event(c.RUN_ENDED, start + HOUR, 10_000, STATUS="succeeded")
    tell(database, batch(sender, ended), start + HOUR)


def test_nonfinite_steps_are_those_of_the_rank_that_saw_most_and_skipped_ones_are_apart(
    database: Engine,
) -> None:
    steps = scalar(c.STEP_INDEX, range(10), range(10))
    tell_ended(database, "run", steps, counted(c.NONFINITE, 0, 2, 1), counted(c.SKIPPED_STEPS, 4, 0, 1))
    tell_ended(database, "run", counted(c.NONFINITE, 1, 0, 1), counted(c.SKIPPED_STEPS, 4, 1, 1), rank=1)
    tell_ended(database, "run", counted(c.NONFINITE, 5), attempt=2, start=2 * HOUR)
    found = summarised(database, "run")
    assert (found["steps"], found["nonfinite_steps"], found["skipped_steps"]) == (10, 8, 6)


def test_there_are_at_least_as_many_steps_as_were_not_finite(database: Engine) -> None:
    told = event(c.NONFINITE_STEP, 5, 1, STEP=2, NONFINITE_STEPS=3)
    tell_ended(database, "run", scalar(c.STEP_INDEX, range(2), range(2)), events=[told])
    found = summarised(database, "run")
    assert (found["steps"], found["nonfinite_steps"]) == (3, 3)


def test_a_process_that_died_before_it_told_its_counter_is_believed_by_its_events(database: Engine) -> None:
    told = [event(c.NONFINITE_STEP, 5 + i, 1 + i, STEP=i, NONFINITE_STEPS=i + 1) for i in range(3)]
    tell_ended(database, "run", counted(c.NONFINITE, 1), events=told)
    assert summarised(database, "run")["nonfinite_steps"] == 3


def test_of_a_run_that_told_nothing_nothing_is_known(database: Engine) -> None:
    tell_ended(database, "run")
    found = summarised(database, "run", prices=PRICES)
    assert {name for name, value in found.items() if value is not None} == {
        "run_id",
        "checkpoints",
        "failed_checkpoints",
        "compared",
    }


# --- What was pruned ---------------------------------------------------------------------------------------


def prune_numbers(database: Engine) -> None:
    with transaction(database) as connection:
        while compact(connection, at(50 * DAY)).more:
            pass
    prune(lambda: transaction(database), Policy(raw=DAY * SECOND, rollups=300 * DAY * SECOND), at(50 * DAY))


def test_of_rolled_up_numbers_what_can_be_known_is_and_the_rest_is_not(database: Engine) -> None:
    rng = np.random.default_rng(5)
    calm = list(rng.uniform(1, 3, 1000))
    calm[700] = math.nan
    tell_steps(database, "calm", calm)
    tell_steps(database, "wild", wild(1000))
    for run_id in ("calm", "wild"):
        sender = source(run_id, instance=f"{run_id}-1-0", attempt=1)
        counts = [counted(c.NONFINITE, *[0, 3] * 100), _collectives({"all_reduce": [0.5] * 10}, 1001.0)]
        headroom = frame(c.DEVICE_MEMORY_HEADROOM, [{c.DEVICE: "cuda:0"}], range(100), [[0.5] * 99 + [0.25]])
        tell(database, batch(sender, frames=[*counts, headroom]), 1001)
    before = summarised(database, "calm", seconds=2000)
    assert (before["unhealthy_steps"], before["collective_p95"]) == (1, pytest.approx(0.5, rel=0.05))
    prune_numbers(database)
    for run_id in ("calm", "wild"):
        tell(database, batch(source(run_id, instance=f"{run_id}-1-0", attempt=1)), 50 * DAY)
    calm_now, wild_now = summarised(database, "calm"), summarised(database, "wild")
    for found in (calm_now, wild_now):
        assert (found["steps"], found["observed_steps"], found["nonfinite_steps"]) == (1000, 1000, 300)
        assert found["memory_headroom"] == 0.25
        assert found["collective_p95"] is None
        assert found["effective_time_ratio"] is None
    assert (calm_now["unhealthy_steps"], wild_now["unhealthy_steps"]) == (1, None)


# --- Devices -----------------------------------------------------------------------------------------------


def devices(metric: c.Metric, told: Mapping[str, Sequence[float]]) -> Frame:
    count = len(next(iter(told.values())))
    return frame(metric, [{c.DEVICE: name} for name in told], range(1, count + 1), list(told.values()))


def test_utilisation_is_the_mean_of_the_devices_that_the_run_used(database: Engine) -> None:
    for rank, load in enumerate(([0.9, 0.7], [0.5, 0.3])):
        own = f"cuda:{rank}"
        tell_ended(
            database,
            "run",
            devices(c.HW_GPU_UTILIZATION, {own: load, "cuda:7": [0.0, 0.0]}),
            devices(c.DEVICE_MEMORY_LIMIT, {own: [80e9]}),
            rank=rank,
        )
    assert summarised(database, "run")["gpu_utilization"] == 0.6


@pytest.mark.parametrize("count", [2, 3, 7, 60, 61, 150])
def test_a_device_that_is_busy_just_so_much_is_so_on_average(database: Engine, count: int) -> None:
    load = devices(c.HW_GPU_UTILIZATION, {"cuda:0": [0.8] * count})
    tell_ended(database, "run", load, devices(c.DEVICE_MEMORY_LIMIT, {"cuda:0": [80e9]}))
    assert summarised(database, "run")["gpu_utilization"] == 0.8


def test_a_run_on_the_cpu_is_not_judged_by_its_utilisation_and_is_by_its_memory(database: Engine) -> None:
    tell_ended(database, "run", devices(c.DEVICE_MEMORY_HEADROOM, {"cpu": [0.9, 0.3, 0.6]}))
    found = summarised(database, "run")
    assert (found["gpu_utilization"], found["memory_headroom"]) == (None, 0.3)


def test_headroom_is_the_least_of_all_devices_and_not_of_the_host_beside_them(database: Engine) -> None:
    tell_ended(
        database,
        "run",
        devices(c.DEVICE_MEMORY_HEADROOM, {"cpu": [0.01]}),
        devices(c.DEVICE_MEMORY_HEADROOM, {"cuda:0": [0.9, 0.2, 0.2]}),
    )
    tell_ended(database, "run", devices(c.DEVICE_MEMORY_HEADROOM, {"cuda:1": [0.9, 0.1, 0.1]}), rank=1)
    assert summarised(database, "run")["memory_headroom"] == 0.1


# --- Collectives -------------------------------------------------------------------------------------------


def _collectives(durations: Mapping[str, Sequence[float]], seconds: float, scale: int = 3) -> Frame:
    """The buckets of operations that took so long, as the receiver decodes them."""
    request = ExportMetricsServiceRequest()
    metric = request.resource_metrics.add().scope_metrics.add().metrics.add()
    metric.name, metric.unit = c.COLLECTIVE_DURATION.name, c.COLLECTIVE_DURATION.unit
    histogram = metric.exponential_histogram
    histogram.aggregation_temporality = AggregationTemporality.AGGREGATION_TEMPORALITY_DELTA
    for operation, took in durations.items():
        point = histogram.data_points.add(time_unix_nano=at(seconds), count=len(took), scale=scale)
        label = point.attributes.add(key=c.COLLECTIVE)
        label.value.string_value = operation
        places = [math.ceil(math.log2(each) * 2**scale) - 1 for each in took]
        point.positive.offset = min(places)
        counts = [places.count(place) for place in range(min(places), max(places) + 1)]
        point.positive.bucket_counts.extend(counts)
    (decoded,) = MetricsDecoder().decode(request.SerializeToString()).batches
    return next(each for each in decoded.frames if each.field == "buckets")


def test_reductions_are_not_hidden_by_what_is_shorter_and_more_frequent(database: Engine) -> None:
    told = {"broadcast": [1e-5] * 960, "ddp_all_reduce": [0.01] * 30, "reduce_scatter_tensor": [0.02] * 10}
    tell_ended(database, "run", _collectives(told, 1.0))
    tell_ended(database, "none", _collectives({"broadcast": [1e-5] * 9, "all_gather": [0.01]}, 1.0))
    assert summarised(database, "run")["collective_p95"] == pytest.approx(0.02, rel=0.05)
    assert row(database, "none")["collective_p95"] == pytest.approx(0.01, rel=0.05)


def test_a_percentile_is_the_least_that_so_many_do_not_exceed(database: Engine) -> None:
    tell_ended(database, "run", _collectives({"all_reduce": [0.001] * 19 + [1.0]}, 1.0))
    assert summarised(database, "run")["collective_p95"] == pytest.approx(0.001, rel=0.05)


def test_the_95th_percentile_is_over_all_operations_of_all_ranks(database: Engine) -> None:
    rng = np.random.default_rng(3)
    everything: list[float] = []
    for rank in range(3):
        frames = []
        for interval in range(4):
            took = rng.lognormal(-4 + rank, 1, 50)
            everything += took.tolist()
            told = {"all_reduce": took.tolist(), c.DDP_EXPOSED: [1000.0] * 50}
            # The others tell on a coarser scale.
            frames.append(_collectives(told, interval + 1.0, scale=3 - rank // 2))
        tell_ended(database, "run", *frames, rank=rank)
    dense = sorted(everything)[math.ceil(0.95 * len(everything)) - 1]
    assert summarised(database, "run")["collective_p95"] == pytest.approx(dense, rel=2 ** (1 / 8) - 1)


# --- Checkpoints, time, cost, quality ----------------------------------------------------------------------


def test_a_checkpoint_of_many_ranks_is_one_and_failed_if_any_part_did(database: Engine) -> None:
    def told(rank: int) -> Iterator[Any]:
        for number, state in enumerate(("saved", "saved", "failed" if rank == 1 else "saved", "saved")):
            # The last is the third again, which had failed.
            name = f"step-{min(number, 2)}"
            definition = c.CHECKPOINT_SAVED if state == "saved" else c.CHECKPOINT_FAILED
            yield event(definition, 10 + number, number + 1, CHECKPOINT_NAME=name, STEP=min(number, 2))

    for rank in range(3):
        tell_ended(database, "run", events=list(told(rank)), rank=rank)
    found = summarised(database, "run")
    assert (found["checkpoints"], found["failed_checkpoints"]) == (4, 1)


def test_cost_is_that_of_a_thousand_steps_and_unknown_without_prices(database: Engine) -> None:
    tell_run(database, "run", 0, seconds=1000, losses=[1.0] * 250, devices=["cuda:0", "cuda:1"], resource=GPU)
    assert summarised(database, "run", seconds=2000)["step_cost"] is None
    tell(database, batch(source("run", instance="run-1-0", attempt=1)), 3000)
    # Two devices for 1000 s at 3.60 an hour, and 250 steps.
    expected = 2 * 1000 / HOUR * 3.60 / 250 * 1000
    assert summarised(database, "run", prices=PRICES)["step_cost"] == pytest.approx(expected)


def test_effective_time_is_that_of_the_run(database: Engine) -> None:
    # Nine steps of 0.3 s in 3 s: as binary fractions their sum is short of 2.7.
    tell_run(database, "run", 0, seconds=3, losses=[1.0] * 9)
    assert summarised(database, "run")["effective_time_ratio"] == 0.9


def test_effective_time_is_as_the_page_works_it_out(database: Engine) -> None:
    for attempt, (start, first) in enumerate(((0, 0), (120, 80)), 1):
        steps = [float(step) for step in range(first, 100 * attempt)]
        ends = [start + 10 + 0.9 * (number + 1) for number in range(len(steps))]
        sender = source("run", attempt=attempt, instance=str(attempt))
        frames = [
            scalar(c.STEP_INDEX, ends, steps),
            scalar(c.STEP_DURATION, ends, [0.9] * len(steps)),
            scalar(c.DATA_WAIT, ends, [0.045] * len(steps)),
        ]
        tell(database, batch(sender, event(c.RUN_STARTED, start), frames=frames), ends[-1])
        ending = event(c.RUN_ENDED, ends[-1], 1, STATUS="failed" if attempt == 1 else "succeeded")
        tell(database, batch(sender, ending), ends[-1])
    assert "171 / 238 = 71.8 %" in PAGE
    assert summarised(database, "run")["effective_time_ratio"] == 171 / 238


@pytest.mark.parametrize(
    ("target", "before", "after", "delta"),
    [("val_loss<=0.5", 0.38, 0.41, -0.03), ("accuracy>=0.9", 1.81, 1.824, 0.007)],
)
def test_quality_is_as_the_page_works_it_out(
    database: Engine, target: str, before: float, after: float, delta: float
) -> None:
    for number, value in enumerate((before, after)):
        tell_run(database, **logged(f"run-{number}", 100 * number, value, resource={c.TARGET: target}))
    assert f"= {delta}, " in PAGE
    assert summarised(database, "run-1")["quality_delta"] == delta


def logged(run_id: str, start: float, value: float, **of: Any) -> dict[str, Any]:
    values = frame(c.LOGGED, [{c.METRIC_NAME: "val_loss"}], [start + 1, start + 2], [[9.0, value]])
    other = frame(c.LOGGED, [{c.METRIC_NAME: "accuracy"}], [start + 3], [[value / 2]])
    return {"run_id": run_id, "start": start, "frames": [values, other], **of}


def test_quality_is_held_against_the_last_good_run_with_the_same_aim(database: Engine) -> None:
    lower, higher = {c.TARGET: "val_loss<=0.5"}, {c.TARGET: "accuracy>=0.25"}
    for told in (
        logged("first", 0, 1.0, resource=lower),
        logged("better", 100, 0.75, resource={c.TARGET: "val_loss<0.25"}),
        logged("failed", 200, 0.1, resource=lower, ending={"STATUS": "failed"}),
        logged("other", 300, 0.9, resource=higher),
        logged("worse", 400, 0.8, resource=lower),
        logged("most", 500, 1.0, resource=higher),
        logged("aimless", 600, 0.5),
    ):
        tell_run(database, **told)
    summarised(database, "aimless")
    found = {run_id: row(database, run_id) for run_id in ("first", "better", "worse", "other", "most")}
    assert [each["quality"] for each in found.values()] == [-1.0, -0.75, -0.8, 0.45, 0.5]
    # As written: as binary fractions they are -0.050000000000000044 and 0.04999999999999999.
    assert [each["quality_delta"] for each in found.values()] == [None, 0.25, -0.05, None, 0.05]
    assert row(database, "aimless")["quality"] is None


def test_quality_is_what_the_lowest_rank_of_the_last_attempt_told_last(database: Engine) -> None:
    for place, value in (((1, 0), 0.1), ((2, 1), 0.2), ((2, 0), 0.3), ((2, 3), 0.4)):
        attempt, rank = place
        told = logged("run", 100 * attempt + rank, value, resource={c.TARGET: "val_loss<=0.5"})
        tell_run(database, **told, attempt=attempt, rank=rank)
    assert summarised(database, "run")["quality"] == -0.3


def test_an_improvement_that_is_just_what_is_asked_for_is_good(database: Engine) -> None:
    for number, value in enumerate((0.7, 0.8, 0.9, 1.0, 1.1, 1.2)):
        resource = {c.TARGET: "accuracy>=0.5"}
        tell_run(database, **logged(f"run-{number}", 100 * number, 2 * value, resource=resource))
    summarised(database, "run-5")
    asked = Threshold("quality_delta", "gte", Decimal("0.1"))
    against_one = replace(asked, baseline_run="run-0")
    against_better = replace(asked, baseline_run="run-4")  # 1.1 + 0.1 is more than 1.2 in binary
    (shipped, *_) = (each for each in default_objectives().objectives if each.name == "model-quality")
    with database.connect() as connection:
        for measure, good in ((asked, 5), (against_one, 5), (against_better, 1)):
            objective = replace(shipped, measure=measure, selection=Selection(), group_by=())
            (report,) = evaluate_objectives(connection, [objective], at(DAY))
            assert (report.good, report.total) == (good, 5)


@pytest.mark.parametrize("last", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("target", "delta", "good"), [("val_loss<=0.5", -0.5, 0), ("accuracy>=0.25", 0.25, 1)])
def test_a_run_that_diverges_is_worse_than_the_last_good_one_and_nothing_is_held_against_it(
    database: Engine, target: str, delta: float, good: int, last: float
) -> None:
    for number, (run_id, value) in enumerate({"first": 1.0, "diverged": last, "next": 1.5}.items()):
        tell_run(database, **logged(run_id, 100 * number, value, resource={c.TARGET: target}))
    summarised(database, "next")
    found = [row(database, run_id)["quality_delta"] for run_id in ("first", "diverged", "next")]
    assert found == [None, -sys.float_info.max, delta]
    better = [each for each in default_objectives().objectives if each.name == "model-quality"]
    with database.connect() as connection:
        _, experiments = evaluate_objectives(connection, better, at(DAY))
    assert (experiments.good, experiments.total) == (good, 2)


def test_ratios_are_to_the_median_of_the_last_twenty_good_runs_once_there_are_five(database: Engine) -> None:
    took = [8.0, 1.0, 2.0, 3.0, 4.0, 5.0, *[2.0] * 20, 6.0]
    for number, each in enumerate(took):
        frames = [_collectives({"all_reduce": [each] * 3}, 100 * number + 10.0)]
        tell_run(database, f"run-{number}", 100 * number, frames=frames, losses=[1.0] * 10)
        if number == 0:
            with transaction(database) as connection:
                exclude(connection, What(single_run="run-0"), "a broken switch", now=at(50))
    summarised(database, "run-0", prices=PRICES)
    assert row(database, "run-5")["collective_p95_ratio"] is None
    # 1 to 5: the middle of each one's bucket is off by the same half bucket.
    assert row(database, "run-6")["collective_p95_ratio"] == pytest.approx(2 / 3, rel=0.09)
    last = row(database, f"run-{len(took) - 1}")
    assert last["collective_p95_ratio"] == pytest.approx(3, rel=0.09)
    assert last["step_cost_ratio"] == pytest.approx(1)


# --- Which runs are due ------------------------------------------------------------------------------------


def test_a_run_is_summarised_once_it_has_ended_and_its_telemetry_has_settled(database: Engine) -> None:
    sender = source("run")
    tell(database, batch(sender, event(c.RUN_STARTED, 0), frames=told_norms([1.0] * 5)), 10)
    assert due(database) == 0
    tell(database, batch(sender, event(c.RUN_ENDED, 20, 1, STATUS="succeeded")), 20)
    forget_changes(database)
    assert summarise_due(database, lambda: transaction(database), None, at(20 + SETTLED - 0.1))
    assert due(database) == 1
    assert summarised(database, "run", seconds=20 + SETTLED)["steps"] == 5
    assert due(database) == 0
    with database.connect() as connection:
        assert load_changed(connection) == [at(20) // (HOUR * SECOND)]


def test_more_telemetry_of_an_ended_run_has_it_summarised_and_its_hour_counted_again(database: Engine) -> None:
    tell_steps(database, "run", [1.0] * 5)
    assert summarised(database, "run", seconds=100)["steps"] == 5
    late = scalar(c.STEP_INDEX, [5.5], [5.0])
    tell(database, batch(source("run", rank=0, attempt=1, instance="run-1-0"), frames=[late]), 200)
    forget_changes(database)
    assert summarised(database, "run", seconds=300)["steps"] == 6
    with database.connect() as connection:
        assert load_changed(connection) == [at(6) // (HOUR * SECOND)]


def test_what_says_nothing_new_counts_no_hour_again(database: Engine) -> None:
    tell_steps(database, "run", [1.0] * 5)
    before = summarised(database, "run", seconds=100)
    forget_changes(database)
    tell(database, batch(source("run", rank=0, attempt=1, instance="run-1-0")), 200)
    assert (due(database), summarised(database, "run", seconds=300)) == (1, before)
    with database.connect() as connection:
        assert load_changed(connection) == []


def test_an_ended_run_that_is_told_of_all_the_time_is_read_once_a_minute(database: Engine) -> None:
    tell_steps(database, "run", [1.0] * 5)
    summarised(database, "run", seconds=20)
    for seconds in range(20, 80):
        tell(
            database,
            batch(source("run", attempt=1, instance="run-1-0"), event(c.RUN_HEARTBEAT, seconds)),
            seconds,
        )
    assert summarise_due(database, lambda: transaction(database), None, at(79.9))
    assert due(database) == 60
    assert summarise_due(database, lambda: transaction(database), None, at(80))
    assert due(database) == 0


def test_a_run_that_fell_silent_is_summarised(database: Engine) -> None:
    tell(database, batch(source("run"), event(c.RUN_STARTED, 0), frames=told_norms([1.0] * 5)), 5)
    with transaction(database) as connection:
        assert mark_silent(connection, at(100), 30 * SECOND, at(0)) == ["run"]
    assert summarised(database, "run")["steps"] == 5


def test_what_arrives_while_a_run_is_read_has_it_summarised_again(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell_steps(database, "run", [1.0] * 5)
    late = batch(source("run", attempt=1, instance="run-1-0"), frames=[scalar(c.STEP_INDEX, [5.5], [5.0])])
    read = summaries.summarise

    def read_meanwhile(*arguments: Any) -> Any:
        found = read(*arguments)
        monkeypatch.undo()
        tell(database, late, 50)
        return found

    monkeypatch.setattr(summaries, "summarise", read_meanwhile)
    assert summarise_due(database, lambda: transaction(database), None, at(100))
    assert (row(database, "run")["steps"], due(database)) == (5, 1)
    assert summarised(database, "run")["steps"] == 6


def test_who_does_not_hold_the_lease_any_more_writes_no_summary(database: Engine) -> None:
    tell_steps(database, "run", [1.0] * 5)
    lease, other = Lease(database), Lease(database)
    assert lease.acquire()
    lease.release()
    assert other.acquire()
    with pytest.raises(LeaseLostError):
        summarise_due(database, lease.transaction, None, at(100))
    assert due(database) == 1
    assert summarise_due(database, other.transaction, None, at(100))
    assert due(database) == 0


def test_a_run_that_cannot_be_read_keeps_no_other_waiting(
    database: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number, run_id in enumerate(("odd", "even")):
        tell_steps(database, run_id, [1.0] * 5, start=100 * number)
    read = summaries.summarise

    def fail(connection: Any, run: Any, prices: Any) -> Any:
        if run.run_id == "odd":
            raise ValueError("a number that no layer foresaw")
        return read(connection, run, prices)

    monkeypatch.setattr(summaries, "summarise", fail)
    assert summarised(database, "even")["steps"] == 5
    assert row(database, "odd")["steps"] is None
    assert "the run odd cannot be summarised" in caplog.text


def test_a_deleted_run_takes_its_summary_along_and_gets_no_other(database: Engine) -> None:
    tell_steps(database, "run", [1.0] * 5)
    tell_steps(database, "later", [1.0] * 5)
    summarised(database, "run", seconds=100)
    tell(database, batch(source("run", attempt=1, instance="run-1-0")), 200)
    prune(lambda: transaction(database), Policy(raw=DAY, rollups=DAY, runs=DAY * SECOND), at(50 * DAY))
    with database.connect() as connection:
        assert connection.execute(select(schema.run_summary)).all() == []
    assert due(database) == 0
