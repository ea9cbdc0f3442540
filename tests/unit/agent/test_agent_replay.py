"""A captured step runs again exactly, and the module where it went bad is named."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
import resource
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import conventions as names
from gradwatch.reproduction.bundle import Bundle, BundleError, load
from gradwatch.reproduction.command import _notes
from gradwatch.reproduction.finite_difference import compare
from gradwatch.reproduction.replay import build, inputs_of, replay, run
from gradwatch.testing import InMemoryExporter


class Root(nn.Module):
    """The forward fault: a root of a negative number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(x - 100)


class Cusp(nn.Module):
    """The backward fault: the root's value at 0 is 0, its slope is infinite."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(x - x.detach()) + x


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * math.nan


class Poison(nn.Module):
    """A custom function whose backward is broken."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Poison.apply(x)  # type: ignore[no-untyped-call, no-any-return]


class Masked(nn.Module):
    """Attention scores with -inf where nobody may look: bad on purpose, and healed."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Threshold(0.0, -math.inf)
        self.softmax = nn.Softmax(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.mask(torch.cat([x.abs(), -torch.ones_like(x[:, :1])], dim=1))
        return x * self.softmax(scores)[:, :-1]


class Inline(nn.Module):
    """Goes bad between its children."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.log(-self.first(x).abs()))  # type: ignore[no-any-return]


def network(fault: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 6), nn.BatchNorm1d(6), Masked(), nn.Dropout(0.4), fault,
        nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 2),
    )  # fmt: skip


def captured(
    watching: Callable[..., gradwatch.Watch],
    exporter: InMemoryExporter,
    model: nn.Module,
    loss: Callable[[torch.Tensor], torch.Tensor] = lambda output: output.square().mean(),
    steps: int = 1,
    batches: int = 1,
    inputs: Callable[[], torch.Tensor] = lambda: torch.randn(16, 6),
    before_last: Callable[[], object] = lambda: None,
) -> Bundle:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with watching(model, optimizer, capture="on_nonfinite", run_id="caught"):
        for step in range(steps):
            optimizer.zero_grad()
            if step == steps - 1:
                before_last()
            for _ in range(batches):
                loss(model(inputs())).backward()
            optimizer.step()
    (event,) = exporter.find_events(names.BUNDLE_SAVED.name)
    assert event.attributes[names.STEP] == steps - 1
    return load(Path(str(event.attributes[names.BUNDLE_PATH])))


@pytest.mark.parametrize(
    ("fault", "born_in", "layer"),
    [
        (Root(), "forward", "4"),
        (Inline(), "forward", "4"),
        (Cusp(), "backward", "4"),
        (Poison(), "backward", "4"),
    ],
)
def test_the_guilty_module_is_named(
    watching: Callable[..., gradwatch.Watch],
    exporter: InMemoryExporter,
    fault: nn.Module,
    born_in: str,
    layer: str,
) -> None:
    bundle = captured(watching, exporter, network(fault))
    assert bundle.exact
    verdict, _ = replay(bundle, build(bundle, f"{__name__}:with_{type(fault).__name__.lower()}", "cpu"), None)
    assert (verdict.born_in, verdict.layer) == (born_in, layer)


def with_root() -> nn.Module:
    return network(Root())


def with_inline() -> nn.Module:
    return network(Inline())


def with_cusp() -> nn.Module:
    return network(Cusp())


def with_poison() -> nn.Module:
    return network(Poison())


def with_identity() -> nn.Module:
    return network(nn.Identity())


@pytest.mark.parametrize(
    ("loss", "born_in"),
    [
        (lambda output: (output.square().mean() - 1e9).log(), "loss"),
        (lambda output: (output - output.detach()).abs().sum().sqrt(), "backward"),
    ],
    ids=["a bad loss", "a good loss with bad gradients"],
)
def test_a_fault_of_the_loss_function_blames_no_module(
    watching: Callable[..., gradwatch.Watch],
    exporter: InMemoryExporter,
    loss: Callable[[torch.Tensor], torch.Tensor],
    born_in: str,
) -> None:
    bundle = captured(watching, exporter, network(nn.Identity()), loss)
    models = build(bundle, f"{__name__}:with_identity", "cpu")
    for criterion in (None, loss):
        verdict, _ = replay(bundle, models, criterion)
        assert (verdict.born_in, verdict.layer) == (born_in, None)


