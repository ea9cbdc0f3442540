"""The loops people write, each with the dense truth beside it: norms and loss of every step.

A loop takes ``watch``, which it calls as a context manager around training, and a `Truth` that it fills from
its own gradients in float64. It returns the modules it trained, for a comparison of weights.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

STEPS = 5

Watch = Callable[..., AbstractContextManager[Any]]


class Step(NamedTuple):
    """What a step should be reported as; ``norms`` None where it was skipped."""

    norms: dict[str, float] | None
    loss: float | None


@dataclass
class Truth:
    """Steps by optimizer; loss scales of all steps."""

    steps: dict[int, list[Step]] = field(default_factory=dict)
    scales: list[float] = field(default_factory=list)

    def step(
        self,
        model: nn.Module,
        loss: float | None,
        *,
        optimizer: int = 0,
        scale: float = 1.0,
        skipped: bool = False,
        prefix: str = "",
    ) -> None:
        """Take down the gradients as they are now, divided by ``scale``."""
        norms = {prefix + name: norm / scale for name, norm in norms_of(model).items()}
        self.steps.setdefault(optimizer, []).append(Step(None if skipped else norms, loss))


Loop = Callable[[Watch, Truth], Iterable[nn.Module]]


def dense_norm(grad: Tensor) -> float:
    values = grad.detach().to_dense() if grad.layout is not torch.strided else grad.detach()
    wide = values.to(torch.complex128) if values.is_complex() else values.double()
    return math.sqrt(float((wide.abs() ** 2).sum()))


def norms_of(model: nn.Module) -> dict[str, float]:
    return {name: dense_norm(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def loss_of(model: nn.Module) -> Tensor:
    loss: Tensor = model(torch.randn(8, 6)).square().mean()
    return loss


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    watch: Watch,
    truth: Truth,
    *,
    steps: Callable[[], Any] | None = None,
    watched: tuple[Any, ...] | None = None,
    after: Callable[[], Any] = lambda: None,
    set_to_none: bool = True,
) -> list[nn.Module]:
    """The plain loop; ``steps`` steps instead of the optimizer, ``after`` follows each step."""
    with watch(*(watched or (model, optimizer))):
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss = loss_of(model)
            loss.backward()
            truth.step(model, loss.item())
            (steps or optimizer.step)()
            after()
    return [model]


# --- Mixed precision -----------------------------------------------------------------------------------


def _scaled(
    watch: Watch,
    truth: Truth,
    *,
    fused: bool,
    unscale: bool,
    clip: bool,
    overflow: bool = False,
    clip_first: bool = False,
) -> list[nn.Module]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    with watch(model, optimizer):
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(model) * (2.0**100 if overflow and step in (1, 3) else 1.0)
            scale = scaler.get_scale()
            scaled = scaler.scale(loss)
            scaled.backward()
            skipped = overflow and step in (1, 3)
            if skipped:
                model[0].weight.grad[0, 0] = math.inf  # what does not fit into half precision
            truth.scales.append(scale)
            truth.step(model, loss.item(), scale=scale, skipped=skipped)
            if clip_first:
                clip_grad_norm_(model.parameters(), 0.5 * scale)
            if unscale:
                scaler.unscale_(optimizer)
            if clip:
                clip_grad_norm_(model.parameters(), 0.5 if unscale else 0.5 * scale)
            scaler.step(optimizer)
            scaler.update()
    return [model]


def scaled(watch: Watch, truth: Truth) -> list[nn.Module]:
    return _scaled(watch, truth, fused=False, unscale=False, clip=False)


def scaled_fused(watch: Watch, truth: Truth) -> list[nn.Module]:
    return _scaled(watch, truth, fused=True, unscale=False, clip=False)


def scaled_and_clipped(watch: Watch, truth: Truth) -> list[nn.Module]:
    return _scaled(watch, truth, fused=False, unscale=True, clip=True)


def scaled_fused_and_clipped(watch: Watch, truth: Truth) -> list[nn.Module]:
    return _scaled(watch, truth, fused=True, unscale=True, clip=True)


def scaled_and_clipped_before_unscaling(watch: Watch, truth: Truth) -> list[nn.Module]:
    return _scaled(watch, truth, fused=False, unscale=False, clip=True)


def scaled_fused_and_clipped_before_unscaling(watch: Watch, truth: Truth) -> list[nn.Module]:
    return _scaled(watch, truth, fused=True, unscale=False, clip=True)


def scaled_clipped_and_then_unscaled(watch: Watch, truth: Truth) -> list[nn.Module]:
    return _scaled(watch, truth, fused=False, unscale=True, clip=False, clip_first=True)


def scaled_fused_clipped_and_then_unscaled(watch: Watch, truth: Truth) -> list[nn.Module]:
    return _scaled(watch, truth, fused=True, unscale=True, clip=False, clip_first=True)


def scaled_and_skipped(watch: Watch, truth: Truth) -> list[nn.Module]:
    return _scaled(watch, truth, fused=False, unscale=False, clip=False, overflow=True)


def scaled_fused_and_skipped(watch: Watch, truth: Truth) -> list[nn.Module]:
    return _scaled(watch, truth, fused=True, unscale=False, clip=False, overflow=True)


def scaled_clipped_and_skipped(watch: Watch, truth: Truth) -> list[nn.Module]:
    return _scaled(watch, truth, fused=False, unscale=True, clip=True, overflow=True)


def bfloat16_autocast(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer):
        for _ in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model)
            loss.backward()
            truth.step(model, loss.item())
            optimizer.step()
    return [model]


# --- Accumulation, closures, several of everything -----------------------------------------------------


def plain(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = network()
    return _train(model, torch.optim.Adam(model.parameters(), lr=0.01), watch, truth)


def accumulated_and_clipped(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with watch(model, optimizer):
        for _ in range(STEPS):
            optimizer.zero_grad()
            total = 0.0
            for _ in range(3):
                loss = loss_of(model) / 3
                loss.backward()
                total += loss.item()
            truth.step(model, total)
            clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
    return [model]


def gradients_kept_as_zeros(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return _train(model, optimizer, watch, truth, set_to_none=False)


def _closures(
    optimizer: torch.optim.Optimizer, model: nn.Module, watch: Watch, truth: Truth
) -> list[nn.Module]:
    x = torch.randn(8, 6)
    last = Truth()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(x).square().mean()
        loss.backward()
        last.steps.clear()
        last.step(model, loss.item())
        return loss

    with watch(model, optimizer):
        for _ in range(STEPS):
            optimizer.step(closure)  # type: ignore[arg-type] # torch types it as float
            truth.steps.setdefault(0, []).extend(last.steps[0])
    return [model]


def lbfgs(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = network()
    return _closures(torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4), model, watch, truth)


def first_order_closure(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = network()
    return _closures(torch.optim.Adam(model.parameters(), lr=0.01), model, watch, truth)


def gan(watch: Watch, truth: Truth) -> list[nn.Module]:
    generator, critic = nn.Linear(4, 6), network()
    steps_c = torch.optim.Adam(critic.parameters(), lr=0.01)
    steps_g = torch.optim.Adam(generator.parameters(), lr=0.01)
    with watch({"critic": critic, "generator": generator}, [steps_c, steps_g]):
        for _ in range(STEPS):
            steps_c.zero_grad()
            real = critic(torch.randn(8, 6)).mean()
            real.backward()
            fake = -critic(generator(torch.randn(8, 4)).detach()).mean()
            fake.backward()
            truth.step(critic, real.item() + fake.item(), optimizer=0, prefix="critic.")
            steps_c.step()
            steps_g.zero_grad()
            loss = critic(generator(torch.randn(8, 4))).square().mean()
            loss.backward()
            truth.step(generator, loss.item(), optimizer=1, prefix="generator.")
            steps_g.step()
    return [generator, critic]


def actor_critic(watch: Watch, truth: Truth) -> list[nn.Module]:
    """One shared loss, two optimizers: the loss is the first one's."""
    actor, critic = network(), nn.Linear(6, 1)
    steps_a = torch.optim.SGD(actor.parameters(), lr=0.1)
    steps_c = torch.optim.SGD(critic.parameters(), lr=0.1)
    with watch({"actor": actor, "critic": critic}, [steps_a, steps_c]):
        for _ in range(STEPS):
            steps_a.zero_grad()
            steps_c.zero_grad()
            state = torch.randn(8, 6)
            value = critic(state)
            loss = (actor(state).log_softmax(-1)[:, :1] * value.detach()).mean() + (value - 1).square().mean()
            loss.backward()
            truth.step(actor, loss.item(), optimizer=0, prefix="actor.")
            truth.step(critic, None, optimizer=1, prefix="critic.")
            steps_a.step()
            steps_c.step()
    return [actor, critic]


