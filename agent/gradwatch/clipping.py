"""Gradients as they were before clipping.

One NaN element, and ``clip_grad_norm_`` makes every gradient NaN; one Inf, and it makes all others zero: a
read after it says nothing about where. torch computes the total norm in one helper, which runs before any
gradient is touched; it is wrapped, and its result handed through untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import torch
from torch.nn.utils import clip_grad

from gradwatch.safety import internal_error

# torch.nn.utils hands the helper out under a second name. Before torch 2.6 neither exists, and gradients are
# read in the optimizer's hook.
_PLACES: Final[tuple[tuple[Any, str], ...]] = (
    (clip_grad, "_get_total_norm"),
    (torch.nn.utils, "get_total_norm"),
)


class ClipSink(Protocol):
    """Who hears, on the training thread, that gradients are about to be clipped."""

    def before_clipping(self, grads: Sequence[torch.Tensor], total_norm: torch.Tensor | None) -> None:
        """``total_norm`` is torch's L2 norm of these gradients, None for another norm or when torch raised."""


class ClipCapture:
    """Wraps torch's total-norm helper while installed."""

    def __init__(self, sink: ClipSink) -> None:
        self._sink = sink
        self._replaced: list[tuple[Any, str, Callable[..., Any], Callable[..., Any]]] = []

    def install(self) -> None:
        """Put the wrapper in place."""
        for owner, name in _PLACES:
            original = getattr(owner, name, None)
            if original is not None:
                wrapper = self._wrap(original)
                self._replaced.append((owner, name, original, wrapper))
                setattr(owner, name, wrapper)

    def remove(self) -> None:
        """Put torch's function back, unless somebody wrapped ours."""
        for owner, name, original, wrapper in self._replaced:
            if getattr(owner, name) is wrapper:
                setattr(owner, name, original)
        self._replaced.clear()

    def _wrap(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        sink = self._sink

        def total_norm(
            tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
        ) -> torch.Tensor:
            if torch.compiler.is_compiling():
                return original(tensors, norm_type, error_if_nonfinite, foreach)
            grads = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
            total: torch.Tensor | None = None
            try:
                total = original(grads, norm_type, error_if_nonfinite, foreach)
                return total
            finally:
                try:
                    sink.before_clipping(grads, total if norm_type == 2.0 else None)
                except Exception as error:  # noqa: BLE001 - rule 2: nothing of ours may stop training
                    internal_error(error, "clip_grad_norm_")

        return total_norm
