"""Phases of observed steps, by clocks of the test's own: the host's, and one whose marks pass on command."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import gradwatch
from gradwatch import conventions as names
from gradwatch.measures import measures
from gradwatch.measures.phases import PhaseTimer
from gradwatch.testing import InMemoryExporter

Watching = Callable[..., gradwatch.Watch]


@pytest.fixture(autouse=True)
def phases_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "_LOOK_NANOSECONDS", 0)


def test_phases_are_timed_a_few_times_a_second_however_short_the_steps(
    watching: Watching, exporter: InMemoryExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "_LOOK_NANOSECONDS", 10**15)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watching(model, optimizer):
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    assert len({point.time for point in exporter.points(names.PHASE_DURATION)}) == 1


class Device:
    """A stopwatch in seconds whose marks pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done = 0.0
        self.capturing = False
        self.made = 0
        self.free: list[list[float]] = []

    def mark(self) -> list[float] | None:
        if self.capturing:
            return None
        if not self.free:
            self.made += 1
        mark = self.free.pop() if self.free else []
        mark[:] = [self.now]
        return mark

    def passed(self, mark: list[float]) -> bool:
        return mark[0] <= self.done

    def between(self, start: list[float], end: list[float]) -> float:
        assert self.passed(end)
        return end[0] - start[0]

    def reuse(self, marks: Sequence[list[float]]) -> None:
        self.free += marks


class Timed:
    """A phase timer, its device, and what it reported."""

    def __init__(self) -> None:
        self.device = Device()
        self.found: list[tuple[int, Mapping[str, float]]] = []
        self.timer = PhaseTimer(lambda time, seconds: self.found.append((time, seconds)))
        self.timer.use(self.device)

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        """Time goes by, and a hook fires: it calls only while the step is observed."""
        self.device.now += seconds
        if self.timer.observed:
            what()


def one_step(timed: Timed, time: int = 1) -> None:
    timer = timed.timer
    timer.begin()
    timed.after(3, timer.before_backward)
    timed.after(5, timer.after_backward)
    timed.after(100, timer.before_optimizer)  # clipping: no phase
    timed.after(2, timer.after_optimizer)
    timed.after(1, lambda: timer.end(time))


def test_a_step_is_reported_once_its_last_mark_has_passed() -> None:
    timed = Timed()
    one_step(timed, 7)
    assert timed.found == []
    timed.device.done = timed.device.now
    timed.timer.drain()
    assert timed.found == [(7, {"forward": 3, "backward": 5, "optimizer": 2})]


def test_micro_batches_and_optimizers_of_one_step_add_up() -> None:
    timed = Timed()
    timer = timed.timer
    timed.device.done = 10**9
    timer.begin()
    for _ in range(2):
        for forward, backward in ((1, 10), (2, 20)):
            timed.after(forward, timer.before_backward)
            timed.after(backward, timer.after_backward)
        timed.after(50, timer.before_optimizer)
        timed.after(4, timer.after_optimizer)
    timer.end(1)
    assert timed.found == [(1, {"forward": 6, "backward": 60, "optimizer": 8})]


@pytest.mark.parametrize("late", [False, True])
def test_a_wait_is_taken_off_the_forward_it_lies_in_and_off_nothing_else(late: bool) -> None:
    timed = Timed()
    timer = timed.timer
    timed.device.done = 10**9
    timer.begin()
    if not late:
        timed.after(1, timer.pause)
        timed.after(30, timer.resume)
    timed.after(2, timer.before_backward)
    timed.after(5, timer.after_backward)
    if late:  # the next batch is fetched before the update
        timed.after(1, timer.pause)
        timed.after(30, timer.resume)
    timed.after(1, timer.before_optimizer)
    timed.after(2, timer.after_optimizer)
    timer.end(1)
    assert timed.found == [(1, {"forward": 2 if late else 3, "backward": 5, "optimizer": 2})]


