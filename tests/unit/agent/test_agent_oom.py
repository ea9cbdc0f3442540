"""Memory that ran out: what was asked for, where, and what training was doing."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch import conventions as names
from gradwatch.life import oom
from gradwatch.life.oom import AllocatorWatch, OutOfMemory, out_of_memory, phase_of
from gradwatch.testing import InMemoryExporter

CUDA_MESSAGE = (
    "CUDA out of memory. Tried to allocate 20.50 GiB. GPU 1 has a total capacity of 79.10 GiB of which "
    "5.00 GiB is free."
)


def exhaust() -> None:
    torch.empty(2**46, dtype=torch.uint8)  # 64 TiB


class Hungry(torch.autograd.Function):
    """Runs out of memory on the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        exhaust()
        return grad


class Model(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.where = where

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.where == "forward" or (self.where == "checkpoint" and self.visits()):
            exhaust()
        y = x * self.weight
        if self.where == "backward":
            y = Hungry.apply(y)  # type: ignore[no-untyped-call]
        return y

    def visits(self) -> bool:
        self.been, before = True, getattr(self, "been", False)
        return before


class HungryOptimizer(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        if closure is None:
            exhaust()
        return super().step(closure)


def run_out(where: str) -> None:
    model = Model(where)
    kind = HungryOptimizer if where in {"optimizer", "closure"} else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=0.1)

    def closure() -> torch.Tensor:
        exhaust()
        return torch.zeros(())

    if where == "outside":
        exhaust()
    x = torch.ones(3)
    y = checkpoint(model, x, use_reentrant=False) if where == "checkpoint" else model(x)
    y.sum().backward()
    optimizer.step(closure if where == "closure" else None)


@pytest.mark.parametrize(
    ("where", "during"),
    [
        ("forward", "forward"),
        ("backward", "backward"),
        ("checkpoint", "backward"),
        ("optimizer", "optimizer"),
        ("closure", "optimizer"),
        ("outside", None),
    ],
)
def test_a_run_that_runs_out_of_memory_says_during_what(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter, where: str, during: str | None
) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="allocate memory"), watching(model, optimizer):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        run_out(where)
    (event,) = exporter.find_events(names.OUT_OF_MEMORY.name)
    known = {name: value for name, value in event.attributes.items() if name != names.EVENT_SEQUENCE}
    expected = {names.STEP: 1, names.DEVICE: "cpu", names.OOM_REQUESTED: 2**46, names.OOM_DURING: during}
    assert known == {name: value for name, value in expected.items() if value is not None}
    (box,) = exporter.find_events(names.FLIGHT_RECORD.name)
    assert box.attributes[names.FLIGHT_TRIGGER] == "oom"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(CUDA_MESSAGE), OutOfMemory(None, "cuda:1", 41 * 2**29)),
        (torch.OutOfMemoryError("no details"), OutOfMemory(None)),
        (MemoryError(), OutOfMemory(None, "cpu")),
        (ValueError("Tried to allocate 20.00 GiB"), None),
        (RuntimeError("out of patience"), None),
    ],
)
def test_an_exception_says_what_it_knows(error: Exception, expected: OutOfMemory | None) -> None:
    assert out_of_memory(error) == expected


def test_an_error_raised_from_one_is_one() -> None:
    wrapped = RuntimeError("training failed")
    wrapped.__cause__ = MemoryError()
    assert out_of_memory(wrapped) == OutOfMemory(None, "cpu")


class TrainingError(Exception):
    """A framework's own."""


def raised(how: Callable[[], None]) -> Exception:
    with pytest.raises(Exception) as caught:
        how()
    return caught.value


def from_another_type() -> None:
    try:
        run_out("forward")
    except RuntimeError as error:
        raise TrainingError("step 3 failed") from error


def while_handling_one() -> None:
    try:
        run_out("forward")
    except RuntimeError:
        raise TrainingError("step 3 failed")  # noqa: B904 - as people write it


