"""A NaN is never missed, and is blamed on the right step and layer or on none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch import conventions as names
from gradwatch.nonfinite.birthplace import Origin, Witnesses, is_reported, origin
from gradwatch.nonfinite.forward_plan import NOWHERE, Site
from gradwatch.testing import InMemoryExporter

Watching = Callable[..., Any]
STEPS = 12


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # Registered in another order than they run in: the order of backward must be learned, not assumed.
        self.head = nn.Linear(6, 2)
        self.middle = nn.Linear(6, 6)
        self.stem = nn.Linear(4, 6)
        self.poison = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.middle(torch.tanh(self.stem(x)))
        if self.poison and hidden.requires_grad:
            hidden.register_hook(lambda grad: grad * math.nan)
        return self.head(torch.tanh(hidden))


def span(told: Any) -> tuple[Any, Any]:
    """The steps between which it came, first and last."""
    if names.STEP in told:
        assert names.NONFINITE_EARLIEST not in told
        return told[names.STEP], told[names.STEP]
    return told[names.NONFINITE_EARLIEST], told[names.NONFINITE_LATEST]


def train(model: Net, watch: Any, optimizer: Any, *, bad_step: int, clip: bool) -> None:
    with watch:
        for step in range(STEPS):
            optimizer.zero_grad()
            model.poison = step == bad_step
            model(torch.randn(5, 4)).square().mean().backward()
            if clip:
                clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("every", [1, 5, 100])
@pytest.mark.parametrize("bad_step", [0, 3, 7])
def test_a_nan_planted_in_backward_is_found_at_its_step_and_layer(
    watching: Watching, exporter: InMemoryExporter, bad_step: int, every: int, clip: bool
) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, watching(model, optimizer, every=every), optimizer, bad_step=bad_step, clip=clip)
    events = [event.attributes for event in exporter.find_events(names.NONFINITE_STEP.name)]
    first, *later = events
    seen = clip or bad_step % every == 0
    assert span(first) == ((bad_step, bad_step) if seen else (bad_step, bad_step + 1))
    assert str(first[names.LAYER_NAME]).startswith("middle.")
    # Clipping reads the gradients of every step, and the last layer's say that what came into it was good.
    assert first.get(names.BORN_IN) == ("backward" if seen else None)
    assert [event[names.STEP] for event in later] == list(range(bad_step + 1, STEPS))[: len(later)]
    assert {event[names.BORN_IN] for event in later} <= {"parameters"}
    assert sum(exporter.values(names.NONFINITE)) == STEPS - bad_step


def test_a_bad_loss_names_no_layer(watching: Watching, exporter: InMemoryExporter) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watching(model, optimizer, every=100):
        for step in range(3):
            optimizer.zero_grad()
            (model(torch.randn(5, 4)).square().mean() * (math.inf if step == 1 else 1.0)).backward()
            for parameter in model.parameters():
                parameter.grad = None  # so that the parameters stay good
            optimizer.step()
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert event.attributes[names.STEP] == 1
    assert event.attributes[names.LOSS_VALUE] == math.inf
    assert names.LAYER_NAME not in event.attributes
    assert event.attributes[names.BORN_IN] == "loss"


def test_a_parameter_that_was_already_bad_is_named(watching: Watching, exporter: InMemoryExporter) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer):
        for step in range(3):
            if step == 2:
                model.stem.weight.data[0, 0] = math.nan
            optimizer.zero_grad()
            model(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert event.attributes[names.STEP] == 2
    assert event.attributes[names.BORN_IN] == "parameters"
    assert event.attributes[names.LAYER_NAME] == "stem.weight"


def test_a_poisoned_critic_is_blamed_on_parameters_when_the_generator_steps(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    generator, critic = Net(), nn.Linear(2, 1)
    steps_g = torch.optim.SGD(generator.parameters(), lr=0.1)
    steps_c = torch.optim.SGD(critic.parameters(), lr=0.1)
    with watching([generator, critic], [steps_g, steps_c]):
        critic.weight.data[0, 0] = math.nan
        critic(generator(torch.randn(5, 4))).mean().backward()
        steps_g.step()
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert event.attributes[names.BORN_IN] == "parameters"
    assert event.attributes[names.LAYER_NAME] == "Linear.weight"


def test_a_norm_that_overflows_over_finite_gradients_is_no_nan(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    parameter = nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    with watching(None, optimizer):
        parameter.grad = torch.full((8,), 3e38)
        optimizer.step()
    assert exporter.find_events(names.NONFINITE_STEP.name) == []
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx([3e38 * math.sqrt(8)], rel=1e-6)


def test_bad_elements_and_layers_are_counted(watching: Watching, exporter: InMemoryExporter) -> None:
    first, second = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.SGD([first, second], lr=0.0)
    with watching(None, optimizer):
        first.grad, second.grad = torch.ones(8), torch.ones(8)
        first.grad[:3] = math.inf
        optimizer.step()
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert event.attributes[names.NONFINITE_ELEMENTS] == 3
    assert event.attributes[names.NONFINITE_LAYERS] == 1


def test_a_loss_only_the_user_knows_counts_too(watching: Watching, exporter: InMemoryExporter) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watching(model, optimizer, capture_loss=False) as watch:
        for step in range(3):
            optimizer.zero_grad()
            model(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
            watch.log(loss=math.nan if step == 1 else 1.0)
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert event.attributes[names.STEP] == 1
    assert sum(exporter.values(names.NONFINITE)) == 1


def test_events_thin_out_and_the_counter_does_not(watching: Watching, exporter: InMemoryExporter) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer, every=7):
        for _ in range(205):
            optimizer.zero_grad()
            (model(torch.randn(5, 4)).square().mean() * math.nan).backward()
            optimizer.step()
    counts = [e.attributes[names.NONFINITE_STEPS] for e in exporter.find_events(names.NONFINITE_STEP.name)]
    assert counts == [*range(1, 11), 100]
    assert sum(exporter.values(names.NONFINITE)) == 205


def test_a_step_that_several_optimizers_tell_of_counts_once(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    models = [nn.Linear(4, 1) for _ in range(3)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    with watching({str(index): model for index, model in enumerate(models)}, optimizers):
        for step in range(6):
            for optimizer in optimizers:
                optimizer.zero_grad()
            x = torch.full((2, 4), math.nan if step in (2, 4) else 1.0)
            sum(model(x).square().mean() for model in models).backward()
            if step not in (2, 4):
                for optimizer in optimizers:
                    optimizer.step()
            else:  # read, and passed over
                clip_grad_norm_([p for model in models for p in model.parameters()], 1.0)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                    optimizer.step()
    events = [event.attributes for event in exporter.find_events(names.NONFINITE_STEP.name)]
    counts = {event[names.STEP]: event[names.NONFINITE_STEPS] for event in events}
    assert counts == {2: 1, 4: 2}
    assert sum(exporter.values(names.NONFINITE)) == 2


@given(st.integers(1, 10**7))
def test_the_first_ten_and_then_powers_of_ten_are_reported(count: int) -> None:
    assert is_reported(count) == (count <= 10 or count in {10**n for n in range(2, 8)})


BAD: Final = (math.nan, math.inf, -math.inf)
indices = st.lists(st.integers(0, 5), unique=True)


@st.composite
def witnesses(draw: st.DrawFn) -> Witnesses:
    gradients = draw(indices)
    return Witnesses(
        loss=draw(st.sampled_from([None, 1.0, *BAD])),
        gradients=gradients,
        bad_gradients=draw(st.lists(st.sampled_from(gradients), unique=True)) if gradients else [],
        bad_parameters=draw(st.none() | indices),
        backward_order=draw(st.permutations(range(6))),
        bad_elsewhere=draw(st.booleans()),
        parameters_by=draw(st.sampled_from([None, "optimizer", "parameters"])),
        forward=draw(st.sampled_from([None, "good", "input", "forward"])),
        site=draw(
            st.builds(Site, st.sampled_from([None, "forward", "loss"]), st.none() | st.just("a"), st.booleans())
        ),
    )  # fmt: skip


@given(witnesses())
def test_bad_parameters_are_asked_before_anything_else(seen: Witnesses) -> None:
    found = origin(replace(seen, bad_parameters=[3]))
    assert found == Origin(seen.parameters_by, None if seen.bad_elsewhere else 3)
    assert origin(replace(seen, bad_parameters=[3, 4])).layer is None


@given(witnesses(), st.sampled_from(["input", "forward"]))
def test_a_bad_input_or_output_of_good_parameters_is_asked_next(seen: Witnesses, forward: Any) -> None:
    found = origin(replace(seen, bad_parameters=[], bad_elsewhere=False, forward=forward))
    assert found.born_in == (None if seen.site.phase == "loss" else forward)
    assert found.module is None or (forward, found.module) == ("forward", seen.site.module)
    assert found.layer is None


@given(witnesses(), st.sampled_from(BAD))
def test_a_bad_loss_after_a_good_output_was_born_in_the_loss(seen: Witnesses, loss: float) -> None:
    found = origin(replace(seen, bad_parameters=[], bad_elsewhere=False, forward="good", loss=loss))
    assert found == Origin(None if seen.site.phase == "forward" else "loss")


@given(witnesses())
def test_backward_is_what_is_left_and_its_layer_comes_after_a_good_one(seen: Witnesses) -> None:
    seen = replace(seen, bad_parameters=[], bad_elsewhere=False, forward="good", loss=1.0)
    found = origin(seen)
    assert found.born_in == "backward"
    reached = [index for index in seen.backward_order if index in seen.gradients]
    if found.layer is None:
        assert not seen.bad_gradients or reached[0] in seen.bad_gradients
    else:
        before = reached[: reached.index(found.layer)]
        assert before
        assert not set(before) & set(seen.bad_gradients)


@given(witnesses())
def test_without_its_witnesses_nothing_is_said_for_sure(seen: Witnesses) -> None:
    blind = replace(seen, bad_parameters=None, bad_elsewhere=False, forward=None, site=NOWHERE)
    assert origin(blind).born_in is None


def test_a_nan_that_no_loss_ever_meets_is_found_at_the_end_of_the_run(exporter: InMemoryExporter) -> None:
    table, head = nn.Embedding(10, 4), nn.Linear(4, 1)
    model = nn.ModuleDict({"table": table, "head": head})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    with gradwatch.watch(model, optimizer, every=1000, exporter=exporter):
        for step in range(60):
            optimizer.zero_grad()
            loss = head(table(torch.randint(0, 8, (4,)))).square().mean()
            if (
                step == 40
            ):  # the root of zero: a finite loss and a NaN gradient, of a row that is never read again
                loss = loss + (table(torch.tensor([9])) * 0).square().sum().sqrt()
            loss.backward()
            optimizer.step()
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert names.STEP not in event.attributes
    assert span(event.attributes) == (0, 59)
    assert names.BORN_IN not in event.attributes
    assert event.attributes[names.NONFINITE_LAYERS] == 1


@pytest.mark.parametrize("kind", ["adam", "momentum"])
@pytest.mark.parametrize("every", [1, 100])
def test_what_a_bad_step_leaves_in_the_optimizer_is_not_told_as_a_fault_of_the_update(
    watching: Watching, exporter: InMemoryExporter, kind: str, every: int
) -> None:
    model = nn.Linear(4, 2)
    optimizer: torch.optim.Optimizer
    if kind == "adam":
        optimizer = torch.optim.Adam(model.parameters())
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with watching(model, optimizer, every=every):
        for step in range(9):
            x = torch.randn(3, 4)
            if step == 5:
                x[0, 0] = math.nan
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    told = [
        (event.attributes[names.STEP], event.attributes.get(names.BORN_IN))
        for event in exporter.find_events(names.NONFINITE_STEP.name)
    ]
    assert told[0] == (5, "input")
    assert told[1:] == [(step, "parameters") for step in (6, 7, 8)]


def test_an_option_that_changes_in_the_middle_is_seen_in_the_update_it_spoils(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.Adam(model.parameters())
    with watching(model, optimizer):
        for step in range(7):
            if step == 5:
                optimizer.param_groups[0]["eps"] = 0.0  # 0 / 0 where the gradient has always been zero
            x = torch.randn(3, 4)
            x[:, 0] = 0.0
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    first = exporter.find_events(names.NONFINITE_STEP.name)[0].attributes
    assert (first[names.STEP], first[names.BORN_IN], first[names.LAYER_NAME]) == (5, "optimizer", "weight")


class Masked(nn.Module):
    """Attention over a row of positions, with a mask of minus infinity that is a parameter of the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.mask = nn.Parameter(torch.full((4, 4), -math.inf).triu(1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.embed(x) @ self.embed(x).T + self.mask).softmax(-1) @ x


def forbidding_a_class() -> nn.Module:
    model = nn.Linear(4, 4)
    model.bias.data[3] = -math.inf
    return model


class Signs(torch.optim.Optimizer):
    """An optimizer of the user's, whose arithmetic nobody knows: its updates are looked at one by one."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.sign(), alpha=0.01)


@pytest.mark.parametrize("steps_mask", [True, False])
@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("kind", [torch.optim.SGD, Signs])
@pytest.mark.parametrize("build", [Masked, forbidding_a_class])
def test_infinities_that_parameters_always_held_are_no_finding_and_no_evidence(
    exporter: InMemoryExporter, build: Any, kind: Any, every: int, steps_mask: bool
) -> None:
    model = build()
    optimizer = kind([p for p in model.parameters() if steps_mask or p.requires_grad])
    with gradwatch.watch(model, optimizer, every=every, exporter=exporter):
        for step in range(7):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(torch.randn(4, 4)), torch.zeros(4, dtype=torch.long))
            (loss * (math.nan if step == 6 else 1.0)).backward()
            if step == 6:
                assert exporter.find_events(names.NONFINITE_STEP.name) == []
            optimizer.step()
    first = exporter.find_events(names.NONFINITE_STEP.name)[0].attributes
    # Unobserved, the live graph alone is asked: it shows the bias's infinity in the model's output.
    told = "loss" if every == 1 or build is Masked else None
    assert (first[names.STEP], first.get(names.BORN_IN)) == (6, told)
    assert names.LAYER_NAME not in first


def test_a_healthy_run_with_a_forbidden_class_ends_without_a_finding(exporter: InMemoryExporter) -> None:
    model = forbidding_a_class()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, exporter=exporter):
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.randn(4, 4)), torch.zeros(4, dtype=torch.long)).backward()
            optimizer.step()
    assert exporter.find_events(names.NONFINITE_STEP.name) == []


def test_a_nan_among_infinities_that_are_meant_is_the_parameters_fault(exporter: InMemoryExporter) -> None:
    model = Masked()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, every=1, exporter=exporter):
        for step in range(3):
            if step == 2:
                model.mask.data[0, 1] = math.nan
            optimizer.zero_grad()
            model(torch.randn(4, 4)).square().mean().backward()
            optimizer.step()
    first = exporter.find_events(names.NONFINITE_STEP.name)[0].attributes
    told = (first[names.STEP], first.get(names.BORN_IN), first.get(names.LAYER_NAME))
    assert told == (2, "parameters", "mask")


def by_hand(model: nn.Sequential) -> None:
    model[2].weight.data[0, 0] = math.nan


def in_backward(model: nn.Sequential) -> None:
    model[2].weight.grad[0, 0] = math.nan


@pytest.mark.parametrize(
    ("build", "by_user", "by_backward"),
    [
        (lambda params: torch.optim.SGD(params, lr=0.01), (6, 7, None), (6, 7, None)),
        (lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9), (7, 7, "parameters"), (6, 6, None)),
        (lambda params: torch.optim.Adam(params), (7, 7, "parameters"), (6, 6, None)),
    ],
)
@pytest.mark.parametrize("fault", [by_hand, in_backward])
def test_a_step_that_nobody_observed_is_told_for_certain_or_as_one_of_two(
    exporter: InMemoryExporter, build: Any, fault: Any, by_user: Any, by_backward: Any
) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    optimizer = build(model.parameters())
    with gradwatch.watch(model, optimizer, every=1000, exporter=exporter):
        for step in range(10):
            if step == 7 and fault is by_hand:
                fault(model)
            optimizer.zero_grad()
            model(torch.randn(5, 4)).square().mean().backward()
            if step == 6 and fault is in_backward:
                fault(model)
            optimizer.step()
    first = exporter.find_events(names.NONFINITE_STEP.name)[0].attributes
    assert first[names.LAYER_NAME] == "2.weight"
    assert (*span(first), first.get(names.BORN_IN)) == (by_user if fault is by_hand else by_backward)


def spoilt_by_decay(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["weight_decay"] = math.nan


def spoilt_by_loading(optimizer: torch.optim.Optimizer) -> None:
    state = optimizer.state_dict()
    for index in range(4):
        state["state"][index]["exp_avg"] = torch.full_like(state["state"][index]["exp_avg"], math.nan)
    optimizer.load_state_dict(state)


def spoilt_by_backward(optimizer: torch.optim.Optimizer) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad.fill_(math.nan)


@pytest.mark.parametrize(
    ("spoil", "born_in"),
    [(spoilt_by_decay, None), (spoilt_by_loading, None), (spoilt_by_backward, "backward")],
)
def test_a_memory_that_is_spoilt_tells_of_gradients_only_where_nothing_else_makes_it(
    exporter: InMemoryExporter, spoil: Callable[[Any], None], born_in: str | None
) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
    below, top = list(model[:4].parameters()), list(model[4].parameters())
    optimizer = torch.optim.Adam([{"params": below}, {"params": top}])
    with gradwatch.watch(model, optimizer, every=1000, exporter=exporter):
        for step in range(8):
            optimizer.zero_grad()
            model(torch.randn(5, 4)).square().mean().backward()
            if step == 6:
                spoil(optimizer)
            optimizer.step()
    first = exporter.find_events(names.NONFINITE_STEP.name)[0].attributes
    assert (first[names.STEP], first.get(names.BORN_IN)) == (6, born_in)


def test_a_row_that_is_not_read_at_once_was_spoilt_at_any_step_since_the_last_look(
    exporter: InMemoryExporter,
) -> None:
    table = nn.Embedding(10, 4)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.01)
    with gradwatch.watch(table, optimizer, every=1000, exporter=exporter):
        for step in range(10):
            optimizer.zero_grad()
            table(torch.tensor([9 if step in (2, 7) else 1])).square().mean().backward()
            if step == 2:
                table.weight.grad[9, 0] = math.nan
            optimizer.step()
    first = exporter.find_events(names.NONFINITE_STEP.name)[0].attributes
    assert span(first) == (0, 7)
