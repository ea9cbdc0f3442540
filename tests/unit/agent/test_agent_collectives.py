"""Collective time: two real gloo processes, one of which is late, and the calls' wrappers in one process."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import gradwatch
from gradwatch import conventions as names
from gradwatch.measures.collectives import OPERATIONS, CollectiveCalls, CollectiveTimes, DdpTimes
from gradwatch.measures.stopwatch import HostStopwatch
from gradwatch.telemetry import HistogramPoint
from gradwatch.testing import InMemoryExporter
from tests.unit.agent.ranks import run_ranks

Watching = Callable[..., gradwatch.Watch]
LATE = 0.05
STEPS = 12


def by_operation(points: list[HistogramPoint]) -> dict[str, tuple[int, float, float]]:
    """Number, sum and maximum of each operation's durations, over all intervals."""
    found: dict[str, tuple[int, float, float]] = {}
    for point in points:
        operation = str(point.attributes[names.COLLECTIVE])
        total, seconds, maximum = found.get(operation, (0, 0.0, 0.0))
        found[operation] = (total + point.total, seconds + point.sum, max(maximum, point.maximum))
    return found


def rank_that_may_be_late(rank: int, folder: str) -> None:
    os.environ["GRADWATCH_TESTING"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = DistributedDataParallel(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    exporter = InMemoryExporter()
    watch = gradwatch.watch(model, optimizer, exporter=exporter, every=1, collectives=True)
    for x in DataLoader(torch.ones(STEPS * 2, 4), batch_size=2):  # type: ignore[arg-type]
        if rank == 1:
            time.sleep(LATE)
        optimizer.zero_grad()
        model(x).mean().backward()
        optimizer.step()
        if rank == 1:
            time.sleep(LATE)
        loss = torch.ones(1)
        dist.all_reduce(loss)
        work = dist.broadcast(loss, src=1, async_op=True)
        assert isinstance(work, dist.Work)
        work.wait()
        dist.all_gather_object([None, None], {"rank": rank})
    watch.close()
    dist.barrier()
    found = {
        "collectives": by_operation(exporter.histograms(names.COLLECTIVE_DURATION)),
        "data_wait": sum(exporter.values(names.DATA_WAIT)),
        "backward": sum(p.value for p in exporter.points(names.PHASE_DURATION, **{names.PHASE: "backward"})),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gloo")
    run_ranks(rank_that_may_be_late, str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_a_late_peer_shows_in_the_other_rank_s_collective_time_and_not_in_its_data_wait(
    ranks: list[dict[str, Any]],
) -> None:
    waiting, late = ranks
    count, seconds, longest = waiting["collectives"]["all_reduce"]
    assert count == STEPS
    assert seconds > STEPS * LATE / 2
    assert longest > LATE / 2
    assert seconds > late["collectives"]["all_reduce"][1]
    assert waiting["data_wait"] < seconds


def test_ddp_s_own_figures_tell_that_its_backward_waited(ranks: list[dict[str, Any]]) -> None:
    waiting, late = (rank["collectives"] for rank in ranks)
    assert waiting["ddp_all_reduce"][0] >= 1
    assert waiting["ddp_all_reduce"][1] > LATE / 2
    assert LATE / 2 < waiting["ddp_all_reduce_exposed"][1] <= waiting["ddp_all_reduce"][1]
    assert waiting["ddp_all_reduce"][1] > late["ddp_all_reduce"][1]
    assert ranks[0]["backward"] > STEPS * LATE / 2


def test_every_kind_of_call_is_counted_once(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        counts = {operation: found[0] for operation, found in rank["collectives"].items()}
        del counts["ddp_all_reduce"], counts["ddp_all_reduce_exposed"]
        # `all_gather_object` calls `all_gather` twice inside; the last barrier comes after close.
        assert counts == {"all_reduce": STEPS, "broadcast": STEPS, "all_gather_object": STEPS}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def installed(stopwatch: Any = None) -> tuple[CollectiveCalls, CollectiveTimes]:
    times = CollectiveTimes(5)
    stopwatch = stopwatch or HostStopwatch()
    calls = CollectiveCalls(times, lambda _device: stopwatch)
    calls.install()
    return calls, times


def counted(times: CollectiveTimes, start: int = 5) -> dict[str, int]:
    points = [point for point in times.points(9).points if isinstance(point, HistogramPoint)]
    assert all((point.start, point.time) == (start, 9) for point in points)
    return {str(point.attributes[names.COLLECTIVE]): point.total for point in points}


def test_torch_s_functions_are_back_after_close_and_untouched_without_the_setting(
    watching: Watching, alone: None
) -> None:
    def functions() -> list[Any]:
        return [*(getattr(dist, name, None) for name in OPERATIONS), dist.Work.wait]

    model = nn.Linear(2, 1)
    own = functions()
    with watching(model):
        assert functions() == own
    with watching(model, collectives=True):
        replaced = [a is not b for a, b in zip(functions(), own, strict=True) if a is not None]
        assert all(replaced)
        assert dist.all_reduce.__doc__ == own[OPERATIONS.index("all_reduce")].__doc__
    assert functions() == own


def test_an_error_passes_through_and_the_next_call_is_counted(alone: None) -> None:
    calls, times = installed()
    try:
        with pytest.raises((ValueError, RuntimeError)):
            dist.broadcast(torch.ones(1), src=7)
        tensor = torch.ones(2)
        assert dist.all_reduce(tensor=tensor) is None
    finally:
        calls.remove()
    assert counted(times) == {"all_reduce": 1}


def test_an_asynchronous_call_ends_where_it_is_waited_for(alone: None) -> None:
    calls, times = installed()
    try:
        works = [dist.all_reduce(torch.ones(1), async_op=True) for _ in range(3)]
        assert all(isinstance(work, dist.Work) for work in works)
        works[0].wait()
        works[0].wait()
        assert counted(times) == {"all_reduce": 1}
        for _ in range(2000):  # never waited for: kept within a bound
            dist.all_reduce(torch.ones(1), async_op=True)
        assert len(calls._handles) < 300
    finally:
        calls.remove()


def test_a_figure_of_ddp_s_is_counted_once_however_often_it_is_read(alone: None) -> None:
    times = CollectiveTimes(5)
    figures = DdpTimes(times)
    model = DistributedDataParallel(nn.Linear(4, 1))
    for step in range(3):
        model(torch.ones(2, 4)).sum().backward()
        figures.read([model, nn.Linear(1, 1)])
        figures.read([model])
        if step == 0:
            assert counted(times) == {}  # DDP's first iteration is not among them
    assert counted(times, start=9) == {"ddp_all_reduce": 2, "ddp_all_reduce_exposed": 2}


class Late(HostStopwatch):
    """A device whose marks pass on command."""

    done = False

    def passed(self, mark: int) -> bool:
        return self.done


def test_a_device_s_times_wait_for_its_events_within_a_bound(alone: None) -> None:
    device = Late()
    calls, times = installed(device)
    try:
        for _ in range(1000):
            dist.all_reduce(torch.ones(1))
        assert counted(times) == {}
        device.done = True
        calls.drain()
    finally:
        calls.remove()
    (point,) = times.points(12).points
    assert isinstance(point, HistogramPoint)
    assert (point.start, point.time, point.total) == (9, 12, 256)
