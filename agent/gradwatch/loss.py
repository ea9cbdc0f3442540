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
from gradwatch.phases import PhaseTimer
from gradwatch.safety import internal_error


class LossSink(Protocol):
    """Who hears about losses and skipped steps, on the training thread."""

    def host_loss(self, value: float) -> None:
        """Backward is about to run from one scalar on the host, already unscaled."""

    def loss_seen(self, losses: list[torch.Tensor]) -> None:
        """Backward is about to run from these scalars, already unscaled."""

    def skipped_by_scaler(self, optimizer: object) -> None:
        """The scaler found a non-finite gradient and did not step this optimizer."""

    def last_end(self, optimizer: object) -> int | None:
        """When this optimizer's last step ended; None when it is not watched."""


class LossCapture:
    """Wraps ``torch.autograd.backward`` and ``GradScaler.scale`` / ``.step`` while installed."""

    def __init__(self, sink: LossSink, capture_loss: bool, phases: PhaseTimer) -> None:
        self._sink = sink
        self._phases = phases
        self._capture_loss = capture_loss
        # id of the scaled loss -> (itself, what it was before). Weak: an entry must not keep the graph alive.
        self._scaled: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}
        self._replaced: list[tuple[Any, str, Callable[..., Any], Callable[..., Any]]] = []

    def install(self) -> None:
        """Put the wrappers in place."""
        self._replaced = [
            (GradScaler, "scale", GradScaler.scale, self._wrap_scale(GradScaler.scale)),
            (GradScaler, "step", GradScaler.step, self._wrap_step(GradScaler.step)),
        ]
        if self._capture_loss:
            original: Callable[..., None] = torch.autograd.backward
            self._replaced.append((torch.autograd, "backward", original, self.wrap_backward(original)))
        for owner, name, _, wrapper in self._replaced:
            setattr(owner, name, wrapper)

    def wrap_backward(self, original: Callable[..., None]) -> Callable[..., None]:
        """Torch's ``backward`` with a look at the loss before it."""
        sink, scaled, phases = self._sink, self._scaled, self._phases
        host_loss, is_compiling, tensor = sink.host_loss, torch.compiler.is_compiling, torch.Tensor

        # torch's own parameters, spelled out: packing and unpacking them costs as much as reading the loss.
        def backward(
            tensors: Any,
            grad_tensors: Any = None,
            retain_graph: bool | None = None,
            create_graph: bool = False,
            grad_variables: Any = None,
            inputs: Any = None,
        ) -> None:
            # With a gradient given it is not a scalar loss, or it is a re-entrant checkpoint's own call.
            timed = False  # a local: where the step is compiled, there is nothing to guard and recompile for
            if grad_tensors is None and not is_compiling():
                try:
                    if type(tensors) is tensor and tensors.is_cpu and not scaled:
                        value = tensors.item()
                        if type(value) is float:
                            host_loss(value)
                    else:
                        sink.loss_seen(self._losses(tensors))
                    if phases.observed:
                        phases.before_backward()
                        timed = True
                except RuntimeError:
                    pass  # several elements: torch is about to say so itself
                except Exception as error:  # noqa: BLE001 - rule 2: nothing of ours may stop training
                    internal_error(error, "backward")
            original(tensors, grad_tensors, retain_graph, create_graph, grad_variables, inputs)
            if timed:
                try:
                    phases.after_backward()
                except Exception as error:  # noqa: BLE001
                    internal_error(error, "backward")

        return backward

    def _wrap_scale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def scale(scaler: GradScaler, outputs: Any) -> Any:
            scaled = original(scaler, outputs)
            try:
                self._remember(outputs, scaled)
            except Exception as error:  # noqa: BLE001
                internal_error(error, "GradScaler.scale")
            return scaled

        return scale

    def _wrap_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        sink = self._sink

        def step(scaler: GradScaler, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            before = sink.last_end(optimizer)
            result = original(scaler, optimizer, *args, **kwargs)
            try:
                if sink.last_end(optimizer) == before:
                    sink.skipped_by_scaler(optimizer)
            except Exception as error:  # noqa: BLE001
                internal_error(error, "GradScaler.step")
            return result

        return step

    def remove(self) -> None:
        """Put torch's functions back, unless somebody wrapped ours: then theirs keeps calling through."""
        for owner, name, original, wrapper in self._replaced:
            if getattr(owner, name) is wrapper:
                setattr(owner, name, original)
        self._replaced.clear()
        self._scaled.clear()

    def _losses(self, tensors: Any) -> list[torch.Tensor]:
        if isinstance(tensors, torch.Tensor):
            tensors = (tensors,)
        elif not isinstance(tensors, (list, tuple)):
            return []
        if not self._scaled:
            return [t for t in tensors if _is_loss(t)]
        losses = []
        for tensor in tensors:
            known = self._scaled.pop(id(tensor), None)
            unscaled = known[1] if known and known[0]() is tensor else tensor
            if _is_loss(unscaled):
                losses.append(unscaled)
        return losses

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
