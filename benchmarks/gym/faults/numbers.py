"""Where NaNs come from, and what float16 cannot hold."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gym.data import Batch
from gym.fault import Birthplace, Fault
from gym.training import Recipe, Training


class _OneBadStep(Fault):
    """Strong: the loop takes a step with the NaN. Weak: it passes over that one batch."""

    def cook(self, recipe: Recipe) -> Recipe:
        """See `Fault`."""
        return replace(recipe, guarded=not self.is_strong)

    @property
    def is_bad(self) -> bool:
        """Whether it is the step, and it is training: a policy also acts, and would be stopped by a NaN."""
        return self.now == self.step and torch.is_grad_enabled()


class _Divide(nn.Module):
    """Normalises by a scale; of features that are all zero it makes 0/0, which no tanh behind it can hide."""

    def __init__(self, fault: _OneBadStep) -> None:
        super().__init__()
        self._fault = [fault]  # in a list, so that it is no part of what is copied or saved

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.tensor(0.0 if self._fault[0].is_bad else 1.0)
        return x * scale / scale


class _DividedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: _OneBadStep) -> Tensor:
        ctx.fault = fault
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient / torch.full_like(gradient, 0.0 if ctx.fault.now == ctx.fault.step else 1.0), None


class _DivideInBackward(nn.Module):
    def __init__(self, fault: _OneBadStep) -> None:
        super().__init__()
        self._fault = [fault]

    def forward(self, x: Tensor) -> Tensor:
        divided: Tensor = _DividedGradient.apply(x, self._fault[0])  # type: ignore[no-untyped-call] # torch's
        return divided


class _Louder(nn.Module):
    """Multiplies with what float16 cannot hold, in as many steps as ``often`` says."""

    def __init__(self, fault: Fault, often: float) -> None:
        super().__init__()
        self._fault, self._often = [fault], often

    def forward(self, x: Tensor) -> Tensor:
        is_loud = self._fault[0].is_on and self._fault[0].chance.random() < self._often
        return x * 1e6 if is_loud and x.dtype == torch.float16 else x


def follow(training: Training, fault: Fault, extra: nn.Module, *, within: bool = False) -> str:
    """Put a module behind one of the layers, drawn by chance; return the path of both, as it is watched.

    ``within``: not behind one whose output the loss meets, where nobody can tell the two apart.
    """
    places = [
        (name, path)
        for name, model in training.models.items()
        for path in _layers(model)[: -1 if within else None]
        if not within or path not in {_layers(child, at)[-1] for at, child in _towers(model)}
    ]
    name, path = fault.chance.choice(places)
    model = training.models[name]
    parent, _, own = path.rpartition(".")
    setattr(model.get_submodule(parent), own, nn.Sequential(model.get_submodule(path), extra))
    return ".".join(part for part in (name, path.removeprefix("module.")) if part)


def _layers(model: nn.Module, prefix: str = "") -> list[str]:
    kinds = nn.Linear | nn.Conv2d | nn.LayerNorm
    return [path for path, layer in model.named_modules(prefix=prefix) if isinstance(layer, kinds)]


def _towers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Parts that may each have an output of their own, as those of an actor and a critic."""
    return [(name, child) for name, child in model.named_children() if isinstance(child, nn.Sequential)]


class DivisionInForward(_OneBadStep):
    """A layer's output, zero, is divided by zero."""

    def install(self, training: Training) -> None:
        """See `Fault`."""
        self.birthplace = Birthplace("forward", follow(training, self, _Divide(self)) + ".1")


class DivisionInLoss(_OneBadStep):
    """The loss is divided by the number of its terms, which is zero."""

    birthplace = Birthplace("loss")

    def loss(self, loss: Tensor) -> Tensor:
        """See `Fault`."""
        return loss / torch.zeros(()) if self.is_bad else loss


class DivisionInBackward(_OneBadStep):
    """An operation's own backward divides by zero; the forward pass is right."""

    def install(self, training: Training) -> None:
        """See `Fault`."""
        self.birthplace = Birthplace(
            "backward", follow(training, self, _DivideInBackward(self), within=True) + ".0"
        )


class CorruptBatch(_OneBadStep):
    """A NaN or an Inf among the inputs."""

    birthplace = Birthplace("input")

    def batch(self, batch: Batch) -> Batch:
        """See `Fault`."""
        if not self.is_bad:
            return batch
        inputs = batch[0].clone()
        flat = inputs.view(-1)
        flat[: len(flat) // 10 if self.is_strong else 1] = self.chance.choice((math.nan, math.inf))
        return (inputs, *batch[1:])


class HalfOverflow(Fault):
    """Float16 overflows in the forward pass of every step, or of most; the loss scale falls and falls."""

    def cook(self, recipe: Recipe) -> Recipe:
        """See `Fault`."""
        return replace(recipe, half=True)

    def install(self, training: Training) -> None:
        """See `Fault`."""
        follow(training, self, _Louder(self, 1.0 if self.is_strong else 0.6))
