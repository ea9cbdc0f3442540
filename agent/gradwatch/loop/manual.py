"""Loops without an optimizer: ``p.data -= rate * p.grad``, as tutorials and inner loops write it.

No hook says when a step ends. What can be seen is that the gradients of a finished backward are gone, or have
changed, when the next one begins: then what lay between was a step. Backward passes in a row that leave each
other's gradients alone are one step's micro-batches. Before the first step an optimizer may still come, and all
be a warm-up: so the first step changes a parameter, as far as looking at it does not synchronise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


class ManualSteps:
    """Remembers the gradients a backward left behind. Has ``param_groups``, so that it can be watched."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": [p for p in parameters if p.requires_grad]}]
        self._left: tuple[Tensor, int, int] | None = None
        self._has_stepped = False
        # Where the first gradient is largest, and the parameter's value there; before the first step only.
        self._place: tuple[Tensor, int, object] | None = None

    @property
    def pending(self) -> bool:
        """Whether a backward ended whose step has not, though at the end of a run it must have."""
        return self._left is not None and not self._is_warm_up()

    def backward_ended(self) -> None:
        """Note what the backward left: one gradient stands for all."""
        for parameter in self.param_groups[0]["params"]:
            grad = parameter.grad
            if grad is not None:
                # Its address and not itself: holding on to it would keep its memory.
                self._left = (parameter, grad.data_ptr(), grad._version)  # noqa: SLF001
                if not self._has_stepped and type(grad) is torch.Tensor:
                    self._place = _largest(parameter, grad)
                return

    def stepped(self) -> bool | None:
        """Whether what was left became a step, or was thrown away; says so once. None while it is neither."""
        if self._left is None or not self._is_changed(*self._left):
            return None
        self._left = None
        if self._is_warm_up():
            return False
        self._has_stepped, self._place = True, None
        return True

    def _is_warm_up(self) -> bool:
        if self._place is None:
            return False
        parameter, place, before = self._place
        return _value(parameter, place) == before

    def _is_changed(self, parameter: Tensor, address: int, version: int) -> bool:
        grad = parameter.grad
        if grad is None or grad.data_ptr() != address or grad._version != version:  # noqa: SLF001
            return True
        # `.data.zero_()` leaves no trace but the zeros; on a device looking for them would synchronise.
        return grad.device.type == "cpu" and not bool(grad.any())


def _largest(parameter: Tensor, grad: Tensor) -> tuple[Tensor, int, object] | None:
    """A place that no step leaves as it is; None where there is none or it is on a device."""
    if not (grad.is_cpu and grad.layout is torch.strided and grad.numel()):
        return None
    place = int(grad.detach().abs().argmax())
    return (parameter, place, _value(parameter, place)) if _value(grad, place) else None


def _value(tensor: Tensor, place: int) -> object:
    return tensor.detach().reshape(-1)[place].item()
