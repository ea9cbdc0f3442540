"""Faults planted in five kinds of networks: the step, the phase and the layer they are blamed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import gradwatch
from gradwatch import conventions as names
from gradwatch.testing import InMemoryExporter
from tests.unit.agent.planted import Fault, Task, faults

FAULTS = tuple(faults())
STEPS, BAD_STEP = 7, 4


@dataclass(frozen=True)
class Outcome:
    fault: Fault
    step: Any
    born_in: Any
    layer: Any

    @property
    def is_exact(self) -> bool:
        return self.has_step and self.born_in == self.fault.born_in and self.has_layer

    @property
    def has_step(self) -> bool:
        return self.step == BAD_STEP + self.fault.steps_late

    @property
    def has_layer(self) -> bool:
        expected = self.fault.layer
        if self.fault.born_in == "backward" and expected is not None:
            return str(self.layer).rpartition(".")[0] == expected
        return self.layer == expected

    @property
    def is_wrong(self) -> bool:
        """Whether anything it says is untrue; null is not."""
        return (
            self.born_in not in (None, self.fault.born_in)
            or (self.born_in is not None and not self.has_step)
            or (self.born_in is not None and self.layer is not None and not self.has_layer)
        )

    def __str__(self) -> str:
        mark = "ok   " if self.is_exact else "WRONG" if self.is_wrong else "null "
        truth = f"{self.fault.born_in}/{self.fault.layer}"
        return f"{mark} {self.fault!s:60} {truth:36} said {self.step}: {self.born_in}/{self.layer}"


def outcome(fault: Fault, prepare: Callable[[Task], None] = lambda task: None, **settings: Any) -> Outcome:
    torch.manual_seed(0)
    task = fault.build()
    prepare(task)
    exporter = InMemoryExporter()
    models = task.models if len(task.models) > 1 else task.model
    with gradwatch.watch(models, task.optimizers, exporter=exporter, **settings):
        for step in range(STEPS):
            undo = fault.plant(task) if step == BAD_STEP else None
            task.iterate(task, step)
            if undo is not None:
                undo()
    events = exporter.find_events(names.NONFINITE_STEP.name)
    if not events:
        return Outcome(fault, None, "no event", None)
    told = min(events, key=lambda event: (event.attributes[names.STEP], event.time)).attributes
    return Outcome(fault, told[names.STEP], told.get(names.BORN_IN), told.get(names.LAYER_NAME))


def table(outcomes: list[Outcome]) -> str:
    exact = sum(one.is_exact for one in outcomes)
    return "\n".join([f"{exact} of {len(outcomes)} exact", *(str(one) for one in outcomes if not one.is_exact)])


def test_on_observed_steps_nearly_every_birthplace_is_exact_and_none_is_wrong() -> None:
    outcomes = [outcome(fault, every=1) for fault in FAULTS]
    assert len(outcomes) >= 40
    assert not any(one.is_wrong for one in outcomes), table(outcomes)
    assert sum(one.is_exact for one in outcomes) >= 0.95 * len(outcomes), table(outcomes)
