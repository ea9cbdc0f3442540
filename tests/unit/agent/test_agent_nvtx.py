"""NVTX ranges: every one begun is ended, whatever happens inside (recorded: there is no NVTX here)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.measures import measures
from gradwatch.measures.nvtx import Ranges, nvtx_ranges

Watching = Callable[..., gradwatch.Watch]


class Recorder:
    """A timeline: names with their depth; ending what is not open is an error."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.seen: list[tuple[int, str]] = []

    def push(self, name: str) -> None:
        self.seen.append((len(self.open), name))
        self.open.append(name)

    def pop(self) -> None:
        assert self.open, "a range was ended that nobody began"
        self.open.pop()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(measures, "nvtx_ranges", lambda: Ranges(recorder.push, recorder.pop))
    return recorder


class Fragile(nn.Module):
    """Raises when told to."""

    error: type[BaseException] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error("as told")
        return x


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Fragile()), nn.Linear(4, 1))


LAYERS = [(1, "0"), (1, "1.0"), (1, "1.1"), (1, "2")]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).mean().backward()
        optimizer.step()


@contextmanager
def watched(watching: Watching, nvtx: object) -> Iterator[tuple[nn.Sequential, torch.optim.Optimizer]]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watching(model, optimizer, nvtx=nvtx, every=100):
        yield model, optimizer


def test_steps_follow_each_other_observed_or_not(watching: Watching, recorder: Recorder) -> None:
    with watched(watching, True) as (model, optimizer):
        train(model, optimizer, 3)
        assert recorder.open == ["step 3"]
        assert not model[0]._forward_hooks
    assert recorder.seen == [(0, f"step {step}") for step in range(4)]
    assert recorder.open == []


def test_layers_lie_inside_their_step_under_their_full_names(watching: Watching, recorder: Recorder) -> None:
    with watched(watching, "layers") as (model, optimizer):
        train(model, optimizer, 2)
    assert recorder.seen == [(0, "step 0"), *LAYERS, (0, "step 1"), *LAYERS, (0, "step 2")]
    assert recorder.open == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_evaluation_has_ranges_of_its_own_within_the_step(watching: Watching, recorder: Recorder) -> None:
    with watched(watching, "layers") as (model, optimizer):
        train(model, optimizer, 1)
        recorder.seen.clear()
        with torch.no_grad():
            model.eval()(torch.ones(2, 4))
        assert recorder.open == ["step 1"]
    assert recorder.seen == LAYERS
    assert recorder.open == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_raises_leaves_no_range_open(
    watching: Watching, recorder: Recorder, error: type[BaseException]
) -> None:
    with watched(watching, "layers") as (model, optimizer):
        fragile = model[1][1]
        fragile.error = error
        with pytest.raises(error, match="as told"):
            model(torch.ones(2, 4))
        if issubclass(error, Exception):  # torch runs no hook on Ctrl-C; the step's end clears up then
            assert recorder.open == ["step 0"]
        fragile.error = None
        train(model, optimizer, 2)
        assert recorder.open == ["step 2"]
        assert recorder.seen[-1] == (0, "step 2")
    assert recorder.open == []


def test_a_hook_of_somebody_else_that_raises_first_leaves_no_range_open(
    watching: Watching, recorder: Recorder
) -> None:
    def refuse(_module: nn.Module, _args: object) -> None:
        raise LookupError("not today")

    with watched(watching, "layers") as (model, _):
        model[2].register_forward_pre_hook(refuse, prepend=True)
        with pytest.raises(LookupError, match="not today"):
            model(torch.ones(2, 4))
        assert recorder.open == ["step 0"]
    assert recorder.open == []


def test_an_interrupt_that_a_module_catches_leaves_no_range_open(
    watching: Watching, recorder: Recorder
) -> None:
    class Catching(nn.Module):
        def __init__(self, other: nn.Module) -> None:
            super().__init__()
            self.other = [other]  # called, but no child of its own

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                self.other[0](x)
            except KeyboardInterrupt:
                return x
            return x

    fragile = Fragile()
    fragile.error = KeyboardInterrupt
    model = nn.ModuleList([Catching(fragile), fragile])
    with watching(model, nvtx="layers"):
        model[0](torch.ones(1))
        assert recorder.open == ["step 0"]


def test_a_copy_of_the_model_makes_no_ranges(watching: Watching, recorder: Recorder) -> None:
    with watched(watching, "layers") as (model, _):
        other = copy.deepcopy(model)
        recorder.seen.clear()
        other(torch.ones(2, 4))
        assert recorder.seen == []


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has NVTX")
def test_without_nvtx_there_is_one_warning_and_training_goes_on(
    watching: Watching, caplog: pytest.LogCaptureFixture
) -> None:
    assert nvtx_ranges() is None
    caplog.clear()
    with (
        caplog.at_level(logging.WARNING, logger="gradwatch"),
        watched(watching, "layers") as (model, optimizer),
    ):
        train(model, optimizer, 3)
        assert not model[0]._forward_hooks
    assert [record.message for record in caplog.records if "nvtx" in record.message] == [
        "nvtx: this torch has no NVTX (a build without CUDA); no ranges are made"
    ]
