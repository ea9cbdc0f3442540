"""One step under dense watch: every module's inputs, outputs and gradients are looked at as they come.

In forward, the module whose output is bad though its inputs are good is where a value was born; in backward,
the one that turns good gradients of its outputs into bad ones. A module that merely contains the guilty one
passes its fault on, so a child's fault clears the parent, unless a later child healed it (a softmax of masked
scores does).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from gradwatch.reproduction.capture import kind_of
from gradwatch.tensors.nested import is_fine, is_finite, mapped, tensors

Fault = Literal["NaN", "Inf", "-Inf"]
# Of several modules with a bad output, a NaN is worse than an infinity, and -inf may be a mask.
_WORST_FIRST: Final[tuple[Fault, ...]] = ("NaN", "Inf", "-Inf")


@dataclass(slots=True, eq=False)
class Visit:
    """One call of one module. ``None`` where nothing was there to look at.

    Attributes:
        output_fault: The worst that its outputs hold.
        born: Its outputs are bad and nothing before them was.
        gradients_in: Whether each gradient that backward brought to its outputs was finite.
        gradients_out: The same of those it handed on to its inputs.
        bad_parameters: Its own parameters whose gradient it made non-finite.
    """

    name: str
    kind: str
    parent: Visit | None
    inputs_finite: bool = True
    output_fault: Fault | None = None
    born: bool = False
    carrying: bool = False
    gradients_in: list[bool] = field(default_factory=list)
    gradients_out: list[bool] = field(default_factory=list)
    bad_parameters: list[str] = field(default_factory=list)

    def spoils_gradients(self) -> bool:
        """Whether good gradients came in, and bad ones went out or into its parameters."""
        came_good = bool(self.gradients_in) and all(self.gradients_in)
        return came_good and not (all(self.gradients_out) and not self.bad_parameters)


class DenseWatch:
    """Watches all modules of some models while it is entered."""

    def __init__(self, models: dict[str, nn.Module]) -> None:
        self.visits: list[Visit] = []
        self._models = models
        self._open: list[Visit] = []
        self._parameters: dict[int, str] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> DenseWatch:
        several = len(self._models) > 1
        for model_name, model in self._models.items():
            for path, module in model.named_modules():
                name = ".".join(part for part in (model_name if several else "", path) if part)
                self._handles += [
                    module.register_forward_pre_hook(self._before(name), with_kwargs=True),
                    module.register_forward_hook(self._after),
                ]
            for name, parameter in model.named_parameters():
                self._parameters[id(parameter)] = name
        return self

    def __exit__(self, *_ending: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, name: str) -> Any:
        def before(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            visit = Visit(name, kind_of(module), self._open[-1] if self._open else None)
            visit.inputs_finite = all(is_fine(tensor) for tensor in tensors((args, kwargs)))
            self.visits.append(visit)
            self._open.append(visit)
            seen: dict[int, Tensor] = {}

            def own(tensor: Tensor) -> Tensor:
                # A view of its own: a hook on the tensor would see what its other users send back, too.
                if not tensor.requires_grad or tensor.layout != torch.strided:
                    return tensor
                if id(tensor) not in seen:
                    view = tensor.view_as(tensor)
                    _hook(view, visit.gradients_out)
                    seen[id(tensor)] = view
                return seen[id(tensor)]

            return mapped(args, own), mapped(kwargs, own)

        return before

    def _after(self, module: nn.Module, _args: Any, output: Any) -> None:
        visit = self._open.pop()
        found = {fault for tensor in tensors(output) if (fault := fault_of(tensor)) is not None}
        visit.output_fault = next((fault for fault in _WORST_FIRST if fault in found), None)
        visit.born = visit.output_fault is not None and visit.inputs_finite and not visit.carrying
        if visit.parent is not None:
            # What goes in bad and comes out bad tells nothing: the parent's own code may have made it so.
            if visit.inputs_finite and visit.output_fault is not None:
                visit.parent.carrying = True
            elif not visit.inputs_finite and visit.output_fault is None:
                visit.parent.carrying = False
        for tensor in tensors(output):
            if tensor.requires_grad:
                _hook(tensor, visit.gradients_in)
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                self._watch_parameter(visit, parameter)

    def _watch_parameter(self, visit: Visit, parameter: Tensor) -> None:
        def came(grad: Tensor) -> None:
            if not is_finite(grad):
                visit.bad_parameters.append(self._parameters[id(parameter)])

        self._handles.append(parameter.register_hook(came))  # type: ignore[no-untyped-call] # torch

    def born_in_forward(self) -> Visit | None:
        """The module whose output went bad first, of those with the worst fault."""
        born = [visit for visit in self.visits if visit.born]
        return min(born, key=lambda visit: _WORST_FIRST.index(visit.output_fault or "-Inf"), default=None)

    def born_in_backward(self) -> Visit | None:
        """The innermost module that spoiled good gradients, the first that backward came to."""
        guilty = [visit for visit in self.visits if visit.spoils_gradients()]
        containers = {id(parent) for visit in guilty for parent in _parents(visit)}
        innermost = [visit for visit in guilty if id(visit) not in containers]
        return innermost[-1] if innermost else None


def _hook(tensor: Tensor, found: list[bool]) -> None:
    """Note whether each gradient that reaches the tensor is finite."""
    tensor.register_hook(lambda grad: found.append(is_finite(grad)))  # type: ignore[no-untyped-call] # torch


def _parents(visit: Visit) -> Sequence[Visit]:
    found = []
    parent = visit.parent
    while parent is not None:
        found.append(parent)
        parent = parent.parent
    return found


def fault_of(tensor: Tensor) -> Fault | None:
    """The worst that a tensor holds."""
    if is_finite(tensor):
        return None
    detached = tensor.detach()
    if bool(detached.isnan().any()):
        return "NaN"
    return "Inf" if detached.is_complex() or bool((detached == math.inf).any()) else "-Inf"
