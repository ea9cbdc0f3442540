"""Every test of the agent: errors surface, the environment is clean, and no run is left open."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gradwatch
from gradwatch import current_run as runs
from gradwatch import safety, training_run
from gradwatch.life.endings import RETURNED
from gradwatch.testing import InMemoryExporter

# Hundreds of tests begin a run, and each would measure anew, for 10 ms, what a step costs.
_thin_cost = functools.cache(training_run.thin_cost)


@pytest.fixture(autouse=True)
def clean_agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith(("GRADWATCH_", "OTEL_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GRADWATCH_TESTING", "1")
    monkeypatch.setattr(training_run, "thin_cost", _thin_cost)
    monkeypatch.setattr(safety, "_errors", safety.Throttle())
    monkeypatch.setenv("GRADWATCH_DIR", str(tmp_path / "gradwatch"))
    torch.manual_seed(0)
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if frames is not None and any(frames.cached_backends.values()):
        torch._dynamo.reset()  # another test's use of torch.compile must not be seen by this one
    yield
    left = runs.current()
    if left is not None:
        runs.close_run(left, RETURNED)


@pytest.fixture
def exporter() -> InMemoryExporter:
    return InMemoryExporter()


@pytest.fixture
def watching(exporter: InMemoryExporter) -> Callable[..., gradwatch.Watch]:
    """`watch()` into the in-memory exporter, observing every step."""

    def begin(*objects: Any, **settings: Any) -> gradwatch.Watch:
        return gradwatch.watch(*objects, **{"every": 1, "exporter": exporter, **settings})

    return begin
