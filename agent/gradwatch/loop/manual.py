"""Loops without an optimizer: ``p.data -= rate * p.grad``, as tutorials and inner loops write it.

No hook says when a step ends. What can be seen is that the gradients of a finished backward are gone, or have
changed, when the next one begins: then what lay between was a step. Backward passes in a row that leave each
other's gradients alone are one step's micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class ManualSteps:
    """Remembers the gradients a backward left behind. Has ``param_groups``, so that it can be watched."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": [p for p in parameters if p.requires_grad]}]
        self._left: tuple[Tensor, int, int] | None = None

    @property
    def pending(self) -> bool:
        """Whether a backward ended whose step has not."""
        return self._left is not None

    def backward_ended(self) -> None:
        """Note what the backward left: one gradient stands for all."""
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                # Its address and not itself: holding on to it would keep its memory.
                self._left = (parameter, parameter.grad.data_ptr(), parameter.grad._version)  # noqa: SLF001
                return

    def stepped(self) -> bool:
        """Whether the gradients that were left are gone, replaced or changed; says so once."""
        if self._left is None or not self._is_changed(*self._left):
            return False
        self._left = None
        return True

    def _is_changed(self, parameter: Tensor, address: int, version: int) -> bool:
        grad = parameter.grad
        if grad is None or grad.data_ptr() != address or grad._version != version:  # noqa: SLF001
            return True
        # `.data.zero_()` leaves no trace but the zeros; on a device looking for them would synchronise.
        return grad.device.type == "cpu" and not bool(grad.any())
