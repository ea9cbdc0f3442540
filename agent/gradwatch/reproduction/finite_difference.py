"""A module's own backward against central differences, in float64, on a sample of elements.

The idea of ``torch.autograd.gradcheck``, but where that raises at the first difference, this reports all of the
sample, keeps going over non-finite values, and tells a wrong derivative from a kink.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from gradwatch.reproduction.random_state import random_state, restore
from gradwatch.tensors.nested import is_finite, mapped, tensors

# About eps^(1/3), where truncation and rounding of a central difference meet.
_STEP: Final = 6e-6
_RELATIVE: Final = 1e-3
_ABSOLUTE: Final = 1e-6

Outcome = Literal["ok", "wrong", "kink", "non-finite"]


@dataclass(frozen=True, slots=True)
class Row:
    """One element: what backward says, what the differences say, and what to make of it."""

    tensor: str
    element: tuple[int, ...]
    analytic: float
    numeric: float
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of one module. ``output_finite``: whether its output is finite in float64."""

    rows: list[Row]
    output_finite: bool


class _Case:
    """A module with its inputs in float64, and a scalar made of its outputs by fixed random weights."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], random: Any) -> None:
        self._module = copy.deepcopy(module).double()
        self._buffers = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        self._random = random
        self._args, self._kwargs = mapped(args, _doubled), mapped(kwargs, _doubled)
        inputs = [t for t in tensors((self._args, self._kwargs)) if t.is_floating_point()]
        self.variables: dict[str, Tensor] = {f"input {i}": t for i, t in enumerate(inputs)}
        for name, parameter in self._module.named_parameters():
            parameter.requires_grad_(True)
            self.variables[name] = parameter

    def outputs(self) -> Tensor:
        """All outputs, weighted, in one row; from the same generators and buffers each time."""
        restore(self._random)
        for name, buffer in self._module.named_buffers():
            buffer.data.copy_(self._buffers[name])
        arguments = mapped((self._args, self._kwargs), lambda tensor: tensor * 1)  # safe to change in place
        made = [t for t in tensors(self._module(*arguments[0], **arguments[1])) if t.is_floating_point()]
        row = torch.cat([t.reshape(-1) for t in made])
        generator = torch.Generator().manual_seed(0)
        weights = torch.rand(row.shape, generator=generator, dtype=torch.float64) + 0.5
        return row * weights.to(row.device)

    def gradients(self) -> dict[str, Tensor]:
        """What the module's own backward says about the sum of the finite outputs."""
        outputs = self.outputs()
        # Of the finite ones, as the differences are: beside a NaN the others can still be compared.
        whole = outputs[torch.isfinite(outputs)].sum()
        found = torch.autograd.grad(whole, list(self.variables.values()), allow_unused=True)
        return {
            name: torch.zeros_like(variable) if grad is None else grad
            for (name, variable), grad in zip(self.variables.items(), found, strict=True)
        }

    def difference(
        self, variable: Tensor, element: tuple[int, ...], middle: Tensor
    ) -> tuple[float, float, bool]:
        """The central difference over finite outputs, what rounding did to it, whether left and right agree."""
        values = variable.data
        before = float(values[element])
        step = _STEP * max(1.0, abs(before))
        with torch.no_grad():
            values[element] = before + step
            above = self.outputs()
            values[element] = before - step
            below = self.outputs()
            values[element] = before
        usable = torch.isfinite(above) & torch.isfinite(below) & torch.isfinite(middle)
        left, right = (float(d[usable].sum()) / step for d in (middle - below, above - middle))
        rounding = _rounding(middle, step)
        return (left + right) / 2, rounding, _close(left, right, rounding)


def compare(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], sample: int, seed: int = 0
) -> Comparison:
    """Check at most ``sample`` elements of each input and parameter, those with a non-finite gradient first.

    Raises:
        RuntimeError, TypeError: The module does not run in float64.
    """
    state = random_state()
    try:
        case = _Case(module, args, kwargs, state)
        analytic = case.gradients()
        with torch.no_grad():
            middle = case.outputs()
        rows = [
            row
            for name, variable in case.variables.items()
            for row in _rows(case, name, variable, analytic[name], middle, sample, seed)
        ]
        return Comparison(rows, is_finite(middle))
    finally:
        restore(state)


def _rows(
    case: _Case, name: str, variable: Tensor, analytic: Tensor, middle: Tensor, sample: int, seed: int
) -> Iterator[Row]:
    for place in _sample(analytic, sample, seed):
        element = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), analytic.shape))
        said = float(analytic[element])
        numeric, rounding, smooth = case.difference(variable, element, middle)
        outcome: Outcome = "ok"
        if not (math.isfinite(said) and math.isfinite(numeric)):
            outcome = "non-finite"
        elif not _close(said, numeric, rounding):
            outcome = "wrong" if smooth else "kink"
        yield Row(name, element, said, numeric, outcome)


def _sample(analytic: Tensor, sample: int, seed: int) -> list[int]:
    size = analytic.numel()
    bad = (~torch.isfinite(analytic.reshape(-1))).nonzero().reshape(-1).tolist()
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return list(dict.fromkeys([*bad[: (sample + 1) // 2], *order]))[:sample]


def _rounding(outputs: Tensor, step: float) -> float:
    """What rounding alone may do to a difference of these outputs over such a step."""
    size = float(outputs[torch.isfinite(outputs)].abs().sum())
    return _ABSOLUTE + 4 * torch.finfo(torch.float64).eps * size / step


def _close(left: float, right: float, absolute: float) -> bool:
    return math.isclose(left, right, rel_tol=_RELATIVE, abs_tol=absolute)


def _doubled(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.detach().clone()
    return tensor.detach().double().clone(memory_format=torch.contiguous_format).requires_grad_(True)
