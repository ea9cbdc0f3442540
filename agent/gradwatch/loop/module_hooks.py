"""Hooks on the user's modules that ``pickle``, ``copy.deepcopy`` and ``torch.save`` can meet without harm."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from gradwatch.safety import internal_error


def is_compiled(module: nn.Module) -> bool:
    """Whether hooks inside this module would be compiled with it, and break its graph, or are not possible."""
    return (
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or is_script(module)
    )


def is_script(module: nn.Module) -> bool:
    """Whether this is TorchScript's, which refuses hooks."""
    return isinstance(module, torch.jit.ScriptModule)


class ModuleHook:
    """Calls a function that only looks on: its result is not returned, and its errors reach nobody.

    A copied or pickled module carries, in its place, a call of the standard library that does nothing, so that
    it can be loaded where gradwatch is not installed. Where a module is compiled or exported, this call is
    traced with it, to nothing: it is the one part of our hooks that Dynamo may look into (``compiling``).
    """

    __slots__ = ("_look",)

    def __init__(self, look: Callable[..., object]) -> None:
        self._look = look

    def __call__(self, *args: Any) -> None:
        """Look on."""
        if torch.compiler.is_compiling():
            return
        try:
            self._look(*args)
        except Exception as error:  # noqa: BLE001 - rule 2: nothing of ours may stop training
            internal_error(error, "module hook")

    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (nullcontext(), "__exit__"))
