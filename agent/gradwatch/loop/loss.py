"""The loss, without being told: read where ``backward()`` is called, and what the GradScaler was given.

Both functions are replaced on their owners (a module and a class), so that early imports of ``torch`` and
scalers made before are covered, and put back on close.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from threading import get_ident
from typing import Any, Final, Protocol

import torch
from torch.amp.grad_scaler import GradScaler
from torch.autograd.graph import Node

from gradwatch.loop.step_in_progress import StepInProgress
from gradwatch.measures.phases import PhaseTimer
from gradwatch.safety import internal_error
from gradwatch.tensors.sharding import is_distributed_tensor

# Number of what accumulates into a leaf.
_LEAF: Final = 2**64 - 1
# Operations between the scaling of a loss and ``backward()`` that are looked through.
_MOST_NODES: Final = 64


class LossSink(Protocol):
    """Who hears about losses and skipped steps, on the training thread."""

    @property
    def progress(self) -> StepInProgress:
        """Where a loss on the host that is nothing special is written down at once.

        Calling somebody would cost a step of 1 ms more than reading the loss does.
        """

    def loss_seen(self, losses: list[torch.Tensor], roots: list[torch.Tensor]) -> None:
        """Backward is about to run from ``roots``; ``losses`` are the same scalars, unscaled."""

    @property
    def follows_backward(self) -> bool:
        """Whether the next two are to be called."""

    def backward_begins(self, tensors: Any) -> None:
        """Backward is about to run from these tensors as they are; called after ``loss_seen``."""

    def backward_ended(self) -> None:
        """Backward ran to its end."""

    def unscaled(self, optimizer: object, inverse: torch.Tensor) -> None:
        """The scaler multiplied this optimizer's gradients with the inverse of its scale, or with one."""

    def scaling(self, optimizer: object, scale: torch.Tensor) -> None:
        """The scaler is about to step this optimizer."""

    def skipped_by_scaler(self, optimizer: object) -> None:
        """The scaler found a non-finite gradient and did not step this optimizer."""

    def last_end(self, optimizer: object) -> int | None:
        """When this optimizer's last step ended; None when it is not watched."""


