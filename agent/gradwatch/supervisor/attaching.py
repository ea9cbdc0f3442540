"""``gradwatch run`` watches what trains in a process whose code says nothing of it.

When an optimizer is made, torch's ``backward`` and ``GradScaler.scale`` are wrapped until one of them is
called: by then the models are what they will be (compiled, wrapped, moved), and the first step has its loss.
What the optimizers train is watched from there on, as if the script had called ``gradwatch.watch`` itself. In a
loop without ``backward`` that begins after the first step. It is a hook of the optimizer itself that tells:
within one of the global hooks, no other can be added. A forward pass would be too early, and may be anybody's.

A script that calls ``gradwatch.watch`` is left to itself.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Final

from gradwatch.safety import shielded

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle


class Attachment:
    """Watches optimizers, and the models they train, once gradients are asked for.

    Args:
        is_watched: Whether somebody else watches in this process, or did.
    """

    def __init__(self, is_watched: Callable[[], bool]) -> None:
        self._is_watched = is_watched
        self._made: list[tuple[weakref.ref[Optimizer], RemovableHandle]] = []
        self._replaced: list[tuple[Any, str, Callable[..., Any], Callable[..., Any]]] = []
        self._watches = self._is_busy = False

    def optimizer_made(self, optimizer: Optimizer) -> None:
        """Have a look at what it trains, with the next gradients."""
        if self._is_busy or self._is_left_alone():  # the agent makes one too, to measure itself
            return
        import torch

        from gradwatch.loop.compiling import stay_untraced

        stay_untraced()
        self._made.append((weakref.ref(optimizer), optimizer.register_step_post_hook(self._after_step)))
        if not self._replaced:
            for owner, name in ((torch.amp.GradScaler, "scale"), (torch.autograd, "backward")):
                original = getattr(owner, name)
                wrapper = self._wrap(owner, name, original)
                self._replaced.append((owner, name, original, wrapper))
                setattr(owner, name, wrapper)

    def _wrap(self, owner: Any, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def first(*args: Any, **kwargs: Any) -> Any:
            if not any(wrapper is first for *_, wrapper in self._replaced):
                return original(*args, **kwargs)
            is_outermost = getattr(owner, name) is first
            for _, handle in self._made:
                handle.remove()
            self._begin()
            # A watch that has begun looks at this loss already, unless somebody's wrapper called us.
            return (getattr(owner, name) if is_outermost else original)(*args, **kwargs)

        return first

    def _after_step(self, *_: Any) -> None:
        # Stays on this optimizer, for that matter: torch is going through its hooks.
        if self._made:
            self._begin()

    def _begin(self) -> None:
        """Take the wrappers off, unless somebody wrapped them, and watch."""
        for owner, name, original, wrapper in self._replaced:
            if getattr(owner, name) is wrapper:
                setattr(owner, name, original)
        self._replaced.clear()
        made = [optimizer for reference, _ in self._made if (optimizer := reference()) is not None]
        self._made.clear()
        if made and not self._is_left_alone():
            self._watch(made)

    @shielded(None)
    def _watch(self, optimizers: list[Optimizer]) -> None:
        from gradwatch.supervisor.trained_models import are_apart, trained_models
        from gradwatch.watching import watch

        self._watches = self._is_busy = True
        # Of an optimizer and the one within it only one steps for both: which, is for the first step to tell.
        try:
            watch(trained_models(optimizers), optimizers if are_apart(optimizers) else None)
        finally:
            self._is_busy = False

    def _is_left_alone(self) -> bool:
        return not self._watches and self._is_watched()


# Only a watch imports what it runs on.
_attachment: Final = Attachment(lambda: "gradwatch.current_run" in sys.modules)
optimizer_made = _attachment.optimizer_made
