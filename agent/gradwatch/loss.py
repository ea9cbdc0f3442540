"""The loss, without being told: read where ``backward()`` is called, and what the GradScaler was given.

Both functions are replaced on their owners (a module and a class), so that early imports of ``torch`` and
scalers made before are covered, and put back on close.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.amp.grad_scaler import GradScaler

from gradwatch.gradients import is_distributed_tensor
from gradwatch.safety import internal_error


class LossSink(Protocol):
    """Who hears about losses and skipped steps, on the training thread."""

    def loss_seen(self, losses: list[torch.Tensor], roots: list[torch.Tensor]) -> None:
        """Backward is about to run from ``roots``; ``losses`` are the same scalars, unscaled."""

    def skipped_by_scaler(self, optimizer: object) -> None:
        """The scaler found a non-finite gradient and did not step this optimizer."""

    def steps_begun(self) -> int:
        """Optimizer steps that reached a hook so far."""


class LossCapture:
    """Wraps ``torch.autograd.backward`` and ``GradScaler.scale`` / ``.step`` while installed."""

    def __init__(self, sink: LossSink, capture_loss: bool) -> None:
        self._sink = sink
        self._capture_loss = capture_loss
        # id of the scaled loss -> (itself, what it was before). Weak: an entry must not keep the graph alive.
        self._scaled: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}
        self._replaced: list[tuple[Any, str, Callable[..., Any], Callable[..., Any]]] = []

    def install(self) -> None:
        """Put the wrappers in place."""
        original_backward: Callable[..., None] = torch.autograd.backward
        original_scale: Callable[..., Any] = GradScaler.scale
        original_step: Callable[..., Any] = GradScaler.step
        sink = self._sink

        def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
            # With a gradient given it is not a scalar loss, or it is a re-entrant checkpoint's own call.
            if grad_tensors is None and not torch.compiler.is_compiling():
                try:
                    sink.loss_seen(*self._losses(tensors))
                except Exception as error:  # noqa: BLE001 - rule 2: nothing of ours may stop training
                    internal_error(error, "backward")
            original_backward(tensors, grad_tensors, *args, **kwargs)

        def scale(scaler: GradScaler, outputs: Any) -> Any:
            scaled = original_scale(scaler, outputs)
            try:
                self._remember(outputs, scaled)
            except Exception as error:  # noqa: BLE001
                internal_error(error, "GradScaler.scale")
            return scaled

        def step(scaler: GradScaler, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            begun = sink.steps_begun()
            result = original_step(scaler, optimizer, *args, **kwargs)
            try:
                if sink.steps_begun() == begun:
                    sink.skipped_by_scaler(optimizer)
            except Exception as error:  # noqa: BLE001
                internal_error(error, "GradScaler.step")
            return result

        self._replaced = [
            (GradScaler, "scale", original_scale, scale),
            (GradScaler, "step", original_step, step),
        ]
        if self._capture_loss:
            self._replaced.append((torch.autograd, "backward", original_backward, backward))
        for owner, name, _, wrapper in self._replaced:
            setattr(owner, name, wrapper)

    def remove(self) -> None:
        """Put torch's functions back, unless somebody wrapped ours: then theirs keeps calling through."""
        for owner, name, original, wrapper in self._replaced:
            if getattr(owner, name) is wrapper:
                setattr(owner, name, original)
        self._replaced.clear()
        self._scaled.clear()

    def _losses(self, tensors: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        if isinstance(tensors, torch.Tensor):
            tensors = (tensors,)
        elif not isinstance(tensors, (list, tuple)):
            return [], []
        if not self._scaled:
            losses = [t for t in tensors if _is_loss(t)]
            return losses, losses
        losses, roots = [], []
        for tensor in tensors:
            known = self._scaled.pop(id(tensor), None)
            unscaled = known[1] if known and known[0]() is tensor else tensor
            if _is_loss(unscaled):
                losses.append(unscaled)
                roots.append(tensor)
        return losses, roots

    def _remember(self, outputs: Any, scaled: Any) -> None:
        if isinstance(outputs, torch.Tensor):
            if scaled is not outputs:
                if len(self._scaled) > 64:  # scaled but never backpropagated
                    self._scaled.clear()
                self._scaled[id(scaled)] = (weakref.ref(scaled), outputs.detach())
        elif isinstance(outputs, (list, tuple)):
            for before, after in zip(outputs, scaled, strict=True):
                self._remember(before, after)


def _is_loss(tensor: torch.Tensor) -> bool:
    # Reading a distributed tensor may start a collective on this rank alone, and hang it.
    return tensor.numel() == 1 and (type(tensor) is torch.Tensor or not is_distributed_tensor(tensor))
