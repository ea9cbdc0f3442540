"""The gym, which the benchmarks import by their own folder, and runs of it within a test's process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import gradwatch
from gradwatch import current_run as runs
from gradwatch.life.endings import RETURNED
from gradwatch.testing import InMemoryExporter

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))


@pytest.fixture(autouse=True)
def no_run_is_left_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith(("GRADWATCH_", "OTEL_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GRADWATCH_TESTING", "1")
    monkeypatch.setenv("GRADWATCH_DIR", str(tmp_path / "gradwatch"))
    yield
    left = runs.current()
    if left is not None:
        runs.close_run(left, RETURNED)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@dataclass
class Played:
    training: Any
    recipe: Any
    fault: Any
    folder: Path
    exporter: InMemoryExporter = field(default_factory=InMemoryExporter)


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., Played]:
    """Train a few steps of a planned run, its fault coming in the middle."""
    from gym.plan import HEALTHY, plan
    from gym.train import Loop, prepare

    def play(fault: str | None, strength: str = "strong", family: str = "mlp", steps: int = 12) -> Played:
        planned = next(
            each
            for each in plan("tuning", families=(family,), faults=(fault or HEALTHY,))
            if fault is None or each.strength == strength
        )
        training, recipe, made = prepare(planned, steps, 0, tmp_path)
        training.every = 6
        played = Played(training, recipe, made, tmp_path)
        models = training.models if len(training.models) > 1 else next(iter(training.models.values()))
        optimizers = [turn.optimizer for turn in training.turns]
        with gradwatch.watch(models, optimizers, every=1, exporter=played.exporter) as watch:
            Loop(training, recipe, made, watch).run()
        return played

    return play
