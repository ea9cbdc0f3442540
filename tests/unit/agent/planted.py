"""Small networks of five kinds, and faults to plant in them whose birthplace is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_


class BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / torch.zeros_like(grad)


class Spot(nn.Module):
    """Where a fault is planted. ``kind``: the operations it always runs; ``bad``: whether they go wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = ""
        self.bad = False

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "divide":
            return x / torch.tensor(0.0 if self.bad else 2.0)
        if self.kind == "log":
            return torch.log(torch.sigmoid(x) * (0.0 if self.bad else 1.0))
        if self.kind == "exp":
            return torch.exp(x.abs() * 0.1 + (1e3 if self.bad else 0.0))
        if self.kind == "sqrt":
            return torch.sqrt(x.square() + (-1e6 if self.bad else 1.0))
        if self.kind == "one nan":
            first = torch.arange(x.numel()).reshape(x.shape) == 0
            return x.masked_fill(first & self.bad, math.nan)
        if self.kind == "branch" and self.bad:
            return x * math.nan
        if self.kind == "function" and self.bad:
            return BadBackward.apply(x)
        if self.kind == "hook" and self.bad and x.requires_grad:
            x.register_hook(lambda grad: grad * math.inf)
        return x


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.spot, self.fc2 = nn.Linear(width, 2 * width), Spot(), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).split(x.shape[-1], dim=-1)
        # An infinite mask is meant, and no fault.
        mask = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), 1)
        scores = (q @ k.transpose(-2, -1) / math.sqrt(x.shape[-1])).masked_fill(mask, -math.inf)
        x = x + self.proj(torch.softmax(scores, dim=-1) @ v)
        return x + self.fc2(self.spot(functional.gelu(self.fc1(self.norm2(x)))))


class CharGpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 8), nn.Parameter(torch.randn(6, 8) * 0.1)
        self.blocks = nn.ModuleList([Block(8) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11)
        self.spot = self.blocks[1].spot

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Spot())
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 3)
        self.spot = self.stem[3]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.spot, self.head = nn.LSTM(3, 5, 2, batch_first=True), Spot(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.spot(self.lstm(x)[0][:, -1]))


class Mlp(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.fc1, self.spot, self.fc2 = nn.Linear(inputs, 8), Spot(), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.leaky_relu(self.spot(self.fc1(x))))


class ActorCritic(nn.Module):
    """Two heads on two towers; forbidden actions have a logit of minus infinity, which is meant."""

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = Mlp(4, 5), Mlp(4, 1)
        self.spot = self.critic.spot

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.actor(x)
        forbidden = torch.tensor([True, False, False, False, False])
        return logits.masked_fill(forbidden, -math.inf), {"value": self.critic(x)}


LossFault = Callable[[Tensor], Tensor]

LOSS_FAULTS: dict[str, LossFault] = {
    "log(0) in the loss": lambda loss: loss + torch.log(loss * 0),
    "0/0 in the loss": lambda loss: loss / (loss * 0) * 0,
    "inf weight in the loss": lambda loss: loss * math.inf,
    # A finite loss, and a gradient of 0 * inf.
    "sqrt(0) in the loss": lambda loss: loss + torch.sqrt((loss - loss.detach()).clamp(min=0) * 0),
}


@dataclass
class Task:
    """A training loop over one network. ``batch`` makes inputs; ``loss`` judges an output of the model."""

    models: dict[str, nn.Module]
    optimizers: list[torch.optim.Optimizer]
    iterate: Callable[[Task, int], None]
    batch: Callable[[], list[Tensor]]
    input_fault: float | None = None
    target_fault: bool = False
    hide: bool = False
    loss_fault: LossFault | None = None
    clip: float | None = None
    scaler: Any = None
    accumulate: int = 1
    wrapped: nn.Module | None = None

    @property
    def model(self) -> nn.Module:
        return self.wrapped or next(iter(self.models.values()))

    def net(self, name: str | None) -> Any:
        return self.models[name] if name else next(iter(self.models.values()))

    def inputs(self) -> list[Tensor]:
        batch = self.batch()
        if self.input_fault is not None:
            batch[0].view(-1)[0] = self.input_fault
        return batch

    def backward(self, loss: Tensor) -> None:
        if self.loss_fault is not None:
            loss = self.loss_fault(loss)
        (self.scaler.scale(loss) if self.scaler is not None else loss).backward()

    def step(self, *optimizers: torch.optim.Optimizer) -> None:
        for optimizer in optimizers:
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
            if self.clip is not None:
                clip_grad_norm_(optimizer.param_groups[0]["params"], self.clip)
            if self.scaler is not None:
                self.scaler.step(optimizer)
            else:
                optimizer.step()
        if self.scaler is not None:
            self.scaler.update()