def test_bad_inputs_and_bad_parameters_are_told_from_faults_of_a_module(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter
) -> None:
    bad = lambda: torch.full((16, 6), math.nan)  # noqa: E731
    bundle = captured(watching, exporter, network(nn.Identity()), inputs=bad)
    models = build(bundle, f"{__name__}:with_identity", "cpu")
    assert replay(bundle, models, None)[0].born_in == "input"
    bundle.models["Sequential"].parameters["0.bias"][3] = math.inf
    verdict, _ = replay(bundle, models, None)
    assert (verdict.born_in, verdict.layer) == ("parameters", "0.bias")


def test_the_step_is_the_one_that_failed_bit_by_bit(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter
) -> None:
    """Dropout, batch statistics and parameters are those of the moment, in each of two micro-batches."""
    model = network(nn.Identity())
    outputs: list[torch.Tensor] = []

    def loss(output: torch.Tensor) -> torch.Tensor:
        outputs.append(output.detach().clone())
        return output.sum() * (math.nan if len(outputs) == 8 else 1.0)

    averages: list[torch.Tensor] = []
    bundle = captured(
        watching, exporter, model, loss, steps=4, batches=2,
        before_last=lambda: averages.append(model.get_buffer("1.running_mean").clone()),
    )  # fmt: skip
    assert bundle.exact
    assert torch.equal(bundle.calls[0].buffers["1.running_mean"], averages[0])
    parameters = bundle.models["Sequential"].parameters
    again = build(bundle, f"{__name__}:with_identity", "cpu")["Sequential"]
    assert all(torch.equal(p, parameters[name]) for name, p in again.named_parameters())
    state = torch.get_rng_state()
    for call, expected in zip(bundle.calls, outputs[-2:], strict=True):
        assert torch.equal(run(again, call), expected)
    assert len(bundle.calls) == 2
    torch.set_rng_state(state)


class Counting(nn.Linear):
    """Puts a new tensor in the place of its buffer at each pass, as averages written by hand do."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__(6, 2)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count = self.count + 1
        return super().forward(x) * torch.where(self.count > 4, math.nan, 1.0)


def test_a_buffer_that_the_model_replaces_is_that_of_the_moment(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter
) -> None:
    bundle = captured(watching, exporter, Counting(), steps=3, batches=2)
    assert [call.buffers["count"].item() for call in bundle.calls] == [4, 5]
    assert replay(bundle, build(bundle, None, "cpu"), None)[0].born_in == "forward"


class Shifted(nn.Module):
    """Adds a parameter, whose gradient autograd then makes of the very memory that the output's came in."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


def test_a_captured_gradient_is_not_what_became_of_its_memory(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter
) -> None:
    weights = iter([torch.full((2, 3), 5.0), torch.full((2, 3), math.nan)])
    bundle = captured(
        watching, exporter, Shifted(), lambda output: (output * next(weights)).sum(),
        batches=2, inputs=lambda: torch.ones(2, 3),
    )  # fmt: skip
    (first,), (second,) = (call.gradients for call in bundle.calls)
    assert torch.equal(first, torch.full((2, 3), 5.0))
    assert second.isnan().all()


def test_a_gradient_that_is_one_value_repeated_is_kept_as_that(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter
) -> None:
    bundle = captured(
        watching, exporter, Shifted(), lambda output: output.sum() * math.nan, inputs=lambda: torch.ones(2, 3)
    )
    ((gradient,),) = (call.gradients for call in bundle.calls)
    assert gradient.shape == (2, 3)
    assert gradient.isnan().all()
    assert gradient.untyped_storage().nbytes() == gradient.element_size()


def test_the_optimizers_state_is_that_before_the_update(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter
) -> None:
    model = network(nn.Identity())
    seen: list[torch.Tensor] = []

    def loss(output: torch.Tensor) -> torch.Tensor:
        seen.append(output)
        return output.sum() * (math.nan if len(seen) == 3 else 1.0)

    bundle = captured(watching, exporter, model, loss, steps=3)
    (optimizer,) = bundle.optimizers
    assert optimizer["kind"] == "torch.optim.adam:Adam"
    states = optimizer["state"]["state"]
    assert all(state["step"] == 2 for state in states.values())
    assert all(torch.isfinite(state["exp_avg"]).all() for state in states.values())


def test_inputs_changed_in_place_are_admitted(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter
) -> None:
    class InPlace(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.clone()) + x.mul_(2).sum()

    bundle = captured(watching, exporter, InPlace(6, 2), lambda output: output.sum() * math.nan)
    assert [call.inputs_changed for call in bundle.calls] == [True]


