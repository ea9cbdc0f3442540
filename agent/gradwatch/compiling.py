"""Keeps our code out of what ``torch.compile`` traces, and hears when it is used.

A compiled training step breaks its graph at ``backward()`` and at ``optimizer.step()`` anyway, and Dynamo then
looks at every function called from there, ours included: it would compile our bookkeeping, and break at each
clock it reads. Told to skip this package, it captures the graphs it would capture without us.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from gradwatch.safety import internal_error, shielded

_told = False


@shielded(None)
def stay_untraced() -> None:
    """Tell Dynamo, once a process. It is there already: making an optimizer loads it."""
    global _told
    rules: Any = sys.modules.get("torch._dynamo.trace_rules")
    if rules is not None and not _told:
        rules.add("gradwatch")
        _told = True


class CompileWatch:
    """Calls who asked, if ``torch.compile`` was used before and each time it is used while installed."""

    def __init__(self) -> None:
        self._used = False
        self._asking: list[Callable[[], None]] = []
        self._original: Callable[..., Any] | None = None
        self._wrapper: Callable[..., Any] | None = None

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
        """Put the wrapper in place."""
        frames: Any = sys.modules.get("torch._dynamo.eval_frame")
        backends = getattr(frames, "cached_backends", {})
        if any(backend is not None for backend in backends.values()):  # None: told not to compile a function
            self._hear()
        original: Callable[..., Any] = torch.compile

        @wraps(original)
        def compile_(*args: Any, **kwargs: Any) -> Any:
            try:
                self._hear()
            except Exception as error:  # noqa: BLE001 - rule 2: nothing of ours may stop training
                internal_error(error, "torch.compile")
            return original(*args, **kwargs)

        self._original, self._wrapper = original, compile_
        torch.compile = compile_

    def remove(self) -> None:
        """Put torch's function back, unless somebody wrapped ours."""
        if self._original is not None and torch.compile is self._wrapper:
            torch.compile = self._original
        self._original = None
        self._asking.clear()
