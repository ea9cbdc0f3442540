"""``torch.compile`` captures the graphs it would capture without us, and the numbers are right all the same."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import compile as compile_by_name
from torch import nn
from torch._dynamo.utils import counters

from gradwatch import conventions as names
from gradwatch.testing import InMemoryExporter
from tests.unit.agent.training_loops import COMPILED, Loop, Truth, Watch, norms_of

Watching = Callable[..., Any]


@pytest.fixture(autouse=True)
def quiet_compiler() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own deprecated parts
        yield
    torch._dynamo.reset()


def captured(loop: Loop, watch: Watch) -> tuple[dict[str, int], int, list[bytes]]:
    """Operators and graphs captured, graph breaks, final weights."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(1)
    modules = loop(watch, Truth())
    weights = [tensor.numpy().tobytes() for module in modules for tensor in module.state_dict().values()]
    return dict(counters["stats"]), sum(counters["graph_break"].values()), weights


@pytest.mark.parametrize("loop", COMPILED, ids=lambda loop: loop.__name__)
def test_the_same_graphs_are_captured_and_the_same_weights_come_out(watching: Watching, loop: Loop) -> None:
    bare = captured(loop, lambda *_: nullcontext())
    watched = captured(loop, watching)
    assert bare[0]["unique_graphs"] > 0
    assert watched[0] == bare[0]
    assert watched[1] <= bare[1]
    assert watched[2] == bare[2]


@pytest.mark.parametrize("loop", COMPILED, ids=lambda loop: loop.__name__)
def test_compiled_loops_are_told_like_others(
    watching: Watching, exporter: InMemoryExporter, loop: Loop
) -> None:
    truth = Truth()
    loop(watching, truth)
    steps = truth.steps[0]
    totals = [math.hypot(*step.norms.values()) for step in steps if step.norms is not None]
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx(totals, rel=1e-5)
    assert exporter.values(names.LOSS) == pytest.approx([step.loss for step in steps], rel=1e-5)
    layers = {point.attributes[names.LAYER_NAME] for point in exporter.histograms(names.LAYER_GRADIENT_NORM)}
    assert layers == set(steps[0].norms or ())


@pytest.mark.parametrize("every", [None, 1])
@pytest.mark.parametrize("step", range(5))
def test_what_was_exported_or_compiled_in_mid_run_is_what_it_would_have_been(
    watching: Watching, every: int | None, step: int
) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    called: Callable[..., Any] = model
    with watching(model, optimizer, every=every):
        for index in range(5):
            if index == step:
                exported = torch.export.export(model, (torch.randn(3, 4),), strict=True)
                assert len(exported.graph_signature.parameters) == 4
                called = compile_by_name(model, fullgraph=True, backend="eager")
            optimizer.zero_grad()
            called(torch.randn(3, 4)).square().mean().backward()
            optimizer.step()


def test_a_backward_inside_one_whole_graph_stays_in_it(
    watching: Watching, exporter: InMemoryExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss is never seen: the loop has to log it."""
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    @torch.compile(backend="eager", fullgraph=True)
    def forward_and_backward(x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(x).square().mean()
        loss.backward()
        return loss.detach()

    totals, losses = [], []
    with watching(model, optimizer) as watch:
        for _ in range(3):
            optimizer.zero_grad()
            loss = forward_and_backward(torch.randn(5, 4))
            losses.append(loss.item())
            totals.append(math.hypot(*norms_of(model).values()))
            optimizer.step()
            watch.log(loss=loss)
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx(totals)
    assert exporter.values(names.LOSS) == losses


def test_clipping_inside_one_whole_graph_stays_in_it(watching: Watching) -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    @torch.compile(backend="eager", fullgraph=True)
    def clip() -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(list(model.parameters()), 0.01)

    with watching(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(5, 4)).square().mean().backward()
            total = math.hypot(*norms_of(model).values())
            assert float(clip()) == pytest.approx(total)
            optimizer.step()


def test_a_watched_model_can_be_scripted(watching: Watching) -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer):
        x = torch.randn(5, 4)
        scripted = torch.jit.script(model)
        assert torch.equal(scripted(x), model(x))
