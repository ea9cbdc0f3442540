"""Several threads: one of them trains the run, and what the others do harms nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gradwatch import conventions as names
from gradwatch.loop.missing import ELSEWHERE
from gradwatch.testing import InMemoryExporter

Watching = Callable[..., Any]
STEPS = 300


class Trainee:
    """A model, its optimizer, and a loop that can run in any thread."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.inputs = torch.randn(50, 8, 6)

    def train(self, steps: int) -> None:
        for step in range(steps):
            self.optimizer.zero_grad()
            self.model(self.inputs[step % 50]).square().mean().backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
            self.optimizer.step()

    @property
    def weights(self) -> bytes:
        return b"".join(parameter.detach().numpy().tobytes() for parameter in self.model.parameters())


def in_threads(*work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=each) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def bare(seed: int, *parts: int) -> bytes:
    trainee = Trainee(seed)
    for steps in parts:
        trainee.train(steps)
    return trainee.weights


@pytest.mark.parametrize("every", [None, 1])
def test_of_two_threads_that_train_the_first_optimizers_is_told_and_both_come_out_the_same(
    watching: Watching, exporter: InMemoryExporter, every: int | None
) -> None:
    one, other = Trainee(1), Trainee(2)
    with watching([one.model, other.model], [one.optimizer, other.optimizer], every=every):
        one.train(1)
        in_threads(lambda: one.train(STEPS - 1), lambda: other.train(STEPS))
    assert one.weights == bare(1, 1, STEPS - 1)
    assert other.weights == bare(2, STEPS)
    assert exporter.values(names.STEP_INDEX) == list(range(STEPS))
    told = [
        event.attributes[names.MISSING_REASON]
        for event in exporter.find_events(names.INSTRUMENTATION_MISSING.name)
    ]
    assert told == [ELSEWHERE]


def test_training_that_moves_to_another_thread_is_followed(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    one, other = Trainee(1), Trainee(2)

    def both() -> None:
        for _ in range(10):
            one.train(1)
            other.train(1)

    with watching([one.model, other.model], [one.optimizer, other.optimizer], every=1):
        both()
        in_threads(both)
    owners = [point.attributes[names.OPTIMIZER] for point in exporter.points(names.GRADIENT_NORM)]
    assert owners.count(0) == owners.count(1) == 20
    assert not exporter.find_events(names.INSTRUMENTATION_MISSING.name)


def test_a_second_optimizer_trains_on_where_the_first_ones_thread_has_ended(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    one, other = Trainee(1), Trainee(2)
    with watching([one.model, other.model], [one.optimizer, other.optimizer], every=1):
        in_threads(lambda: one.train(5))
        in_threads(lambda: other.train(5))
    owners = [point.attributes[names.OPTIMIZER] for point in exporter.points(names.GRADIENT_NORM)]
    assert owners.count(0) == owners.count(1) == 5
