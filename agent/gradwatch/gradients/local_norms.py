"""Each rank's own gradients under data parallelism, before they are averaged: which rank is guilty.

DistributedDataParallel copies gradients into buckets, averages those, and copies them back in a callback at the
end of backward. A callback that is queued earlier in the same backward sees all gradients of this rank, in one
read. With ``gradient_as_bucket_view`` gradients are averaged in place, and there is nothing left to see.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.safety import internal_error

if TYPE_CHECKING:
    from torch import Tensor, nn


class LocalNorms:
    """Knows the data-parallel modules, and calls ``read`` at the right moment of an observed backward.

    ``read`` is given the ``id`` of every parameter whose gradient is about to be averaged.
    """

    def __init__(self, read: Callable[[set[int]], None]) -> None:
        self._read = read
        self._modules: list[weakref.ref[Any]] = []

    def __bool__(self) -> bool:
        return bool(self._modules)

    def add(self, model: nn.Module) -> None:
        """Look for data-parallel modules in (or around) this one."""
        parallel: Any = sys.modules.get("torch.nn.parallel.distributed")
        if parallel is not None:
            self._modules += [
                weakref.ref(module)
                for module in model.modules()
                if isinstance(module, parallel.DistributedDataParallel) and not module.gradient_as_bucket_view
            ]

    def clear(self) -> None:
        """Forget all modules."""
        self._modules.clear()

    def before_backward(self, losses: Any) -> None:
        """Backward is about to run from ``losses``: read in it, if it is one that averages."""
        modules = [module for reference in self._modules if (module := reference()) is not None]
        averaging = [module for module in modules if module.require_backward_grad_sync]
        several = (losses,) if isinstance(losses, torch.Tensor) else losses
        loss = next((each for each in several if isinstance(each, torch.Tensor) and each.requires_grad), None)
        if not averaging or loss is None:
            return

        def read() -> None:
            try:
                self._read({id(parameter) for module in averaging for parameter in module.parameters()})
            except Exception as error:  # noqa: BLE001 - rule 2: nothing of ours may stop training
                internal_error(error, "local gradient norms")

        def queue(_gradient: Tensor) -> None:
            handle.remove()
            # Callbacks run in the order they were queued: the loss's hook is the first of all.
            torch.autograd.Variable._execution_engine.queue_callback(read)  # noqa: SLF001

        handle = loss.register_hook(queue)  # type: ignore[no-untyped-call] # torch