def while_handling_what_was_raised_from_one() -> None:
    try:
        from_another_type()
    except TrainingError:
        raise KeyError("worker")  # noqa: B904


@pytest.mark.parametrize(
    "how", [from_another_type, while_handling_one, while_handling_what_was_raised_from_one]
)
def test_memory_that_ran_out_is_recognised_behind_what_was_raised_because_of_it(
    how: Callable[[], None],
) -> None:
    assert out_of_memory(raised(how)) == OutOfMemory("forward", "cpu", 2**46)


def test_what_somebody_raised_instead_on_purpose_is_no_lack_of_memory() -> None:
    def instead() -> None:
        try:
            exhaust()
        except RuntimeError:
            raise TrainingError("no such device") from None

    assert out_of_memory(raised(instead)) is None


def test_memory_that_ran_out_before_a_retry_began_is_not_why_the_retry_failed(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter
) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(TrainingError):
        try:
            exhaust()
        except RuntimeError:
            with watching(model):
                raise TrainingError("something else")  # noqa: B904
    assert exporter.find_events(names.OUT_OF_MEMORY.name) == []


class PretendedAllocator:
    """Stands in for torch's CUDA allocator, which no machine without a GPU has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.observers: list[Callable[[int, int, int, int], None]] = []
        monkeypatch.setattr(
            torch._C, "_cuda_attach_out_of_memory_observer", self.observers.append, raising=False
        )
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)


class Recovering(nn.Linear):
    """Runs out of device memory at each pass, and gets by."""

    def __init__(self, allocator: PretendedAllocator) -> None:
        super().__init__(2, 1)
        self.allocator = [allocator]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (observer,) = self.allocator[0].observers
        observer(0, 123, 456, 7)
        return super().forward(x)


def test_the_allocators_observer_speaks_while_a_run_is_open_and_is_inert_after(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Recovering(PretendedAllocator(monkeypatch))
    looked: list[int] = []
    monkeypatch.setattr("gradwatch.training_run.memory_points", lambda _now: [])
    monkeypatch.setattr(oom, "phase_of", lambda frames: looked.append(1) or phase_of(frames))
    with watching(model):
        model(torch.ones(1, 2))
        assert looked == [1]
        child = os.fork()
        if child == 0:
            model(torch.ones(1, 2))
            os._exit(len(looked) - 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    model(torch.ones(1, 2))
    assert looked == [1]
    (event,) = exporter.find_events(names.OUT_OF_MEMORY.name)
    assert event.attributes[names.OOM_DURING] == "forward"
    assert event.attributes[names.DEVICE] == "cuda:0"
    assert event.attributes[names.OOM_REQUESTED] == 123


def test_memory_that_the_allocator_told_of_is_not_told_again_by_the_exception(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Recovering(PretendedAllocator(monkeypatch))
    monkeypatch.setattr("gradwatch.training_run.memory_points", lambda _now: [])
    with pytest.raises(torch.OutOfMemoryError), watching(model):
        model(torch.ones(1, 2))
        raise torch.OutOfMemoryError(CUDA_MESSAGE)
    (event,) = exporter.find_events(names.OUT_OF_MEMORY.name)
    assert event.attributes[names.OOM_REQUESTED] == 123


def test_an_observer_is_attached_once_and_says_nothing_when_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = PretendedAllocator(monkeypatch)
    heard: list[OutOfMemory] = []
    watch = AllocatorWatch(heard.append)
    watch.attach()
    watch.attach()
    (observer,) = allocator.observers
    for _ in range(2):
        observer(1, 123, 456, 7)
        watch.silence()
    assert heard == [OutOfMemory(None, "cuda:1", 123)]


def test_without_cuda_nothing_is_attached() -> None:
    watch = AllocatorWatch(lambda _what: None)
    watch.attach()
    assert not watch.attached
