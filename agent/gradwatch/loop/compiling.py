"""Keeps our code out of what ``torch.compile`` traces, and hears when it is used.

A compiled training step breaks its graph at ``backward()`` and at ``optimizer.step()`` anyway, and Dynamo then
looks at every function called from there, ours included: it would compile our bookkeeping, and break at each
clock it reads. Told to skip this package, it captures the graphs it would capture without us.
``torch.jit.script`` refuses what has hooks of ours.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

import gradwatch
from gradwatch import gradients, loop
from gradwatch.gradients import clipping
from gradwatch.loop import module_hooks
from gradwatch.safety import internal_error, shielded

_told = False


@shielded(None)
def stay_untraced() -> None:
    """Tell Dynamo, once a process. It is there already: making an optimizer loads it."""
    global _told
    rules: Any = sys.modules.get("torch._dynamo.trace_rules")
    if rules is not None and not _told:
        # What wraps a function, or hangs on a module, that may be inside of a graph has to be traced with it.
        traced = {gradients.__name__, clipping.__name__, loop.__name__, module_hooks.__name__}
        for package in (gradwatch, gradients, loop):
            for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
                if module.name not in traced:
                    rules.add(module.name)
        _told = True


class CompileWatch:
    """Calls who asked, if models were compiled before and each time one is while installed."""

    def __init__(self) -> None:
        self._used = False
        self._asking: list[Callable[[], None]] = []
        self._replaced: list[tuple[Any, str, Callable[..., Any], Callable[..., Any]]] = []

    def tell(self, heard: Callable[[], None]) -> None:
        """Call this, now if there was a use already."""
        self._asking.append(heard)
        if self._used:
            heard()

    def _hear(self) -> None:
        self._used = True
        for heard in self._asking:
            heard()

    def install(self) -> None:
        """Put the wrappers in place."""
        frames: Any = sys.modules.get("torch._dynamo.eval_frame")
        backends = getattr(frames, "cached_backends", {})
        if any(backend is not None for backend in backends.values()):  # None: told not to compile a function
            self._hear()
        # `torch.compile` may have been imported by its name: it calls this one.
        dynamo = sys.modules.get("torch._dynamo")
        called: list[tuple[Any, str]] = [(torch, "compile"), (torch.jit, "script")]
        if dynamo is not None:
            called.append((dynamo, "optimize"))
        for owner, name in called:
            original = getattr(owner, name)
            wrapper = self._wrap(original)
            self._replaced.append((owner, name, original, wrapper))
            setattr(owner, name, wrapper)

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def compile_(*args: Any, **kwargs: Any) -> Any:
            try:
                self._hear()
            except Exception as error:  # noqa: BLE001 - rule 2: nothing of ours may stop training
                internal_error(error, "torch.compile")
            return original(*args, **kwargs)

        return compile_

    def remove(self) -> None:
        """Put torch's functions back, unless somebody wrapped ours."""
        for owner, name, original, wrapper in self._replaced:
            if getattr(owner, name) is wrapper:
                setattr(owner, name, original)
        self._replaced.clear()
        self._asking.clear()
