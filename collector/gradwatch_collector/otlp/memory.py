"""The memory that requests may take together, from their first byte until they are answered."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Final, Self

from gradwatch_collector.otlp.errors import UnavailableError

DEFAULT_MEMORY: Final = 512 << 20
# What the collector takes that serves no request, and what it takes to decode and store a byte of a request.
_RESIDENT: Final = 192 << 20
_PER_BYTE: Final = 4
_LEAST: Final = 32 << 20


class Memory:
    """Counts the bytes of all requests that are held, ``limit`` at most. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held = 0
        self._lock = threading.Lock()

    @classmethod
    def of_process(cls, cap: int = DEFAULT_MEMORY) -> Memory:
        """Return what leaves a process under ``cap`` resident bytes."""
        return cls(max(_LEAST, cap - _RESIDENT) // _PER_BYTE)

    def take(self, size: int, held: int) -> None:
        """Count ``size`` bytes more for a request that holds ``held``.

        Raises:
            UnavailableError: others hold so much that it would be too much. One alone is never refused.
        """
        with self._lock:
            if self._held > held and self._held + size > self.limit:
                raise UnavailableError("too much is arriving at once: more than there is memory for")
            self._held += size

    def give_back(self, size: int) -> None:
        """Count ``size`` bytes less."""
        with self._lock:
            self._held -= size


class Holding:
    """What one request holds, while it is a context."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._size = 0

    def grow(self, size: int) -> None:
        """Hold ``size`` bytes more.

        Raises:
            UnavailableError: there is no room for them.
        """
        self._memory.take(size, self._size)
        self._size += size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._memory.give_back(self._size)
