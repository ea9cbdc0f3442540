"""Time and gradients that are not training's: evaluation and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import nn

from gradwatch import conventions as names
from gradwatch.testing import InMemoryExporter

Watching = Callable[..., Any]
PAUSE = 0.05


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(4, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("mark", ["evaluation", "checkpoint"])
def test_marked_time_belongs_to_no_step(watching: Watching, exporter: InMemoryExporter, mark: str) -> None:
    model, optimizer = make()
    with watching(model, optimizer) as watch:
        step(model, optimizer)
        began = time.perf_counter()
        for _ in range(3):
            with getattr(watch, mark)(), watch.evaluation():
                time.sleep(PAUSE)
            step(model, optimizer)
        lasted = time.perf_counter() - began
    durations = exporter.values(names.STEP_DURATION)
    assert len(durations) == 3
    assert sum(durations) <= lasted - 3 * PAUSE


def test_what_happens_in_evaluation_is_not_judged(watching: Watching, exporter: InMemoryExporter) -> None:
    model, optimizer = make()
    probe, probe_optimizer = make()
    with watching(model, optimizer) as watch, watching(probe, probe_optimizer):
        step(model, optimizer)
        with watch.evaluation():
            (probe(torch.randn(5, 4)).mean() * math.nan).backward()
            torch.nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
            probe_optimizer.step()
            watch.log(val_loss=0.5)
        step(model, optimizer)
    assert exporter.find_events(names.NONFINITE_STEP.name) == []
    assert exporter.values(names.STEP_INDEX) == [0, 1]
    assert len(exporter.values(names.LOSS)) == 2
    assert exporter.values(names.LOGGED) == [0.5]


def test_evaluation_that_raises_is_over(watching: Watching, exporter: InMemoryExporter) -> None:
    model, optimizer = make()
    with watching(model, optimizer) as watch:
        with pytest.raises(ValueError, match="planted"), watch.evaluation():
            raise ValueError("planted")
        step(model, optimizer)
    assert exporter.values(names.STEP_INDEX) == [0]


def test_a_function_can_be_marked_as_evaluation(watching: Watching, exporter: InMemoryExporter) -> None:
    model, optimizer = make()
    with watching(model, optimizer) as watch:

        @watch.evaluation()  # type: ignore[untyped-decorator]
        def validate() -> float:
            step(model, optimizer)
            return 0.25

        assert [validate(), validate()] == [0.25, 0.25]
    assert exporter.values(names.STEP_INDEX) == []


def test_a_watch_that_watches_nothing_can_be_told_too(
    watching: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADWATCH_DISABLED", "true")
    watch = watching(*make())
    with watch.evaluation(), watch.checkpoint():
        assert watch.run_id is None


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_nan_seen_in_evaluation_does_not_excuse_one_in_training(
    watching: Watching, exporter: InMemoryExporter, marked: bool, with_gradients: bool
) -> None:
    model, optimizer = make()
    bad = torch.full((5, 4), math.nan)
    with watching(model, optimizer) as watch:
        for number in range(6):
            if number == 2:
                with watch.evaluation() if marked else nullcontext(), torch.set_grad_enabled(with_gradients):
                    model(bad)
            optimizer.zero_grad()
            model(bad if number == 5 else torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert (event.attributes[names.STEP], event.attributes[names.BORN_IN]) == (5, "input")


@pytest.mark.parametrize("reason", ["pause", "closure", "closure that raises", "loss in doubt"])
def test_losses_are_read_the_short_way_again_once_nobody_has_to_think_about_them(
    watching: Watching, reason: str
) -> None:
    model, optimizer = make()
    busy: list[bool] = []

    def closure() -> torch.Tensor:
        busy.append(progress.busy)
        if reason == "closure that raises":
            raise ValueError("no loss")
        return torch.zeros(())

    with watching(model, optimizer) as watch:
        progress = watch._run.observer.progress
        step(model, optimizer)
        assert not progress.busy
        if reason == "pause":
            with watch.evaluation(), watch.checkpoint():
                busy.append(progress.busy)
        elif reason == "loss in doubt":
            watch.log(loss=5.0)
            busy.append(progress.busy)
        else:
            with suppress(ValueError):
                optimizer.step(closure)
        if reason in {"pause", "closure"}:
            assert not progress.busy
        step(model, optimizer)
        step(model, optimizer)
        assert busy == [True]
        assert not progress.busy