def test_capturing_changes_neither_weights_nor_random_numbers(watching: Callable[..., gradwatch.Watch]) -> None:
    def trained(**settings: Any) -> list[Any]:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        model = network(nn.Identity())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        with watching(model, optimizer, **settings):
            for _ in range(5):
                optimizer.zero_grad()
                model(torch.randn(8, 6)).square().mean().backward()
                optimizer.step()
        return [
            *(p.detach().tolist() for p in model.parameters()),
            torch.rand(1).item(),
            random.random(),
            np.random.rand(),
        ]

    assert trained() == trained(capture="on_nonfinite")


def test_copies_of_a_captured_model_carry_nothing_of_ours_that_acts(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter
) -> None:
    model = nn.Linear(6, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer, capture="on_nonfinite"):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
        for one in copies:
            one(torch.full((4, 6), math.nan)).sum().backward()
        (model(torch.ones(4, 6)).sum() * math.nan).backward()
        optimizer.step()
    (event,) = exporter.find_events(names.BUNDLE_SAVED.name)
    (call,) = load(Path(str(event.attributes[names.BUNDLE_PATH]))).calls
    assert torch.equal(call.args[0], torch.ones(4, 6))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


class Batch:
    """A batch of the user's own class."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values


def test_inputs_of_a_class_of_the_users_own_need_trust(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter
) -> None:
    class Own(nn.Linear):
        def forward(self, x: Any) -> torch.Tensor:
            return super().forward(x.values)

    model = Own(6, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer, capture="on_nonfinite"):
        (model(Batch(torch.ones(4, 6))).sum() * math.nan).backward()
        optimizer.step()
    (event,) = exporter.find_events(names.BUNDLE_SAVED.name)
    path = Path(str(event.attributes[names.BUNDLE_PATH]))
    with pytest.raises(BundleError, match="--trust"):
        load(path)
    (call,) = load(path, trusted=True).calls
    assert torch.equal(call.args[0].values, torch.ones(4, 6))


@pytest.mark.parametrize("watch_compiled", [True, False])
def test_compiled_models_train_on_without_a_graph_break(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter, watch_compiled: bool
) -> None:
    """Only a hook outside the graph can capture: that of the compiled module itself."""
    model = nn.Linear(6, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with watching(compiled if watch_compiled else model, optimizer, capture="on_nonfinite"):
        (compiled(torch.ones(4, 6)).sum() * math.nan).backward()
        optimizer.step()
    assert len(exporter.find_events(names.BUNDLE_SAVED.name)) == watch_compiled


def test_of_two_models_the_guilty_one_is_named(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter
) -> None:
    """A GAN: the discriminator runs twice in the step and goes bad on what the generator made."""
    models = generator_and_critic()
    generator, critic = models.values()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models.values()]
    with watching(models, optimizers, capture="on_nonfinite"):
        real = critic(torch.rand(4, 6) + 100)
        made = critic(generator(torch.rand(4, 3)))
        (real.mean() - made.mean()).backward()
        optimizers[1].step()
    (event,) = exporter.find_events(names.BUNDLE_SAVED.name)
    bundle = load(Path(str(event.attributes[names.BUNDLE_PATH])))
    assert [call.model for call in bundle.calls] == ["critic", "generator", "critic"]
    built = build(bundle, f"{__name__}:generator_and_critic", "cpu")
    state = torch.get_rng_state()
    verdict, visits = replay(bundle, built, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert (verdict.born_in, verdict.layer) == ("forward", "critic.0")
    assert [visit.output_fault for visit in visits if visit.name == "critic.0"] == [None, "NaN"]


def test_a_module_is_checked_with_what_its_first_call_gets(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter
) -> None:
    models = generator_and_critic()
    generator, critic = models.values()
    real, noise = torch.rand(4, 6) + 100, torch.rand(4, 3)
    optimizer = torch.optim.SGD([*generator.parameters(), *critic.parameters()], lr=0.1)
    with watching(models, optimizer, capture="on_nonfinite"):
        (critic(real).mean() - critic(generator(noise)).mean()).backward()
        optimizer.step()
    (event,) = exporter.find_events(names.BUNDLE_SAVED.name)
    bundle = load(Path(str(event.attributes[names.BUNDLE_PATH])))
    built = build(bundle, f"{__name__}:generator_and_critic", "cpu")
    for name, module, expected in (
        ("critic.0", built["critic"].get_submodule("0"), real),
        ("critic", built["critic"], real),
        ("generator", built["generator"], noise),
    ):
        found = inputs_of(bundle, built, name)
        assert found is not None
        assert found[0] is module
        assert torch.equal(found[1][0], expected)
        assert not module._forward_pre_hooks
    assert inputs_of(bundle, built, "0") is None
    bundle.calls.clear()
    assert inputs_of(bundle, built, "critic") is None


def test_what_a_module_gets_is_as_it_was_before_it_changed_it(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter
) -> None:
    bundle = captured(watching, exporter, network(Root()))
    models = build(bundle, f"{__name__}:with_root", "cpu")
    bundle.calls[0].args = (torch.ones(16, 6),)
    models["Sequential"].get_submodule("4").forward = lambda x: x  # type: ignore[method-assign, assignment] # no NaN
    state = torch.get_rng_state()
    found = inputs_of(bundle, models, "6")
    assert torch.equal(torch.get_rng_state(), state)
    assert found is not None
    assert (found[1][0] < 0).any()


class Again(nn.Linear):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__(6, 6)

    def forward(self, x: torch.Tensor, again: bool = True) -> torch.Tensor:
        y = super().forward(x)
        return self(y, again=False) * 3 if again else y


def test_each_pass_gets_the_gradient_of_its_own_output(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter
) -> None:
    bundle = captured(watching, exporter, Again(), lambda output: output.sum() * math.nan, batches=1)
    assert [call.kwargs for call in bundle.calls] == [{}, {"again": False}]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.head = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.head(self.frozen(x)), x

    outer, recursive = Outer(), Again()
    optimizer = torch.optim.SGD([*outer.head.parameters(), *recursive.parameters()], lr=0.1)
    with watching(
        {"outer": outer, "inner": outer.frozen, "again": recursive}, optimizer, capture="on_nonfinite"
    ):
        output, _ = outer(torch.ones(4, 6))
        (output.sum() * 2 + recursive(torch.ones(4, 6)).sum()).backward()
        recursive.weight.grad.fill_(math.nan)  # type: ignore[union-attr]
        optimizer.step()
    (_, event) = exporter.find_events(names.BUNDLE_SAVED.name)
    calls = load(Path(str(event.attributes[names.BUNDLE_PATH]))).calls
    gradients = [(call.model, [float(g.max()) for g in call.gradients if g is not None]) for call in calls]
    assert gradients == [("outer", [2.0]), ("inner", []), ("again", [1.0]), ("again", [3.0])]


def test_the_last_passes_of_accumulation_without_end_are_kept(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter
) -> None:
    passes = iter(range(100))
    bundle = captured(
        watching, exporter, nn.Linear(6, 2), lambda output: output.sum() * math.nan, batches=70,
        inputs=lambda: torch.full((1, 6), float(next(passes))),
    )  # fmt: skip
    assert [int(call.args[0][0, 0]) for call in bundle.calls] == list(range(6, 70))


def test_a_fault_found_after_the_update_admits_that_parameters_changed(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter
) -> None:
    model = nn.Linear(6, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 6)).sum() * math.nan
        loss.backward()
        return loss

    with watching(model, optimizer, capture="on_nonfinite"):
        optimizer.step(closure)  # type: ignore[arg-type] # torch
    (event,) = exporter.find_events(names.BUNDLE_SAVED.name)
    assert not load(Path(str(event.attributes[names.BUNDLE_PATH]))).exact


def test_modes_frozen_parameters_and_autocast_are_those_of_the_step(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter
) -> None:
    model = network(nn.Identity())
    model.get_submodule("3").eval()
    model.get_submodule("0").requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer, capture="on_nonfinite"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(torch.randn(16, 6))
        (output.float().sum() * math.nan).backward()
        optimizer.step()
    (event,) = exporter.find_events(names.BUNDLE_SAVED.name)
    bundle = load(Path(str(event.attributes[names.BUNDLE_PATH])))
    again = build(bundle, f"{__name__}:with_identity", "cpu")["Sequential"]
    assert [name for name, part in again.named_modules() if not part.training] == ["3"]
    assert [name for name, p in again.named_parameters() if not p.requires_grad] == ["0.weight", "0.bias"]
    rerun = run(again, bundle.calls[0])
    assert rerun.dtype is output.dtype is torch.bfloat16
    assert torch.equal(rerun, output)


def test_models_of_one_name_are_told_apart_and_a_script_is_left_out(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter, caplog: pytest.LogCaptureFixture
) -> None:
    models = [nn.Linear(6, 6), nn.Linear(6, 6)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.script(nn.Linear(6, 6))
    optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.1)
    with (
        watching(models[0], optimizer, capture="on_nonfinite"),
        watching(models[1], optimizer),
        watching(script),
    ):
        (script(models[1](models[0](torch.ones(4, 6)))).sum() * math.nan).backward()
        optimizer.step()
    (event,) = exporter.find_events(names.BUNDLE_SAVED.name)
    bundle = load(Path(str(event.attributes[names.BUNDLE_PATH])))
    assert [call.model for call in bundle.calls] == list(bundle.models) == ["Linear", "Linear_2"]
    assert "TorchScript has no hooks" in caplog.text


def generator_and_critic() -> dict[str, nn.Module]:
    torch.manual_seed(2)
    return {"generator": nn.Linear(3, 6), "critic": nn.Sequential(Root(), nn.Linear(6, 1))}


@pytest.mark.parametrize("every", [None, 100])
def test_a_bad_backward_is_captured_before_its_update_unless_steps_are_left_out_on_purpose(
    watching: Callable[..., gradwatch.Watch],
    exporter: InMemoryExporter,
    every: int | None,
) -> None:
    model = nn.Linear(6, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watching(model, optimizer, capture="on_nonfinite", every=every):
        for step in range(60):
            optimizer.zero_grad()
            output = model(torch.randn(4, 6))
            if step == 50:
                output.register_hook(lambda gradient: gradient * math.nan)
            output.square().mean().backward()
            optimizer.step()
    (event,) = exporter.find_events(names.BUNDLE_SAVED.name)
    bundle = load(Path(str(event.attributes[names.BUNDLE_PATH])))
    assert (bundle.exact, bundle.changed) == ((True, []) if every is None else (False, ["Linear"]))
    assert bundle.step == 50


def test_a_bundle_says_whose_parameters_another_optimizer_has_updated_since(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter
) -> None:
    models = generator_and_critic()
    generator, critic = models.values()
    of_generator, of_critic = (torch.optim.SGD(model.parameters(), lr=0.1) for model in models.values())
    with watching(models, [of_critic, of_generator], capture="on_nonfinite"):
        (-critic(generator(torch.rand(4, 3)).abs() + 100).mean()).backward()
        of_generator.step()
        of_critic.zero_grad()
        critic(torch.rand(4, 6) - 100).mean().backward()
        of_critic.step()
    (event,) = exporter.find_events(names.BUNDLE_SAVED.name)
    bundle = load(Path(str(event.attributes[names.BUNDLE_PATH])))
    assert (bundle.exact, bundle.changed) == (False, ["generator"])
    (note,) = _notes(bundle)
    assert note.startswith("the parameters of generator are those after an update")


def test_one_bundle_a_run_and_none_without_being_asked(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter, tmp_path: Path
) -> None:
    for settings, expected in (({}, 0), ({"capture": "on_nonfinite"}, 1)):
        model = nn.Linear(6, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with watching(model, optimizer, **settings):
            for _ in range(3):
                (model(torch.ones(4, 6)).sum() * math.nan).backward()
                optimizer.step()
        assert len(exporter.find_events(names.BUNDLE_SAVED.name)) == expected
        assert len(list((tmp_path / "gradwatch").glob("bundle-*"))) == expected


@pytest.mark.parametrize("where", ["evaluation", "checkpoint", "another thread"])
def test_only_the_passes_of_training_are_captured(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter, where: str
) -> None:
    model = nn.Linear(6, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def other_pass() -> None:
        with torch.enable_grad():
            model(torch.zeros(4, 6))

    with watching(model, optimizer, capture="on_nonfinite") as watch:
        for scale in (1.0, math.nan):
            loss = model(torch.ones(4, 6)).sum() * scale
            if where == "another thread":
                thread = threading.Thread(target=other_pass)
                thread.start()
                thread.join()
            else:
                with getattr(watch, where)():
                    other_pass()
            loss.backward()
            optimizer.step()
    (event,) = exporter.find_events(names.BUNDLE_SAVED.name)
    (call,) = load(Path(str(event.attributes[names.BUNDLE_PATH]))).calls
    assert torch.equal(call.args[0], torch.ones(4, 6))
    assert len(call.gradients) == 1


def test_a_model_used_through_a_method_of_its_own_is_told_of_in_one_line(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter, caplog: pytest.LogCaptureFixture
) -> None:
    class Encoder(nn.Linear):
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    model = Encoder(6, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer, capture="on_nonfinite"):
        for _ in range(3):
            (model.encode(torch.ones(4, 6)).sum() * math.nan).backward()
            optimizer.step()
    (line,) = told_by_capture(caplog)
    assert line.startswith("capture: no bundle of step 0: no forward pass of a watched model was seen")
    assert not exporter.find_events(names.BUNDLE_SAVED.name)


def test_running_out_of_room_is_one_line_and_leaves_nothing_behind(
    watching: Callable[..., gradwatch.Watch],
    exporter: InMemoryExporter,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Linear(300, 300)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with watching(model, optimizer, capture="on_nonfinite"):
        (model(torch.ones(4, 300)).sum() * math.nan).backward()
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            optimizer.step()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list((tmp_path / "gradwatch").iterdir()) == []
    (line,) = told_by_capture(caplog)
    assert line.startswith("capture: no bundle of step 0: ")
    assert line.endswith("File too large")
    assert not exporter.find_events(names.BUNDLE_SAVED.name)


def told_by_capture(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for record in caplog.records if (line := record.getMessage()).startswith("capture: ")]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no.such:thing", "No module named"),
        (f"{__name__}:nothing", "nothing"),
        (f"{__name__}:wrong_model", "not the model of the bundle"),
        (f"{__name__}:no_model", "gives no model"),
        (f"{__name__}:broken_model", "cannot build"),
        ("nonsense", "expected module:function"),
        (None, "cannot build"),
    ],
)
def test_a_model_that_cannot_be_built_is_one_clear_line(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter, reference: str | None, message: str
) -> None:
    bundle = captured(watching, exporter, nn.Linear(6, 2), lambda output: output.sum() * math.nan)
    with pytest.raises(BundleError, match=message) as raised:
        build(bundle, reference, "cpu")
    assert "\n" not in str(raised.value)


def test_a_step_that_does_not_run_again_is_one_clear_line(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter
) -> None:
    bundle = captured(watching, exporter, network(nn.Identity()), lambda output: output.sum() * math.nan)
    models = build(bundle, f"{__name__}:with_identity", "cpu")
    with pytest.raises(BundleError, match="cannot be run again") as raised:
        replay(bundle, models, lambda output: output)
    assert "\n" not in str(raised.value)


def wrong_model() -> nn.Module:
    return nn.Linear(3, 3)


def no_model() -> int:
    return 5


def broken_model() -> nn.Module:
    raise RuntimeError("first line\nsecond line")


# --- Finite differences --------------------------------------------------------------------------------


class _WrongSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


class WrongSlope(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _WrongSlope.apply(x)  # type: ignore[no-untyped-call, no-any-return]


def test_right_backwards_agree_with_finite_differences() -> None:
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 2))
    before = copy.deepcopy(module.state_dict())
    compared = compare(module, (torch.randn(7, 4),), {}, 6)
    assert {row.outcome for row in compared.rows} == {"ok"}
    assert {row.tensor for row in compared.rows} >= {"input 0", "0.weight", "1.bias", "4.weight"}
    assert compared.output_finite
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Turned(nn.Module):
    """Its weight is a transposed view, and it has one parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4).t())
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight) ** 2 * self.scale


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), (1, 3, 6, 6)),  # type: ignore[call-overload] # torch
        (Turned(), (2, 4)),
    ],
    ids=["channels last", "transposed"],
)
def test_the_order_of_a_weight_in_memory_does_not_matter(module: nn.Module, shape: tuple[int, ...]) -> None:
    compared = compare(module, (torch.randn(shape),), {}, 200)
    assert {row.outcome for row in compared.rows} == {"ok"}
    assert len(compared.rows) == math.prod(shape) + sum(p.numel() for p in module.parameters())