def test_a_host_far_ahead_of_its_device_gives_steps_up_and_makes_no_more_events() -> None:
    timed = Timed()
    for step in range(100):
        one_step(timed, step)
    assert timed.device.made == 4 * 5
    timed.device.done = timed.device.now
    timed.timer.drain()
    assert [time for time, _ in timed.found] == [0, 1, 2, 3]
    one_step(timed, 100)
    assert timed.device.made == 4 * 5


def test_nothing_is_marked_while_a_graph_is_captured() -> None:
    timed = Timed()
    timed.device.done = 10**9
    timed.timer.begin()
    timed.device.capturing = True
    timed.timer.before_backward()
    assert not timed.timer.observed
    timed.timer.end(1)
    timed.device.capturing = False
    assert timed.found == []
    one_step(timed, 2)
    assert [time for time, _ in timed.found] == [2]


def test_a_step_of_very_many_micro_batches_is_given_up() -> None:
    timed = Timed()
    timed.device.done = 10**9
    timed.timer.begin()
    for _ in range(1000):
        if timed.timer.observed:
            timed.timer.before_backward()
        if timed.timer.observed:
            timed.timer.after_backward()
    timed.timer.end(1)
    assert timed.found == []
    assert timed.device.made <= 128


class Counted(nn.Module):
    """A model whose forward and backward move the clock."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.device = device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.device.now += 3
        y = self.weight * x
        y.register_hook(self._backward)
        return y.sum()

    def _backward(self, grad: torch.Tensor) -> torch.Tensor:
        self.device.now += 5
        return grad


def test_a_loop_s_own_phases_are_those_reported(
    watching: Watching, exporter: InMemoryExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device()
    device.done = 10**9
    monkeypatch.setattr(measures, "stopwatch_for", lambda _device: device)
    model = Counted(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def slow_batch(samples: list[torch.Tensor]) -> torch.Tensor:
        device.now += 1000
        return torch.stack(samples)

    loader: Any = DataLoader([torch.ones(2)] * 8, batch_size=2, collate_fn=slow_batch)  # type: ignore[arg-type]
    with watching(model, optimizer):
        for x in loader:
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()
            device.now += 50  # the loop's own, charged to the next forward
    found = [
        {point.attributes[names.PHASE]: point.value for point in exporter.points(names.PHASE_DURATION)
         if point.time == step.time}
        for step in exporter.points(names.STEP_INDEX)
    ]  # fmt: skip
    assert found == [{}, *[{"forward": 53, "backward": 5, "optimizer": 0}] * 3]


def test_of_steps_that_are_not_observed_only_forward_and_backward_are_told(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watching(model, optimizer, every=4):
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    observed = {point.time for point in exporter.points(names.GRADIENT_NORM)}
    found: dict[int, set[object]] = {}
    for point in exporter.points(names.PHASE_DURATION):
        assert point.value >= 0
        found.setdefault(point.time, set()).add(point.attributes[names.PHASE])
    first, *steps = [point.time for point in exporter.points(names.STEP_INDEX)]
    assert first not in found
    for step in steps:
        assert found[step] == {"forward", "backward"} | ({"optimizer"} if step in observed else set())


def test_where_another_optimizer_takes_over_its_steps_are_looked_at(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))

    def train(optimizer: torch.optim.Optimizer) -> None:
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()

    with watching(model, every=1000):
        train(torch.optim.SGD(model[1].parameters(), lr=0.01))
        train(torch.optim.SGD(model.parameters(), lr=0.01))
    looked_at = {point.time for point in exporter.points(names.PHASE_DURATION)}
    _, *steps = [point.time for point in exporter.points(names.STEP_INDEX)]
    assert len(steps) >= 8
    assert len(looked_at & set(steps)) >= 8


def test_a_step_with_a_closure_has_no_phases(watching: Watching, exporter: InMemoryExporter) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).square().sum()
        loss.backward()
        return loss

    with watching(model, optimizer):
        for _ in range(4):
            optimizer.step(closure)
    assert exporter.points(names.PHASE_DURATION) == []
