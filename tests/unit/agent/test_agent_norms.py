"""Reported norms against an independent dense computation in float64, over every kind of loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from gradwatch import conventions as names
from gradwatch.gradients.norms import nonfinite_among
from gradwatch.nonfinite import forward_witness
from gradwatch.testing import InMemoryExporter

Watching = Callable[..., Any]


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def dense_norm(grad: torch.Tensor) -> float:
    values = grad.detach().to_dense() if grad.layout is not torch.strided else grad.detach()
    wide = values.to(torch.complex128) if values.is_complex() else values.double()
    return math.sqrt(float((wide.abs() ** 2).sum()))


def norms_of(model: nn.Module) -> dict[str, float]:
    return {name: dense_norm(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def layer_sums(exporter: InMemoryExporter) -> dict[str, float]:
    sums: dict[str, float] = {}
    for point in exporter.histograms(names.LAYER_GRADIENT_NORM):
        layer = str(point.attributes[names.LAYER_NAME])
        sums[layer] = sums.get(layer, 0.0) + point.sum
    return sums


def assert_reported(
    exporter: InMemoryExporter, truth: Iterable[dict[str, float]], tolerance: float = 1e-5
) -> None:
    """Global norm of every step, and the sum of each layer's norms over all steps."""
    steps = list(truth)
    totals = [math.hypot(*step.values()) for step in steps]
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx(totals, rel=tolerance)
    expected: dict[str, float] = {}
    for step in steps:
        for layer, norm in step.items():
            expected[layer] = expected.get(layer, 0.0) + norm
    assert layer_sums(exporter) == pytest.approx(expected, rel=tolerance)


def test_a_plain_loop(watching: Watching, exporter: InMemoryExporter) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    truth = []
    with watching(model, optimizer):
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(5, 4)).square().mean().backward()
            truth.append(norms_of(model))
            optimizer.step()
    assert_reported(exporter, truth)
    assert exporter.values(names.STEP_INDEX) == [0, 1, 2, 3]