def supervised(
    model: nn.Module,
    batch: Callable[[], list[Tensor]],
    loss: Callable[[Any, Tensor], Tensor],
    rate: float = 0.01,
) -> Task:
    def iterate(task: Task, step: int) -> None:
        task.optimizers[0].zero_grad()
        for micro in range(task.accumulate):
            x, target = task.inputs()
            if task.target_fault:
                target = target * math.nan
            if task.hide and micro == 0:
                target = target.clone()
                target[0] = -100
            task.backward(loss(task.model(x), target) / task.accumulate)
        task.step(task.optimizers[0])

    return Task({"net": model}, [torch.optim.SGD(model.parameters(), lr=rate)], iterate, batch)


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, -2), target.flatten())


def gpt() -> Task:
    return supervised(CharGpt(), lambda: [torch.randint(11, (3, 6)), torch.randint(11, (3, 6))], cross_entropy)


def conv() -> Task:
    return supervised(ConvNet(), lambda: [torch.randn(6, 1, 8, 8), torch.randint(3, (6,))], cross_entropy)


def lstm() -> Task:
    return supervised(Lstm(), lambda: [torch.randn(4, 6, 3), torch.randint(3, (4,))], cross_entropy)


def regression() -> Task:
    return supervised(Mlp(4, 2), lambda: [torch.randn(6, 4), torch.randn(6, 2)], functional.mse_loss)


def actor_critic() -> Task:
    """One loss over both towers, stepped by two optimizers."""
    model = ActorCritic()

    def iterate(task: Task, step: int) -> None:
        for optimizer in task.optimizers:
            optimizer.zero_grad()
        for _ in range(task.accumulate):
            x, reward = task.inputs()
            logits, value = task.model(x)
            chosen = torch.log_softmax(logits, dim=-1)[:, 1:].mean(-1)
            advantage = reward - value["value"].squeeze(-1)
            task.backward(-(chosen * advantage.detach()).mean() + advantage.square().mean())
        task.step(*task.optimizers)

    optimizers = [torch.optim.SGD(part.parameters(), lr=0.01) for part in (model.actor, model.critic)]
    return Task({"net": model}, optimizers, iterate, lambda: [torch.randn(6, 4), torch.randn(6)])


def masked_actor() -> Task:
    """The same, and its spot on the way to the logits of which some are forbidden."""
    task = actor_critic()
    task.net(None).spot = task.net(None).actor.spot
    return task


def gan() -> Task:
    """The critic runs twice an iteration, and again for the generator's step."""
    generator, critic = Mlp(3, 4), Mlp(4, 1)

    def iterate(task: Task, step: int) -> None:
        steps_d, steps_g = task.optimizers
        steps_d.zero_grad()
        (real,) = task.inputs()
        fake = generator(torch.randn(6, 3))
        task.backward(
            functional.softplus(-critic(real)).mean() + functional.softplus(critic(fake.detach())).mean()
        )
        task.step(steps_d)
        steps_g.zero_grad()
        functional.softplus(-critic(fake)).mean().backward()
        task.step(steps_g)

    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in (critic, generator)]
    return Task({"critic": critic, "generator": generator}, optimizers, iterate, lambda: [torch.randn(6, 4)])


def half_precision() -> Task:
    """Everything in float16, whose numbers end at 65504."""
    model = Mlp(4, 2).half()
    return supervised(
        model, lambda: [torch.randn(6, 4).half(), torch.randn(6, 2).half()], functional.mse_loss, rate=1e-3
    )


@dataclass(frozen=True)
class Fault:
    """A fault and its truth.

    Attributes:
        plant: Prepares the task for the bad step; what it returns undoes that.
        layer: Path of the module, or name of the parameter; None where null is the truth.
        kind: What the spot in ``model`` runs from the start.
        steps_late: 1 for the second optimizer of an iteration, by when the first has ended the step.
    """

    name: str
    task: Callable[[], Task]
    plant: Callable[[Task], Callable[[], None] | None]
    born_in: str
    layer: str | None = None
    kind: str = ""
    model: str | None = None
    steps_late: int = 0

    def __str__(self) -> str:
        return f"{self.task.__name__}: {self.name}"

    def build(self) -> Task:
        task = self.task()
        task.net(self.model).spot.kind = self.kind
        return task