# --- Optimizers of all kinds ---------------------------------------------------------------------------


def without_an_optimizer(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = network()
    with watch(model):
        for step in range(STEPS):
            loss = loss_of(model)
            loss.backward()
            truth.step(model, loss.item())
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.data -= 0.1 * parameter.grad
                if step == 1:
                    parameter.grad.zero_()
                elif step == 2:
                    parameter.grad.data.zero_()
                else:
                    parameter.grad = None
    return [model]


def without_an_optimizer_accumulating(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = network()
    with watch(model):
        for _ in range(STEPS):
            total = 0.0
            for _ in range(2):
                loss = loss_of(model)
                loss.backward()
                total += loss.item()
            truth.step(model, total)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
            model.zero_grad()
    return [model]


def _stepping_in_backward(model: nn.Module) -> list[torch.optim.Optimizer]:
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizer = optimizers[parameter]  # type: ignore[index] # it is a Parameter
        optimizer.step()
        optimizer.zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]
    return list(optimizers.values())


def _in_backward(watch: Watch, truth: Truth, *, named: bool) -> list[nn.Module]:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    twin = copy.deepcopy(model)
    optimizers = _stepping_in_backward(model)
    with watch(model, optimizers) if named else watch(model):
        for _ in range(STEPS):
            x = torch.randn(8, 6)
            twin.load_state_dict(model.state_dict())
            twin.zero_grad()
            torch.autograd.backward(twin(x), torch.ones(8, 3))  # with a gradient given: no loss of the run's
            loss = model(x).sum()
            truth.step(twin, loss.item())
            loss.backward()
    return [model]


def stepping_in_backward(watch: Watch, truth: Truth) -> list[nn.Module]:
    return _in_backward(watch, truth, named=True)


def stepping_in_backward_unnamed(watch: Watch, truth: Truth) -> list[nn.Module]:
    return _in_backward(watch, truth, named=False)


class Accelerated(torch.optim.Optimizer):
    """Shaped like Accelerate's: an Optimizer by name, never initialised as one, that hands everything on."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)


class Bare:
    """A wrapper that shares nothing with torch's optimizers but an attribute."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def advance(self) -> None:
        self.optimizer.step()


class EightBit(torch.optim.Optimizer):
    """Keeps its momentum as bytes and a scale, and overrides everything, as 8-bit optimizers do."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                momentum = parameter.grad.clone()
                if state:
                    momentum += 0.9 * state["bytes"].float() * state["scale"]
                state["scale"] = momentum.abs().max() / 127 + 1e-12
                state["bytes"] = (momentum / state["scale"]).round().to(torch.int8)
                parameter -= group["lr"] * state["bytes"].float() * state["scale"]


def accelerated(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = network()
    optimizer = Accelerated(torch.optim.Adam(model.parameters(), lr=0.01))
    return _train(model, optimizer, watch, truth)


def averaging_after_local_steps(watch: Watch, truth: Truth) -> list[nn.Module]:
    """torch's own wrapper; its averager has nobody to average with here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own deprecated parts
        from torch.distributed.optim import PostLocalSGDOptimizer
    model = network()
    averager: Any = SimpleNamespace(average_parameters=lambda params: None)
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    return _train(model, PostLocalSGDOptimizer(inner, averager), watch, truth)


def wrapped_without_hooks(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = network()
    inner = torch.optim.Adam(model.parameters(), lr=0.01)
    wrapper = Bare(inner)
    return _train(model, inner, watch, truth, steps=wrapper.advance, watched=(model, wrapper))


def eight_bit(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = network()
    return _train(model, EightBit(model.parameters(), lr=0.01), watch, truth)


def groups_and_a_schedule(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": [*model[1:].parameters()], "lr": 0.2}]
    optimizer = torch.optim.SGD(groups)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    return _train(model, optimizer, watch, truth, after=schedule.step)


# --- Copies, adapters, parameters that come and go -----------------------------------------------------


def moving_average(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    _train(model, optimizer, watch, truth, after=lambda: average.update_parameters(model))
    return [model, average]


def averaged_weights(watch: Watch, truth: Truth) -> list[nn.Module]:
    """The copy is made while watched: nothing of ours may come along."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    copies: list[nn.Module] = []

    def average() -> None:
        if not copies:
            copies.append(AveragedModel(model))
        copies[0].update_parameters(model)  # type: ignore[operator]

    _train(model, optimizer, watch, truth, after=average)
    return [model, *copies]


class Adapter(nn.Module):
    """Low-rank adaptation of a frozen linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + x @ self.down.T @ self.up.T
        return out


def low_rank_adapter(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = nn.Sequential(Adapter(nn.Linear(6, 16)), nn.ReLU(), Adapter(nn.Linear(16, 3)))
    return _train(model, torch.optim.Adam(model.parameters(), lr=0.01), watch, truth)


def frozen_and_thawed(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].requires_grad_(False)
    done = []

    def change() -> None:
        done.append(None)
        model[0].requires_grad_(len(done) in (2, 3))

    return _train(model, optimizer, watch, truth, after=change)


# --- Graphs of all kinds -------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 16)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3), nn.Tanh())
        self.head = nn.Linear(16, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant)
        out: Tensor = self.head(hidden)
        return out


def _checkpointed(watch: Watch, truth: Truth, *, reentrant: bool) -> list[nn.Module]:
    model = Checkpointed(reentrant=reentrant)
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.1), watch, truth)


def checkpointed(watch: Watch, truth: Truth) -> list[nn.Module]:
    return _checkpointed(watch, truth, reentrant=False)


def checkpointed_reentrant(watch: Watch, truth: Truth) -> list[nn.Module]:
    return _checkpointed(watch, truth, reentrant=True)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 8, num_layers=2, dropout=0.1)
        self.gru = nn.GRU(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.gru(self.lstm(x.reshape(2, 8, 3))[0])[0]
        return out


def recurrent(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = Recurrent()
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.1), watch, truth)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.round()

    @staticmethod
    def backward(_context: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2.0 * grad


class Rounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _StraightThrough.apply(self.inner(x))
        return out


def custom_function(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = Rounded()
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.1), watch, truth)


class Odd(nn.Module):
    """Parameters whose gradients are complex, empty, sparse, shared, missing, or not wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.complex = nn.Parameter(torch.randn(6, dtype=torch.complex64))
        self.empty = nn.Parameter(torch.zeros(0))
        self.unused = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.table = nn.Embedding(10, 6, sparse=True)
        self.shared = nn.Linear(6, 6, bias=False)
        self.again = nn.Linear(6, 6, bias=False)
        self.again.weight = self.shared.weight

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table(torch.tensor([1, 1, 2, 3, 1, 2, 3, 1]))
        return self.again(self.shared(x + self.frozen)) + rows + self.complex.abs() + self.empty.sum()


def odd_gradients(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = Odd()
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.1), watch, truth)


def compiled(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    outer: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(outer, optimizer):
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(outer)
            loss.backward()
            truth.step(model, loss.item())
            optimizer.step()
    return [model]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def compiled_in_place(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = Small()
    model.compile(backend="aot_eager", fullgraph=True)  # type: ignore[no-untyped-call] # torch
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.1), watch, truth)


def compiled_step(watch: Watch, truth: Truth) -> list[nn.Module]:
    """Forward, backward and update in one compiled function; the truth is a twin's."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    @torch.compile(backend="eager")
    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(x).sum()
        loss.backward()
        optimizer.step()
        return loss

    with watch(model, optimizer):
        for _ in range(STEPS):
            x = torch.randn(8, 6)
            twin.load_state_dict(model.state_dict())
            twin.zero_grad()
            torch.autograd.backward(twin(x), torch.ones(8, 3))
            truth.step(twin, step(x).item())
    return [model]


def compiled_optimizer(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    return _train(model, optimizer, watch, truth, steps=step)


def poisoned(watch: Watch, truth: Truth) -> list[nn.Module]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer):
        for step in range(STEPS):
            optimizer.zero_grad()
            (loss_of(model) * (math.nan if step == 3 else 1.0)).backward()
            clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    return [model]


# --- What interrupts a loop ----------------------------------------------------------------------------


def evaluated(watch: Watch, truth: Truth) -> list[nn.Module]:
    """Validation by gradient (as adversarial accuracy needs) must not be taken for training."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer) as watching:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            truth.step(model, loss.item())
            optimizer.step()
            if watching is not None:
                with watching.evaluation():
                    _attack(model)
            else:
                _attack(model)
    return [model]


def _attack(model: nn.Module) -> None:
    model.eval()
    x = torch.randn(8, 6, requires_grad=True)
    (1e6 * model(x).square().mean() * math.nan).backward()
    model.zero_grad()
    model.train()


def interrupted(watch: Watch, truth: Truth) -> list[nn.Module]:
    """Ctrl-C in the middle of a step, caught, and training goes on."""

    class Interrupted(torch.optim.SGD):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().step(closure)

    model = network()
    optimizer = Interrupted(model.parameters(), lr=0.1)
    with watch(model, optimizer):
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            if step != 1:
                truth.step(model, loss.item())
            try:
                optimizer.step()
            except KeyboardInterrupt:
                assert step == 1
    return [model]


TOLD: tuple[Loop, ...] = (
    plain, accumulated_and_clipped, gradients_kept_as_zeros, lbfgs, first_order_closure, gan, actor_critic,
    scaled, scaled_fused, scaled_and_clipped, scaled_fused_and_clipped, scaled_and_clipped_before_unscaling,
    scaled_fused_and_clipped_before_unscaling, scaled_clipped_and_then_unscaled,
    scaled_fused_clipped_and_then_unscaled,
    scaled_and_skipped, scaled_fused_and_skipped, scaled_clipped_and_skipped, bfloat16_autocast,
    without_an_optimizer, without_an_optimizer_accumulating, stepping_in_backward, stepping_in_backward_unnamed,
    accelerated, averaging_after_local_steps, wrapped_without_hooks, eight_bit, groups_and_a_schedule,
    moving_average, averaged_weights, low_rank_adapter, frozen_and_thawed,
    checkpointed, checkpointed_reentrant, recurrent, custom_function, odd_gradients,
    evaluated, interrupted,
)  # fmt: skip
"""Loops whose every step is reported as its `Truth` says."""

ALL: tuple[Loop, ...] = (*TOLD, poisoned)

COMPILED: tuple[Loop, ...] = (compiled, compiled_in_place, compiled_step, compiled_optimizer)