def test_a_wrong_backward_is_told_from_a_kink_and_from_nan() -> None:
    assert {row.outcome for row in compare(WrongSlope(), (torch.tensor([2.0, 3.0]),), {}, 5).rows} == {"wrong"}
    (kink,) = compare(nn.ReLU(), (torch.zeros(1),), {}, 5).rows
    assert kink.outcome == "kink"
    bad = compare(Root(), (torch.tensor([99.0, 101.0]),), {}, 5)
    assert {row.element: row.outcome for row in bad.rows} == {(0,): "non-finite", (1,): "ok"}
    assert not bad.output_finite


def test_what_overflows_in_half_precision_is_finite_in_float64() -> None:
    class Square(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x

    x = torch.tensor([1000.0], dtype=torch.float16)
    assert torch.isinf(Square()(x)).all()
    assert compare(Square(), (x,), {}, 5).output_finite


def compared_rows(module: nn.Module, x: torch.Tensor, sample: int, **options: int) -> list[tuple[str, Any]]:
    return [(row.outcome, row.element) for row in compare(module, (x,), {}, sample, **options).rows]


class Halved(nn.Module):
    """Every second element goes bad."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(len(x)) % 2 == 0, x.sqrt(), x)


def test_a_sample_has_bad_elements_and_good_ones_and_no_element_twice() -> None:
    one_bad = torch.ones(500, dtype=torch.float64)
    one_bad[400] = -1.0
    assert ("non-finite", (400,)) in compared_rows(Halved(), one_bad, 3)
    half_bad = torch.ones(100)
    half_bad[::2] = -1.0
    rows = compared_rows(Halved(), half_bad, 40)
    others = compared_rows(Halved(), half_bad, 40, seed=1)
    assert len(set(rows)) == len(set(others)) == 40
    assert {outcome for outcome, _ in rows} == {"non-finite", "ok"}
    assert compared_rows(Halved(), half_bad, 40) == rows != others


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, wrong: float) -> torch.Tensor:
        ctx.wrong = wrong
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.wrong, None


class Slope(nn.Module):
    """Its backward is wrong by a factor."""

    def __init__(self, wrong: float, offset: float = 0.0) -> None:
        super().__init__()
        self.wrong, self.offset = wrong, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Slope.apply(x, self.wrong) + self.offset  # type: ignore[no-untyped-call, no-any-return]


@pytest.mark.parametrize(
    ("module", "at", "outcome"),
    [
        (Slope(1.0005), 0.3, "ok"),
        (Slope(1.002), 0.3, "wrong"),
        (Slope(1.0, offset=1e10), 0.3, "ok"),  # what rounding does beside a large output is no fault
        (Slope(1.002, offset=1e3), 0.3, "wrong"),
        (Slope(1.002), 1e12, "wrong"),  # the step is as large as the number wants
    ],
)
def test_a_backward_is_wrong_when_it_is_off_by_more_than_rounding(
    module: nn.Module, at: float, outcome: str
) -> None:
    assert compared_rows(module, torch.tensor([at], dtype=torch.float64), 1) == [(outcome, (0,))]


class Cube(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x**3


class BesideInfinity(nn.Module):
    """One element is infinite; the other's derivative is wrong."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = Slope(1.002)(x)
        return torch.cat([y, y * 0 + math.inf])


def test_a_slope_of_nothing_is_right_and_an_infinity_hides_no_fault() -> None:
    assert compared_rows(Cube(), torch.zeros(1), 1) == [("ok", (0,))]
    assert compared_rows(BesideInfinity(), torch.ones(1), 1) == [("wrong", (0,))]


class Noisy(nn.Module):
    """Draws numbers, counts its passes, changes its input in place; one parameter is unused, one frozen."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        x.mul_(2.0)
        return x * self.frozen * torch.rand(3) * self.count * random.random()


def test_each_evaluation_begins_alike_and_nothing_of_it_stays() -> None:
    module, x = Noisy(), torch.randn(3)
    before = (torch.get_rng_state(), random.getstate(), x.clone())
    compared = compare(module, (x,), {}, 3)
    assert {row.outcome for row in compared.rows} == {"ok"}
    assert {row.tensor for row in compared.rows} == {"input 0", "frozen", "unused"}
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert torch.equal(x, before[2])
    assert module.count == 0
    assert module.frozen.dtype is torch.float32
    assert not module.frozen.requires_grad


def test_wrong_derivatives_that_cancel_in_the_sum_are_found() -> None:
    class _Swapped(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x[0] * 1.0, x[0] * 0.0])

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad[1:]  # as if the second output were the first

    class Swapped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _Swapped.apply(x)  # type: ignore[no-untyped-call, no-any-return]

    assert compared_rows(Swapped(), torch.ones(1), 1) == [("wrong", (0,))]
