"""Loops that people write: batches thrown away, clipping twice, optimizers without a rate, late layers."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch import conventions as names
from gradwatch.testing import InMemoryExporter

Watching = Callable[..., gradwatch.Watch]


def dense_norm(model: nn.Module) -> float:
    return math.sqrt(
        sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    )


def test_a_batch_that_is_thrown_away_leaves_no_trace_in_the_next_step(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watch = watching(model, optimizer)
    losses = []
    for batch in range(5):
        x = torch.randn(8, 4)
        if batch == 2:
            x[0] = math.nan
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 10.0)
        if batch in (2, 3):
            optimizer.zero_grad()
            continue
        losses.append(loss.item())
        optimizer.step()
    watch.close()
    assert exporter.values(names.LOSS) == pytest.approx(losses)
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert event.attributes[names.STEP] == 2


@pytest.mark.parametrize("fault", [math.nan, 1.0])
def test_a_batch_thrown_away_by_setting_its_gradients_to_zero_leaves_no_trace_either(
    exporter: InMemoryExporter, fault: float
) -> None:
    """Also where every number of the batch is finite, and no step is observed that could tell its own norm."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses, norms = [], []
    with gradwatch.watch(model, optimizer, exporter=exporter, every=1000):
        for batch in range(8):
            optimizer.zero_grad(set_to_none=False)
            loss = (100 * model(torch.randn(8, 4))).square().mean() * (fault if batch == 4 else 1.0)
            loss.backward()
            if batch == 4:
                clip_grad_norm_(model.parameters(), 1.0)
                optimizer.zero_grad(set_to_none=False)
                continue
            losses.append(loss.item())
            norms.append(dense_norm(model))
            optimizer.step()
    assert exporter.values(names.LOSS) == pytest.approx(losses)
    told = exporter.values(names.GRADIENT_NORM)  # of the first, and after a NaN of the one that came next
    assert told == pytest.approx(norms[:1] if math.isfinite(fault) else [norms[0], norms[4]])
    assert exporter.values(names.CLIP_RATIO) == []
    assert len(exporter.find_events(names.NONFINITE_STEP.name)) == math.isnan(fault)


