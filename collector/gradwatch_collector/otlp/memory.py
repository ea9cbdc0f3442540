"""The memory that requests may take together, from their first byte until they are answered."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self

from gradwatch_collector.otlp.errors import UnavailableError

DEFAULT_MEMORY: Final = 512 << 20
# What the collector takes that serves no request, and what it takes to decode and store a byte of a request.
_RESIDENT: Final = 192 << 20
_PER_BYTE: Final = 4
_LEAST: Final = 32 << 20
# A request that holds no more is small. Those that hold more leave an eighth of the memory to the small ones,
# so that uploads that take their time, or never end, keep no ordinary sender out.
SMALL: Final = 512 << 10
_LARGE_SHARE: Final = 7 / 8


class Memory:
    """Counts the bytes of all requests that are held, ``limit`` at most. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held = 0
        self._held_by_large = 0
        self._lock = threading.Lock()

    @classmethod
    def of_process(cls, cap: int = DEFAULT_MEMORY) -> Memory:
        """Return what leaves a process under ``cap`` resident bytes."""
        return cls(max(_LEAST, cap - _RESIDENT) // _PER_BYTE)

    @property
    def held(self) -> int:
        """Bytes that are held now."""
        return self._held

    def take(self, size: int, held: int) -> None:
        """Count ``size`` bytes more for a request that holds ``held``.

        Raises:
            UnavailableError: others hold so much that it would be too much. One alone is never refused.
        """
        large_before, large = _beyond_small(held), _beyond_small(held + size)
        with self._lock:
            by_large = self._held_by_large - large_before
            if (self._held > held and self._held + size > self.limit) or (
                by_large and large > large_before and by_large + large > self.limit * _LARGE_SHARE
            ):
                raise UnavailableError("too much is arriving at once: more than there is memory for")
            self._held += size
            self._held_by_large += large - large_before

    def give_back(self, size: int, held: int) -> None:
        """Count ``size`` bytes less for a request that holds ``held``."""
        with self._lock:
            self._held -= size
            self._held_by_large -= _beyond_small(held) - _beyond_small(held - size)


def _beyond_small(size: int) -> int:
    return max(0, size - SMALL)


class Holding:
    """What one request holds, while it is a context. Thread-safe: it may be given up while it is read."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.size = 0
        self._lock = threading.Lock()
        self._is_over = False

    def grow(self, size: int) -> None:
        """Hold ``size`` bytes more.

        Raises:
            UnavailableError: there is no room for them, or nobody waits for the answer any more.
        """
        with self._lock:
            if self._is_over:
                raise UnavailableError("the request was given up")
            self._memory.take(size, self.size)
            self.size += size

    @contextmanager
    def more(self, size: int) -> Iterator[None]:
        """Hold ``size`` bytes more for as long as the context is open.

        Raises:
            UnavailableError: as from `grow`.
        """
        self.grow(size)
        try:
            yield
        finally:
            with self._lock:
                if not self._is_over:
                    self._memory.give_back(size, self.size)
                    self.size -= size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._is_over = True
            self._memory.give_back(self.size, self.size)