def test_accumulation_reads_once_a_step(watching: Watching, exporter: InMemoryExporter) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    truth, losses = [], []
    with watching(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            total = 0.0
            for _ in range(4):
                loss = model(torch.randn(5, 4)).square().mean() / 4
                loss.backward()
                total += loss.item()
            losses.append(total)
            truth.append(norms_of(model))
            optimizer.step()
    assert_reported(exporter, truth)
    assert exporter.values(names.LOSS) == pytest.approx(losses)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_clipping_does_not_hide_the_gradients_before_it(
    watching: Watching, exporter: InMemoryExporter, norm_type: float, every: int
) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    truth = []
    with watching(model, optimizer, every=every):
        for _ in range(4):
            optimizer.zero_grad()
            model(100 * torch.randn(5, 4)).square().mean().backward()
            truth.append(norms_of(model))
            clip_grad_norm_(model.parameters(), 0.01, norm_type=norm_type)
            optimizer.step()
    observed = truth[::every]
    expected = {layer: sum(step[layer] for step in observed) for layer in truth[0]}
    assert layer_sums(exporter) == pytest.approx(expected, rel=1e-5)
    # torch's own total norm tells the global norm of the steps in between, where it is an L2 norm.
    totals = [math.hypot(*step.values()) for step in (truth if norm_type == 2.0 else observed)]
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx(totals, rel=1e-5)


def test_clipping_each_micro_batch_is_read_again_after_the_last(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    truth: dict[str, float] = {}
    with watching(model, optimizer):
        for _ in range(2):
            model(torch.randn(5, 4)).square().mean().backward()
            truth = norms_of(model)
            clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    assert_reported(exporter, [truth])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_that_is_converted_in_mid_run_is_read_in_its_new_type(
    watching: Watching, exporter: InMemoryExporter, dtype: torch.dtype
) -> None:
    model = nn.Linear(60, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    truth = []
    with watching(model, optimizer):
        for step in range(4):
            if step == 2:
                model.to(dtype)
            optimizer.zero_grad()
            (model(torch.full((1, 60), 40.0, dtype=model.weight.dtype)) * 250.0).sum().backward()
            truth.append(norms_of(model))
            optimizer.step()
    assert_reported(exporter, truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_are_accumulated_in_float32(
    watching: Watching, exporter: InMemoryExporter, dtype: torch.dtype
) -> None:
    parameter = nn.Parameter(torch.zeros(4096, dtype=dtype))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    with watching(None, optimizer):
        parameter.grad = torch.full_like(parameter, 1000.0)  # an fp16 norm of 64 000 squares to infinity
        optimizer.step()
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx([dense_norm(parameter.grad)], rel=1e-3)
    assert exporter.find_events(names.NONFINITE_STEP.name) == []


@pytest.mark.parametrize("coalesce", [True, False])
def test_sparse_gradients(watching: Watching, exporter: InMemoryExporter, coalesce: bool) -> None:
    table = nn.Embedding(10, 3, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.0)
    with watching(table, optimizer):
        table(torch.tensor([1, 1, 2])).sum().backward()
        assert table.weight.grad is not None
        if coalesce:
            table.weight.grad = table.weight.grad.coalesce()
        truth = norms_of(table)
        optimizer.step()
    assert truth["weight"] == pytest.approx(math.sqrt(3 * 4 + 3))
    assert_reported(exporter, [truth])


def test_complex_empty_none_and_frozen_gradients(watching: Watching, exporter: InMemoryExporter) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.complex = nn.Parameter(torch.randn(6, dtype=torch.complex64))
            self.empty = nn.Parameter(torch.zeros(0))
            self.unused = nn.Parameter(torch.zeros(3))
            self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
            self.wide = nn.Parameter(torch.randn(5, dtype=torch.float64))

    model = Odd()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watching(model, optimizer):
        (model.complex.abs().square().sum() + model.wide.square().sum() + model.empty.sum()).backward()
        truth = norms_of(model)
        optimizer.step()
    assert set(truth) == {"complex", "empty", "wide"}
    assert_reported(exporter, [truth])


def test_a_shared_parameter_is_counted_once(watching: Watching, exporter: InMemoryExporter) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            self.second = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watching(model, optimizer):
        model.second(model.first(torch.randn(3, 4))).sum().backward()
        truth = norms_of(model)
        optimizer.step()
    assert list(truth) == ["first.weight"]
    assert_reported(exporter, [truth])


def test_groups_have_a_learning_rate_each_and_may_be_added_later(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    truth = []
    with watching(model, optimizer):
        for step in range(3):
            if step == 1:
                optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.01})
            model.zero_grad()
            model(torch.randn(5, 4)).square().mean().backward()
            mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
            wanted = {name for name, p in model.named_parameters() if id(p) in mine}
            truth.append({name: norm for name, norm in norms_of(model).items() if name in wanted})
            optimizer.step()
    assert_reported(exporter, truth)
    assert [p.value for p in exporter.points(names.LEARNING_RATE, **{names.PARAM_GROUP: 1})] == [0.01, 0.01]


def test_a_closure_reports_its_last_evaluation(watching: Watching, exporter: InMemoryExporter) -> None:
    model = mlp()
    x = torch.randn(5, 4)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, max_eval=3)
    truth, losses = [], []
    evaluations: list[tuple[float, dict[str, float]]] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        evaluations.append((loss.item(), norms_of(model)))
        return loss

    with watching(model, optimizer):
        for _ in range(3):
            optimizer.step(closure)
            losses.append(evaluations[-1][0])
            truth.append(evaluations[-1][1])
    assert len(evaluations) > 3
    assert_reported(exporter, truth)
    assert exporter.values(names.LOSS) == pytest.approx(losses)


def test_a_gan_keeps_its_two_optimizers_apart(watching: Watching, exporter: InMemoryExporter) -> None:
    generator, critic = mlp(), nn.Linear(3, 1)
    steps_g = torch.optim.SGD(generator.parameters(), lr=0.1)
    steps_c = torch.optim.SGD(critic.parameters(), lr=0.1)
    critic_losses, generator_losses, critic_norms = [], [], []
    with watching({"critic": critic, "generator": generator}, [steps_c, steps_g]):
        for _ in range(3):
            steps_c.zero_grad()
            real = critic(torch.randn(5, 3)).mean()
            real.backward()
            fake = -critic(generator(torch.randn(5, 4)).detach()).mean()
            fake.backward()
            critic_losses.append(real.item() + fake.item())
            critic_norms.append(norms_of(critic)["weight"])
            steps_c.step()
            steps_g.zero_grad()
            loss = critic(generator(torch.randn(5, 4))).mean()
            loss.backward()
            generator_losses.append(loss.item())
            steps_g.step()
    by_optimizer = [[p.value for p in exporter.points(names.LOSS, **{names.OPTIMIZER: i})] for i in (0, 1)]
    assert by_optimizer == [pytest.approx(critic_losses), pytest.approx(generator_losses)]
    assert layer_sums(exporter)["critic.weight"] == pytest.approx(sum(critic_norms), rel=1e-5)
    assert "generator.0.weight" in layer_sums(exporter)
    assert exporter.values(names.STEP_INDEX) == [0, 1, 2]


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_changes_neither_loss_nor_norms(
    watching: Watching, exporter: InMemoryExporter, fused: bool
) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    truth, losses = [], []
    with watching(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(torch.randn(5, 4)).square().mean()
            losses.append(loss.item())
            scaler.scale(loss).backward()
            truth.append({name: norm / scaler.get_scale() for name, norm in norms_of(model).items()})
            scaler.step(optimizer)
            scaler.update()
    assert_reported(exporter, truth)
    assert exporter.values(names.LOSS) == pytest.approx(losses)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_skipped_by_the_scaler_counts_and_is_no_finding(
    watching: Watching, exporter: InMemoryExporter, fused: bool
) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    with watching(model, optimizer) as watch:
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(1e6 * model(torch.randn(5, 4)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert watch.step == 2
    assert exporter.values(names.STEP_INDEX) == [0, 1]
    assert exporter.values(names.GRADIENT_NORM) == []
    assert exporter.find_events(names.NONFINITE_STEP.name) == []


def test_a_subclass_that_calls_its_parent_is_one_step(watching: Watching, exporter: InMemoryExporter) -> None:
    class Mine(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    model = mlp()
    torch.optim.SGD(model.parameters(), lr=0.1)  # puts hooks on the parent's step too
    optimizer = Mine(model.parameters(), lr=0.1)
    with watching(model, optimizer):
        for _ in range(3):
            model(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
    assert exporter.values(names.STEP_INDEX) == [0, 1, 2]


def test_a_step_that_raises_does_not_hide_the_next(watching: Watching, exporter: InMemoryExporter) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def broken() -> float:
        raise RuntimeError("planted")

    with watching(model, optimizer):
        with pytest.raises(RuntimeError, match="planted"):
            optimizer.step(broken)
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    assert exporter.values(names.STEP_INDEX) == [0]


def test_an_optimizer_nobody_named_is_found_by_what_it_trains(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model, other = mlp(), mlp()
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)
    with watching(model):
        for net, optimizer in ((model, mine), (other, foreign)):
            net(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
    assert exporter.values(names.STEP_INDEX) == [0]
    assert set(layer_sums(exporter)) == {name for name, _ in model.named_parameters()}


def test_wrapped_optimizers_and_modules_go_by_their_inner_names(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = nn.DataParallel(mlp())
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, Wrapper(inner)):
        model(torch.randn(5, 4)).square().mean().backward()
        inner.step()
    assert "0.weight" in layer_sums(exporter)
    assert exporter.resource[names.MODEL] == "Sequential"


def test_loss_and_step_share_a_time_stamp(watching: Watching, exporter: InMemoryExporter) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer):
        for _ in range(3):
            model(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
    times = [p.time for p in exporter.points(names.STEP_INDEX)]
    assert times == sorted(set(times))
    for metric in (names.LOSS, names.GRADIENT_NORM, names.LEARNING_RATE):
        assert [p.time for p in exporter.points(metric)] == times


def test_a_loop_that_keeps_gradients_elsewhere_is_told_and_not_reported_as_zero(
    watching: Watching, exporter: InMemoryExporter, caplog: pytest.LogCaptureFixture
) -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    with watching(None, optimizer):
        for _ in range(3):
            optimizer.step()
    assert exporter.values(names.GRADIENT_NORM) == []
    assert exporter.values(names.STEP_INDEX) == [0, 1, 2]
    assert caplog.text.count("missing instrumentation") == 1


def test_every_optimizer_is_observed_under_the_default_budget(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    first, second = mlp(), mlp()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (first, second)]
    with watching([first, second], optimizers, every=None, overhead_budget=1.0):
        for _ in range(20):
            for net, optimizer in zip((first, second), optimizers, strict=True):
                net(torch.randn(5, 4)).square().mean().backward()
                optimizer.step()
    observed = [len(exporter.points(names.GRADIENT_NORM, **{names.OPTIMIZER: i})) for i in (0, 1)]
    # A share of 1 leaves room for every read; without a step time of its own an optimizer would be thinned.
    assert observed == [20, 20]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_overflows_only_when_it_is_added_up_is_not_bad(dtype: torch.dtype) -> None:
    large = torch.full((4,), torch.finfo(dtype).max, dtype=dtype)
    nan, inf = large.clone(), large.clone()
    nan[1], inf[2] = math.nan, -math.inf
    both = torch.tensor([math.inf, -math.inf], dtype=dtype)
    values = [large, nan, large[:0], inf, both, torch.zeros(3, dtype=dtype)]
    bad = [False, True, False, True, True, False]
    assert nonfinite_among(values) == bad
    assert nonfinite_among([*values, torch.tensor([math.nan], dtype=torch.float64)]) == [*bad, True]
    assert [bool(forward_witness._flaw(value)) for value in values] == bad


def test_a_fused_optimizers_own_scale_and_verdict_are_read(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    """Also where it was no GradScaler of torch's that left them."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    norms = []
    with watching(model, optimizer):
        for found in (None, 0.0, 0.0, 1.0, 0.0):
            optimizer.zero_grad()
            model(torch.randn(3, 4)).square().mean().backward()
            total = float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())
            if found is not None:
                optimizer.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined] # as torch's scaler does
                optimizer.found_inf = torch.tensor(found)  # type: ignore[attr-defined]
            norms.append(total if found is None else total / 4)
            optimizer.step()
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx([*norms[:3], norms[4]])