def test_micro_batches_are_summed_where_gradients_are_kept_as_zeros(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    """Some of a kept batch's gradients are always zero, the last ones among them."""
    model = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    with watching(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad(set_to_none=False)
            total = 0.0
            for _ in range(3):
                loss = model(torch.randn(8, 4)).square().mean()
                loss.backward()
                model[1].bias.grad.zero_()
                total += loss.item()
            losses.append(total)
            optimizer.step()
    assert exporter.values(names.LOSS) == pytest.approx(losses)


def test_a_loss_that_is_nan_before_scaling_is_no_overflow_of_the_scaler(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    watch = watching(model, optimizer)
    for step in range(4):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).mean() * (math.nan if step == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    watch.close()
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert event.attributes[names.STEP] == 2
    assert names.LAYER_NAME not in event.attributes


@pytest.mark.parametrize("group", [{"lr": None}, {}])
def test_an_optimizer_without_a_learning_rate_is_observed_all_the_same(
    watching: Watching, exporter: InMemoryExporter, group: dict[str, None]
) -> None:
    class Own(torch.optim.Optimizer):
        def __init__(self, parameters: object) -> None:
            super().__init__(parameters, dict(group))  # type: ignore[arg-type]

        @torch.no_grad()
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for parameter in self.param_groups[0]["params"]:
                parameter -= 0.01 * parameter.grad

    model = nn.Linear(4, 1)
    optimizer = Own(model.parameters())
    watch = watching(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).mean().backward()
        optimizer.step()
    watch.close()
    assert exporter.values(names.STEP_INDEX) == [0, 1, 2]
    assert len(exporter.values(names.GRADIENT_NORM)) == 3
    assert exporter.values(names.LEARNING_RATE) == []


@pytest.mark.parametrize("clip", [False, True])
def test_layers_added_or_replaced_later_are_in_the_norm(
    watching: Watching, exporter: InMemoryExporter, clip: bool
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watch = watching(model, optimizer)
    truth = []
    for step in range(6):
        if step == 2:
            model.append(nn.Linear(1, 1))
            optimizer.add_param_group({"params": list(model[2].parameters())})
        if step == 4:
            model[2] = nn.Linear(1, 1)
            optimizer.param_groups[1]["params"] = list(model[2].parameters())
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        truth.append(dense_norm(model))
        if clip:
            clip_grad_norm_(model.parameters(), 0.001)
        optimizer.step()
    watch.close()
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx(truth, rel=1e-5)


def test_the_norm_is_that_before_the_first_of_two_clips_observed_or_not(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watch = watching(model, optimizer, every=4)
    truth = []
    for _ in range(8):
        optimizer.zero_grad()
        (100 * model(torch.randn(8, 4))).square().mean().backward()
        truth.append(dense_norm(model))
        clip_grad_norm_(model.parameters(), 1.0)
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    watch.close()
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx(truth, rel=1e-5)


def test_hyper_parameters_of_any_kind_are_hashed(watching: Watching, exporter: InMemoryExporter) -> None:
    model = nn.Linear(4, 1)
    watching(
        model, torch.optim.SGD(model.parameters(), lr=0.01), config={"a": 1, 1: {2: object, "b": 3}}
    ).close()
    assert len(str(exporter.resource[names.CONFIG_HASH])) == 16


@pytest.mark.parametrize("held", [False, True])
def test_whether_torch_is_held_to_determinism_is_told(
    watching: Watching, exporter: InMemoryExporter, held: bool
) -> None:
    model = nn.Linear(4, 1)
    torch.use_deterministic_algorithms(held)
    try:
        watching(model, torch.optim.SGD(model.parameters(), lr=0.01)).close()
    finally:
        torch.use_deterministic_algorithms(False)
    assert exporter.resource[names.DETERMINISTIC] is held


@pytest.mark.parametrize("every", [1, 7])
def test_steps_go_on_when_the_optimizer_is_replaced(exporter: InMemoryExporter, every: int) -> None:
    model = nn.Linear(4, 1)
    with gradwatch.watch(model, exporter=exporter, every=every) as watch:
        for kind in (torch.optim.SGD, torch.optim.Adam):
            optimizer = kind(model.parameters(), lr=0.01)
            for _ in range(20):
                optimizer.zero_grad()
                model(torch.randn(8, 4)).square().mean().backward()
                optimizer.step()
            del optimizer
        assert watch.step == 40
    assert exporter.values(names.STEP_INDEX) == list(range(40))
    assert exporter.find_events(names.RUN_ENDED.name)[0].attributes[names.STEP] == 39


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("ours", [True, False])
def test_one_clip_over_several_optimizers_tells_each_ones_norm_before_it(
    exporter: InMemoryExporter, ours: bool, every: int
) -> None:
    models = {"a": nn.Linear(4, 2), "b": nn.Linear(2, 1)}
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in models.values()]
    truth: dict[int, list[float]] = {0: [], 1: []}
    with gradwatch.watch(models, optimizers, exporter=exporter, every=every) as watch:
        for _ in range(12):
            for optimizer in optimizers:
                optimizer.zero_grad()
            (100 * models["b"](models["a"](torch.randn(8, 4)))).square().mean().backward()
            for index, model in enumerate(models.values()):
                truth[index].append(dense_norm(model))
            if ours:
                watch.clip_grad_norm_(0.5)
            else:
                clip_grad_norm_([p for model in models.values() for p in model.parameters()], 0.5)
            for optimizer in optimizers:
                optimizer.step()
    for index, norms in truth.items():
        told = [p.value for p in exporter.points(names.GRADIENT_NORM, **{names.OPTIMIZER: index})]
        assert told == pytest.approx(norms, rel=1e-5)
    assert len(exporter.values(names.CLIP_RATIO)) == 24


def test_a_frozen_parameter_does_not_hide_what_clipping_tells(exporter: InMemoryExporter) -> None:
    """As when a low-rank adapter trains over a frozen base, and the optimizer is given all parameters."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    truth = []
    with gradwatch.watch(model, optimizer, exporter=exporter, every=6) as watch:
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            truth.append(dense_norm(model))
            watch.clip_grad_norm_(0.1)
            optimizer.step()
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx(truth, rel=1e-5)
    assert len(exporter.values(names.CLIP_RATIO)) == 12


def test_a_step_that_raises_keeps_nothing_of_its_caller_alive(watching: Watching) -> None:
    class Raises(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            raise MemoryError

    model = nn.Linear(4, 1)
    optimizer = Raises(model.parameters(), lr=0.01)

    def attempt() -> weakref.ref[torch.Tensor]:
        large = torch.zeros(10)
        model(torch.randn(8, 4)).mean().backward()
        with pytest.raises(MemoryError):
            optimizer.step()
        return weakref.ref(large)

    with watching(model, optimizer):
        reference = attempt()
        gc.collect()
        assert reference() is None


def test_a_norm_that_is_only_looked_at_keeps_no_gradient_alive(watching: Watching) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watching(model, optimizer):
        model(torch.randn(8, 4)).mean().backward()
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        reference = weakref.ref(model.weight.grad)
        optimizer.step()
        optimizer.zero_grad()
        assert reference() is None


@pytest.mark.parametrize("every", [1, 1000])
def test_a_loss_logged_before_its_backward_is_its_own_steps(exporter: InMemoryExporter, every: int) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    with gradwatch.watch(model, optimizer, exporter=exporter, every=every) as watch:
        for _ in range(7):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4)).square().mean()
            losses.append(loss.item())
            watch.log(loss=loss)
            loss.backward()
            optimizer.step()
    assert exporter.values(names.LOSS) == losses


def test_a_nan_logged_before_its_backward_is_told_of_its_own_step(exporter: InMemoryExporter) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, exporter=exporter, every=1) as watch:
        for step in range(5):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4)).square().mean() * (math.nan if step == 4 else 1.0)
            watch.log(loss=loss)
            loss.backward()
            optimizer.step()
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert (event.attributes[names.STEP], event.attributes[names.BORN_IN]) == (4, "loss")


def test_another_loss_logged_after_the_step_is_that_steps(exporter: InMemoryExporter) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, exporter=exporter, every=1) as watch:
        for step in range(5):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            watch.log(loss=float(step) if step < 4 else math.nan)
    assert exporter.values(names.LOSS)[:4] == [0.0, 1.0, 2.0, 3.0]
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert event.attributes[names.STEP] == 4


def test_a_bad_loss_whose_step_never_comes_is_told_when_the_run_fails(exporter: InMemoryExporter) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with (
        pytest.raises(ValueError, match="diverged"),
        gradwatch.watch(model, optimizer, exporter=exporter, every=1),
    ):
        for step in range(5):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4)).square().mean() * (math.nan if step == 3 else 1.0)
            loss.backward()
            if not torch.isfinite(loss):
                raise ValueError("diverged")
            optimizer.step()
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert (event.attributes[names.STEP], event.attributes[names.BORN_IN]) == (3, "loss")
    told = exporter.event_names()
    assert told.index(names.NONFINITE_STEP.name) < told.index(names.RUN_ENDED.name)


def test_a_captured_nan_stays_a_finding_where_a_finite_loss_is_logged_in_its_place(
    exporter: InMemoryExporter,
) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, exporter=exporter, every=1000) as watch:
        for step in range(8):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4)).square().mean() * (math.nan if step == 5 else 1.0)
            loss.backward()
            watch.log(loss=torch.nan_to_num(loss).item())
            optimizer.step()
    events = exporter.find_events(names.NONFINITE_STEP.name)
    assert [event.attributes[names.STEP] for event in events] == [5, 6, 7]
    assert events[0].attributes[names.NONFINITE_ELEMENTS] == 5


def test_a_closure_that_raises_does_not_change_what_later_losses_add_up_to(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def closure() -> float:
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        raise ValueError("no loss today")

    losses = []
    with watching(model, optimizer):
        for _ in range(3):
            with pytest.raises(ValueError, match="no loss"):
                optimizer.step(closure)
            total = 0.0
            optimizer.zero_grad()
            for _ in range(3):
                loss = model(torch.randn(8, 4)).square().mean()
                loss.backward()
                total += loss.item()
            losses.append(total)
            optimizer.step()
    assert exporter.values(names.LOSS) == pytest.approx(losses)


class Sharpness(torch.optim.Optimizer):
    """As in sharpness-aware minimisation: two passes a step, taken by the optimizer within."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})
        self.base_optimizer = torch.optim.SGD(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["old"] = parameter.clone()
            parameter += 0.05 * parameter.grad
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.copy_(self.state[parameter]["old"])
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure: Callable[[], None] | None = None) -> None:  # type: ignore[override]
        assert closure is not None
        self.first_step()
        closure()
        self.second_step()


@pytest.mark.parametrize("every", [1, 4])
def test_the_step_of_a_closure_may_be_taken_by_an_optimizer_within(
    exporter: InMemoryExporter, every: int
) -> None:
    model = nn.Linear(4, 1)
    optimizer = Sharpness(model.parameters())
    passes: list[tuple[float, float]] = []
    norms, losses = [], []
    with gradwatch.watch(model, optimizer, exporter=exporter, every=every):
        for _ in range(12):
            x = torch.randn(8, 4)

            def closure(x: torch.Tensor = x) -> None:
                loss = model(x).square().mean()
                loss.backward()
                passes.append((dense_norm(model), loss.item()))

            closure()
            optimizer.step(closure)
            norms.append(passes[-1][0])
            losses.append(passes[-1][1])
    assert exporter.values(names.LOSS) == pytest.approx(losses)
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx(norms[::every])
    assert exporter.find_events(names.INSTRUMENTATION_MISSING.name) == []


def test_a_closure_that_leaves_a_batch_out_is_not_taken_for_a_loop_that_cannot_be_seen(
    exporter: InMemoryExporter,
) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, exporter=exporter, every=1):
        for step in range(5):

            def closure(step: int = step) -> torch.Tensor | None:
                optimizer.zero_grad()
                if step == 2:
                    return None
                loss = model(torch.randn(8, 4)).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)  # type: ignore[arg-type]
    assert len(exporter.values(names.GRADIENT_NORM)) == 4
    assert exporter.find_events(names.INSTRUMENTATION_MISSING.name) == []


@pytest.mark.parametrize("every", [1, 4])
def test_the_optimizer_within_steps_for_the_one_that_was_named(exporter: InMemoryExporter, every: int) -> None:
    model = nn.Linear(4, 1)
    optimizer = Sharpness(model.parameters())
    losses, norms = [], []
    with gradwatch.watch(model, optimizer, exporter=exporter, every=every) as watch:
        assert gradwatch.watch(model, optimizer) is watch
        for _ in range(12):
            x = torch.randn(8, 4)
            model(x).square().mean().backward()
            optimizer.first_step()
            loss = model(x).square().mean()
            loss.backward()
            losses.append(loss.item())
            norms.append(dense_norm(model))
            optimizer.second_step()
            assert gradwatch.watch(model, optimizer) is watch
        assert watch.step == 12
    # Of the pass whose gradients were stepped with; the other pass's are thrown away.
    assert exporter.values(names.LOSS) == pytest.approx(losses)
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx(norms[::every])
    assert exporter.values(names.LEARNING_RATE)[0] == 0.01
    assert exporter.find_events(names.INSTRUMENTATION_MISSING.name) == []


def test_a_scaler_that_skips_the_optimizer_within_skips_the_one_that_was_named(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = nn.Linear(4, 1)
    optimizer = Sharpness(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with watching(model, optimizer) as watch:
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(8, 4)).square().mean()).backward()
            if step == 2:
                model.weight.grad[0, 0] = math.inf
            scaler.step(optimizer.base_optimizer)
            scaler.update()
        assert watch.step == 4
    assert exporter.find_events(names.NONFINITE_STEP.name) == []


def test_an_optimizer_of_other_parameters_steps_for_nobody(watching: Watching) -> None:
    model, other = nn.Linear(4, 1), nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    stranger = torch.optim.SGD(other.parameters(), lr=0.01)
    with watching(model, optimizer) as watch:
        other(torch.randn(8, 4)).mean().backward()
        stranger.step()
        assert watch.step == 0