def setting(**values: Any) -> Callable[[Task], Callable[[], None]]:
    def plant(task: Task) -> Callable[[], None]:
        before = {name: getattr(task, name) for name in values}
        vars(task).update(values)
        return lambda: vars(task).update(before)

    return plant


def at_spot(model: str | None = None) -> Callable[[Task], Callable[[], None]]:
    def plant(task: Task) -> Callable[[], None]:
        spot = task.net(model).spot
        spot.bad = True
        return lambda: setattr(spot, "bad", False)

    return plant


def hidden(task: Task) -> Callable[[], None]:
    undo = [setting(hide=True)(task), at_spot()(task)]

    def both() -> None:
        for one in undo:
            one()

    return both


def parameter(name: str, value: float = math.nan, model: str | None = None) -> Callable[[Task], None]:
    def plant(task: Task) -> None:
        task.net(model).get_parameter(name).data.view(-1)[0] = value

    return plant


def every_element(name: str, value: float) -> Callable[[Task], None]:
    def plant(task: Task) -> None:
        task.net(None).get_parameter(name).data.fill_(value)

    return plant


def rate(value: float, optimizer: int = 0) -> Callable[[Task], Callable[[], None]]:
    def plant(task: Task) -> Callable[[], None]:
        group = task.optimizers[optimizer].param_groups[0]
        before, group["lr"] = group["lr"], value
        return lambda: group.update(lr=before)

    return plant


def faults() -> Iterator[Fault]:
    networks: Sequence[tuple[Callable[[], Task], str | None, str, str]] = (
        (gpt, None, "blocks.1.spot", "blocks.1.fc1"),
        (conv, None, "stem.3", "stem.1"),
        (lstm, None, "spot", "lstm"),
        (actor_critic, None, "critic.spot", "critic.fc1"),
        (masked_actor, None, "actor.spot", "actor.fc1"),
        (gan, "generator", "generator.spot", "generator.fc1"),
        (gan, "critic", "critic.spot", "critic.fc1"),
    )
    for task, model, spot, before in networks:
        for kind in ("divide", "log", "exp", "sqrt", "one nan"):
            yield Fault(f"{kind} in {spot}", task, at_spot(model), "forward", spot, kind, model)
        for kind in ("function", "hook"):
            late = 1 if task is actor_critic or model == "generator" else 0
            yield Fault(f"bad {kind} in {spot}", task, at_spot(model), "backward", before, kind, model, late)
    yield Fault("a branch never taken before", gpt, at_spot(), "forward", "blocks.1.spot", "branch")
    yield Fault("a branch never taken before", conv, at_spot(), "forward", "stem.3", "branch")
    for task in (conv, lstm, actor_critic, gan, regression):
        for value in (math.nan, math.inf):
            yield Fault(f"{value} in the input", task, setting(input_fault=value), "input")
    for task in (gpt, conv, lstm, actor_critic, gan):
        for name, fault in LOSS_FAULTS.items():
            phase = "backward" if name.startswith("sqrt") else "loss"
            yield Fault(name, task, setting(loss_fault=fault), phase)
    yield Fault("bad target", regression, setting(target_fault=True), "loss")
    yield Fault("output hidden by ignore_index", gpt, hidden, "forward", "blocks.1.spot", "one nan")
    yield Fault("output hidden by ignore_index", lstm, hidden, "forward", "spot", "one nan")
    yield Fault("output hidden by ignore_index", conv, hidden, "forward", "stem.3", "one nan")
    for task, model, name in (
        (gpt, None, "blocks.2.qkv.weight"),
        (conv, None, "body.1.bias"),
        (lstm, None, "lstm.weight_hh_l1"),
        (actor_critic, None, "critic.fc2.weight"),
        (gan, "critic", "fc1.weight"),
        (gan, "generator", "fc2.bias"),
    ):
        path = f"{model}.{name}" if model else name
        yield Fault(f"{path} poisoned by hand", task, parameter(name, model=model), "parameters", path)
    for task, optimizer in ((gpt, 0), (conv, 0), (lstm, 0), (actor_critic, 1), (gan, 0), (gan, 1)):
        for value in (math.inf, math.nan):
            name = f"rate {value} of optimizer {optimizer}"
            yield Fault(name, task, rate(value, optimizer), "optimizer", steps_late=optimizer)
    yield Fault(
        "weights that overflow float16", half_precision, every_element("fc1.weight", 6e4), "forward", "fc1"
    )
