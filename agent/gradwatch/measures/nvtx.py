"""NVTX ranges on request, so that a profiler's timeline says which step and which layer a kernel belongs to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradwatch.gradients.norms import layer_name
from gradwatch.loop.module_hooks import ModuleHook, is_compiled, is_script
from gradwatch.safety import log


@dataclass(frozen=True, slots=True)
class Ranges:
    """Begins and ends a range of the calling thread."""

    push: Callable[[str], object]
    pop: Callable[[], object]


def nvtx_ranges() -> Ranges | None:
    """Torch's NVTX; None, with one warning, where torch was built without it."""
    try:
        # A CPU build has these functions, and they raise.
        torch.cuda.nvtx.range_push("gradwatch")  # type: ignore[no-untyped-call] # torch
        torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call] # torch
    except RuntimeError:
        log.warning("nvtx: this torch has no NVTX (a build without CUDA); no ranges are made")
        return None
    return Ranges(torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop)


class NvtxRanges:
    """A range for each step and, if asked, for each forward of a leaf module. Every one begun is ended.

    A leaf's range ends in a hook that also runs when its forward raises. What is begun is remembered by thread:
    a hook that ran without the other (a hook of somebody else raised in between) leaves nothing open.
    """

    def __init__(self, ranges: Ranges, layers: bool) -> None:
        self._ranges = ranges
        self._layers = layers
        self._open = threading.local()
        self._in_step = False
        self._handles: list[Any] = []

    def begin(self, step: int) -> None:
        """The first step begins."""
        self._ranges.push(f"step {step}")
        self._in_step = True

    def next_step(self, step: int) -> None:
        """A step ended, and ``step`` begins."""
        self._end_step()
        self.begin(step)

    def add_model(self, model: nn.Module, name: str) -> None:
        """Put ranges around the leaf modules of this model, if asked for; a compiled one has none left."""
        if not self._layers or is_compiled(model):
            return
        for path, module in model.named_modules():
            if next(module.children(), None) is None and not is_script(module):
                begin, end = self._around(module, layer_name(path) if path else name)
                self._handles += [
                    module.register_forward_pre_hook(ModuleHook(begin)),
                    module.register_forward_hook(ModuleHook(end), always_call=True),
                ]

    def remove(self) -> None:
        """Take the hooks off, and end the step's range."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._end_step()

    def _end_step(self) -> None:
        if self._in_step:
            self._in_step = False
            # Ctrl-C in the middle of a forward runs no hook of torch's.
            for _ in range(len(self._stack())):
                self._stack().pop()
                self._ranges.pop()
            self._ranges.pop()

    def _around(self, module: nn.Module, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        key = id(module)

        def begin(*_: object) -> None:
            if not torch.compiler.is_compiling():
                self._stack().append(key)
                self._ranges.push(name)

        def end(*_: object) -> None:
            stack = self._stack()
            if key in stack and not torch.compiler.is_compiling():
                while stack.pop() != key:
                    self._ranges.pop()
                self._ranges.pop()

        return begin, end

    def _stack(self) -> list[int]:
        stack: list[int] | None = getattr(self._open, "stack", None)
        if stack is None:
            stack = self._open.stack = []
        return stack
