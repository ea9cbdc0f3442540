"""Clipping is torch's own, bit for bit, whoever does it; and what it did is reported."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch import conventions as names
from gradwatch.gradients.clipping import ClipCapture
from gradwatch.testing import InMemoryExporter

Watching = Callable[..., gradwatch.Watch]


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 3)).to(dtype)


def plain(model: nn.Module) -> None:
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.randn_like(parameter) * 10.0**index


def with_holes(model: nn.Module) -> None:
    plain(model)
    first, *_ = model.parameters()
    first.grad = None


def frozen(model: nn.Module) -> None:
    next(model.parameters()).requires_grad_(False)
    with_holes(model)


def poisoned(value: float) -> Callable[[nn.Module], None]:
    def fill(model: nn.Module) -> None:
        plain(model)
        grad = next(model.parameters()).grad
        assert grad is not None
        grad[0, 0] = value

    return fill


def mixed(model: nn.Module) -> None:
    next(iter(model.children())).double()
    plain(model)


def empty(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


FILLS = {
    "plain": plain, "some None": with_holes, "frozen": frozen, "nan": poisoned(math.nan),
    "inf": poisoned(math.inf), "mixed types": mixed, "no gradient": empty,
}  # fmt: skip


class Deaf:
    """Hears of clipping, and knows nothing."""

    def gradients_alike(self, optimizer: object) -> None: ...

    def knows_alike(self, grads: object) -> bool:
        return False

    def before_clipping(self, *_: object, **__: object) -> None: ...

    def clipped(self, *_: object) -> None: ...


def gradients(model: nn.Module) -> list[bytes | None]:
    # Bytes, since NaN is no NaN's equal.
    return [None if p.grad is None else p.grad.numpy().tobytes() for p in model.parameters()]


def clipped(model: nn.Module, fill: Callable[[nn.Module], None], clip: Callable[[], Any]) -> Any:
    torch.manual_seed(5)
    fill(model)
    total = clip()
    return total.numpy().tobytes(), total.dtype, gradients(model)


@pytest.mark.parametrize("max_norm", [0.1, 1e9, 0.0])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
def test_clipping_through_us_is_torchs_bit_for_bit(
    watching: Watching, fill: Callable[[nn.Module], None], norm_type: float, max_norm: float
) -> None:
    bare = network()
    expected = clipped(bare, fill, lambda: clip_grad_norm_(bare.parameters(), max_norm, norm_type))
    for every in (1, 100):
        for ours in (True, False):
            model = network()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            with watching(model, optimizer, every=every) as watch:
                told = clipped(
                    model,
                    fill,
                    lambda: (
                        watch.clip_grad_norm_(max_norm, norm_type)
                        if ours  # noqa: B023
                        else clip_grad_norm_(model.parameters(), max_norm, norm_type)  # noqa: B023
                    ),
                )
            assert told == expected


@given(
    values=st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=40),
    share=st.floats(0.9999, 1.0001) | st.floats(0.0, 3.0),
)
def test_around_the_norm_where_clipping_begins_not_one_bit_differs(values: list[float], share: float) -> None:
    bare, ours = nn.Parameter(torch.zeros(len(values))), nn.Parameter(torch.zeros(len(values)))
    bare.grad, ours.grad = torch.tensor(values), torch.tensor(values)
    max_norm = share * float(torch.linalg.vector_norm(bare.grad))
    expected = clip_grad_norm_([bare], max_norm)
    capture = ClipCapture(Deaf())
    capture.install()
    try:
        told = clip_grad_norm_([ours], max_norm)
    finally:
        capture.remove()
    assert told.numpy().tobytes() == expected.numpy().tobytes()
    assert ours.grad.numpy().tobytes() == bare.grad.numpy().tobytes()


def test_what_torch_flushes_to_zero_is_flushed_where_nothing_is_clipped(watching: Watching) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers")
    try:
        model = nn.Linear(2, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        bare = nn.Parameter(torch.zeros(2))
        denormal = torch.tensor([0x00000001, 0x3F800000], dtype=torch.int32).view(torch.float32)
        bare.grad, model.weight.grad = denormal.clone(), denormal.clone().view(1, 2)
        clip_grad_norm_([bare], 100.0)
        with watching(model, optimizer) as watch:
            watch.clip_grad_norm_(100.0)
        assert model.weight.grad.view(torch.int32).tolist() == [bare.grad.view(torch.int32).tolist()]
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_half_and_double_gradients_are_clipped_as_torch_does(watching: Watching, dtype: torch.dtype) -> None:
    bare, model = network(dtype), network(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watching(model, optimizer) as watch:
        for each in (bare, model):
            torch.manual_seed(1)
            plain(each)
        expected = clip_grad_norm_(bare.parameters(), 0.5)
        assert torch.equal(watch.clip_grad_norm_(0.5), expected)
        for one, other in zip(bare.parameters(), model.parameters(), strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert torch.equal(one.grad.view(torch.uint8), other.grad.view(torch.uint8))


def test_a_non_finite_norm_raises_where_torch_raises(watching: Watching) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watching(model, optimizer) as watch:
        poisoned(math.nan)(model)
        before = gradients(model)
        with pytest.raises(RuntimeError, match="non-finite"):
            watch.clip_grad_norm_(1.0, error_if_nonfinite=True)
        with pytest.raises(RuntimeError, match="non-finite"):
            clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        assert gradients(model) == before


def test_a_total_of_other_gradients_is_not_taken_for_these(watching: Watching) -> None:
    first, second = network(), network()
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.0)
    with watching([first, second], optimizer):
        plain(first)
        plain(second)
        expected = copy.deepcopy([p.grad for p in second.parameters()])
        total = torch.nn.utils.get_total_norm([p.grad for p in first.parameters() if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(second.parameters(), 1.0, total)
    for parameter, grad in zip(second.parameters(), expected, strict=True):
        assert grad is not None
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, grad * torch.clamp(1.0 / (total + 1e-6), max=1.0))


@pytest.mark.parametrize("disabled", [True, False])
def test_a_closed_or_disabled_watch_still_clips(
    watching: Watching, monkeypatch: pytest.MonkeyPatch, disabled: bool
) -> None:
    if disabled:
        monkeypatch.setenv("GRADWATCH_DISABLED", "1")
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch = watching(model, optimizer)
    watch.close()
    plain(model)
    watch.clip_grad_norm_(0.25)
    total = math.hypot(*(float(p.grad.norm()) for p in model.parameters() if p.grad is not None))
    assert total == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("ours", [True, False])
def test_norm_before_and_ratio_are_reported_of_every_step_that_clips(
    watching: Watching, exporter: InMemoryExporter, ours: bool, every: int
) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    totals, ratios = [], []
    with watching(model, optimizer, every=every) as watch:
        for step in range(9):
            optimizer.zero_grad()
            (model(torch.randn(4, 5)).square().mean() * 10.0 ** (step % 3)).backward()
            total = math.sqrt(
                sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
            )
            totals.append(total)
            ratios.append(min(1.0, 0.5 / (total + 1e-6)))
            if ours:
                watch.clip_grad_norm_(0.5)
            else:
                clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx(totals, rel=1e-5)
    assert exporter.values(names.CLIP_RATIO) == pytest.approx(ratios, rel=1e-5)


@pytest.mark.parametrize("every", [1, 4])
def test_where_no_loss_is_seen_each_step_has_its_own_norm_and_ratio(
    watching: Watching, exporter: InMemoryExporter, every: int
) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    totals = []
    with watching(model, optimizer, every=every, capture_loss=False):
        for step in range(9):
            optimizer.zero_grad()
            (model(torch.randn(4, 5)).square().mean() * 10.0 ** (step % 3)).backward()
            totals.append(float(clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx(totals)
    assert exporter.values(names.CLIP_RATIO) == pytest.approx([min(1.0, 0.5 / (t + 1e-6)) for t in totals])


def test_gradients_clipped_in_parts_have_no_one_ratio(watching: Watching, exporter: InMemoryExporter) -> None:
    model = network()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    totals = []
    with watching(model, optimizer, every=4):
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 5)).square().mean().backward()
            totals.append(math.hypot(*(float(p.grad.norm()) for p in parameters if p.grad is not None)))
            clip_grad_norm_(parameters[:2], 0.01)
            clip_grad_norm_(parameters[2:], 0.01)
            optimizer.step()
    observed = exporter.values(names.GRADIENT_NORM)
    assert exporter.values(names.CLIP_RATIO) == []
    assert all(min(abs(norm - total) for total in totals) < 1e-6 for norm in observed)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("norm_type", [1.0, math.inf])
def test_clipping_by_another_norm_has_its_own_ratio_and_the_l2_norm_of_observed_steps(
    watching: Watching, exporter: InMemoryExporter, norm_type: float, every: int
) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    totals, ratios = [], []
    with watching(model, optimizer, every=every):
        for step in range(9):
            optimizer.zero_grad()
            (model(torch.randn(4, 5)).square().mean() * 10.0 ** (step % 3)).backward()
            totals.append(math.hypot(*(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)))
            by = float(clip_grad_norm_(model.parameters(), 0.5, norm_type))
            ratios.append(min(1.0, 0.5 / (by + 1e-6)))
            clip_grad_norm_(model.parameters(), 1e9)  # finds gradients that are clipped already
            optimizer.step()
    assert min(ratios) < 1.0
    assert exporter.values(names.CLIP_RATIO) == pytest.approx(ratios, rel=1e-5)
    observed = exporter.values(names.GRADIENT_NORM)
    assert observed == pytest.approx(totals[::every], rel=1e-5)


def test_clipped_together_with_gradients_nobody_watches_the_ratio_is_known(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model, other = network(), nn.Linear(5, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ratios = []
    with watching(model, optimizer, every=4):
        for _ in range(5):
            optimizer.zero_grad()
            x = torch.randn(4, 5)
            (model(x) + other(x.double())).square().mean().backward()
            total = float(clip_grad_norm_([*model.parameters(), *other.parameters()], 0.1))
            ratios.append(0.1 / (total + 1e-6))
            optimizer.step()
    assert max(ratios) < 1.0
    assert exporter.values(names.CLIP_RATIO) == pytest.approx(ratios, rel=1e-5)


def test_what_is_clipped_in_evaluation_is_no_steps(watching: Watching, exporter: InMemoryExporter) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watching(model, optimizer, every=1) as watch:
        for _ in range(3):
            with watch.evaluation():
                plain(model)
                clip_grad_norm_(model.parameters(), 1e-9)
            optimizer.zero_grad()
            model(torch.randn(4, 5)).square().mean().backward()
            clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()
    assert exporter.values(names.CLIP_RATIO) == [1.0, 1.0, 1.0]


def test_layers_that_came_since_the_last_observed_step_are_in_the_norm(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model, more = network(), nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    totals = []
    with watching([model, more], optimizer, every=100):
        for step in range(6):
            if step == 3:
                optimizer.add_param_group({"params": list(more.parameters())})
            optimizer.zero_grad()
            x = torch.randn(4, 5)
            (model(x) + (more(x) if step >= 3 else 0.0)).square().mean().backward()
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            totals.append(float(clip_grad_norm_(parameters, 0.05)))
            optimizer.step()
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx(totals)


@pytest.mark.parametrize("ours", [True, False])
def test_a_norm_that_makes_clipping_raise_is_told(
    watching: Watching, exporter: InMemoryExporter, ours: bool
) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watching(model, optimizer, every=100) as watch:
        for step in range(4):
            optimizer.zero_grad()
            model(torch.randn(4, 5)).square().mean().backward()
            if step == 3:
                grad = next(model.parameters()).grad
                assert grad is not None
                grad[0, 0] = math.nan
                with pytest.raises(RuntimeError, match="non-finite"):
                    if ours:
                        watch.clip_grad_norm_(1.0, error_if_nonfinite=True)
                    else:
                        clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
                break
            optimizer.step()
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert (event.attributes[names.STEP], event.attributes[names.LAYER_NAME]) == (3, "0.weight")


class Doubling(torch.Tensor):
    """Gradients of a class of their own, which knows no fused operations and multiplies in its own way."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in {torch._foreach_norm, torch._foreach_mul_}:
            raise TypeError("no fused operations")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_gradients_of_another_class_are_left_to_torch(watching: Watching) -> None:
    bare, model = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watching(model, optimizer):
        for each in (bare, model):
            torch.manual_seed(1)
            plain(each)
            for parameter in each.parameters():
                assert parameter.grad is not None
                parameter.grad = parameter.grad.as_subclass(Doubling)  # type: ignore[assignment]
        total = clip_grad_norm_(bare.parameters(), 0.5)
        assert torch.equal(clip_grad_norm_(model.parameters(), 0.5), total)
    assert gradients(bare) == gradients(model)


def test_signs_of_complex_zeros_are_lost_as_torch_loses_them(watching: Watching) -> None:
    bare = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    ours = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    bare.grad = torch.tensor([1 - 0j, complex(-0.0, -0.0)])
    ours.grad = bare.grad.clone()
    optimizer = torch.optim.SGD([ours], lr=0.0)
    with watching(None, optimizer) as watch:
        clip_grad_norm_([bare], 10.0)
        watch.clip_grad_norm_(10.0)
    assert ours.grad.numpy().tobytes() == bare.grad.numpy().tobytes()


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_a_graph_through_gradients_finds_that_they_were_changed(watching: Watching) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watching(model, optimizer) as watch:
        model(torch.randn(4, 5)).square().mean().backward(create_graph=True)
        penalty = sum((p.grad**3).sum() for p in model.parameters() if p.grad is not None)
        watch.clip_grad_norm_(1e6)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            penalty.backward()  # type: ignore[union-attr]
    for parameter in model.parameters():
        parameter.grad = None  # break the circle through the graph
