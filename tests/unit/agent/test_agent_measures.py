"""Weights and updates through a watch: when they are measured, under which names, and by way of a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gradwatch
from gradwatch import conventions as names
from gradwatch.loop.arrivals import Arrivals
from gradwatch.loop.step_in_progress import StepInProgress
from gradwatch.measures.cadence import Cadence
from gradwatch.measures.measures import Measures
from gradwatch.measures.weights import WeightReading
from gradwatch.nonfinite.forward_witness import ForwardWitness
from gradwatch.nonfinite.suspects import Suspects
from gradwatch.settings import Settings, SettingsError
from gradwatch.telemetry import Point
from gradwatch.testing import InMemoryExporter

Watching = Callable[..., gradwatch.Watch]


Truth = dict[str, tuple[float, float]]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Truth]:
    """Norm and update ratio of every parameter at every step, by a dense computation."""
    truth = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 4)).square().mean().backward()
        before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        optimizer.step()
        moved = {name: (p.detach() - before[name]).norm().item() for name, p in model.named_parameters()}
        norms = {name: old.norm().item() for name, old in before.items()}
        truth.append({name: (norm, moved[name] / norm) for name, norm in norms.items()})
    return truth


def by_layer(points: Sequence[Point]) -> dict[str, float]:
    return {str(point.attributes[names.LAYER_NAME]): point.value for point in points}


def test_a_run_reports_norms_and_ratios_once_early_with_the_time_of_their_step(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with watching(model, optimizer):
        truth = train(model, optimizer, 25)
    norms, ratios = exporter.points(names.WEIGHT_NORM), exporter.points(names.UPDATE_RATIO)
    times = {point.time for point in (*norms, *ratios)}
    (step,) = (point.value for point in exporter.points(names.STEP_INDEX) if point.time in times)
    assert step == 9
    assert by_layer(norms) == pytest.approx({name: norm for name, (norm, _) in truth[9].items()})
    moved = {name: ratio for name, (_, ratio) in truth[9].items() if name != "0.bias"}
    assert by_layer(ratios) == pytest.approx(moved, rel=1e-5)


def test_thinned_sampling_measures_on_observed_steps_only(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer, every=3):
        truth = train(model, optimizer, 40)
    times = {point.time for point in exporter.points(names.WEIGHT_NORM)}
    (step,) = (int(point.value) for point in exporter.points(names.STEP_INDEX) if point.time in times)
    assert step in [
        point.value
        for point in exporter.points(names.STEP_INDEX)
        if point.time in {norm.time for norm in exporter.points(names.GRADIENT_NORM)}
    ]
    assert by_layer(exporter.points(names.UPDATE_RATIO)) == pytest.approx(
        {name: ratio for name, (_, ratio) in truth[step].items()}, rel=1e-5
    )


def test_two_optimizers_are_told_apart(watching: Watching, exporter: InMemoryExporter) -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 1)
    model = nn.Sequential(first, second)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (first, second)]
    with watching(model, optimizers):
        for _ in range(12):
            for optimizer in optimizers:
                optimizer.zero_grad()
            model(torch.randn(4, 4)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
    found = {
        (point.attributes[names.OPTIMIZER], point.attributes[names.LAYER_NAME])
        for point in exporter.points(names.UPDATE_RATIO)
    }
    assert found == {(0, "0.weight"), (0, "0.bias"), (1, "1.weight"), (1, "1.bias")}


def test_a_step_that_the_scaler_skipped_has_no_update(watching: Watching, exporter: InMemoryExporter) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with watching(model, optimizer):
        for step in range(12):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(4, 4)).square().mean()).backward()
            if step == 9:
                assert model.weight.grad is not None
                model.weight.grad.fill_(torch.inf)
            scaler.step(optimizer)
            scaler.update()
    assert exporter.points(names.UPDATE_RATIO) == []


class Later(Arrivals):
    """A ring whose vectors arrive when the test says so."""

    def __init__(self) -> None:
        super().__init__(None, Suspects(None, {}, (), ForwardWitness(StepInProgress())))  # type: ignore[arg-type]
        self.sent: list[tuple[Tensor, Callable[[list[float]], None]]] = []

    def send_vector(self, vector: Tensor, take: Callable[[list[float]], None]) -> None:
        self.sent.append((vector, take))


def test_what_is_on_a_device_is_reported_when_it_arrives_with_the_time_of_its_step() -> None:
    ring = Later()
    measures = Measures(ring, [], start=0)
    watched: Any = SimpleNamespace(layers=("a", "b"), index=0)
    elsewhere = WeightReading((0, 1), (True, False), torch.empty(6, device="meta"))
    measures._weights_found(watched, elsewhere, 7, optimizers=1)
    measures._input_vectors.append(("x", torch.empty(3, device="meta")))
    measures._inputs_found(8)
    assert measures.points(9) == []
    for (_, take), numbers in zip(ring.sent, [[4.0, 5.0, 2.0, 5.0, 1.0, 0.0], [1.5, 0.5, 0.25]], strict=True):
        take(numbers)
    found = {
        (batch.metric.name, *point.attributes.values()): (point.time, point.value)
        for batch in measures.points(9)
        for point in batch.points
        if isinstance(point, Point)
    }
    assert found == {
        ("training.layer.weight.norm", "a"): (7, 4.0),
        ("training.layer.weight.norm", "b"): (7, 5.0),
        ("training.update.ratio", "a"): (7, 0.5),
        ("training.input.mean", "x"): (8, 1.5),
        ("training.input.stddev", "x"): (8, 0.5),
        ("training.input.nonfinite", "x"): (8, 0.25),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measuring_changes_no_weight_by_a_bit(watching: Watching, dtype: torch.dtype) -> None:
    def final(watch: Callable[..., Any]) -> list[Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1)).to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        data: Any = torch.randn(60, 4).to(dtype)
        with watch(model, optimizer):
            for x in DataLoader(data, batch_size=2, shuffle=True):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    bare = final(lambda *_: nullcontext())
    measured = final(lambda *objects: watching(*objects, collectives=True))
    assert all(torch.equal(a, b) for a, b in zip(bare, measured, strict=True))


@given(st.lists(st.floats(0, 20, allow_nan=False), max_size=60))
def test_a_cadence_is_due_at_the_tenth_time_and_then_at_most_once_in_its_seconds(pauses: list[float]) -> None:
    now = [0.0]
    cadence = Cadence(30.0, lambda: now[0])
    due = []
    for asked, pause in enumerate(pauses, 1):
        now[0] += pause
        if cadence.due():
            due.append((asked, now[0]))
    assert [asked for asked, _ in due][:1] == ([10] if len(pauses) >= 10 else [])
    assert all(later - earlier >= 30 for (_, earlier), (_, later) in pairwise(due))


@pytest.mark.parametrize(
    ("keywords", "environ", "expected"),
    [
        ({}, {}, (True, False, None)),
        ({"inputs": False, "collectives": True, "nvtx": "layers"}, {}, (False, True, "layers")),
        ({"nvtx": True}, {"GRADWATCH_NVTX": "layers"}, (True, False, "step")),
        ({"nvtx": False}, {"GRADWATCH_NVTX": "layers"}, (True, False, None)),
        ({}, {"GRADWATCH_INPUTS": "0", "GRADWATCH_NVTX": "1"}, (False, False, "step")),
        ({}, {"GRADWATCH_COLLECTIVES": "1", "GRADWATCH_NVTX": "0"}, (True, True, None)),
    ],
)  # fmt: skip
def test_settings(keywords: dict[str, Any], environ: dict[str, str], expected: tuple[Any, ...]) -> None:
    settings = Settings.resolve(keywords, environ, "script")
    assert (settings.inputs, settings.collectives, settings.nvtx) == expected


def test_an_unknown_kind_of_range_is_one_clear_line() -> None:
    with pytest.raises(SettingsError, match="nvtx='modules': expected true, false or layers"):
        Settings.resolve({"nvtx": "modules"}, {}, "script")
