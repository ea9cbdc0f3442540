"""How long the training thread waits for data: in ``DataLoader`` iterators, and where the user says so.

The iterators' ``__next__`` is replaced on their class while installed, so loaders made before are covered. Put
back on close; a forked worker takes it off with everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from time import perf_counter_ns
from typing import Any, Protocol

import torch
from torch.utils.data import dataloader

# torch has no public name for what `iter(DataLoader(...))` returns; both of its kinds derive from this one.
_ITERATOR: Any = dataloader._BaseDataLoaderIter  # noqa: SLF001


class Pauses(Protocol):
    """Who must know, on a step that is timed, that the time of a wait is not its own."""

    observed: bool

    def pause(self) -> None:
        """A wait begins."""

    def resume(self) -> None:
        """It is over."""


class DataWait:
    """Sums up the waits of the step in progress.

    Waits of other threads (a prefetcher's) are not training's, and neither are those with gradients disabled,
    nor any while ``suspended``: that is evaluation. A loader inside a loader is counted once.

    Attributes:
        thread: The one that trains.
        seen: Whether any data was waited for so far; before, a wait of zero would be a guess.
        suspended: Whether the loop evaluates.
        waiting: Whether a wait began that is not over.
    """

    def __init__(self, pauses: Pauses) -> None:
        self.seen = False
        self.suspended = False
        self._pauses = pauses
        self.thread = get_ident()
        self.waiting = False
        self._waited = 0
        self._since = 0
        self._replaced: tuple[Callable[[Any], Any], Callable[[Any], Any]] | None = None

    def install(self) -> None:
        """Put the wrapper in place."""
        original: Callable[[Any], Any] = _ITERATOR.__next__

        def __next__(iterator: Any) -> Any:  # noqa: N807 - it replaces one, and tracebacks should say so
            if not self._begins():
                return original(iterator)
            try:
                return original(iterator)
            finally:
                self._ends()

        self._replaced = (original, __next__)
        _ITERATOR.__next__ = __next__

    def remove(self) -> None:
        """Put torch's method back, unless somebody wrapped ours: then it only calls through."""
        if self._replaced is not None and _ITERATOR.__next__ is self._replaced[1]:
            _ITERATOR.__next__ = self._replaced[0]
        self._replaced = None

    def suspend(self) -> None:
        """The loop evaluates from now on, if need be in the middle of a wait, of which that is no part."""
        if self.waiting:
            self._waited += perf_counter_ns() - self._since
        self.suspended = True

    def resume(self) -> None:
        """It trains, or waits, again."""
        self.suspended = False
        self._since = perf_counter_ns()

    @contextmanager
    def marked(self) -> Iterator[None]:
        """Count what happens inside as waiting for data."""
        if not self._begins():
            yield
            return
        try:
            yield
        finally:
            self._ends()

    def take(self) -> int:
        """Nanoseconds waited since the last call."""
        waited, self._waited = self._waited, 0
        return waited

    def _begins(self) -> bool:
        if (
            self.waiting
            or self._replaced is None
            or self.suspended
            or get_ident() != self.thread
            or not torch.is_grad_enabled()
        ):
            return False
        self.waiting = self.seen = True
        if self._pauses.observed:
            self._pauses.pause()
        self._since = perf_counter_ns()
        return True

    def _ends(self) -> None:
        if not self.suspended:
            self._waited += perf_counter_ns() - self._since
        self.waiting = False
        if self._pauses.observed:
            self._pauses.resume()