class LossCapture:
    """Wraps ``torch.autograd.backward`` and a ``GradScaler``'s scaling, unscaling and step while installed."""

    def __init__(self, sink: LossSink, capture_loss: bool, phases: PhaseTimer) -> None:
        self._sink = sink
        self._phases = phases
        self._capture_loss = capture_loss
        # autograd's number of the scaling -> (its result, what it was before). Weak: an entry must not keep the
        # graph alive.
        self._scaled: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}
        self._replaced: list[tuple[Any, str, Callable[..., Any], Callable[..., Any]]] = []

    def install(self) -> None:
        """Put the wrappers in place."""
        self._replace(GradScaler, "scale", self._scale)
        self._replace(GradScaler, "step", self._step)
        # Subclasses have an ``unscale_`` of their own; all of them call this.
        self._replace(GradScaler, "_unscale_grads_", self._unscale)
        if self._capture_loss:
            self._replace(torch.autograd, "backward", self.wrap_backward)

    def _replace(self, owner: Any, name: str, wrap: Callable[[Any], Callable[..., Any]]) -> None:
        original = getattr(owner, name)
        wrapper = wrap(original)
        self._replaced.append((owner, name, original, wrapper))
        setattr(owner, name, wrapper)

    def wrap_backward(self, original: Callable[..., None]) -> Callable[..., None]:
        """Torch's ``backward`` with a look at the loss before it."""
        sink, scaled, phases = self._sink, self._scaled, self._phases
        progress, is_compiling, tensor = sink.progress, torch.compiler.is_dynamo_compiling, torch.Tensor

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
            heard = False  # a local: where the step is compiled, there is nothing to guard and recompile for
            thread = progress.thread
            if grad_tensors is None and not is_compiling() and (thread is None or thread == get_ident()):
                try:
                    if type(tensors) is tensor and tensors.is_cpu and not scaled:
                        value = tensors.item()
                        if type(value) is not float:
                            pass
                        elif progress.loss is None and value - value == 0.0 and not progress.busy:
                            progress.loss = value
                            progress.passes += 1
                        else:
                            sink.loss_seen([tensors], [tensors])
                    else:
                        sink.loss_seen(*self._losses(tensors))
                    heard = phases.observed or sink.follows_backward
                    if heard:
                        self._before(tensors)
                except RuntimeError:
                    pass  # several elements: torch is about to say so itself
                except Exception as error:  # noqa: BLE001 - rule 2: nothing of ours may stop training
                    internal_error(error, "backward")
            original(tensors, grad_tensors, retain_graph, create_graph, grad_variables, inputs)
            if heard:
                try:
                    self._after()
                except Exception as error:  # noqa: BLE001
                    internal_error(error, "after backward")

        return backward

    def _before(self, tensors: Any) -> None:
        if self._sink.follows_backward:
            self._sink.backward_begins(tensors)
        if self._phases.observed:
            self._phases.before_backward()

    def _after(self) -> None:
        if self._phases.observed:
            self._phases.after_backward()
        if self._sink.follows_backward:
            self._sink.backward_ended()

    def _scale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def scale(scaler: GradScaler, outputs: Any) -> Any:
            scaled = original(scaler, outputs)
            try:
                self._remember(outputs, scaled)
            except Exception as error:  # noqa: BLE001
                internal_error(error, "GradScaler.scale")
            return scaled

        return scale

    def _unscale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def unscale(scaler: GradScaler, optimizer: Any, inverse: Any, *args: Any, **kwargs: Any) -> Any:
            found = original(scaler, optimizer, inverse, *args, **kwargs)
            try:
                self._sink.unscaled(optimizer, inverse)
            except Exception as error:  # noqa: BLE001
                internal_error(error, "GradScaler.unscale_")
            return found

        return unscale

    def _step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        sink = self._sink

        def step(scaler: GradScaler, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            before: int | None = None
            try:
                self._announce(scaler, optimizer)
                before = sink.last_end(optimizer)
            except Exception as error:  # noqa: BLE001
                internal_error(error, "GradScaler.step")
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

    def _announce(self, scaler: GradScaler, optimizer: Any) -> None:
        if not scaler.is_enabled():
            return
        scale = scaler._scale  # noqa: SLF001
        if scale is not None:
            self._sink.scaling(optimizer, scale)

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
            unscaled = self._unscaled(tensor)
            if unscaled is not None and _is_loss(unscaled):
                losses.append(unscaled)
                roots.append(tensor)
        return losses, roots

    def _unscaled(self, root: torch.Tensor) -> torch.Tensor | None:
        """The loss before scaling; None where this was made of scaled losses, and nobody knows what of them."""
        node = root.grad_fn
        if node is None:
            return root
        number = node._sequence_nr()  # noqa: SLF001 - no other name that does not keep the graph alive
        known = self._scaled.get(number)
        if known is not None and known[0]() is root:
            del self._scaled[number]
            return known[1]
        derived = self._scaled_behind(node)
        for number in derived:
            if self._scaled[number][0]() is None:  # never a root itself
                del self._scaled[number]
        return None if derived else root

    def _scaled_behind(self, root: Node) -> set[int]:
        """Numbers of the scalings this was computed from."""
        first = min(self._scaled, default=_LEAF)
        found: set[int] = set()
        seen: set[Node] = set()
        waiting = [root]
        while waiting and len(seen) < _MOST_NODES:
            node = waiting.pop()
            number = node._sequence_nr()  # noqa: SLF001
            # What was computed earlier, and leaves, cannot be made of a scaled loss.
            if number < first or number == _LEAF or node in seen:
                continue
            seen.add(node)
            if number in self._scaled:
                found.add(number)
            else:
                waiting += [below for below, _ in node.next_functions if below is not None]
        return found

    def _remember(self, outputs: Any, scaled: Any) -> None:
        if isinstance(outputs, torch.Tensor):
            if scaled is not outputs and scaled.grad_fn is not None:
                if len(self._scaled) > 64:  # scaled but never backpropagated
                    self._scaled.clear()
                number = scaled.grad_fn._sequence_nr()  # noqa: SLF001
                self._scaled[number] = (weakref.ref(scaled), outputs.detach())
        elif isinstance(outputs, (list, tuple)):
            for before, after in zip(outputs, scaled, strict=True):
                self._remember(before, after)


def _is_loss(tensor: torch.Tensor) -> bool:
    # Reading a distributed tensor may start a collective on this rank alone, and hang it.
    return tensor.numel() == 1 and (type(tensor) is torch.Tensor or not is_distributed_tensor(tensor))
