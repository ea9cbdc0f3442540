"""Whether gradients are still those that somebody has looked at.

No hook tells that gradients were thrown away, replaced or changed by hand. A weak reference tells whether a
gradient is the same tensor, and its version counter whether anything was written into it since; neither reads a
value, so neither waits for a device.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class SeenGradients:
    """The gradients of these parameters as they are now; those that have none are left out."""

    __slots__ = ("_seen",)

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._seen = [
            (parameter, weakref.ref(grad), grad._version)  # noqa: SLF001 - no public name
            for parameter in parameters
            if (grad := parameter.grad) is not None
        ]

    @classmethod
    def one_of(cls, parameters: Iterable[Tensor]) -> SeenGradients:
        """The first that there is: it stands for all where looking at all would cost too much."""
        return cls(islice((parameter for parameter in parameters if parameter.grad is not None), 1))

    def are_replaced(self) -> bool:
        """Whether one of them is another tensor now. One that is gone is not: the step itself may free it."""
        return any((grad := p.grad) is not None and grad is not seen() for p, seen, _ in self._seen)

    def are_as_seen(self) -> bool:
        """Whether they are there, and nothing was written into them."""
        return all(
            (grad := p.grad) is not None and grad is seen() and grad._version == version  # noqa: SLF001
            for p, seen, version in self._seen
        )
